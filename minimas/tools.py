"""The tools of style deliberation: an agent writes <python>code</python> or <search>query</search>, reads the result.

Python runs in a guarded child process (guard.py): isolated mode, an empty temporary folder, a bare environment, limits
on time, memory, files and processes, and all that it started ends with it. That contains accidents, but it does not
stop code that means harm, so a tool is used only if the user named it.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

TOOLS = ("python", "search")
FINAL_CALL = re.compile(r"<(python|search)>((?:(?!<(?:python|search)>).)*)</\1>\Z", re.DOTALL | re.IGNORECASE)
CLOSING_TAG = re.compile(r"</(?:python|search)>", re.IGNORECASE)
MAX_CALLS = 5  # per question
MAX_RESULT = 6000  # characters
MAX_PAGES, MAX_CONTENT = 4, 320  # of a search: pages, and characters of each
GUARD = Path(__file__).with_name("guard.py")
LATE = 10  # seconds after a program's time is over in which its guard must have ended it
SEARCH_URL = "https://api.tavily.com/search"
PRELUDE = "import fractions, functools, itertools, math, statistics\n"  # a program may use these without importing them
SYMPY = "import contextlib\nwith contextlib.suppress(ImportError):\n    import sympy as sp\n"  # and sp, if there is sympy


def call_at_end(text):
    """(tool, argument) if the text ends with a closed call, else None."""
    found = FINAL_CALL.search(text)
    return found and (found[1].lower(), found[2].strip())


class ToolCalls:
    """The calls in a batch of B texts while they are written: Agent.decode asks for a `reply` after every token.

    made, inserted: how many calls each row has made, and how many tokens their results have.
    """

    def __init__(self, tokenizer, allowed, B):
        self.tokenizer, self.allowed = tokenizer, allowed
        self.made, self.inserted = [0] * B, [0] * B

    def reply(self, b, ids):
        """The token ids of a result if the last token in row b's ids closed a call, else []."""
        tail, before = (self.tokenizer.decode(part, strip=False) for part in (ids[-16:], ids[-16:-1]))
        closed = [tag.end() for tag in CLOSING_TAG.finditer(tail) if tag.end() > len(before)]
        if not closed:
            return []
        text = self.tokenizer.decode(ids, strip=False)
        call = call_at_end(text[:len(text) - len(tail) + closed[0]])  # that token may go on behind the tag
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


def guarded(code, seconds=10, megabytes=1024, stdin=""):
    """Run a Python program under guard.py; returns (all that it printed, "" if it ended well, else how it ended)."""
    folder = tempfile.mkdtemp()
    try:
        for name, content in ("program.py", code), ("stdin", stdin):
            (Path(folder) / name).write_text(content, encoding="utf-8", errors="replace", newline="")
        work = Path(folder) / "work"
        work.mkdir()
        command = [sys.executable, "-I", str(GUARD), folder, str(seconds), str(megabytes)]
        settings = {"HOME": str(work), "TMPDIR": str(work), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        output = Path(folder) / "output"
        with open(Path(folder) / "stdin", "rb") as given, open(output, "ab") as printed:
            guard = subprocess.Popen(command, env=settings, stdin=given, stdout=subprocess.PIPE, stderr=printed,
                                     text=True, start_new_session=True)
        try:
            ending = guard.communicate(timeout=seconds + LATE)[0].strip()
        except subprocess.TimeoutExpired:  # without namespaces a program can stop its guard
            guard.kill()
            ending = guard.communicate()[0].strip()
        except BaseException:  # even Ctrl-C: when the guard is told to end, it ends the program too
            guard.terminate()
            raise
        ending = "" if ending == "ended with status 0" else ending or "lost its guard"
        return output.read_text(encoding="utf-8", errors="replace"), ending
    finally:  # rm, not shutil: a program may have made folders that are too deep for Python, or closed to us
        subprocess.run(["sh", "-c", 'chmod -R u+rwX "$0"; rm -rf "$0"', folder], stderr=subprocess.DEVNULL)


def run_python(code):
    """The output of a Python program, then how it ended unless it ended well, such as [exit_code] 1."""
    text, ending = guarded(PRELUDE + (SYMPY if re.search(r"\bsp\b", code) else "") + code)
    if ending:
        ending = ending.replace("ended with status", "[exit_code]") if "status" in ending else f"[{ending}]"
    return f"{text.rstrip()}\n{ending}".strip() or "[no output]"


def search(query):
    """The first pages that Tavily finds for a query: title, address, content; or a text that says what failed."""
    key = os.environ.get("TAVILY_API_KEY")
    if not key:
        return "Search is not available: TAVILY_API_KEY is not set."
    request = urllib.request.Request(SEARCH_URL, json.dumps({"query": query, "search_depth": "advanced"}).encode(),
                                     {"Content-Type": "application/json", "Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            found = json.load(reply)["results"][:MAX_PAGES]
        pages = [page_text(n, page.get("title", ""), page.get("url", ""), page.get("content", ""))
                 for n, page in enumerate(found, 1)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f"[search error] {type(e).__name__}: {e}"
    return "\n".join([f"Query: {query}", *(["Results:", *pages] if pages else ["[no search results]"])])


def page_text(n, title, url, content):
    """What an agent is shown of the n-th page."""
    content = " ".join(content.split())
    if len(content) > MAX_CONTENT:
        content = content[:MAX_CONTENT].rstrip() + " ..."
    return f"[{n}] {title}\nURL: {url}\n{content}"
