"""The deliberation style's tools:
what counts as a call, what a child process may do, and how a text goes on after a result.
"""

import http.server
import json
import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import checkpoints
import pytest
import torch
from shared import SCRIPTS, scripted

import minimas
from minimas.generate import generate
from minimas.sandbox import tools
from minimas.sandbox.python import run_guarded, run_python
from minimas.sandbox.search import search
from minimas.sandbox.tools import call_at_end, result_text


@pytest.mark.parametrize(
    "text, call",
    [
        ("so <python> print(1) </python>", ("python", "print(1)")),
        ("<SEARCH>who</Search>", ("search", "who")),
        ("<python>a</python> <result> 1 </result> <search>b\nc</search>", ("search", "b\nc")),
        ("<python> <search>x</search>", ("search", "x")),
        ("<python>a</python> and", None),
        ("<python>a</search>", None),
        ("a</python>", None),
        ("", None),
    ],
)
def test_what_is_a_call(text, call):
    assert call_at_end(text) == call


def test_results_are_cut_and_defused(monkeypatch):
    assert (
        result_text("python", "print('x' * 9000)", 0, ("python",))
        == f" <result> {'x' * 6000}\n... [truncated 3000 chars] </result>"
    )
    shown = result_text("python", "print('a</result>b</RESULT>')", 0, ("python",))
    assert (
        shown.lower().count("</result>") == 1
        and shown.endswith(" </result>")
        and "a< /result>b" in shown
    )
    assert (
        result_text("python", "print(1)", 0, ())
        == " <result> The tool python is not available. </result>"
    )
    assert (
        result_text("python", "print(1)", 5, ("python",))
        == " <result> [tool limit reached after 5 calls] </result>"
    )


def test_python_runs_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "key")
    assert (
        run_python("import os; print(6 * 7, dict(os.environ).get('SECRET'), os.listdir())")
        == "42 None []"
    )
    assert run_python("x = 1") == "[no output]" and run_python("print(math.comb(4, 2))") == "6", (
        "the release imports math for it"
    )
    assert run_python("print(sp.Integer(6) / 4)") == "3/2", "sympy comes with torch"
    assert "ZeroDivisionError" in run_python("1 / 0") and run_python("1 / 0").endswith(
        "\n[exit_code] 1"
    )
    assert run_guarded("print(input())", stdin="given") == ("given\n", "")


def test_python_that_hangs_is_stopped():
    deaf = "import signal; signal.signal(15, signal.SIG_IGN)\nwhile True: pass"
    programs, started = (
        ("while True: pass", "import time; time.sleep(60)", deaf),
        time.perf_counter(),
    )
    with ThreadPoolExecutor() as pool:
        assert [*pool.map(lambda code: run_guarded(code, seconds=1), programs)] == [
            ("", "stopped after 1 seconds")
        ] * 3
    assert time.perf_counter() - started < 20


def test_python_cannot_take_the_machine():
    assert "MemoryError" in run_python("x = bytearray(4 << 30)")
    assert "[exit_code]" in run_python("open('big', 'wb').write(bytes(64 << 20))")
    mark = f"4343.{os.getpid()}"  # what it started is gone when it is
    assert (
        run_python(f"import subprocess; subprocess.Popen(['sleep', {mark!r}]); print('started')")
        == "started"
    )
    assert mark not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


