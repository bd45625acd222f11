"""How commands end: signals at any moment, and streams that are closed, full, slow or left."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import minimas
from minimas.commands.ask import main
from minimas.commands.failures import command
from minimas.common import Terminated

ROOT = Path(minimas.__file__).parent.parent
CHAIN = "7 +5 *3"


@pytest.fixture
def start(tmp_path):
    """Starts a script of this source, named `minimas` as that of pip, in a folder of its own."""

    def start(source, **options):
        script = tmp_path / "minimas"
        script.write_text(
            "import os, signal, sys, time, warnings\nimport minimas\n"
            "from minimas.commands.failures import command, completed_first\n" + source
        )
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        return subprocess.Popen(
            [sys.executable, str(script)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            **options,
        )

    return start


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["import", "work", "exit"])
def test_a_signal_at_any_moment_is_an_exit_status(start, tmp_path, moment, number):
    source = {
        "import": "print('here', flush=True); time.sleep(60)",
        "work": "def main():\n    try:\n        print('here', flush=True); time.sleep(60)\n"
        "    finally:\n        open('kept', 'w').close()\ncommand(main)",
        "exit": "import atexit\n"
        "atexit.register(lambda: (print('here', flush=True), time.sleep(60)))\n"
        "command(lambda: None)",
    }[moment]
    process = start(source)
    assert process.stdout.readline() == "here\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=50)
    assert (process.returncode, out, err) == (128 + number, "", "")
    assert (tmp_path / "kept").exists() == (moment == "work")


@pytest.mark.parametrize(
    "module, args",
    [
        ("recurse", ["--prompt", CHAIN]),
        ("evaluate", ["--dataset", "tiny"]),
        ("train", ["outer", "--data", "tiny", "--out", "links"]),
        ("tiny.build", ["--out", "tiny"]),
    ],
)
def test_ctrl_c_while_torch_is_imported(tmp_path, module, args):
    """A stand-in for torch takes for ever to import."""
    (tmp_path / "torch.py").write_text("import time; print('here', flush=True); time.sleep(60)")
    process = subprocess.Popen(
        [sys.executable, "-m", f"minimas.{module}", *args],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=50)
    assert (process.returncode, out, err) == (130, "", "")


def test_a_signal_in_an_import_that_catches_it(start, tmp_path):
    """As parts of torch do, which the commands import after they hold their outputs."""
    (tmp_path / "catches.py").write_text(
        "import time\ntry:\n    print('here', flush=True); time.sleep(9)\nexcept BaseException:\n    pass\n"
    )
    process = start(
        "from pathlib import Path\nfrom minimas.runs.lock import Lock, held\n"
        "def main():\n    with held([Lock('--out', Path('out'))]):\n        import catches\n"
        "        time.sleep(9)\ncommand(main)"
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=8)
    assert (process.returncode, out, err) == (130, "", "")
    assert not (tmp_path / "out.lock").exists()


def test_a_program_that_imports_minimas_keeps_its_handlers():
    code = (
        "import signal; names = signal.SIGINT, signal.SIGTERM, signal.SIGHUP\n"
        "before = [signal.getsignal(n) for n in names]; import minimas, minimas.commands.failures\n"
        "print(before == [signal.getsignal(n) for n in names], minimas.runs_a_command)"
    )
    done = subprocess.run([sys.executable, "-c", code, "minimas"], capture_output=True, text=True)
    assert done.stdout == "True False\n"


def test_a_program_that_has_more_arguments_than_it_was_started_with():
    code = "import sys; sys.argv = ['x'] * 9; import minimas; print(minimas.runs_a_command)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_a_command_in_another_program_gives_its_handlers_back(capsys):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    streams = sys.stdout, sys.stderr, sys.unraisablehook
    command(lambda: print("done"))
    assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert streams == (sys.stdout, sys.stderr, sys.unraisablehook)
    assert capsys.readouterr().out == "done\n"


def test_what_nohup_ignores_stays_ignored(start):
    process = start(
        "def main():\n    os.kill(os.getpid(), signal.SIGHUP)\n    print('alive')\ncommand(main)",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert process.communicate(timeout=50) == ("alive\n", "") and process.returncode == 0


def test_a_hundred_signals_leave_no_traceback(start):
    process = start(
        "def main():\n    while True:\n        try:\n            print('here', flush=True)\n"
        "            while True:\n                time.sleep(0.001)\n"
        "        finally:\n            time.sleep(0.002)\ncommand(main)"
    )
    assert process.stdout.readline() == "here\n"
    for _ in range(100):
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.0002)
    _, err = process.communicate(timeout=50)
    assert (process.returncode, err) == (130, "")


def test_an_interrupt_that_a_destructor_swallows_comes_again(start):
    process = start(
        "class Object:\n    def __del__(self):\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(0)\n"
        "def main():\n    Object()\n    time.sleep(60)\ncommand(main)"
    )
    out, err = process.communicate(timeout=50)
    assert (process.returncode, out, err) == (130, "", "")


def test_a_signal_waits_until_a_file_is_complete(start, tmp_path):
    process = start(
        "def main():\n    with completed_first():\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(0.01)\n        open('page', 'w').close()\n    time.sleep(60)\ncommand(main)"
    )
    process.communicate(timeout=50)
    assert process.returncode == 143 and (tmp_path / "page").exists()


def test_a_fault_ends_with_1_and_its_traceback(start):
    process = start("def main():\n    raise KeyError('ours')\ncommand(main)")
    out, err = process.communicate(timeout=50)
    assert process.returncode == 1 and err.startswith("Traceback") and "KeyError: 'ours'" in err


def test_what_was_registered_for_the_exit_is_run(start):
    process = start(
        "import atexit, threading\natexit.register(print, 'at exit')\n"
        "def late():\n    time.sleep(0.1); print('thread')\n"
        "command(lambda: threading.Thread(target=late).start())"
    )
    assert process.communicate(timeout=50)[0] == "thread\nat exit\n" and process.returncode == 0


def test_terminated_ends_with_the_status_of_its_signal(capsys):
    for error, status in (
        (Terminated(signal.SIGHUP), 129),
        (Terminated(), 143),
        (KeyboardInterrupt("text"), 130),
    ):

        def interrupted(error=error):
            raise error

        with pytest.raises(SystemExit) as end:
            command(interrupted)
        assert end.value.code == status and capsys.readouterr() == ("", "")


# Streams

WORK = """
from tqdm import tqdm
def main():
    with open('records', 'w') as out:
        for i in tqdm(range(3)):
            out.write(f'{i}\\n')
            tqdm.write(f'answer {i}')
            warnings.warn(f'warning {i}')
            os.system('echo child; echo child >&2')
    print('table')
