"""Questions that are typed: one after another on a terminal, and a system that is right after Ctrl-C."""

import builtins
import fcntl
import json
import os
import pty
import select
import subprocess
import sys
import termios
import time

import pytest
import torch

import minimas
import minimas.commands.ask
from minimas.commands.ask import main
from minimas.commands.failures import command
from minimas.common import Terminated
from minimas.fast.graphs import Graphs

CHAIN, OTHER = "7 +5 *3 -4 +8 *7 -1 +6", "1 +1 *3"
SIGN = b"> "


class Terminal:
    """`python -m minimas.recurse` on a terminal of its own, which shows stderr; stdout is a pipe."""

    def __init__(self, *args):
        self.fd, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 100))  # without a width there is no bar

        def take_terminal():
            os.setsid()
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)  # Ctrl-C reaches those whose terminal it is

        strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}  # as in any locale but C
        self.process = subprocess.Popen(
            [sys.executable, "-m", "minimas.recurse", *args],
            stdin=theirs,
            env=strict,
            stdout=subprocess.PIPE,
            stderr=theirs,
            preexec_fn=take_terminal,
        )
        os.close(theirs)

    def shown(self, end, seconds=60):
        """What the terminal shows from now on until `end`."""
        text, late = b"", time.monotonic() + seconds
        while end not in text:
            assert time.monotonic() < late and self.process.poll() is None, text
            if select.select([self.fd], [], [], 1)[0]:
                text += os.read(self.fd, 1 << 16)
        return text.decode(errors="replace")

    def type(self, keys, end=SIGN):
        os.write(self.fd, keys)
        return self.shown(end)

    def leave(self):
        """Ctrl-D -> what was written to stdout."""
        os.write(self.fd, b"\x04")
        out, _ = self.process.communicate(timeout=60)
        os.close(self.fd)
        assert self.process.returncode == 0
        return out.decode()


@pytest.mark.slow
def test_a_session():
    """Two answers on stdout and nothing else, whatever is typed between them, Ctrl-C during an answer included."""
    terminal = Terminal("--rounds", "20")
    terminal.shown(SIGN)
    assert "token/s" in terminal.type(CHAIN.encode() + b"\n")
    for broken, message in (
        (b"what is love", "cannot read 'what is love'"),
        (b"7 +5\xe9", "is not valid text"),
        (b"7 +5\xed\xa0\x80", "is not valid text"),
    ):
        shown = terminal.type(broken + b"\n")
        assert message in shown and shown.count("minimas: ") == 1 and "Traceback" not in shown
    assert terminal.type(b"   \n").split() == [">"]
    terminal.type(b"7 +", b"7 +")
    time.sleep(
        0.5
    )  # a signal between the sign and the read that follows it waits for the next line
    assert terminal.type(b"\x03").split()[-2:] == ["^C", ">"]
    terminal.type(b"3 *7 *9 *7\n", b"| 0/")
    shown = terminal.type(b"\x03")
    assert "Traceback" not in shown and "minimas" not in shown
    terminal.type(OTHER.encode() + b"\n")
    fresh = minimas.load_mas_system("tiny", device="cpu").run(
        [CHAIN, OTHER], rounds=20, batch_size=1
    )
    assert terminal.leave() == "".join(
        f"{result.text}\nanswer: {result.answer}\n" for result in fresh
    )


def test_a_terminal_that_is_closed_ends_it():
    """The kernel then sends SIGHUP."""
    terminal = Terminal()
    terminal.shown(SIGN)
    os.close(terminal.fd)
    assert terminal.process.wait(timeout=10) == 129
    assert terminal.process.stdout.read() == b""


def ask(monkeypatch, typed, *args):
    """Run the command in this process, with these lines typed; an exception among them is raised in place of a line."""
    lines = iter([*typed, EOFError()])

    def type_line(sign):
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", type_line)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr(sys, "argv", ["recurse", "--device", "cpu", *args])
    command(main)


