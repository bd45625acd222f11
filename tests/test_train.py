"""The training command:
what it writes loads, a killed training resumes to the same weights, processes share a batch.
"""

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import checkpoints
import pytest
import torch

import minimas
from minimas.commands.failures import command
from minimas.common import Terminated
from minimas.link import InnerLink, OuterLink
from minimas.styles import STYLES
from minimas.tiny.task import questions
from minimas.train import __main__ as train
from minimas.train import links, loop, save
from minimas.train.examples import load_examples

TINY = [
    "outer",
    "--style",
    "tiny",
    "--data",
    "tiny",
    "--limit",
    "12",
    "--batch-size",
    "4",
    "--rounds",
    "2",
    "--latents",
    "rollout",
    "--latent-steps",
    "2",
    "--device",
    "cpu",
]


def run(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["train", *map(str, args)])
    command(train.main)
    return capsys.readouterr()


def state(folder, name="training.pt"):
    return torch.load(Path(folder) / name, weights_only=True)


def same(a, b):
    """Whether two states are equal, bit for bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def curve(folder):
    return [
        json.loads(line)["loss"]
        for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "links"
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(
            sys,
            "argv",
            ["train", *TINY, "--steps", "12", "--save-every", "5", "--out", str(folder)],
        )
        train.main()
    return folder, out.getvalue(), err.getvalue()


def test_what_it_says_and_leaves(unbroken):
    folder, out, err = unbroken
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert (
        out
        == f"outer of tiny: 12 steps, loss {lines[-1]['loss']:.4f}; --checkpoint links={folder}\n"
    )
    assert "loss=" in err and "tokens/s=" in err
    assert [line["step"] for line in lines] == list(range(1, 13)) and all(
        line["tokens_per_second"] > 0 for line in lines
    )
    rates = [line["lr"] for line in lines]
    assert rates[0] == pytest.approx(5e-5) and max(rates) <= 5e-4 and rates[-1] < rates[7], (
        "a warm-up of ten steps under a cosine"
    )
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        [
            "metrics.jsonl",
            "training.pt",
            "outerlink_config.json",
            "Planner-Critic-Outerlink.pt",
            "Critic-Solver-Outerlink.pt",
            "Solver-Planner-Outerlink.pt",
        ]
    )
    assert state(folder)["step"] == 12 and all(
        t.dtype == torch.float32 for t in state(folder)["links"].values()
    ), "master weights"
    assert (
        minimas.load_mas_system("tiny", checkpoints={"links": folder}, device="cpu")
        .run(["7 +5"])[0]
        .new_tokens
        > 0
    )


@pytest.mark.slow
@pytest.mark.parametrize("kills", [(6,), (1, 6)], ids=str)
def test_killed_and_resumed(unbroken, tmp_path, monkeypatch, capsys, kills):
    """After the first state was kept, and before; metrics of steps after the state are dropped."""
    args = [*TINY, "--steps", "12", "--save-every", "5", "--out"]
    steps = {tmp_path / f"after {step}": step for step in kills}
    start = lambda out: subprocess.Popen(
        [sys.executable, "-m", "minimas.train", *args, str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    children = {out: start(out) for out in steps}  # both at once, one for each of two cores
    taken = lambda out: (
        (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0
    )
    while children:
        for out, child in list(children.items()):
            if child.poll() is not None or taken(out) >= steps[out]:
                child.send_signal(signal.SIGKILL)
                child.wait()
                assert steps[out] <= taken(out) < 12
                del children[out]
        time.sleep(0.005)
    for out in steps:
        run(monkeypatch, capsys, *args, out, "--resume")
        assert same(state(out), state(unbroken[0])) and curve(out) == curve(unbroken[0])
        for file in unbroken[0].glob("*Outerlink*.pt"):
            assert (out / file.name).read_bytes() == file.read_bytes()
        assert not list(out.glob("*.partial"))


def test_resume_refuses_another_training(unbroken, monkeypatch, capsys):
    folder, before = unbroken[0], (unbroken[0] / "training.pt").read_bytes()
    args = [*TINY, "--save-every", "5", "--out", str(folder), "--steps"]
    cases = (
        (["12"], "already holds a training: continue it with --resume"),
        (["13", "--resume"], "steps: 12"),
    )
    for more, complaint in cases:
        with pytest.raises(SystemExit) as end:
            run(monkeypatch, capsys, *args, *more)
        assert end.value.code == 2 and complaint in capsys.readouterr().err
    assert (folder / "training.pt").read_bytes() == before
    printed = run(monkeypatch, capsys, *args, "12", "--resume").out
    assert printed == f"outer of tiny: 12 steps; --checkpoint links={folder}\n", "no step is left"


def test_resume_refuses_the_training_of_another_version(unbroken, tmp_path, monkeypatch, capsys):
    """It says which version wrote it."""
    folder = shutil.copytree(unbroken[0], tmp_path / "links")
    before = state(folder)
    before["settings"] |= {"minimas": "0.1.0", "data_hash": "of its own"}
    torch.save(before, folder / "training.pt")
    with pytest.raises(SystemExit) as end:
        run(
            monkeypatch,
            capsys,
            *TINY,
            "--steps",
            "12",
            "--save-every",
            "5",
            "--out",
            folder,
            "--resume",
        )
    err = capsys.readouterr().err
    assert (
        end.value.code == 2
        and f"was written by minimas 0.1.0, and this is {minimas.__version__}" in err
    )
    assert same(state(folder), before)


def test_resume_refuses_another_agent(tmp_path, monkeypatch, capsys):
    """Its folder has the same name, and another inner link."""
    planner = shutil.copytree(STYLES["tiny"].checkpoints["planner"], tmp_path / "planner")
    args = [*TINY, "--steps", "1", "--out", tmp_path / "out", "--checkpoint", f"planner={planner}"]
    run(monkeypatch, capsys, *args)
    run(monkeypatch, capsys, *args, "--resume")
    link = torch.load(planner / "adapter.pt")
    torch.save({name: value + 1 for name, value in link.items()}, planner / "adapter.pt")
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, capsys, *args, "--resume")
    assert end.value.code == 2 and "checkpoint_files: " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "rounds, share",
    [("1", ["--batch-size", "1", "--accumulate", "2"]), ("2", ["--batch-size", "2"])],
)
def test_two_processes_are_one_with_twice_the_batch(rounds, share, tmp_path, monkeypatch, capsys):
    """With one round, one link gets no gradient; with two parts per step, gradients are exchanged at the last only."""
    torchrun = [
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "minimas.train",
    ]
    common, out = [*TINY, "--steps", "5", "--rounds", rounds, "--out"], tmp_path / "pair"
    pair = subprocess.Popen(
        [sys.executable, "-m", *torchrun, *common, str(out), *share],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run(monkeypatch, capsys, *common, tmp_path / "alone")
    printed, errors = pair.communicate()
    assert pair.returncode == 0, errors
    assert (
        printed == f"outer of tiny: 5 steps, loss {curve(out)[-1]:.4f}; --checkpoint links={out}\n"
    )
    assert curve(out) == pytest.approx(curve(tmp_path / "alone"), rel=1e-4)
    ours, theirs = (state(folder)["links"] for folder in (out, tmp_path / "alone"))
    assert all((ours[name] - theirs[name]).abs().max() < 1e-4 for name in ours)


def test_parts_are_a_batch(tmp_path, monkeypatch, capsys):
    """Gradient accumulation: two batches of two per step equal one of four."""
    for name, more in ("whole", []), ("parts", ["--batch-size", "2", "--accumulate", "2"]):
        run(monkeypatch, capsys, *TINY, "--steps", "2", "--out", tmp_path / name, *more)
    assert curve(tmp_path / "parts") == pytest.approx(curve(tmp_path / "whole"), rel=1e-4)


@pytest.mark.parametrize(
    "loss, found",
    [
        (lambda w: w.sum() * float("nan"), "the loss is nan, its gradient norm nan"),
        (
            lambda w: (w - w.detach()).abs().sum().sqrt() + 1,
            "the loss is 1.0, its gradient norm nan",
        ),
    ],
)
def test_what_is_not_finite_reaches_no_weight(loss, found):
    link, saved = torch.nn.Linear(1, 1), []
    before = link.weight.clone()
    folder = type(
        "",
        (),
        {
            "rank": 0,
            "resume": lambda *_: 0,
            "pace": lambda _: {"tokens_per_second": 1},
            "record_step": lambda *_: None,
            "save": lambda _, step: saved.append(step),
            "counting": lambda _: contextlib.nullcontext(),
        },
    )()
    with pytest.raises(
        minimas.InputError, match=f"at step 3 {found}. The links before it are kept"
    ):
        loop.fit(
            lambda step, part: loss(link.weight) if step == 2 else 0 * link.weight.sum(),
            [loop.adamw(link, 1.0)],
            5,
            "test",
            folder=folder,
        )
    assert torch.equal(link.weight, before) and saved == [2]
    with pytest.raises(
        minimas.InputError,
        match=f"at step 1 {found}. What was learned before it is lost, .* Train again with a lower lr. If it was",
    ):
        loop.fit(lambda step, part: loss(link.weight), [loop.adamw(link, 1.0)], 1, "test")


@pytest.mark.parametrize(
    "held, why",
    [
        (b"?", "[A-Z]\\w+"),
        ([1], "it holds a list"),
        ({"settings": {}, "step": 1, "links": {}, "random": 0}, "it has no 'steppers'"),
        ({"settings": {}, "steppers": [], "step": 1, "random": 0}, "it has no 'links'"),
    ],
)
def test_a_file_that_is_no_state_says_why(tmp_path, held, why):
    folder = loop.TrainingFolder(tmp_path, None, {"steps": 1}, {}, torch.nn.Linear(1, 1), print, 1)
    if isinstance(held, bytes):
        folder.state_file.write_bytes(held)
    else:
        torch.save(held, folder.state_file)
    with pytest.raises(
        minimas.InputError, match=rf"damaged or not the state of a training \({why}\): delete it"
    ):
        folder.saved_state()


@pytest.mark.slow
@pytest.mark.parametrize("kept", (0, 5))
def test_a_kill_between_links_and_state(unbroken, tmp_path, monkeypatch, capsys, kept):
    """The links are written but the state is not: the steps since the last state, if there is one, are taken again."""
    args, whole = (
        [*TINY, "--steps", "12", "--save-every", "5", "--out", tmp_path],
        loop.write_atomic,
    )

    def fails(file, write):
        if file.name == "training.pt" and file.exists() == bool(kept):
            raise KeyboardInterrupt
        whole(file, write)

    monkeypatch.setattr(loop, "write_atomic", fails)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, capsys, *args)
    assert end.value.code == 130 and (
        state(tmp_path)["step"] == 5 if kept else not (tmp_path / "training.pt").exists()
    )
    assert list(tmp_path.glob("*Outerlink.pt"))
    monkeypatch.setattr(loop, "write_atomic", whole)
    run(monkeypatch, capsys, *args, "--resume")
    assert (
        curve(tmp_path) == pytest.approx(curve(unbroken[0]), rel=1e-4)
        and state(tmp_path)["step"] == 12
    )


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal, even if the tests run in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow  # test_a_scheduler_ends_it_as_ctrl_c_does goes the same way
def test_ctrl_c_keeps_the_steps_that_were_taken(
    interruptible, unbroken, tmp_path, monkeypatch, capsys
):
    """The step is ended and its state kept; what resumes comes to the weights of an unbroken training."""
    args, whole, seen = (
        [*TINY, "--steps", "12", "--save-every", "5", "--out", tmp_path],
        loop.set_gradients,
        [],
    )

    def set_gradients(loss_at, step, *rest):
        seen.append(step)
        if seen == [0, 1, 2]:
            signal.raise_signal(signal.SIGINT)
        return whole(loss_at, step, *rest)

    monkeypatch.setattr(loop, "set_gradients", set_gradients)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, capsys, *args)
    assert end.value.code == 130 and state(tmp_path)["step"] == 3 and len(curve(tmp_path)) == 3
    assert capsys.readouterr().err.count("minimas: ending after this step") == 1
    run(monkeypatch, capsys, *args, "--resume")
    assert seen == list(range(12)) and curve(tmp_path) == pytest.approx(
        curve(unbroken[0]), rel=1e-4
    )
    with pytest.raises(KeyboardInterrupt), loop.Ending() as ending:
        signal.raise_signal(signal.SIGINT)
        assert ending.number == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with loop.Ending() as ending:
        signal.raise_signal(signal.SIGINT)
    assert not ending.number, "who ignores Ctrl-C goes on doing so"


def test_metrics_have_one_line_a_step(tmp_path, unbroken, monkeypatch, capsys):
    """After lines that were written twice, cut off by a kill, or follow the state; the plot has the same steps."""
    folder = shutil.copytree(unbroken[0], tmp_path / "links")
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    again = lines[2].replace('"loss": ', '"loss": 9')
    metrics.write_text("".join([*lines[:3], again, *lines[2:], lines[4], '{"step": 13}\n{"st']))
    assert list(loop.read_metrics(metrics)) == list(range(1, 14))
    args = [*TINY, "--steps", "12", "--save-every", "5", "--out", folder, "--resume"]
    run(monkeypatch, capsys, *args, "--plot", tmp_path / "loss.svg")
    assert metrics.read_text() == "".join(lines)
    drawn = (tmp_path / "loss.svg").read_bytes()
    run(monkeypatch, capsys, *args, "--plot", tmp_path / "loss.svg")
    assert metrics.read_text() == "".join(lines)
    assert (tmp_path / "loss.svg").read_bytes() == drawn
    assert not list(tmp_path.rglob("*.partial")) + list(tmp_path.rglob("*.lock"))


def test_points_of_a_curve():
    assert loop.means_of([(1, 3.0), (3, 1.0)]) == [(1, 3.0), (3, 1.0)]
    assert loop.means_of([(1, 4.0), (2, 2.0), (3, 1.0)], most=2) == [(1.5, 3.0), (3, 1.0)]


def ended_by(number, at, monkeypatch, capsys, *args):
    """(what a training raises that gets signals in these steps, the steps that it began)"""
    whole, seen = loop.set_gradients, []

    def set_gradients(loss_at, step, *rest):
        seen.append(step)
        if step in at:
            signal.raise_signal(number)
        return whole(loss_at, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as end:
        patch.setattr(loop, "set_gradients", set_gradients)
        patch.setattr(sys, "argv", ["train", *map(str, args)])
        train.main()
    return end.type, seen


@pytest.fixture
def terminated():
    """Handlers as those of a command: SIGTERM and SIGHUP raise Terminated."""

    def terminate(*_):
        raise Terminated

    numbers = signal.SIGTERM, signal.SIGHUP
    before = [signal.signal(number, terminate) for number in numbers]
    yield terminate
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)]
)
def test_a_scheduler_ends_it_as_ctrl_c_does(
    number, terminated, unbroken, tmp_path, monkeypatch, capsys
):
    args = [*TINY, "--steps", "12", "--save-every", "5", "--out", tmp_path]
    kind, seen = ended_by(number, [2], monkeypatch, capsys, *args)
    assert kind is Terminated and seen == [0, 1, 2]
    assert state(tmp_path)["step"] == 3 and len(curve(tmp_path)) == 3
    assert capsys.readouterr().err.count("minimas: ending after this step") == 1
    assert signal.getsignal(number) is terminated
    run(monkeypatch, capsys, *args, "--resume")
    assert same(state(tmp_path)["links"], state(unbroken[0])["links"])
    assert curve(tmp_path) == curve(unbroken[0])


def test_a_second_signal_ends_at_once(terminated, monkeypatch):
    """But not an echo of the first, as `timeout` and torchrun send it."""
    with pytest.raises(Terminated), loop.Ending() as ending:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert ending.number == signal.SIGTERM
        monkeypatch.setattr(loop, "ECHO_ALONE", 0)
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("it went on")
    monkeypatch.setattr(loop, "rank_and_world", lambda: (0, 2))
    with loop.Ending() as ending:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        assert ending.number == signal.SIGHUP
        ending.number = 0
    with pytest.raises(Terminated), loop.Ending() as ending:
        signal.raise_signal(signal.SIGHUP)
        monkeypatch.setattr(loop, "ECHO_IN_GROUP", 0)
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_after_the_last_step_is_not_lost(terminated):
    """The next training of a system must not begin."""
    with pytest.raises(Terminated), loop.Ending():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is terminated


def test_a_thread_can_train():
    """Handlers of signals can be set in the main thread only."""
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: loop.Ending().__enter__().before).result() == {}
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow  # three processes load torch, twice
def test_sigterm_ends_all_processes_after_one_step(tmp_path):
    """torchrun forwards it. They leave together, and the first of them keeps the state; then they go on."""
    args = [*TINY, "--steps", "400", "--save-every", "1000", "--out", str(tmp_path)]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    start = lambda *more: subprocess.Popen(
        [sys.executable, "-m", *torchrun, "-m", "minimas.train", *args, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "metrics.jsonl"
    child = start()
    while child.poll() is None and (not metrics.exists() or len(curve(tmp_path)) < 3):
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=25)  # torchrun would kill them after 30 s
    steps = state(tmp_path)["step"]
    assert child.returncode != 0 and 3 <= steps < 400 and len(curve(tmp_path)) == steps
    assert err.count("minimas: ending after this step") == 1
    assert not list(tmp_path.glob("*.lock"))


def test_links_of_others_are_not_overwritten(unbroken, tmp_path, monkeypatch, capsys):
    for name in "Planner-Critic-Outerlink.pt", "adapter.pt":
        (tmp_path / name).write_text("mine")
    for args in TINY, ["inner", "--role", "critic", "--data", "tiny"]:
        with pytest.raises(SystemExit) as end:
            run(monkeypatch, capsys, *args, "--steps", "1", "--out", tmp_path)
        assert end.value.code == 2 and "which would be overwritten" in capsys.readouterr().err
    assert {file.read_text() for file in tmp_path.iterdir()} == {"mine"}


def test_other_data_of_the_same_size_are_refused(tmp_path, monkeypatch, capsys):
    rows = [
        {"question": "7 +5", "plan": "a+5=2.", "refined_plan": "a+5=2.", "answer": "a+5\\boxed{2}"}
    ] * 3
    data = tmp_path / "rows.json"
    args = [
        "outer",
        "--data",
        data,
        "--batch-size",
        "2",
        "--device",
        "cpu",
        "--steps",
        "1",
        "--out",
        tmp_path / "out",
    ]
    data.write_text(json.dumps(rows))
    run(monkeypatch, capsys, *args)
    data.write_text(json.dumps([rows[0] | {"answer": "a+5\\boxed{3}"}, *rows[1:]]))
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, capsys, *args, "--resume")
    assert end.value.code == 2 and "rows_hash" in capsys.readouterr().err
    (tmp_path / "out" / "training.pt").write_text("?")
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, capsys, *args, "--resume")
    assert (
        end.value.code == 2
        and "training.pt is damaged or not the state of a training" in capsys.readouterr().err
    )


def test_rows_come_in_permutations():
    rows = list(range(10))
    epochs = [loop.batch_of(rows, 3, number, 10) for number in range(3)]
    assert all(sorted(epoch) == rows for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert sum((loop.batch_of(rows, 3, number, 3) for number in range(10)), []) == sum(
        epochs, []
    ), "for any batch size"
    assert loop.batch_of(rows, 4, 0, 10) != epochs[0]


@pytest.mark.parametrize(
    "what",
    (
        ["outer", "--rounds", "2", "--latents", "rollout", "--latent-steps", "2"],
        pytest.param(["outer", "--rounds", "2", "--latents", "teacher"], marks=pytest.mark.slow),
        ["inner", "--role", "planner"],
    ),
    ids=" ".join,
)
def test_on_a_fake_cuda_device(what, gpu, tmp_path, monkeypatch, capsys):
    """The same curve and the same links, and no tensor on the wrong device."""
    args = [
        *what,
        "--style",
        "tiny",
        "--data",
        "tiny",
        "--limit",
        "12",
        "--batch-size",
        "4",
        "--steps",
        "2",
        "--dtype",
        "float32",
        "--keep-activations",
    ]
    run(monkeypatch, capsys, *args, "--device", "cpu", "--out", tmp_path / "cpu")
    with gpu:
        run(monkeypatch, capsys, *args, "--device", "cuda:0", "--out", tmp_path / "gpu")
    assert gpu.passed and curve(tmp_path / "cpu") == pytest.approx(
        curve(tmp_path / "gpu"), rel=1e-6
    )
    for file in (tmp_path / "cpu").glob("*.pt"):
        if file.name != "training.pt":
            ours, theirs = state(tmp_path / "cpu", file.name), state(tmp_path / "gpu", file.name)
            assert all(
                torch.allclose(ours[name].float(), theirs[name].float(), rtol=0.01) for name in ours
            )


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    root = tmp_path_factory.mktemp("released")
    checkpoints.make_released(root, "sequential_light")
    rows = [
        {
            "question": f"{n} + {n}?",
            "plan": f"Add {n} twice.",
            "refined_plan": f"So add {n} to {n}.",
            "answer": f"\\boxed{{{2 * n}}}",
        }
        for n in range(6)
    ]
    (root / "rows.json").write_text(json.dumps({"data": rows}))
    return root


def test_a_style_in_the_released_layout(released, tmp_path, monkeypatch, capsys):
    """Inner links of all roles for math, one for code, outer links for both:
    names as released, and --checkpoint loads them.
    """
    common = [
        "--style",
        "sequential_light",
        "--checkpoint",
        released / "RecursiveMAS",
        "--data",
        released / "rows.json",
        "--device",
        "cpu",
        "--steps",
        "1",
        "--batch-size",
        "2",
        "--max-length",
        "400",
    ]
    for role in "planner", "critic", "solver":
        run(monkeypatch, capsys, "inner", "--role", role, *common, "--out", tmp_path / role)
    run(
        monkeypatch,
        capsys,
        "inner",
        "--role",
        "planner",
        *common,
        "--task",
        "code",
        "--out",
        tmp_path / "planner",
    )
    for task in "math", "code":
        for more in (
            ["--latents", "teacher", "--init", "ridge"],
            ["--resume", "--latents", "teacher", "--init", "ridge"],
        ):
            run(
                monkeypatch,
                capsys,
                "outer",
                *common,
                "--task",
                task,
                "--out",
                tmp_path / "links",
                "--rounds",
                "2",
                *more,
            )
    released_names = {
        file.name
        for file in (released / "RecursiveMAS" / "Sequential-Light-Planner-Qwen3-1.7B").iterdir()
    }
    own = {"training(math).pt", "training(code).pt", "metrics(math).jsonl", "metrics(code).jsonl"}
    assert {file.name for file in (tmp_path / "planner").iterdir()} == released_names | own
    manifest = json.loads((tmp_path / "planner" / "innerlink_config.json").read_text())
    assert {task: entry["adapter.pt"] for task, entry in manifest["tasks"].items()} == {
        "math": "adapter(math).pt",
        "code": "adapter(code).pt",
    }
    assert all(
        (tmp_path / "planner" / name).exists() for name in manifest["tasks"]["math"].values()
    )
    manifest = json.loads(
        (
            released / "RecursiveMAS" / "Sequential-Light-Outerlinks" / "outerlink_config.json"
        ).read_text()
    )
    written = json.loads((tmp_path / "links" / "outerlink_config.json").read_text())
    assert written["tasks"] == manifest["tasks"] and written["format_version"] == 1
    for task in "math", "code":
        folders = (
            tmp_path
            if task == "math"
            else {"planner": tmp_path / "planner", "links": tmp_path / "links"}
        )
        system = minimas.load_mas_system(
            "sequential_light",
            checkpoints=folders
            if task == "math"
            else folders
            | {
                role: released / "RecursiveMAS" / checkpoints.RELEASED["sequential_light"][0][role]
                for role in ("critic", "solver")
            },
            device="cpu",
            task=task,
        )
        trained = state(tmp_path / "planner", f"training({task}).pt")["links"]
        assert torch.equal(
            system.agents["planner"].inner_link.proj1.weight,
            trained["link.proj1.weight"].bfloat16().float(),
        )
        trained = state(tmp_path / "links", f"training({task}).pt")["links"]
        assert torch.equal(
            system.outer_links["planner", "critic"].proj1.weight,
            trained["links.0.proj1.weight"].bfloat16().float(),
        )


def test_an_inner_link_for_a_base_model(tmp_path, monkeypatch, capsys, released):
    """A folder without links and with its template in tokenizer_config.json becomes an agent;
    weights are not copied.
    """
    base = checkpoints.make_agent(tmp_path / "base", "qwen3", hidden_size=48, adapters=[])
    template, config = base / "chat_template.jinja", base / "tokenizer_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"chat_template": template.read_text()})
    )
    template.unlink()
    out = tmp_path / "planner"
    run(
        monkeypatch,
        capsys,
        "inner",
        "--style",
        "sequential_light",
        "--role",
        "planner",
        "--checkpoint",
        f"planner={base}",
        "--data",
        released / "rows.json",
        "--steps",
        "2",
        "--device",
        "cpu",
        "--out",
        out,
    )
    assert (out / "model.safetensors").samefile(base / "model.safetensors")
    agent = minimas.agent.load_agent(out, "math", torch.device("cpu"), torch.float32)
    assert torch.isfinite(agent.think([["1 + 1?"]], 2)).all()


def test_bfloat16_agents_and_float32_links(released, tmp_path, monkeypatch, capsys):
    run(
        monkeypatch,
        capsys,
        "outer",
        "--style",
        "sequential_light",
        "--checkpoint",
        released / "RecursiveMAS",
        "--data",
        released / "rows.json",
        "--device",
        "cpu",
        "--dtype",
        "bfloat16",
        "--batch-size",
        "2",
        "--steps",
        "2",
        "--rounds",
        "2",
        "--latents",
        "rollout",
        "--latent-steps",
        "2",
        "--init",
        "checkpoint",
        "--plot",
        tmp_path / "loss.svg",
        "--out",
        tmp_path / "links",
    )
    kept = state(tmp_path / "links", "training(math).pt")
    moments = [entry["exp_avg"] for entry in kept["steppers"][0]["state"].values()]
    assert all(t.dtype == torch.float32 and t.abs().sum() > 0 for t in moments)
    assert "loss, outer of sequential_light" in xml.tostring(
        xml.parse(tmp_path / "loss.svg").getroot(), encoding="unicode"
    )


@pytest.mark.parametrize(
    "args, complaint",
    [
        (
            ["inner", "--style", "tiny"],
            "--role is None, expected the inner link's: one of planner, critic, solver",
        ),
        (["outer", "--role", "planner"], "--role means nothing for `train outer`"),
        (
            ["inner", "--role", "planner", "--init", "ridge"],
            "--init ridge gives an inner link weights on a scale",
        ),
        (["outer", "--style", "big"], "style 'big' is not known"),
        (["outer", "--lr", "0"], "--lr is 0.0, expected a finite number above 0"),
        (
            ["outer", "--supervise-all", "nan"],
            "--supervise-all is nan, expected a finite number from 0 up",
        ),
        (
            ["inner", "--role", "planner", "--mse", "inf"],
            "--mse is inf, expected a finite number from 0 up",
        ),
        (["outer", "--lr", "inf"], "--lr is inf, expected a finite number above 0"),
        (["outer", "--clip", "nan"], "--clip is nan, expected a finite number above 0"),
        (["outer", "--steps", "-1"], "--steps is -1, expected a whole number from 0 up"),
        (["outer", "--seed", str(10**17)], "--seed is 100000000000000000, expected a number below"),
        (["outer", "--batch-size", "-1"], "--batch-size is -1, expected a whole number from 1 up"),
        (["outer", "--style", "single"], "style single has no edges"),
        (["outer", "--inner-steps", "3"], "--inner-steps means nothing for `train outer`"),
        (["both"], "argument what: invalid choice: 'both'"),
        (
            ["outer", "--task", "search"],
            "task 'search' is not known, expected one of math, choice, code",
        ),
        (["outer", "--latents", "none"], "argument --latents: invalid choice: 'none'"),
        (["outer", "--data", "nothing.json"], "nothing.json"),
        (
            ["inner", "--role", "critic", "--mse", "-1"],
            "--mse is -1.0, expected a finite number from 0 up",
        ),
        (["outer", "--columns", "question"], "--columns has 'question'"),
        (
            ["inner", "--role", "critic", "--rounds", "2"],
            "--rounds means nothing for `train inner`",
        ),
        (
            ["inner", "--role", "critic", "--latents", "teacher"],
            "--latents means nothing for `train inner`",
        ),
        (["outer", "--mse", "1"], "--mse means nothing for `train outer`"),
        (["outer", "--out", ""], "--out: the path is empty: give one"),
        (["outer", "--plot", "loss.png"], "--plot: 'loss.png' ends in .png, expected .svg"),
        (["outer", "--plot", "/nowhere/loss.svg"], "--plot '/nowhere/loss.svg' cannot be written"),
        (["outer", "--checkpoint", "links=/nowhere", "--init", "checkpoint"], "/nowhere"),
    ],
)
def test_bad_options(args, complaint, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(
            monkeypatch,
            capsys,
            args[0],
            "--data",
            "tiny",
            "--limit",
            "4",
            "--out",
            tmp_path / "out",
            *args[1:],
        )
    err = capsys.readouterr().err
    assert (
        end.value.code == 2
        and complaint in err
        and "Traceback" not in err
        and not (tmp_path / "out").exists()
    )


def test_links_of_no_task_have_plain_names(tmp_path):
    link = InnerLink(8)
    save.save_inner_link(tmp_path, STYLES["mixture"], None, link)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter.pt", "adapter_config.json"}
    assert torch.equal(
        minimas.load.load_inner_link(tmp_path, "code", 8).proj1.weight, link.proj1.weight.bfloat16()
    )
    edges = STYLES["mixture"].edges
    save.save_outer_links(
        tmp_path / "links", STYLES["mixture"], None, {edge: OuterLink(8, 8) for edge in edges}
    )
    manifest = json.loads((tmp_path / "links" / "outerlink_config.json").read_text())
    assert [entry["filename"] for entry in manifest["adapters"]][:2] == [
        "Math-Summarizer-Outerlink.pt",
        "Code-Summarizer-Outerlink.pt",
    ]
    assert len(manifest["adapters"]) == 6 and manifest["paradigm"] == "mixture"


# A system from base models


def base_style(folder):
    """The file of a style whose agents are the tiny system's without any link, and data with questions and answers
    only.
    """
    for role in ("planner", "critic", "solver"):
        shutil.copytree(
            STYLES["tiny"].checkpoints[role],
            folder / role,
            ignore=shutil.ignore_patterns("adapter*"),
        )
    rows = [
        {
            "question": STYLES["tiny"].question(example.question.typed).text,
            "answer": example.text("solver", 3),
        }
        for example in load_examples("tiny", STYLES["tiny"], ("solver",), limit=40)
    ]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    order = ["planner", "critic", "solver"]
    (folder / "mine.json").write_text(
        json.dumps(
            {
                "order": order,
                "edges": [["planner", "critic"], ["critic", "solver"], ["solver", "planner"]],
                "agents": {role: role for role in order},
                "latent_steps": 3,
                "max_new_tokens": 8,
                "temperature": 0,
                "prompts": {
                    "system": "tiny",
                    "planner": "planner {question} notes",
                    "planner_with_feedback": "planner {question} notes {solver}",
                    "critic": "critic {question} notes {planner}",
                    "solver": "solver {question} notes {critic}",
                },
            }
        )
    )
    return [
        "system",
        "--style",
        folder / "mine.json",
        "--data",
        folder / "mine.jsonl",
        "--device",
        "cpu",
    ]


@pytest.mark.slow
def test_a_system_of_several_rounds(tmp_path, monkeypatch, capsys):
    """Texts for each round: what agents hear of later roles belongs to what they read."""
    run(
        monkeypatch,
        capsys,
        "system",
        "--style",
        "tiny",
        "--data",
        "tiny",
        "--limit",
        "150",
        "--device",
        "cpu",
        "--out",
        tmp_path / "out",
    )
    system = minimas.load_mas_system("tiny", checkpoints=tmp_path / "out", device="cpu")
    chains = questions("validation", 5)
    results = system.run([chain.question for chain in chains])
    assert sum(result.answer == str(chain.answer) for result, chain in zip(results, chains)) > 12, (
        "of 40, where chance finds 4"
    )


def links_of(folder):
    return {
        str(file.relative_to(folder)): torch.load(file)
        for file in sorted(folder.rglob("*.pt"))
        if not file.name.startswith("training")
    }


STEPS = ("--inner-steps", "2", "--steps", "2", "--rounds", "2", "--save-every", "1")


@pytest.mark.parametrize("steps", [pytest.param((), marks=pytest.mark.slow), STEPS], ids=str)
def test_a_system_in_one_command(steps, tmp_path, monkeypatch, capsys):
    """From base folders to a folder that --checkpoint takes. A command that was killed resumes to the same links, and
    in closed form each agent reads its texts once.
    """
    args, reads = [*base_style(tmp_path), *steps], []
    read = links.read_replies
    monkeypatch.setattr(
        links,
        "read_replies",
        lambda system, role, *more: (reads.append(role), read(system, role, *more))[1],
    )
    printed = run(monkeypatch, capsys, *args, "--out", tmp_path / "out").out
    assert (
        printed.splitlines()[-1]
        == f"system of {tmp_path / 'mine.json'}: --checkpoint {tmp_path / 'out'}"
    )
    assert sorted(reads) == ["critic", "planner", "solver"]
    system = minimas.load_mas_system(
        tmp_path / "mine.json", checkpoints=tmp_path / "out", device="cpu"
    )
    assert (
        len(system.run(["a: 7 +5"], rounds=2)[0].text) >= 0 and len(links_of(tmp_path / "out")) == 6
    )

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(links, "set_outer_link", killed)
        with pytest.raises(SystemExit):
            run(patch, capsys, *args, "--out", tmp_path / "again")
    assert not (tmp_path / "again" / "links" / "outerlink_config.json").exists()
    run(monkeypatch, capsys, *args, "--out", tmp_path / "again", "--resume")
    ours, theirs = links_of(tmp_path / "again"), links_of(tmp_path / "out")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert all(torch.equal(ours[name][key], theirs[name][key]) for key in ours[name]), name


def test_a_system_goes_on_where_it_was_ended(interruptible, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the last step of a stage ends the command, not the stage alone. The folder may then lie elsewhere, but
    the style may not send another number of latents.
    """
    args, whole, seen = [*base_style(tmp_path), *STEPS], loop.set_gradients, []

    def set_gradients(loss_at, step, *rest):
        seen.append(step)
        if len(seen) in (2, 8):  # the last step of the planner's link, and of the outer links
            signal.raise_signal(signal.SIGINT)
        return whole(loss_at, step, *rest)

    monkeypatch.setattr(loop, "set_gradients", set_gradients)
    for out, resume, taken in ("out", [], 2), ("out", ["--resume"], 8):
        with pytest.raises(SystemExit) as end:
            run(monkeypatch, capsys, *args, "--out", tmp_path / out, *resume)
        assert end.value.code == 130 and len(seen) == taken
    assert state(tmp_path / "out" / "links")["step"] == 2
    (tmp_path / "out").rename(tmp_path / "moved")
    run(monkeypatch, capsys, *args, "--out", tmp_path / "moved", "--resume")
    assert len(seen) == 8
    style = json.loads((tmp_path / "mine.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps(style | {"latent_steps": 4}))
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, *args, "--out", tmp_path / "moved", "--resume")
    assert "latent_steps: 3 there, 4 now" in capsys.readouterr().err


def test_a_setting_out_of_range_is_refused_before_any_link_is_made(tmp_path, monkeypatch, capsys):
    args = base_style(tmp_path)
    style = json.loads((tmp_path / "mine.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps(style | {"temperature": "0"}))
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, *args, "--out", tmp_path / "out")
    assert (
        "temperature is '0', expected a number" in capsys.readouterr().err
        and not (tmp_path / "out").exists()
    )


def test_a_system_is_not_written_over_its_agents(tmp_path, monkeypatch, capsys):
    args, before = [*base_style(tmp_path), "--ridge-rows", "4"], sorted(tmp_path.rglob("*"))
    for out in tmp_path / "critic", tmp_path / "solver" / "made", tmp_path:
        with pytest.raises(SystemExit) as end:
            run(monkeypatch, capsys, *args, "--out", out)
        err = capsys.readouterr().err
        assert (
            end.value.code == 2
            and f"--out {out} is, holds or lies in the folder of " in err
            and err.count("\n") == 1
        )
    assert sorted(tmp_path.rglob("*")) == before


def test_links_that_the_writer_never_hears(tmp_path, monkeypatch, capsys):
    args = base_style(tmp_path)
    style = json.loads((tmp_path / "mine.json").read_text())
    prompts = style["prompts"] | {"critic": "critic {question}", "solver": "solver {question}"}
    (tmp_path / "mine.json").write_text(
        json.dumps(style | {"edges": [["solver", "planner"]], "prompts": prompts})
    )
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, capsys, *args, "--out", tmp_path / "out", "--steps", "1", "--rounds", "1")
    assert (
        end.value.code == 2
        and "nothing that a link sends reaches the last agent" in capsys.readouterr().err
    )


def test_a_full_disk(tmp_path):
    """torch has no OSError of its own for it."""
    resource = pytest.importorskip("resource")
    link, before = InnerLink(64), resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
        with pytest.raises(OSError, match="adapter.pt.partial cannot be written whole"):
            save.save_link(link, tmp_path / "adapter.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.iterdir())
