"""The tools of style deliberation: an agent writes <python>code</python> or <search>query</search> and reads on.

Python runs in the sandbox, which contains accidents, but does not stop code that means harm: so a tool is used only if
the user named it.
"""

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from .python import run_python
from .search import search

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

TOOLS = ("python", "search")
FINAL_CALL = re.compile(
    r"<(python|search)>((?:(?!<(?:python|search)>).)*)</\1>\Z", re.DOTALL | re.IGNORECASE
)
CLOSING_TAG = re.compile(r"</(?:python|search)>", re.IGNORECASE)
MAX_CALLS = 5  # per question
MAX_RESULT = 6000  # characters


def call_at_end(text: str) -> tuple[str, str] | None:
    """(tool, argument) if the text ends with a closed call, else None."""
    call = FINAL_CALL.search(text)
    if call is None:
        return None
    return call[1].lower(), call[2].strip()


class ToolCalls:
    """The calls in a batch of B texts while they are written: generate asks for a `reply` after every token.

    made, inserted: how many calls each row has made, and how many tokens their results have.
    """

    def __init__(self, tokenizer: "Tokenizer", allowed: Collection[str], B: int) -> None:
        self.tokenizer = tokenizer
        self.allowed = allowed
        self.made = [0] * B
        self.inserted = [0] * B

    def reply(self, b: int, ids: list[int]) -> list[int]:
        """The token ids of a result if the last token in row b's ids closed a call, else []."""
        tail = self.tokenizer.decode(ids[-16:], strip=False)
        before = self.tokenizer.decode(ids[-16:-1], strip=False)
        ends = [tag.end() for tag in CLOSING_TAG.finditer(tail)]
        closed = [end for end in ends if end > len(before)]
        if not closed:
            return []
        text = self.tokenizer.decode(ids, strip=False)
        text_to_tag = text[: len(text) - len(tail) + closed[0]]  # the token may go on after the tag
        call = call_at_end(text_to_tag)
        if call is None:
            return []
        tool, argument = call
        result = self.tokenizer.encode(result_text(tool, argument, self.made[b], self.allowed))
        self.made[b] += 1
        self.inserted[b] += len(result)
        return result


def result_text(tool: str, argument: str, calls_before: int, allowed: Collection[str]) -> str:
    """The text that follows a call, ` <result> ... </result>`: cut after MAX_RESULT characters, no such tag inside."""
    if tool not in allowed:
        result = f"The tool {tool} is not available."
    elif calls_before >= MAX_CALLS:
        result = f"[tool limit reached after {MAX_CALLS} calls]"
    elif tool == "python":
        result = run_python(argument)
    else:
        result = search(argument)
    if len(result) > MAX_RESULT:
        result = f"{result[:MAX_RESULT]}\n... [truncated {len(result) - MAX_RESULT} chars]"
    defused = re.sub(r"</(?=result>)", "< /", result, flags=re.IGNORECASE)
    return f" <result> {defused} </result>"