def test_options_hold_for_each_question(monkeypatch, capsys, tmp_path):
    """Each question makes the page of --trace anew; one that cannot be read leaves it."""
    page = tmp_path / "t.html"
    loaded, load = [], minimas.load_mas_system
    monkeypatch.setattr(
        minimas.commands.ask,
        "load_mas_system",
        lambda *a, **k: loaded.append(load(*a, **k)) or loaded[0],
    )
    ask(
        monkeypatch,
        [CHAIN, OTHER, "what?"],
        "--json",
        "--peek",
        "--trace",
        str(page),
        "--rollouts",
        "2",
        "--temperature",
        "0.7",
        "--rounds",
        "2",
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["question"] for row in rows] == [CHAIN, CHAIN, OTHER, OTHER] and all(
        row["peek"] for row in rows
    )
    assert OTHER in page.read_text() and CHAIN not in page.read_text() and len(loaded) == 1


def test_too_little_memory_for_one_question(monkeypatch, capsys):
    answer = minimas.System.answer

    def short_of_memory(self, questions, *args, **options):
        if questions[0].typed == CHAIN:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return answer(self, questions, *args, **options)

    monkeypatch.setattr(minimas.System, "answer", short_of_memory)
    ask(monkeypatch, [CHAIN, KeyboardInterrupt(), OTHER])
    out, err = capsys.readouterr()
    assert (
        out.count("answer: ") == 1
        and "minimas: out of memory: try " in err
        and "Traceback" not in err
    )


def test_sigterm_ends_it(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        ask(monkeypatch, [CHAIN, Terminated(15), OTHER])
    assert end.value.code == 143 and capsys.readouterr().out.count("answer: ") == 1


def test_a_reader_who_has_left_ends_it(monkeypatch):
    """After the first answer, which nobody can read."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as end:
            ask(monkeypatch, [CHAIN, AssertionError("it goes on")])
    assert end.value.code == 141


def test_a_fault_of_ours_is_not_hidden(monkeypatch):
    monkeypatch.setattr(
        minimas.System, "answer", lambda *_, **options: torch.zeros(2) @ torch.zeros(3)
    )
    with pytest.raises(RuntimeError, match="size"):
        ask(monkeypatch, [CHAIN])


def interrupted(system, n, **options):
    """Ask a question and press Ctrl-C at its n-th position; whether it was reached."""
    left = iter(range(n))

    def tick(*_):
        if next(left, None) is None:
            raise KeyboardInterrupt

    settings = minimas.Settings(**options).completed(system.style)
    try:
        with torch.no_grad(), system.lock:
            system.answer(system.style.questions([CHAIN, "3 *7"]), settings, callback=tick)
    except KeyboardInterrupt:
        return True
    return False


LATENT, TEXT = {"rounds": 2, "rollouts": 2, "temperature": 0.9}, {"rounds": 2, "channel": "text"}


@pytest.mark.parametrize(
    "way, options",
    [
        ({}, LATENT),
        ({}, TEXT),
        pytest.param({"fast": False}, LATENT, marks=pytest.mark.slow),
        pytest.param({"offload": True}, LATENT, marks=pytest.mark.slow),
        pytest.param({"graphs": True}, LATENT, marks=pytest.mark.slow),
        ({"graphs": True}, TEXT),
    ],
    ids=str,
)
def test_answers_after_an_interrupt_are_those_of_a_fresh_system(captures, way, options):
    def load():
        system = minimas.load_mas_system(
            "tiny",
            device="cpu",
            **{"fast": True} | {name: on for name, on in way.items() if name != "graphs"},
        )
        for agent in system.agents.values() if "graphs" in way else ():
            agent.steps = Graphs(agent.model)
        return system

    asked = [OTHER, "2 *9 +4 *3"]
    fresh, used = load().run(asked, keep_states=True, **options), load()
    addresses = lambda: [
        p.data_ptr() for agent in used.agents.values() for p in agent.model.parameters()
    ]
    resting = addresses()
    for n in (0, 3, 13, 28):
        assert interrupted(used, n, **options) and addresses() == resting
        for ours, expected in zip(used.run(asked, keep_states=True, **options), fresh, strict=True):
            assert ours.token_ids == expected.token_ids and ours.text == expected.text
            assert all(torch.equal(H, expected.states[turn]) for turn, H in ours.states.items())
