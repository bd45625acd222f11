"""The tools of the deliberation style: an agent writes <python>code</python> or <search>query</search>, and reads the result.

Python runs in a guarded child process: isolated mode, an empty temporary folder, no environment, limits on processor time,
memory, file size and processes, the whole process group killed at the end. That keeps accidents in; it is no wall against
code that means harm (the network is not cut off), so nothing runs unless the user named the tool.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

TOOLS = ("python", "search")
CALL = re.compile(r"<(python|search)>((?:(?!<(?:python|search)>).)*)</\1>\Z", re.DOTALL | re.IGNORECASE)
CLOSED = re.compile(r"</(?:python|search)>", re.IGNORECASE)
MAX_CALLS = 5  # per question
MAX_RESULT = 6000  # characters
SEARCH_URL = "https://api.tavily.com/search"


def call_at_end(text):
    """(tool, argument) if the text ends with a closed call, else None."""
    found = CALL.search(text)
    return found and (found[1].lower(), found[2].strip())


class ToolCalls:
    """The calls in a batch of texts while they are written; `reply` is what Agent.decode asks after every token."""

    def __init__(self, tokenizer, allowed, B):
        self.tokenizer, self.allowed = tokenizer, allowed
        self.made, self.inserted = [0] * B, [0] * B  # per row: calls, and tokens of results

    def reply(self, b, ids):
        """Token ids of the result if row b's ids end with a call that was just closed, else none."""
        tail, before = (self.tokenizer.decode(part, strip=False) for part in (ids[-16:], ids[-16:-1]))
        closed = [tag.end() for tag in CLOSED.finditer(tail) if tag.end() > len(before)]
        if not closed:
            return []
        text = self.tokenizer.decode(ids, strip=False)
        call = call_at_end(text[:len(text) - len(tail) + closed[0]])  # the token that closed the tag may have gone on a little
        if call is None:
            return []
        result = self.tokenizer.encode(result_text(*call, self.made[b], self.allowed))
        self.made[b] += 1
        self.inserted[b] += len(result)
        return result


def result_text(tool, argument, calls_before, allowed):
    """What is put behind a call: ` <result> ... </result>`, cut to MAX_RESULT, never closed from inside."""
    if tool not in allowed:
        result = f"The tool {tool} is not available."
    elif calls_before >= MAX_CALLS:
        result = f"No more than {MAX_CALLS} tool calls are allowed."
    else:
        result = run_python(argument) if tool == "python" else search(argument)
    defused = re.sub(r"</(?=result>)", "< /", result[:MAX_RESULT], flags=re.IGNORECASE)
    return f" <result> {defused} </result>"


# Runs first in the child: it lays the limits on itself, then becomes the program.
GUARD = """
import resource, runpy, sys
program, seconds, megabytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for name, most in ("CPU", seconds), ("AS", megabytes << 20), ("FSIZE", 8 << 20), ("NPROC", 1024), ("CORE", 0):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
sys.argv = [program]
runpy.run_path(program, run_name="__main__")
"""


def run_python(code, seconds=10, megabytes=1024, stdin=""):
    """Output of a Python program (its errors included), run for at most `seconds` in a guarded child process."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in ("program.py", code), ("stdin", stdin), ("output", ""):
            (Path(folder) / name).write_text(content, encoding="utf-8", errors="replace")
        work = Path(folder) / "work"
        work.mkdir()
        with open(Path(folder) / "stdin") as given, open(Path(folder) / "output", "w") as output:
            command = [sys.executable, "-I", "-c", GUARD, str(Path(folder) / "program.py"), str(seconds), str(megabytes)]
            child = subprocess.Popen(command, cwd=work, env={}, stdin=given, stdout=output, stderr=subprocess.STDOUT,
                                     start_new_session=True)
            try:
                child.wait(timeout=seconds)
                ending = "" if child.returncode == 0 else f"\n(ended with status {child.returncode})"
            except subprocess.TimeoutExpired:
                ending = f"\n(stopped after {seconds} seconds)"
            finally:  # children of the child, too
                try:
                    os.killpg(child.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                child.wait()
        with open(Path(folder) / "output", encoding="utf-8", errors="replace") as output:
            text = output.read(MAX_RESULT)
    return (text.strip() + ending).strip() or "(no output)"


def search(query, results=3):
    """Titles and contents that Tavily finds for a query; trouble becomes a text that says so."""
    key = os.environ.get("TAVILY_API_KEY")
    if not key:
        return "Search is not available: TAVILY_API_KEY is not set."
    request = urllib.request.Request(SEARCH_URL, json.dumps({"query": query, "max_results": results}).encode(),
                                     {"Content-Type": "application/json", "Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            found = json.load(reply)["results"]
        return "\n\n".join(f"{page.get('title', '')}\n{page.get('content', '')}" for page in found) or "Nothing found."
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f"Search failed: {type(e).__name__}: {e}"
