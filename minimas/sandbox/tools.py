"""The tools of style deliberation: an agent writes <python>code</python> or <search>query</search>, reads the result.

Python runs in the sandbox, which contains accidents, but does not stop code that means harm: so a tool is used only if
the user named it.
"""

import re

from .python import run_python
from .search import search

TOOLS = ("python", "search")
FINAL_CALL = re.compile(
    r"<(python|search)>((?:(?!<(?:python|search)>).)*)</\1>\Z", re.DOTALL | re.IGNORECASE
)
CLOSING_TAG = re.compile(r"</(?:python|search)>", re.IGNORECASE)
MAX_CALLS = 5  # per question
MAX_RESULT = 6000  # characters


def call_at_end(text):
    """(tool, argument) if the text ends with a closed call, else None."""
    return (call := FINAL_CALL.search(text)) and (call[1].lower(), call[2].strip())


class ToolCalls:
    """The calls in a batch of B texts while they are written: generate asks for a `reply` after every token.

    made, inserted: how many calls each row has made, and how many tokens their results have.
    """

    def __init__(self, tokenizer, allowed, B):
        self.tokenizer, self.allowed = tokenizer, allowed
        self.made, self.inserted = [0] * B, [0] * B

    def reply(self, b, ids):
        """The token ids of a result if the last token in row b's ids closed a call, else []."""
        tail, before = (
            self.tokenizer.decode(part, strip=False) for part in (ids[-16:], ids[-16:-1])
        )
        closed = [tag.end() for tag in CLOSING_TAG.finditer(tail) if tag.end() > len(before)]
        if not closed:
            return []
        text = self.tokenizer.decode(ids, strip=False)
        call = call_at_end(
            text[: len(text) - len(tail) + closed[0]]
        )  # that token may go on after the tag
        if call is None:
            return []
        result = self.tokenizer.encode(result_text(*call, self.made[b], self.allowed))
        self.made[b] += 1
        self.inserted[b] += len(result)
        return result


def result_text(tool, argument, calls_before, allowed):
    """The text that follows a call, ` <result> ... </result>`: cut after MAX_RESULT characters, no closing tag inside."""
    if tool not in allowed:
        result = f"The tool {tool} is not available."
    elif calls_before >= MAX_CALLS:
        result = f"[tool limit reached after {MAX_CALLS} calls]"
    else:
        result = run_python(argument) if tool == "python" else search(argument)
    if len(result) > MAX_RESULT:
        result = f"{result[:MAX_RESULT]}\n... [truncated {len(result) - MAX_RESULT} chars]"
    defused = re.sub(r"</(?=result>)", "< /", result, flags=re.IGNORECASE)
    return f" <result> {defused} </result>"
