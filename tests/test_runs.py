"""What evaluation and training share: one run per output, and the processes of torchrun."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from minimas.commands.failures import command
from minimas.common import InputError
from minimas.evaluate import __main__ as evaluate
from minimas.evaluate import run_tests
from minimas.runs import dependencies, processes
from minimas.runs import lock as locks
from minimas.runs.dependencies import bytes_compared, fingerprint
from minimas.runs.lock import Lock, held, share
from minimas.runs.processes import Processes, join, launched
from minimas.tiny import build
from minimas.train import __main__ as train

# Locks

HOLDER = """
    import sys, time
    from pathlib import Path
    from minimas.runs import lock
    if sys.argv[2] == "without locks":
        lock.fcntl = None
    with lock.held([lock.Lock("--out", Path(sys.argv[1]))]):
        print("held", flush=True)
        time.sleep(60)
"""


def holder(output, kind="with locks"):
    """A process that holds an output."""
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(output), kind],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "held\n"
    return child


@pytest.fixture(params=["with locks", "none in this system", "none in this file system"])
def kind(request, monkeypatch):
    """With locks of the operating system, and without."""

    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if request.param == "none in this system":
        monkeypatch.setattr(locks, "fcntl", None)
    if request.param == "none in this file system":
        monkeypatch.setattr(locks.fcntl, "flock", refused)
    return "with locks" if request.param == "with locks" else "without locks"


def test_an_output_is_held_while_its_process_lives(kind, tmp_path):
    """It names the process, and a kill sets the output free. A link to it and another spelling are the same output."""
    output = tmp_path / "r.jsonl"
    child = holder(output, kind)
    (tmp_path / "link.jsonl").symlink_to(output)
    (tmp_path / "folder").mkdir()
    try:
        for name in "r.jsonl", "link.jsonl", "folder/../r.jsonl":
            with (
                pytest.raises(InputError, match=f"--out .* by process {child.pid}: wait until"),
                held([Lock("--out", tmp_path / name)]),
            ):
                pytest.fail("held twice")
        with held([Lock("--out", tmp_path / "other.jsonl")]):
            pass
    finally:
        child.send_signal(signal.SIGKILL)
        if kind == "with locks":
            child.wait()  # else its parent has not asked for it yet: it has ended all the same
    time.sleep(0.1)
    assert (tmp_path / "r.jsonl.lock").exists()
    with held([Lock("--out", output)]):
        process = json.loads((tmp_path / "r.jsonl.lock").read_text())
        assert process["pid"] == os.getpid()
    child.wait()
    assert {file.name for file in tmp_path.iterdir()} == {"link.jsonl", "folder"}


def test_a_folder_is_held_and_leaves_nothing(kind, tmp_path):
    folder = tmp_path / "runs" / "links"
    with held([Lock("--out", folder, folder=True)]):
        assert [file.name for file in folder.iterdir()] == ["training.lock"]
        with (
            pytest.raises(InputError, match="is being written by process"),
            held([Lock("--out", tmp_path / "runs" / "." / "links", folder=True)]),
        ):
            pytest.fail("held twice")
    assert not list(tmp_path.iterdir())


def test_nothing_is_held_if_one_output_is_taken(kind, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    with held([Lock("--csv", second)]):
        with (
            pytest.raises(InputError, match="--csv"),
            held([Lock("--out", first), Lock("--csv", second)]),
        ):
            pytest.fail("held twice")
        assert [file.name for file in tmp_path.iterdir()] == ["b.lock"]
    assert not list(tmp_path.iterdir())


def test_what_lies_in_a_lock_file_does_no_harm(kind, tmp_path):
    """Nothing, something else, and processes that have ended, of which one has a successor with its number."""
    output, file = tmp_path / "r.jsonl", tmp_path / "r.jsonl.lock"
    dead = subprocess.Popen(["true"])
    dead.wait()
    here = {"host": locks.socket.gethostname(), "by_existence": True}
    reused = {"pid": os.getppid(), "started": "1", **here}
    for text in (
        "",
        "{",
        "[1]\n\0\n",
        json.dumps({"pid": dead.pid, "started": "1", **here}) + "\n",
        json.dumps(reused) + "\n" if sys.platform == "linux" else "",
    ):
        file.write_text(text)
        with held([Lock("--out", output)]):
            assert json.loads(file.read_text())["pid"] == os.getpid()
        assert not file.exists()


def test_another_machine_is_believed(tmp_path, monkeypatch):
    """Without locks it cannot be asked. The error message says what to delete."""
    monkeypatch.setattr(locks, "fcntl", None)
    file = tmp_path / "r.jsonl.lock"
    process = {"pid": 1, "host": "elsewhere", "started": "1", "by_existence": True}
    file.write_text(json.dumps(process) + "\n")
    with (
        pytest.raises(InputError, match=f"by process 1 on elsewhere: .*delete {file}"),
        held([Lock("--out", tmp_path / "r.jsonl")]),
    ):
        pytest.fail("held twice")
    assert file.exists()


def test_where_nobody_knows_who_lives_the_error_says_what_to_delete(tmp_path, monkeypatch):
    """As under Windows. Where it is known, there is nothing to delete."""
    monkeypatch.setattr(locks, "fcntl", None)
    lock = Lock("--out", tmp_path / "r.jsonl")
    with held([lock]):
        assert "delete" not in str(lock.refusal())
        monkeypatch.setattr(locks, "started", lambda pid: "")
        lock.file.write_bytes(locks.this_process(by_existence=True))
        assert f"(if it does not run any more, delete {lock.file})" in str(lock.refusal())
        lock.file.write_bytes(locks.this_process(by_existence=False))
        assert "delete" not in str(lock.refusal()), "the operating system's lock ends with it"


def test_the_processes_of_a_run_share_an_output(kind, tmp_path):
    """It is held until the last of them ends, also if the first is killed."""
    output = tmp_path / "r.jsonl"
    first, second = [Lock("--out", output)], [Lock("--out", output)]
    with held(second, rank=1):
        with held(first):
            share(first, 0, lambda: None)
            share(second, 1, lambda: None)
            with pytest.raises(InputError, match="process"), held([Lock("--out", output)]):
                pytest.fail("held twice")
        if kind == "with locks":  # else the two are one process, which has let go
            assert (tmp_path / "r.jsonl.lock").exists()
            with pytest.raises(InputError, match="process"), held([Lock("--out", output)]):
                pytest.fail("held twice")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_holds_nothing(tmp_path):
    """It may outlive its parent, as that of a grader."""
    code = textwrap.dedent(HOLDER).replace(
        'print("held", flush=True)', "os.write(1, b'%d\\n' % os.fork())"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", "import os\n" + code, str(tmp_path / "r.jsonl"), "with locks"],
        stdout=subprocess.PIPE,
        text=True,
    )
    child = max(int(parent.stdout.readline()), int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    try:
        with held([Lock("--out", tmp_path / "r.jsonl")]):
            os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        parent.stdout.close()


def test_a_refused_command_loads_nothing(tmp_path):
    """It ends before it imports torch."""
    for module, args, output in (
        ("minimas.evaluate", ["--dataset", "tiny", "--out", "r.jsonl"], "r.jsonl"),
        (
            "minimas.train",
            ["outer", "--data", "tiny", "--out", "links", "--resume"],
            "links/training",
        ),
    ):
        place = tmp_path / output
        place.parent.mkdir(exist_ok=True)
        child = holder(place)
        code = (
            "import sys, runpy; sys.modules['torch'] = None; "
            "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
        )
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-c", code, module, *args],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        seconds = os.times().children_user - before.children_user
        child.kill()
        child.wait()
        child.stdout.close()
        assert done.returncode == 2 and done.stdout == "", done.stderr
        assert done.stderr.startswith(
            f"minimas: --out {args[-1 if module.endswith('evaluate') else -2]}"
        )
        assert f"by process {child.pid}" in done.stderr and done.stderr.count("\n") == 1
        assert seconds < 2


def refused(monkeypatch, capsys, main, *args):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        command(main)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1
    return err


def label(value):
    """The name of a case: that of a command is its module, as the workers of pytest-xdist have to agree on names."""
    return value.__module__ if callable(value) else str(value)


@pytest.mark.parametrize(
    "main, option, args, taken",
    [
        (evaluate.main, "--out", ["--dataset", "tiny", "--out", "r.jsonl", "--regrade"], "r.jsonl"),
        (evaluate.main, "--out", ["--dataset", "tiny"], "tiny-tiny.jsonl"),
        (evaluate.main, "--csv", ["--dataset", "tiny", "--csv", "t.csv"], "t.csv"),
        (evaluate.main, "--plot", ["--dataset", "tiny", "--plot", "t.svg"], "t.svg"),
        (
            train.main,
            "--plot",
            ["outer", "--data", "tiny", "--out", "o", "--plot", "t.svg"],
            "t.svg",
        ),
        (train.main, "--out", ["outer", "--data", "tiny", "--out", "o"], "o/training"),
        (
            train.main,
            "--out",
            ["inner", "--role", "critic", "--data", "tiny", "--out", "o"],
            "o/training",
        ),
        (train.main, "--out", ["system", "--data", "tiny", "--out", "o"], "o/training"),
        (train.main, "--out", ["system", "--data", "tiny", "--out", "o"], "o/critic/training"),
        (build.main, "--out", ["--out", "o"], "o/training"),
        (build.main, "--out", ["--out", "o"], "o/solver/training"),
        (
            train.main,
            "--out",
            ["outer", "--data", "tiny", "--out", "o/links", "--resume"],
            "o/links/training",
        ),
    ],
    ids=label,
)
def test_all_outputs_are_held(main, option, args, taken, tmp_path, monkeypatch, capsys):
    """Of every command. The stages of a training have a folder each; `taken` is held with .lock at its end."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / taken).parent.mkdir(parents=True, exist_ok=True)
    with held([Lock("--out", tmp_path / taken)]):
        err = refused(monkeypatch, capsys, main, *args)
        assert err.startswith(f"minimas: {option} ") and f"by process {os.getpid()}" in err
        assert len([file for file in tmp_path.rglob("*") if file.is_file()]) == 1


