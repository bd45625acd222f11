"""Programs run as in an ordinary process: what they may use, their own line numbers, the order of what they print, and
Ctrl-C while they run.

Each test of the guard runs with namespaces, where the kernel grants them, and without.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minimas.evaluate.benchmarks import Example
from minimas.evaluate.run_tests import check_tests, passes, why_void
from minimas.sandbox import python as sandbox
from minimas.sandbox.python import run_guarded, run_python

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(params=["namespaces", "none"])
def folder(request, monkeypatch, tmp_path) -> Iterator[Path]:
    """The folder of temporary folders. In the end it is empty, and no process knows it."""
    if request.param == "none":
        source = sandbox.GUARD.read_text(encoding="utf-8")
        other = tmp_path / "guard.py"
        other.write_text(source.replace("NAMESPACES = ", "NAMESPACES = -1  # "), encoding="utf-8")
        monkeypatch.setattr(sandbox, "GUARD", other)
    place = Path(tempfile.mkdtemp())  # short: the path of a socket has at most 107 characters
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    assert not list(place.iterdir()) and not processes(place)
    place.rmdir()


def processes(place: Path) -> list[str]:
    """The processes whose command line or folder has this path in it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace")
            if str(place) in command + os.readlink(process / "cwd"):
                found.append(command)
        except OSError:  # it has ended
            continue
    return found


# Programs that print ok, as they do without a guard.
ORDINARY = {
    "a lock": "from multiprocessing import Lock\nwith Lock(): print('ok')",
    "a pool": """
from multiprocessing import Pool
def square(x): return x * x
if __name__ == '__main__':
    with Pool(2) as pool: print('ok' if pool.map(square, [1, 2]) == [1, 4] else 'wrong')
""",
    "executors": """
from concurrent.futures import ProcessPoolExecutor
def square(x): return x * x
if __name__ == '__main__':
    with ProcessPoolExecutor(2) as pool: print('ok' if [*pool.map(square, [1, 2])] == [1, 4] else 'wrong')
""",
    "spawned processes": """
import multiprocessing
def square(x): return x * x
if __name__ == '__main__':
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        print('ok' if pool.map(square, [1, 2]) == [1, 4] else 'wrong')
""",
    "a queue": """
from multiprocessing import Barrier, Event, Process, Queue, Value
queue = Queue()
process = Process(target=queue.put, args=('ok',)); process.start(); print(queue.get()); process.join()
Event(), Barrier(2), Value('i', 0)
""",
    "shared memory": """
from multiprocessing.shared_memory import SharedMemory
one = SharedMemory(create=True, size=1000); one.buf[0] = 7
two = SharedMemory(name=one.name); print('ok' if two.buf[0] == 7 else 'wrong')
two.close(); one.close(); one.unlink()
""",
    "a manager": "from multiprocessing import Manager\nwith Manager() as m: print(m.dict(a='ok')['a'])",
    "an alarm": """
import signal, time
def stop(*_): raise TimeoutError
signal.signal(signal.SIGALRM, stop); signal.setitimer(signal.ITIMER_REAL, 0.1)
try: time.sleep(5)
except TimeoutError: print('ok')
""",
    "a signal to itself": """
import os, signal, time
try: os.kill(os.getpid(), signal.SIGINT); time.sleep(1)
except KeyboardInterrupt: print('ok')
""",
    "processes in /proc": """
import os
with open(f'/proc/{os.getpid()}/stat') as file:
    print('ok' if file.read().split()[0] == os.readlink('/proc/self') else 0)
""",
    "loopback": """
import socket
for family, host in (socket.AF_INET, '127.0.0.1'), (socket.AF_INET, 'localhost'):
    server = socket.create_server((host, 0), family=family); client = socket.create_connection(server.getsockname())
    client.send(b'ok')
print(server.accept()[0].recv(2).decode())
""",
    "its own files": """
import os
open('x', 'w').close(); os.chown('x', os.getuid(), os.getgid())
print('ok' if os.stat('x').st_uid == os.getuid() else 0)
""",
    "modules that it writes": "open('helper.py', 'w').write('text = \"ok\"')\nimport helper\nprint(helper.text)",
    "its own source": """
import inspect
def f(): return 'ok'
print(f() if "return 'ok'" in inspect.getsource(f) and '__file__' in open(__file__).read() else 'wrong')
""",
    "an orphan": """
import os, time
if os.fork() == 0:
    if os.fork() == 0: time.sleep(0.1); os._exit(0)
    os._exit(0)
os.wait(); time.sleep(0.2); print('ok')
""",
    "temporary files, threads, programs": """
import asyncio, subprocess, sys, tempfile, threading
tempfile.TemporaryFile().write(b'x'); open('/dev/null', 'w').write('x'); open('/dev/urandom', 'rb').read(1)
thread = threading.Thread(target=len, args=('',)); thread.start(); thread.join(); asyncio.run(asyncio.sleep(0))
print(subprocess.run([sys.executable, '-c', 'print("ok")'], capture_output=True, text=True).stdout)
""",
    "deep recursion": """
import sys
sys.setrecursionlimit(10 ** 6)
def f(n): return n and 1 + f(n - 1)
print('ok' if f(40000) == 40000 else 'wrong')
""",
    "stdin in all forms": """
import os, sys
texts = open(0, closefd=False).read(), open('/dev/stdin').read(), sys.stdin.read()
print('ok' if texts == ('', '', '') and os.fstat(0).st_size == 0 else 'wrong')
""",
}