command(main)
"""


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (1, 2), (0, 1, 2)])
def test_closed_streams_cost_nothing(start, tmp_path, closed):
    process = start(WORK, preexec_fn=lambda: [os.close(number) for number in closed])
    out, err = process.communicate(timeout=50)
    assert process.returncode == 0 and (tmp_path / "records").read_text() == "0\n1\n2\n"
    assert ("table" in out) == (1 not in closed) and ("warning 2" in err) == (2 not in closed)
    assert "Traceback" not in err and "warning" not in out


@pytest.mark.parametrize(
    "full, status", [(("stdout",), 2), (("stderr",), 0), (("stdout", "stderr"), 2)]
)
def test_full_streams_cost_no_file(start, tmp_path, full, status):
    with open("/dev/full", "w") as device:
        process = start(WORK, **dict.fromkeys(full, device))
        out, err = process.communicate(timeout=50)
    assert process.returncode == status and (tmp_path / "records").read_text() == "0\n1\n2\n"
    if full == ("stdout",):
        assert err.endswith(
            "minimas: stdout cannot be written (No space left on device), so that its output is lost: "
            "give it another place\n"
        )
    if full == ("stderr",):
        assert "answer 2" in out and out.endswith("table\n")


def test_a_reader_who_leaves_costs_no_file(start, tmp_path):
    process = start(WORK)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=50) == 141 and (tmp_path / "records").read_text() == "0\n1\n2\n"


def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_everything(start):
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    process = start("command(lambda: print('x' * 500_000))", stdout=theirs)
    os.close(theirs)
    time.sleep(0.3)
    with open(ours) as pipe:
        assert pipe.read() == "x" * 500_000 + "\n"
    assert process.wait(timeout=50) == 0


class Full(io.RawIOBase):
    """A device with room for nothing."""

    def writable(self):
        return True

    def write(self, data):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("traced", [True, False])
def test_answers_that_cannot_be_printed_are_in_the_trace(traced, tmp_path, monkeypatch, capsys):
    """Without --trace there is no reason to go on."""
    page, answered = tmp_path / "t.html", []
    answer = minimas.System.answer
    monkeypatch.setattr(
        minimas.System, "answer", lambda *a, **k: answered.append(a) or answer(*a, **k)
    )
    args = ["--prompt", CHAIN, "--prompt", "2 *9", "--batch-size", "1", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["recurse", *args, *["--trace", str(page)][: 2 * traced]])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Full()))
    with pytest.raises(SystemExit) as end:
        command(main)
    assert end.value.code == 2 and len(answered) == 1 + traced
    assert "\nminimas: stdout cannot be written (" in capsys.readouterr().err.replace("\r", "\n")
    assert not traced or all(question in page.read_text() for question in (CHAIN, "2 *9"))


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", "2>&1 | true", "> /dev/full 2>&1"])
def test_an_evaluation_without_streams(tmp_path, streams):
    args = "--dataset tiny --limit 1 --rounds 1 --out r.jsonl --csv c.csv --plot p.svg"
    line = f"{sys.executable} -m minimas.evaluate {args} {streams}"
    subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60
    )
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "c.csv").stat().st_size and (tmp_path / "p.svg").stat().st_size