def test_the_page_of_trace_is_held(tmp_path, monkeypatch, capsys):
    ask = pytest.importorskip("minimas.commands.ask")
    page = tmp_path / "t.html"
    with held([Lock("--trace", page)]):
        err = refused(monkeypatch, capsys, ask.main, "--prompt", "7 +5", "--trace", page)
    assert err.startswith("minimas: --trace ") and f"by process {os.getpid()}" in err


def test_names_of_files_beside_an_output_are_no_outputs(tmp_path, monkeypatch, capsys):
    for option, name in (
        ("--out", "r.jsonl.part1"),
        ("--csv", "t.csv.lock"),
        ("--out", "a.partial"),
    ):
        err = refused(
            monkeypatch, capsys, evaluate.main, "--dataset", "tiny", option, tmp_path / name
        )
        assert f"{option} is {tmp_path / name}, but names that end in" in err
    assert not list(tmp_path.iterdir())


def test_a_plot_is_not_written_over_its_data(tmp_path, monkeypatch, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("{}")
    args = [
        "outer",
        "--data",
        data,
        "--out",
        tmp_path / "o",
        "--plot",
        tmp_path / "." / "rows.jsonl",
    ]
    assert "rows.jsonl' ends in .jsonl, expected .svg" in refused(
        monkeypatch, capsys, train.main, *args
    )
    assert data.read_text() == "{}"


def test_the_state_of_a_training_is_no_part_of_a_checkpoint(tmp_path):
    (tmp_path / "adapter.pt").write_bytes(b"link")
    before = fingerprint([tmp_path])
    (tmp_path / "training.pt").write_bytes(b"state")
    (tmp_path / "training(math).pt").write_bytes(b"state")
    assert fingerprint([tmp_path]) == before
    (tmp_path / "adapter.pt").write_bytes(b"LINK")
    assert fingerprint([tmp_path]) != before


@pytest.mark.parametrize("size", [1 << 18, (1 << 26) + 12345], ids=["small", "large"])
def test_a_change_in_the_middle_of_a_file_is_seen(size, tmp_path):
    """Of a large file one of size/4096 bytes in a row, wherever it lies."""
    file = tmp_path / "model.safetensors"
    with open(file, "wb") as data:
        data.truncate(size)
    before = fingerprint([tmp_path])
    changed = 1 if size < 1 << 20 else -(-size // 4096)
    found = set()
    for start in (0, size // 2, size // 3, size - changed):
        with open(file, "r+b") as data:
            data.seek(start)
            data.write(b"x" * changed)
        found.add(fingerprint([tmp_path]))
        with open(file, "r+b") as data:
            data.seek(start)
            data.write(bytes(changed))
    assert len(found) == 4 and before not in found
    assert fingerprint([tmp_path]) == before


def test_little_of_a_large_file_is_read(tmp_path):
    with open(tmp_path / "model.safetensors", "wb") as data:
        data.truncate(5 * 10**9)  # it takes no room: it has no blocks on the disk
    read = list(bytes_compared(tmp_path / "model.safetensors"))
    assert sum(map(len, read)) == 1 << 24


def test_a_folder_that_roles_share_is_read_once(tmp_path, monkeypatch):
    """It counts for each of them: another assignment of folders to roles has another fingerprint."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    a = tmp_path / "a"
    b = tmp_path / "b"
    also_a = tmp_path / "also_a"
    also_a.symlink_to(a)
    read = []

    def noted(file):
        read.append(file)
        return bytes_compared(file)

    monkeypatch.setattr(dependencies, "bytes_compared", noted)
    shared = fingerprint([a, str(a), also_a, b])
    assert read.count(a / "model.safetensors") == read.count(b / "model.safetensors") == 1
    assert len(read) == 2
    others = [[a, b], [a, b, b, b], [b, a, a, a], [a, a, a], ["hub/id", a, a, a, b]]
    assert len({shared, *map(fingerprint, others)}) == 1 + len(others)
    (tmp_path / "empty").mkdir()
    assert fingerprint([]) == fingerprint([tmp_path / "empty"]) == ""


# Processes


@pytest.mark.parametrize(
    "variables, complaint",
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2 in the environment, but LOCAL_RANK is"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 in the environment, but RANK is not set"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '' in the environment, expected a number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment, expected a number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0 in the environment, expected 1 or more"),
        ({"RANK": "1"}, "RANK is set in the environment, but WORLD_SIZE is not"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK is set in the environment, but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, "RANK is 1 in the environment, expected 0 to 0"),
        ({"WORLD_SIZE": "1", "RANK": "x"}, "RANK is 'x' in the environment, expected a number"),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": ""}, "LOCAL_RANK is ''"),
    ],
    ids=str,
)
@pytest.mark.parametrize("main", [evaluate.main, train.main], ids=label)
def test_half_an_environment(main, variables, complaint, tmp_path, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    what = ["--dataset", "tiny"]
    if main is train.main:
        what = ["outer", "--data", "tiny", "--out", "o"]
    err = refused(monkeypatch, capsys, main, *what)
    assert complaint in err and "torchrun" in err and "unset WORLD_SIZE, RANK" in err
    assert not list(tmp_path.iterdir())


WHOLE = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"RANK": "2"}, "RANK is 2 in the environment, expected 0 to 1 since WORLD_SIZE is 2"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is -1"),
        ({"MASTER_ADDR": ""}, "but MASTER_ADDR is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http' in the environment, expected a number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000 in the environment, expected 1 to 65535"),
    ],
    ids=str,
)
def test_an_environment_that_contradicts_itself(change, complaint, monkeypatch):
    for name, value in (WHOLE | change).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=complaint):
        launched()


@pytest.mark.parametrize("number", ["x", "", "0"])
def test_a_number_of_processes_on_this_machine(number, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", number)
    with pytest.raises(InputError, match=f"LOCAL_WORLD_SIZE is '?{number}'? in the environment"):
        run_tests.tests_at_once()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000000")
    assert run_tests.tests_at_once() == 1


def test_environments_that_are_whole(monkeypatch):
    assert launched() == Processes()
    monkeypatch.setenv("MASTER_PORT", "tcp://10.0.0.1:80")  # as some clusters name a service
    assert launched() == Processes()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched() == Processes()
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    assert launched() == Processes(1, 2, 1)


def test_processes_that_do_not_find_each_other(monkeypatch):
    import torch

    def fails(*_, **__):
        raise RuntimeError("The client socket has failed to connect\nat frame 1")

    monkeypatch.setattr(torch.distributed, "rendezvous", fails)
    with pytest.raises(
        InputError, match=r"do not find each other \(The client .* connect\): start"
    ):
        join(Processes(1, 2, 1), "cpu")
    monkeypatch.setattr(processes, "shared_store", torch.distributed.HashStore)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "new_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "barrier", fails)
    device, wait = join(Processes(1, 2, 1), "cpu")
    with pytest.raises(InputError, match="another process of this run has ended"):
        wait()
    assert device == "cpu"


MEETS = """
    from datetime import timedelta
    from minimas.runs.processes import join, launched, leave

    ours = launched()
    for _ in range(40):
        _, wait = join(ours, "cpu", "gloo", timedelta(minutes=1))
        wait()
        leave(ours)
"""


@pytest.mark.slow  # three processes load torch
def test_processes_meet_again_and_again(tmp_path):
    """None reads an address of an earlier meeting."""
    script = tmp_path / "meets.py"
    script.write_text(textwrap.dedent(MEETS))
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, str(script)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


WAITS = """
    import signal, sys, time
    from types import SimpleNamespace
    from minimas.runs.processes import wait_for_all

    def barrier(group):  # within torch no handler is called; here it is, and changes nothing
        print("waits", flush=True)
        time.sleep(5)

    sys.modules["torch"] = SimpleNamespace(distributed=SimpleNamespace(barrier=barrier))
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, lambda *_: None)
    wait_for_all()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_process_that_waits_for_others(number):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WAITS)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "waits\n"
    process.send_signal(number)
    process.communicate(timeout=9)
    assert process.returncode == 128 + number