@linux
@pytest.mark.parametrize(
    "folder", ["namespaces", pytest.param("none", marks=pytest.mark.slow)], indirect=True
)
def test_tools_may_use_what_ordinary_processes_may(folder):
    with ThreadPoolExecutor(2) as threads:
        results = dict(zip(ORDINARY, threads.map(run_python, ORDINARY.values()), strict=True))
    assert results == dict.fromkeys(ORDINARY, "ok")


@linux
@pytest.mark.slow
def test_answers_may_use_what_ordinary_processes_may(folder):
    failed = [name for name, code in ORDINARY.items() if not passes(code, [("", "ok")])]
    assert failed == []


@linux
@pytest.mark.parametrize(
    "call, status",
    [("os.kill(os.getpid(), signal.SIGTERM)", -15), ("signal.raise_signal(14)", -14)],
)
def test_signals_end_a_program_as_they_do_elsewhere(folder, call, status):
    program = f"import os, signal, time\n{call}\ntime.sleep(1)\nprint('not ended')"
    assert run_guarded(program) == ("", f"ended with status {status}")


@linux
def test_a_program_has_the_signals_of_an_ordinary_process(folder, monkeypatch):
    """Even if minimas was started in the background, where Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        text, ending = run_guarded("import signal; print(signal.getsignal(2).__name__)")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (text, ending) == ("default_int_handler\n", "")


def namespaces() -> bool:
    """Whether the kernel grants them."""
    return "alone" in run_guarded("import os; print('alone' if os.getpid() < 9 else 'not')")[0]


@linux
def test_what_the_guard_is_for():
    """With namespaces: no network, no other process, no file outside work/ and its own small /dev/shm."""
    if not namespaces():
        pytest.skip("the kernel grants no namespaces")
    others = "import os; print(sorted(int(name) for name in os.listdir('/proc') if name.isdigit()))"
    assert run_guarded(others)[0] == "[1, 2]\n"
    network = "import socket; socket.create_connection(('192.0.2.1', 80), 1)"
    assert "unreachable" in run_guarded(network)[0]
    for path in "/tmp/x", "../x", "/dev/x", "/proc/sys/kernel/x", "/proc/self/comm", "/sys/x":
        assert "Error" in run_guarded(f"open({path!r}, 'w').write('x')")[0], path
    mark = f"minimas-{os.getpid()}"
    assert run_guarded(f"open('/dev/shm/{mark}', 'w').write('x')") == ("", "")
    assert not Path("/dev/shm", mark).exists()
    fill = "for i in range(20):\n    open(f'{}{i}', 'wb').write(bytes(8 << 20))\nprint('written')"
    for place in "/dev/shm/", "/dev/shm/{i%2 and '..'}/shm/":
        text, ending = run_guarded(fill.replace("{}", place))
        assert ending and "written" not in text
    both = fill.replace("range(20)", "range(10)").replace("{}", '{"/dev/shm/" * (i % 2)}')
    assert "64 MB of files" in run_guarded(both + "\nimport time; time.sleep(9)")[1], "in all"


def test_the_order_of_what_is_printed():
    program = """