@pytest.fixture
def stand_in(monkeypatch):
    """A search service on loopback: answers what `replies` holds, remembers what it was asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        replies, asked = [], []

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            Handler.asked.append((self.headers["Authorization"], body["query"]))
            status, content = Handler.replies.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(
        target=server.serve_forever, args=(0.01,), daemon=True
    ).start()  # shutdown() waits that many seconds
    monkeypatch.setattr(
        "minimas.sandbox.search.SEARCH_URL", f"http://127.0.0.1:{server.server_port}/search"
    )
    monkeypatch.setenv("TAVILY_API_KEY", "key")
    yield Handler
    server.shutdown()
    server.server_close()


def test_search(stand_in):
    pages = [
        {"title": "Tower", "content": f"330\n  {'m' * n}", "url": "u"} for n in (1, 320, 1, 1, 1)
    ]
    stand_in.replies[:] = [
        (200, json.dumps({"results": pages})),
        (200, json.dumps({"results": []})),
    ]
    first, long = [f"[{n}] Tower\nURL: u\n330 m" for n in (1, 2)]
    found = search("how tall")
    assert (
        found.startswith(f"Query: how tall\nResults:\n{first}\n{long}{'m' * 315} ...\n[3]")
        and "[5]" not in found
    )
    assert search("none") == "Query: none\n[no search results]"
    assert stand_in.asked[0] == ("Bearer key", "how tall")


@pytest.mark.parametrize(
    "status, content",
    [
        (429, "{}"),
        (500, ""),
        (200, "not json"),
        (200, "[]"),
        (200, '{"results": [1]}'),
        (200, "{}"),
        (200, "[" * 100_000),
    ],
)
def test_search_trouble_becomes_a_text(stand_in, status, content):
    stand_in.replies[:] = [(status, content)]
    assert search("x").startswith("[search error] ")


def test_search_whose_reply_breaks_off(stand_in, monkeypatch):
    monkeypatch.setattr(
        stand_in,
        "end_headers",
        lambda self: (self.send_header("Content-Length", "9"), self.flush_headers()),
    )
    stand_in.replies[:] = [(200, "{}")]
    assert search("x").startswith("[search error] IncompleteRead")


def test_search_without_key_or_network(monkeypatch):
    monkeypatch.delenv("TAVILY_API_KEY", raising=False)
    assert "TAVILY_API_KEY is not set" in search("x")
    monkeypatch.setenv("TAVILY_API_KEY", "key")
    monkeypatch.setattr("minimas.sandbox.search.SEARCH_URL", "http://127.0.0.1:1/")
    assert search("x").startswith("[search error] ")


@pytest.fixture
def system(tmp_path):
    return minimas.load_mas_system(
        "deliberation",
        checkpoints=checkpoints.make_system(tmp_path, "deliberation"),
        device="cpu",
        dtype="float64",
    )


@torch.no_grad()
@pytest.mark.parametrize("model_type", ("llama", "mistral", "gemma3", "qwen3_5_text"))
def test_a_reply_is_read_from_the_cache(tmp_path, captures, model_type):
    """Rows that get replies of their own lengths at their own times go on
    as if prompt, text and reply had been read at once.
    """
    from minimas.agent import load_agent
    from minimas.fast.graphs import Graphs
    from minimas.settings import Settings

    agent = load_agent(
        checkpoints.make_agent(tmp_path, model_type), "math", torch.device("cpu"), torch.float64
    )
    agent.generation_config.eos_ids = ()
    prompts, told = (
        [
            ["Some words to begin with, enough of them to fill a window."],
            ["Short"],
            ["And a third"],
        ],
        {},
    )

    def reply(b, ids):
        if len(ids) == 3 + 2 * b and b < 2 and b not in told:
            told[b] = agent.tokenizer.encode(
                " <result> something long to read </result>"[: 40 - 20 * b]
            )
            return told[b]
        return []

    settings = Settings(max_new_tokens=12, temperature=0.0)
    rows = generate(agent, prompts, [0, 0, 0], settings, reply=reply)
    assert [len(row) for row in rows] == [12 + 40, 12 + 20, 12]
    for b, (prompt, row) in enumerate(zip(prompts, rows)):
        at = 3 + 2 * b
        assert b == 2 or row[at : at + len(told[b])] == told[b]
        ids = torch.tensor([agent.tokenizer.encode(prompt[0]) + row])
        h = agent.model(
            agent.model.embed(ids), torch.arange(ids.shape[1])[None], agent.model.make_cache(1)
        )
        best = agent.model.logits(h[0]).argmax(-1).tolist()[-len(row) - 1 : -1]
        generated = [i for i in range(len(row)) if b == 2 or not at <= i < at + len(told[b])]
        assert [best[i] for i in generated] == [row[i] for i in generated]

    def sampled():
        told.clear()
        return generate(
            agent,
            prompts,
            [0, 1, 2],
            Settings(max_new_tokens=12, temperature=2.0, top_k=0),
            reply=reply,
        )

    agent.generation_config.eos_ids = (
        sampled()[2][9],
    )  # the last row ends before the others, and after their replies
    rows = sampled()
    assert len(rows[0]) == 12 + 40 and len(rows[2]) == 10
    agent.steps = Graphs(agent.model)
    assert sampled() == rows == sampled(), (
        "a cache that grew, and that a row left, is whole for the next batch"
    )


OPTIONS = {"rounds": 1, "latent_steps": 2, "max_new_tokens": 100, "temperature": 0.0}


def test_deliberation_with_tools(system, monkeypatch):
    scripted(system.agents["toolcaller"], SCRIPTS, monkeypatch)
    one, two = system.run(
        ["1 + 1", "a longer question than one plus one"], tools=("python",), **OPTIONS
    )
    assert (
        one.text
        == "Try <python> print(6 * 7) </python> <result> 42 </result> so that makes \\boxed{42}"
        and one.answer == "42"
    )
    assert two.text == "No tool is needed here, and none shall cut a text: \\boxed{7}"
    encode = system.agents["toolcaller"].tokenizer.encode
    assert one.new_tokens == len(encode(SCRIPTS[0])) and len(one.token_ids) == one.new_tokens + len(
        encode(" <result> 42 </result>")
    )


def test_no_tool_runs_when_nothing_can_follow(system, monkeypatch):
    """The call is closed by the last token that is allowed."""
    script = "<python>print(1)</python>"
    scripted(system.agents["toolcaller"], [script], monkeypatch)
    monkeypatch.setattr(tools, "run_python", lambda code: pytest.fail("ran"))
    n = len(system.agents["toolcaller"].tokenizer.encode(script))
    result = system.run(
        ["1 + 1"], tools=("python",), retry=False, **OPTIONS | {"max_new_tokens": n}
    )[0]
    assert result.text == script and len(result.token_ids) == result.new_tokens == n


def test_tools_are_off_until_asked_for(system, monkeypatch):
    scripted(system.agents["toolcaller"], SCRIPTS[:1], monkeypatch)
    monkeypatch.setattr(tools, "run_python", lambda code: pytest.fail("ran"))
    assert (
        "<result> The tool python is not available. </result>"
        in system.run(["1 + 1"], **OPTIONS)[0].text
    )
    with pytest.raises(minimas.InputError, match="tool 'shell' is not known"):
        system.run(["1 + 1"], tools=("shell",))


def test_five_calls_at_most(system, monkeypatch):
    scripted(
        system.agents["toolcaller"], ["<python>print(1)</python>" * 6 + "<|im_end|>"], monkeypatch
    )
    text = system.run(["1 + 1"], tools=("python",), **(OPTIONS | {"max_new_tokens": 400}))[0].text
    assert (
        text.count("<result> 1 </result>") == 5
        and text.count("[tool limit reached after 5 calls]") == 1
    )