import os, subprocess, sys
print('1', end=' ')
print('2', file=sys.stderr)
print('3')
sys.stderr.write('4 ')
subprocess.run(['echo', '5'])
subprocess.run([sys.executable, '-c', "import sys; print('5a'); sys.stderr.write('5b'); print()"])
print('6')
os.write(2, b'7\\n')
print('8', end='')
1 / 0
"""
    text = run_python(program)
    assert text.startswith("1 2\n3\n4 5\n5a\n5b\n6\n7\n8Traceback") and "Error" in text
    assert run_guarded("print(1)\nwhile True: pass", seconds=1)[0] == "1\n", "nothing is lost"


def test_an_agent_sees_its_own_lines():
    error = run_python("from __future__ import annotations\nx: Unknown = 1\n1 / 0")
    lines = error.splitlines()
    assert lines[:2] == [
        "Traceback (most recent call last):",
        '  File "program.py", line 3, in <module>',
    ]
    assert lines[2] == "    1 / 0" and lines[-2:] == [
        "ZeroDivisionError: division by zero",
        "[exit_code] 1",
    ]
    assert 'File "program.py", line 2' in run_python("x = 1\nx = = 2"), "and where it is no Python"
    assert "main.py" not in error + run_python("def f(): raise ValueError\nf()")


@pytest.mark.parametrize(
    "program, printed",
    [
        (
            '"""Docs."""\nfrom __future__ import annotations\nprint(__doc__, __name__)',
            "Docs. __main__",
        ),
        ("# -*- coding: latin-1 -*-\nprint('é')", "é"),
        ("#!/usr/bin/python\n# coding: unknown\nprint('é')", "é"),
        ("\ufeffprint(1)", "1"),
        ("print(math.comb(4, 2), statistics.mean([1, 3]))", "6 2"),
        ("import sys\nprint(len(sys.argv), sys.modules['__main__'].sys is sys)", "1 True"),
        ("import sys; sys.exit(3)", "[exit_code] 3"),
    ],
)
def test_nothing_is_put_before_a_program(program, printed):
    assert run_python(program) == printed
    if "exit" not in program:
        assert passes(program, [("", printed)])


HEAD = 'from typing import List\n\n\ndef add(a: int, b: int) -> int:\n    """Add.\n    """\n'
WHOLE = "def add(a: Later, b: Later) -> List[Later]:\n    return a + b\n"
FUTURE = "from __future__ import annotations"


@pytest.mark.parametrize(
    "answer, right",
    [
        (f"{FUTURE}\n\n{WHOLE}", True),
        (f'#!python\n"""Docs."""\n{FUTURE}, division  # both\nimport math\n{WHOLE}', True),
        (f"from __future__ import (\n    annotations,\n)\n{FUTURE}\n{WHOLE}", True),
        (f"'docs'; {FUTURE}; import math\n{WHOLE}", True),
        (f"\ufeff{FUTURE}\n{WHOLE}", True),
        (f'r"""\\d"""\n{FUTURE}\n{WHOLE}', True),
        (f"U'it\\'s' ' docs'\n{FUTURE}\n{WHOLE}", True),
        (f'"""a \\""" b"""\n{FUTURE}\n{WHOLE}', True),
        (f"import math\n{FUTURE}\n{WHOLE}", False),
        (WHOLE, False),
        ("return a + b", True),
    ],
)
def test_an_answer_may_begin_with_future_imports(answer, right):
    """Below the head of HumanEval, too, where no such import may stand."""
    example = Example("1", "", "", "code", ["assert add(1, 2) == 3"], "add", HEAD)
    assert passes(example.program(answer), example.tests, example.fn_name) is right


def test_the_beginning_of_an_answer_is_found_quickly():
    started = time.process_time()
    for text in '"' * 5000, '""' * 3000 + "x", "'\"" * 4000, '"""a' * 3000, "# a\n" * 5000:
        Example("1", "", "", "code", head=HEAD, fn_name="add").program(text)
    assert time.process_time() - started < 1


# Ctrl-C

STUBBORN = {
    "endless": "while True: pass",
    "deaf": "import signal\nfor n in 1, 2, 3, 15: signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
    "forks": "import os\nwhile True:\n    os.fork()",
    "flees": "import os\nwhile True:\n    if os.fork(): os._exit(0)\n    os.setsid()",
    "leaves": "import os, time\nfor i in range(4):\n    os.fork() or os.setsid()\ntime.sleep(60)",
}


@linux
@pytest.mark.parametrize("kind", STUBBORN)
@pytest.mark.parametrize("after", [0.02, 0.4])
def test_an_interrupt_ends_all_programs(folder, kind, after):
    """At once, and again while the programs are being ended."""

    class Interrupt(KeyboardInterrupt):
        pass

    def interrupt(*_):
        raise Interrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, after, 0.5)
        started = time.perf_counter()
        with pytest.raises(Interrupt):
            while True:  # some of them are stopped by their guard before
                passes(STUBBORN[kind], [("", "1")] * 16)
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert time.perf_counter() - started - after < 5
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@linux
def test_an_interrupt_while_tests_are_checked_or_a_tool_runs(folder):
    endless = "while True: pass"
    example = Example("1", "", "", "code", [endless], "")
    for run in (
        lambda: check_tests([example] * 8),
        lambda: why_void([endless] * 8, ""),
        lambda: run_python(endless),
    ):
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        started = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            run()
        signal.signal(signal.SIGALRM, before)
        assert time.perf_counter() - started < 5
        assert not list(folder.iterdir()) and not processes(folder)


@linux
def test_the_command_ends_when_it_is_interrupted(folder):
    """As a terminal does, the signal goes to all processes of the command."""
    code = (
        "import sys\nfrom minimas.commands.failures import command\nfrom minimas.evaluate.run_tests import passes\n"
        "print(1, flush=True)\ncommand(lambda: passes('while True: pass', [('', '1')] * 16))"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert command.stdout is not None and command.stdout.readline() == "1\n"
    time.sleep(0.5)
    assert processes(folder)
    started = time.perf_counter()
    os.killpg(command.pid, signal.SIGINT)
    assert command.wait(10) == 130
    assert time.perf_counter() - started < 5


@linux
def test_programs_end_when_their_caller_is_killed(folder):
    """Its folder cannot be removed then, but nothing runs on."""
    code = f"from minimas.sandbox.python import run_guarded; run_guarded('while True: pass  # {folder}')"
    caller = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(folder)}
    )
    for _ in range(500):
        if any(re.search(r"main\.py", command) for command in processes(folder)):
            break
        time.sleep(0.02)
    caller.kill()
    caller.wait()
    time.sleep(0.5)
    assert not processes(folder)
    for left in folder.iterdir():
        sandbox.remove(left)
