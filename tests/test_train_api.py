"""Training from Python: what the commands call, the user's own objectives, and what is refused."""

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import minimas
from minimas import InputError
from minimas.agent import load_agent
from minimas.evaluate import evaluate
from minimas.link import InnerLink, OuterLink
from minimas.prompts import Question
from minimas.runs.lock import Lock, held
from minimas.styles import STYLES
from minimas.system import System
from minimas.train import (
    TrainSettings,
    folders,
    links,
    load_examples,
    train_inner,
    train_outer,
    train_system,
)
from minimas.train import __main__ as command
from minimas.train.examples import TrainExample
from minimas.train.losses import next_token_loss
from minimas.train.settings import TRAININGS, trainings_of

ROOT = Path(__file__).parent.parent
EDGES = list(STYLES["tiny"].edges)
FEW = TrainSettings(steps=3, batch_size=4, rounds=2, latent_steps=2, init="random")


@pytest.fixture(scope="module")
def loaded():
    return minimas.load_mas_system("tiny", device="cpu")


@pytest.fixture
def system(loaded):
    """The tiny system, whose links a test may change."""
    inner = {role: agent.inner_link for role, agent in loaded.agents.items()}
    outer = dict(loaded.outer_links)
    yield loaded
    for role, link in inner.items():
        loaded.agents[role].inner_link = link
    loaded.outer_links.update(outer)


@pytest.fixture(scope="module")
def examples():
    return load_examples("tiny", "tiny", limit=12)


def run_command(monkeypatch, *args):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["train", *map(str, args)])
        command.main()


def assert_same_files(ours, theirs, but=()):
    """Links and states bit for bit; manifests byte for byte."""
    names = {file.relative_to(ours) for file in ours.rglob("*") if file.is_file()}
    assert names == {file.relative_to(theirs) for file in theirs.rglob("*") if file.is_file()}
    for name in names:
        if name.suffix == ".pt":
            assert_same(torch.load(ours / name), torch.load(theirs / name))
        elif name.suffix != ".jsonl":
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    return names


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def losses_of(train, *args, **given):
    """The losses of a training that writes nothing."""
    losses = []
    callback = lambda metrics: losses.append(metrics["loss"])
    train(*args, progress=False, callback=callback, **given)
    return losses


# The same as the command


def test_importing_it_is_cheap():
    code = "import sys; from minimas.train import TrainSettings, load_examples; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


COMMON = ["--style", "tiny", "--data", "tiny", "--device", "cpu", "--limit", "12"]
COMMON += ["--batch-size", "4", "--steps", "3"]


@pytest.mark.parametrize(
    "init",
    ["checkpoint", *(pytest.param(init, marks=pytest.mark.slow) for init in ("ridge", "random"))],
)
def test_outer_links_are_those_of_the_command(
    init, system, examples, tmp_path, monkeypatch, capsys
):
    options = ["--rounds", "2", "--latent-steps", "2", "--init", init]
    run_command(monkeypatch, "outer", *COMMON, *options, "--out", tmp_path / "command")
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["notebook", "--unknown"])
    links = train_outer(system, examples, replace(FEW, init=init), out=tmp_path / "python")
    out, err = capsys.readouterr()
    assert out == "" and "loss=" in err
    assert list(links) == EDGES and all(links[edge] is system.outer_links[edge] for edge in EDGES)
    names = assert_same_files(tmp_path / "python", tmp_path / "command")
    assert len(names) == 6
    ours = torch.load(tmp_path / "python" / "Planner-Critic-Outerlink.pt")
    weights = links["planner", "critic"].proj1.weight
    assert torch.equal(ours["proj1.weight"], weights.bfloat16())


def test_an_inner_link_is_that_of_the_command(system, tmp_path, monkeypatch, capsys):
    options = ["--role", "critic", "--mse", "0.1", "--out", tmp_path / "command"]
    run_command(monkeypatch, "inner", *COMMON, *options)
    assert "3/3" in capsys.readouterr().err
    settings = TrainSettings(steps=3, batch_size=4, mse=0.1)
    examples = load_examples("tiny", "tiny", limit=12)
    link = train_inner(
        system, "critic", examples, settings, out=tmp_path / "python", progress=False
    )
    assert link is system.agents["critic"].inner_link and "3/3" not in capsys.readouterr().err
    assert len(assert_same_files(tmp_path / "python", tmp_path / "command")) == 10


@pytest.mark.slow
def test_a_system_is_that_of_the_command(tmp_path, monkeypatch, capsys):
    options = ["--rounds", "2", "--inner-steps", "2", "--out", tmp_path / "command"]
    run_command(monkeypatch, "system", *COMMON, *options)
    capsys.readouterr()
    settings = TrainSettings(steps=3, batch_size=4, rounds=2, inner_steps=2)
    metrics = []
    system = train_system(
        "tiny", "tiny", settings, out=tmp_path / "python", limit=12, device="cpu", progress=False,
        callback=metrics.append,
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert out == err == ""
    assert_same_files(tmp_path / "python", tmp_path / "command")
    assert [(one["what"], one["role"], one["step"]) for one in metrics] == [
        *(("inner", role, step) for role in STYLES["tiny"].order for step in (1, 2)),
        *(("outer", None, step) for step in (1, 2, 3)),
    ]
    again = minimas.load_mas_system("tiny", checkpoints=tmp_path / "python", device="cpu")
    for edge, link in system.outer_links.items():
        assert_same(dict(link.state_dict()), dict(again.outer_links[edge].state_dict()))
    assert not list(tmp_path.rglob("*.lock"))


def test_a_training_goes_on(system, examples, tmp_path):
    """After a Ctrl-C in the middle, with a system that has been loaded again."""
    settings = replace(FEW, steps=5, save_every=2)

    def interrupted(metrics):
        if metrics["step"] == 3:
            raise KeyboardInterrupt

    train_outer(system, examples, settings, out=tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        train_outer(system, examples, settings, out=tmp_path / "o", progress=False, callback=interrupted)  # fmt: skip
    with pytest.raises(InputError, match="already holds a training: continue it with --resume"):
        train_outer(system, examples, settings, out=tmp_path / "o")
    taken = []
    resumed = dict(out=tmp_path / "o", resume=True, progress=False)
    train_outer(system, examples, settings, **resumed, callback=lambda one: taken.append(one["step"]))  # fmt: skip
    assert taken == [3, 4, 5]
    assert not system.agents["solver"].model._forward_pre_hooks, "positions are counted no more"
    assert_same_files(tmp_path / "o", tmp_path / "whole")
    with pytest.raises(InputError, match="holds another run .*lr: 0.0005 there, 0.1 now"):
        train_outer(system, examples, replace(settings, lr=0.1), **resumed)
    train_inner(system, "critic", examples, TrainSettings(steps=1), progress=False)
    before = dict(system.outer_links)
    with pytest.raises(InputError, match="holds another run .*weights_hash"):
        train_outer(system, examples, settings, **resumed)
    assert system.outer_links == before, "the links of before"


def test_weights_at_a_seed_stay_what_they_were(system, examples):
    """The losses of version 0.3.0: the same new links, and the same order of the rows."""
    outer = losses_of(train_outer, system, examples, FEW)
    assert outer == pytest.approx([3.60966, 3.61305, 4.13908], rel=1e-4)
    inner = losses_of(train_inner, system, "critic", examples, TrainSettings(steps=3, batch_size=4))
    assert inner == pytest.approx([1.03601, 1.03182, 1.01147], rel=1e-4)


def test_an_output_that_another_run_holds(system, examples, tmp_path):
    with held([Lock("--out", tmp_path, folder=True)]):
        with pytest.raises(InputError, match="is being written by process"):
            train_outer(system, examples, FEW, out=tmp_path)
        with pytest.raises(InputError, match="is being written by process"):
            train_system("tiny", "tiny", out=tmp_path, device="cpu")
    with held([Lock("--out", tmp_path, folder=True, lent=True)]):
        train_outer(system, examples, replace(FEW, steps=0), out=tmp_path, progress=False)
        assert (tmp_path / "training.lock").exists(), "its holder has it still"
    assert not (tmp_path / "training.lock").exists()


# In memory


def test_nothing_but_the_links_is_changed(system, examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [block for agent in system.agents.values() for block in agent.model.layers]
    torch.manual_seed(3)
    generator = torch.get_rng_state()
    old = dict(system.outer_links)
    losses = losses_of(train_outer, system, examples[:4], replace(FEW, steps=6, lr=5e-3, warm_up=1))
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(torch.get_rng_state(), generator)
    assert not list(tmp_path.iterdir())
    for edge, link in system.outer_links.items():
        assert isinstance(link, OuterLink) and link is not old[edge]
        assert not any(p.requires_grad or p.grad is None for p in link.parameters())
    for block in blocks:
        assert "forward" not in vars(block), "activation checkpointing is over"
    for agent in system.agents.values():
        assert not agent.model._forward_pre_hooks
        assert all(p.grad is None for p in agent.model.parameters())
    assert len(system.run(["7 +5"], rounds=2)) == 1


def test_from_the_links_that_are_there(system, examples):
    """Trained on, in place."""
    old = dict(system.outer_links)
    before = old["planner", "critic"].proj1.weight.clone()
    train_outer(system, examples, replace(FEW, init="checkpoint"), progress=False)
    after = system.outer_links["planner", "critic"].proj1.weight
    assert system.outer_links == old and not torch.equal(after, before)
    with torch.no_grad():
        after.copy_(before)


def test_base_models(tmp_path):
    """Agents without a link get one; rows need a question and an answer."""
    for role in STYLES["tiny"].order:
        shutil.copytree(
            STYLES["tiny"].checkpoints[role],
            tmp_path / role,
            ignore=shutil.ignore_patterns("adapter*"),
        )
    style = {
        "order": ["planner", "solver"],
        "edges": [["planner", "solver"]],
        "agents": {"planner": "planner", "solver": "solver"},
        "prompts": {"planner": "planner {question} notes", "solver": "solver {planner} notes"},
        "latent_steps": 2,
    }
    (tmp_path / "mine.json").write_text(json.dumps(style))
    system = minimas.load_mas_system(tmp_path / "mine.json", device="cpu")
    rows = [{"question": "a+5", "answer": "a+5=2."}, {"question": "b*3", "answer": "b*3=6."}] * 4
    with pytest.raises(InputError, match="there is no inner link of planner, which latents need"):
        train_outer(system, rows, FEW)
    assert system.outer_links == {}
    with pytest.raises(InputError, match="no inner link to start from"):
        train_inner(system, "planner", rows, TrainSettings(steps=0, init="checkpoint"))
    for role in system.agents:
        link = train_inner(system, role, rows, TrainSettings(steps=0, init="ridge"), progress=False)
        assert isinstance(link, InnerLink) and link is system.agents[role].inner_link
    links = train_outer(system, rows, TrainSettings(steps=2), progress=False)
    assert list(links) == [("planner", "solver")]
    assert system.run(["a+5"], rounds=1, max_new_tokens=2)[0].new_tokens > 0


# What is refused


CASES = [
    (dict(settings=TrainSettings(lr=0.0)), "--lr is 0.0, expected a finite number above 0"),
    (dict(settings=TrainSettings(steps=1.5)), "--steps is 1.5, expected a whole number"),
    (dict(settings=TrainSettings(steps="3")), "--steps is '3', expected a whole number"),
    (dict(settings=TrainSettings(lr="high")), "--lr is 'high', expected a number"),
    (
        dict(settings=TrainSettings(latents="x")),
        "--latents is 'x', expected one of rollout, teacher",
    ),
    (dict(settings=TrainSettings(mse=1.0)), "--mse means nothing for `train outer`"),
    (dict(settings=TrainSettings(seed=10**17)), "--seed is 10+, expected a number below"),
    (dict(settings={"steps": 1}), "settings is {'steps': 1}, expected TrainSettings, such as"),
    (
        dict(objective=3),
        "objective is 3, expected a function of turns, states, tokens and examples",
    ),
    (dict(resume=True), "resume is given, but no folder to resume from"),
    (dict(examples=[]), "examples has no row with a question and a text"),
    (dict(examples=None), "examples is None, expected a list of rows"),
    (dict(examples=["7 +5"]), "examples row 1 is '7 .5', expected a dict with question, answer"),
    (dict(examples=[{"question": "7 +5"}]), "examples row 1 has no column planner or plan for"),
    (dict(examples="nothing.json"), "nothing.json"),
    (dict(callback=3), "callback is 3, expected a function of one dict: leave it out"),
    (
        dict(examples=[TrainExample("7 +5", {"solver": ("2",)})]),
        "example 1 has the question '7 .5', expected a Question: give style.question",
    ),
    (
        dict(examples=[TrainExample(Question("7 +5"), ["2"])]),
        r"example 1 has the texts \['2'\], expected {role",
    ),
    (
        dict(objective=lambda *_: 0, settings=replace(FEW, supervise_all=1.0)),
        "supervise_all is the weight of a cross-entropy that an objective takes the place of",
    ),
    (
        dict(objective=lambda turns, states, *_: states, settings=FEW),
        r"the objective returned \(4, \d+, 112\), expected a tensor with one number",
    ),
    (
        dict(objective=lambda *_: torch.zeros(()), settings=FEW),
        "the objective depends on no link",
    ),
]


@pytest.mark.parametrize("given, complaint", CASES, ids=[complaint[:30] for _, complaint in CASES])
def test_bad_input(given, complaint, system, examples):
    before = dict(system.outer_links)
    given = {"examples": examples, "settings": None, "progress": False} | given
    with pytest.raises(InputError, match=complaint):
        train_outer(system, given.pop("examples"), given.pop("settings"), **given)
    assert system.outer_links == before


def test_what_is_no_system(examples):
    with pytest.raises(InputError, match="system is 'tiny', expected a System: load one with"):
        train_inner("tiny", "planner", examples)
    with pytest.raises(InputError, match="system is None, expected a System: load one with"):
        train_outer(None, examples)


def test_none_is_no_callback(system, examples, tmp_path):
    one_step = replace(FEW, steps=1)
    train_outer(system, examples, one_step, progress=False, callback=None)
    inner = TrainSettings(steps=1, batch_size=4)
    train_inner(system, "planner", examples, inner, progress=False, callback=None)
    none = TrainSettings(ridge_rows=4)
    made = train_system(
        "tiny", examples, none, out=tmp_path / "made", progress=False, callback=None
    )
    assert list(made.outer_links) == EDGES
    with pytest.raises(InputError, match="callback is 'x', expected a function of one dict"):
        train_system("tiny", examples, none, out=tmp_path / "other", callback="x")


def test_rows_of_one_s_own_in_a_released_style(system, examples):
    """Columns with the roles' names give the links that the same texts give under the released names."""
    notes = {"planner": "a+5=2.", "critic": "b*3=6.", "solver": "b*3\\boxed{6}"}
    asked = {"question": "7 +5 *3"}
    released = {
        "plan": notes["planner"],
        "refined_plan": notes["critic"],
        "answer": notes["solver"],
    }
    settings = TrainSettings(steps=0)
    own = train_outer(system, [asked | notes], settings, progress=False)
    expected = train_outer(system, [asked | released], settings, progress=False)
    for edge, link in own.items():
        assert_same(dict(link.state_dict()), dict(expected[edge].state_dict()))
    answered = [asked | {"answer": notes["solver"]}]
    with pytest.raises(InputError, match=r"load_examples\(rows, style, columns={'planner': 'COL"):
        train_outer(system, answered, settings, progress=False)


def test_a_callback_ends_a_training_that_goes_on(system, examples, tmp_path):
    """As the docs say: the state of the step is saved, and the training resumes to the same weights."""

    def stop(metrics):
        if metrics["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    uncut = train_outer(system, examples, FEW, progress=False)
    with pytest.raises(KeyboardInterrupt):
        train_outer(system, examples, FEW, out=tmp_path, progress=False, callback=stop)
    assert torch.load(tmp_path / "training.pt")["step"] == 2
    steps = []
    note = lambda metrics: steps.append(metrics["step"])
    resumed = train_outer(
        system, examples, FEW, out=tmp_path, resume=True, progress=False, callback=note
    )
    assert steps == [3]
    for edge, link in resumed.items():
        assert_same(dict(link.state_dict()), dict(uncut[edge].state_dict()))
    longer = replace(FEW, steps=5)
    with pytest.raises(InputError, match="steps: 3 there, 5 now"):
        train_outer(system, examples, longer, out=tmp_path, resume=True, progress=False)
    again = minimas.load_mas_system("tiny", checkpoints={"links": tmp_path}, device="cpu")
    train_outer(again, examples, replace(FEW, init="checkpoint"), progress=False)


def test_an_objective_that_fails(system, examples):
    """Its error comes through, and the system has the links of before."""
    before = dict(system.outer_links)
    with pytest.raises(ZeroDivisionError):
        train_outer(system, examples, FEW, objective=lambda *_: 1 / 0, progress=False)
    assert system.outer_links == before
    assert all("forward" not in vars(link) for link in before.values())
    assert not system.agents["solver"].model._forward_pre_hooks


def test_examples_without_a_text(system, examples):
    answers = load_examples("tiny", "tiny", roles=["solver"], limit=3)
    train_outer(system, answers, replace(FEW, steps=1), progress=False)
    with pytest.raises(
        InputError, match="example 1 has no text for planner, and this training needs"
    ):
        train_outer(system, answers, replace(FEW, init="ridge"))
    with pytest.raises(InputError, match="role 'judge' is not known, expected one of planner, "):
        load_examples("tiny", "tiny", roles=["judge"])
    with pytest.raises(
        InputError, match="--role is 'judge', expected the inner link's: one of planner"
    ):
        train_inner(system, "judge", examples)


def test_the_fast_form_is_refused(examples):
    fast = minimas.load_mas_system("tiny", device="cpu", fast=True)
    with pytest.raises(InputError, match="in its fast form, .*: load it with fast=False"):
        train_outer(fast, examples, FEW)
    with pytest.raises(InputError, match="in its fast form"):
        train_inner(fast, "critic", examples)


def test_a_system_without_offload(loaded, examples, monkeypatch):
    monkeypatch.setattr(loaded.agents["critic"], "offload", True)
    with pytest.raises(InputError, match="the weights of critic are offloaded"):
        train_outer(loaded, examples, FEW)


def test_an_agent_of_memory_has_no_files(system, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(system.agents["critic"], "source", None)
    with pytest.raises(InputError, match="the agent of critic was made in memory"):
        train_inner(system, "critic", examples, TrainSettings(steps=1), out=tmp_path / "o")
    assert not (tmp_path / "o").exists()
    train_inner(system, "critic", examples, TrainSettings(steps=1), progress=False)


# Objectives


def test_an_objective_sees_every_turn(system, examples):
    seen = []

    def objective(turns, states, tokens, batch):
        seen.append(([(turn.round, turn.role) for turn in turns], len(batch)))
        for turn in turns[:-1]:
            assert turn.states.shape[:2] == (4, 2)
            for message in turn.sent.values():
                assert message.requires_grad
        assert turns[-1].answers and states.shape[:2] == tokens.shape
        return next_token_loss(system.agents["solver"], states, tokens)

    own = losses_of(train_outer, system, examples, FEW, objective=objective)
    roles = STYLES["tiny"].order
    assert seen == [([(r, role) for r in (1, 2) for role in roles], 4)] * 3
    assert own == losses_of(train_outer, system, examples, FEW), "it is the usual objective"


def snippet(page, words):
    """The snippet of a page that has these words."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = [
        code for code in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S) if words in code
    ]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    "objective", [pytest.param("steady", marks=pytest.mark.slow), "as_after_text"]
)
def test_the_objectives_of_the_docs(objective, capsys):
    code = snippet("extending.md", "objective=objective")
    names = {}
    code = code.replace("in steady, as_after_text", f"in ({objective},)").replace(
        "steps=8", "steps=5"
    )
    exec(code, names)
    losses = names["losses"]
    assert len(losses) == 5 and losses[-1] < 0.5 * losses[0], losses


def test_the_snippet_of_the_docs(tmp_path, monkeypatch):
    """With fewer steps and rows, and the style that extending.md writes, of other agents."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    style = json.loads(re.search(r"^```json\n(.*?)^```$", text, re.M | re.S)[1])
    planner = str(STYLES["tiny"].checkpoints["planner"])
    style["agents"] = dict.fromkeys(style["agents"], planner)
    (tmp_path / "mine.json").write_text(json.dumps(style))
    monkeypatch.chdir(tmp_path)
    code = re.sub(r"(steps|limit|batch_size)=\d+", r"\1=2", snippet("training.md", "train_system("))
    names = {}
    exec(code, names)
    assert (tmp_path / "runs" / "links" / "training.pt").exists()
    assert list(names["system"].outer_links) == [("thinker", "writer"), ("writer", "thinker")]
    assert set(names["links"]) == set(EDGES)


# The command


def helped(monkeypatch, capsys, *args):
    with pytest.raises(SystemExit) as end:
        run_command(monkeypatch, *args, "--help")
    assert not end.value.code
    return capsys.readouterr().out


OF_ONE = {  # options that some trainings have no use for
    "--role": ("inner",),
    "--mse": ("inner", "system"),
    "--init": ("inner", "outer"),
    "--rounds": ("outer", "system"),
    "--latents": ("outer", "system"),
    "--inner-steps": ("system",),
}


@pytest.mark.parametrize("what", TRAININGS)
def test_help_lists_what_a_training_takes(what, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    shown = helped(monkeypatch, capsys, what)
    assert helped(monkeypatch, capsys, "--style", "tiny", what) == shown
    listed = set(re.findall(r"^  (?:-h, )?(--[\w-]+)", shown, re.M))
    assert {"--style", "--data", "--out", "--lr", "--seed", "--save-every"} <= listed
    for option, trainings in OF_ONE.items():
        assert (option in listed) == (what in trainings)
    titles = re.findall(r"^(\S.*):$", shown, re.M)
    groups = ["which system", "what is trained, and on what", "how links learn", "files", "help"]
    assert titles == groups
    assert len(shown.splitlines()) <= 100 and max(map(len, shown.splitlines())) <= 100


def test_help_of_the_command_names_the_trainings(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    shown = helped(monkeypatch, capsys)
    assert "{inner,outer,system} --data DATA --out OUT" in shown
    for option in OF_ONE:
        assert option not in shown
    assert all(f"  {what} " in shown for what in TRAININGS) and "inner --help" in shown


def test_every_setting_is_an_option_with_its_default(monkeypatch):
    for what in TRAININGS:
        monkeypatch.setattr(sys, "argv", ["train", "--data", "tiny", what, "--out", "o"])
        args = command.arguments()
        for one in fields(TrainSettings):
            assert getattr(args, one.name) == one.default
    assert {name for one in fields(TrainSettings) for name in trainings_of(one)} == set(TRAININGS)


@pytest.mark.parametrize(
    "args, complaint",
    [
        (["--mse", "1", "outer"], "--mse means nothing for `train outer`: leave it out"),
        (["outer", "--inner-steps", "1"], "--inner-steps means nothing for `train outer`"),
        (["system", "--role", "critic"], "--role means nothing for `train system`"),
        (["system", "--init", "random"], "--init means nothing for `train system`"),
        (["outer", "--limit", "0"], "--limit is 0, expected a whole number from 1 up"),
    ],
)
def test_options_before_and_after(args, complaint, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=complaint):
        run_command(monkeypatch, "--data", "tiny", *args, "--out", tmp_path / "o")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_records_of_a_trained_system_would_name_other_links(tmp_path):
    """Its files are those that it was loaded from, so that `out` is refused."""
    system = minimas.load_mas_system("tiny", device="cpu")
    examples = load_examples("tiny", "tiny", limit=8)
    train_outer(system, examples, TrainSettings(steps=0), progress=False)
    assert evaluate(system, "tiny", limit=4, progress=False).rows
    with pytest.raises(InputError, match="trained after it was loaded"):
        evaluate(system, "tiny", limit=4, progress=False, out=tmp_path / "r.jsonl")
    assert not list(tmp_path.iterdir())


# Faults that a cold reader found


@pytest.mark.parametrize("failing", ["callback", "resume"])
def test_an_error_leaves_links_and_weights_as_they_were(system, examples, tmp_path, failing):
    """Also those of init="checkpoint", which learn in place."""
    system.trained = False  # whatever other tests did
    links = [*system.outer_links.values(), system.agents["planner"].inner_link]
    links[0].bfloat16()
    before = [{name: w.clone() for name, w in link.state_dict().items()} for link in links]

    def broken(metrics):
        if metrics["step"] == 2:
            raise RuntimeError("broken")

    settings = replace(FEW, init="checkpoint")
    if failing == "callback":
        with pytest.raises(RuntimeError, match="broken"):
            train_outer(system, examples, settings, progress=False, callback=broken)
        inner = TrainSettings(steps=3, batch_size=4, init="checkpoint")
        with pytest.raises(RuntimeError, match="broken"):
            train_inner(system, "planner", examples, inner, progress=False, callback=broken)
    else:
        (tmp_path / "training.pt").write_bytes(b"damaged")
        with pytest.raises(InputError, match="is damaged"):
            train_outer(system, examples, settings, out=tmp_path, resume=True, progress=False)
    for link, weights in zip(links, before, strict=True):
        assert_same(dict(link.state_dict()), weights)
        assert {name: w.dtype for name, w in link.state_dict().items()} == {
            name: w.dtype for name, w in weights.items()
        }
        assert not any(weight.requires_grad for weight in link.parameters())
    assert not system.trained, "its files still have these links"


def test_a_system_that_was_trained_says_what_its_records_depend_on(tmp_path, capsys):
    """The file goes on with the System that is loaded from the folder."""
    settings = TrainSettings(rounds=1, latent_steps=2, ridge_rows=4)
    options = dict(rounds=1, channel="latent", out=tmp_path / "r.jsonl", progress=False)
    system = train_system(
        "tiny", "tiny", settings, out=tmp_path / "made", limit=4, device="cpu", progress=False
    )
    found = evaluate(system, "tiny", limit=2, **options)
    again = minimas.load_mas_system("tiny", checkpoints=tmp_path / "made", device="cpu")
    assert evaluate(again, "tiny", limit=2, **options).records == found.records
    train_outer(system, "tiny", TrainSettings(steps=0, ridge_rows=4), progress=False)
    with pytest.raises(InputError, match="trained after it was loaded"):
        evaluate(system, "tiny", limit=2, **options)


def test_a_training_in_the_folder_of_its_agent_sees_other_weights(tmp_path, examples):
    """It leaves out what it writes itself: the link, its manifest and its state."""
    own = shutil.copytree(STYLES["tiny"].checkpoints["planner"], tmp_path / "planner")
    (own / "adapter.pt").rename(tmp_path / "adapter.pt")

    def train(**more):
        agent = load_agent(own, "math", torch.device("cpu"), torch.float32, untrained=True)
        system = System(STYLES["tiny"], {"planner": agent}, {})
        settings = TrainSettings(steps=2, batch_size=2)
        train_inner(system, "planner", examples, settings, out=own, progress=False, **more)

    train()
    train(resume=True)
    weights = (own / "model.safetensors").read_bytes()
    middle = len(weights) // 2
    changed = weights[:middle] + bytes([weights[middle] ^ 1]) + weights[middle + 1 :]
    (own / "model.safetensors").write_bytes(changed)
    with pytest.raises(InputError, match="holds another run .*checkpoint_files"):
        train(resume=True)


def test_a_change_in_the_middle_of_a_weight_is_seen():
    linear = torch.nn.Linear(1 << 10, 1 << 11)
    before = links.hash_of_weights([linear])
    with torch.no_grad():
        linear.weight[1000] += 1
    assert links.hash_of_weights([linear]) != before


@pytest.mark.parametrize("shape", [(4096, 4096), (1 << 20, 4)])
def test_a_change_of_one_column_of_a_large_weight_is_seen(shape):
    weights = torch.nn.ParameterDict({"w": torch.zeros(shape)})
    hashes = {links.hash_of_weights([weights])}
    columns = (0, 1, 2, shape[1] // 2 + 1, shape[1] - 1)
    for column in set(columns):
        with torch.no_grad():
            weights["w"][:, column] = 1
        hashes.add(links.hash_of_weights([weights]))
        with torch.no_grad():
            weights["w"][:, column] = 0
    assert len(hashes) == 1 + len(set(columns))


def test_one_process_of_several_shows_bars(system, examples, monkeypatch):
    training = links.Training("outer", None, system, None, examples)
    assert training.progress
    monkeypatch.setattr(links, "rank_and_world", lambda: (1, 2))
    training = links.Training("outer", None, system, None, examples)
    assert not training.progress


@pytest.mark.parametrize("inner_steps", [0, 1])
def test_a_system_needs_rows_that_are_not_held_out(tmp_path, inner_steps):
    settings = TrainSettings(held_out=5, inner_steps=inner_steps)
    with pytest.raises(InputError, match="--held-out is 5, and there are 5 rows"):
        train_system("tiny", "tiny", settings, out=tmp_path / "out", limit=5, progress=False)
    assert not (tmp_path / "out").exists()


def test_an_objective_may_call_a_model_by_keywords(system, examples, tmp_path):
    def objective(turns, states, tokens, examples):
        model = system.agents["solver"].model
        x = states[:1, :1].detach()
        positions = torch.zeros(1, 1, dtype=torch.long)
        model(x, positions=positions, cache=model.make_cache(1, 1), last=1)
        return states.square().mean()

    train_outer(
        system, examples, replace(FEW, steps=1), out=tmp_path, objective=objective, progress=False
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(keep_activations="no"), "--keep-activations is 'no', expected True or False"),
        (dict(date=5), "--date is 5, expected a text"),
        (dict(lr=True), "--lr is True, expected a number"),
    ],
    ids=str,
)
def test_settings_of_another_type(system, examples, given, message):
    with pytest.raises(InputError, match=message):
        train_outer(system, examples, TrainSettings(**given), progress=False)


def test_numbers_of_numpy(system, examples, tmp_path):
    settings = replace(FEW, steps=np.int64(1), lr=np.float32(1e-3))
    train_outer(system, examples, settings, out=tmp_path, progress=False)
    assert (tmp_path / "training.pt").exists()


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one(limit):
    with pytest.raises(InputError, match=f"--limit is {limit}, expected a whole number from 1 up"):
        load_examples("tiny", "tiny", limit=limit)


def test_texts_that_are_no_tuple(system, examples):
    wrong = [*examples, replace(examples[0], texts={"solver": "c+5=7"})]
    with pytest.raises(InputError, match=r"has the text 'c\+5=7' for solver, expected a tuple"):
        train_outer(system, wrong, replace(FEW, init="random"), progress=False)


def test_what_was_read_is_let_go_of(system, examples, monkeypatch):
    known = []
    learn = links.learn
    monkeypatch.setattr(
        links,
        "learn",
        lambda training, *rest: (known.append(dict(training.known)), learn(training, *rest)),
    )
    train_outer(system, examples, replace(FEW, steps=1, init="ridge"), progress=False)
    assert known == [{}]


def test_a_damaged_manifest_is_found_before_training(tmp_path):
    out = tmp_path / "links"
    out.mkdir()
    for text in "{", "[]", '{"tasks": []}':
        (out / "outerlink_config.json").write_text(text)
        with pytest.raises(InputError, match="outerlink_config.json"):
            folders.check_folder(out, inner=False, task="math", resume=False)
    (out / "outerlink_config.json").write_text('{"tasks": {}}')
    folders.check_folder(out, inner=False, task="math", resume=False)


def test_the_plot_of_a_system_has_the_curves_of_all_parts(tmp_path, monkeypatch, capsys):
    plot = tmp_path / "loss.svg"
    options = ["--style", "tiny", "--data", "tiny", "--device", "cpu", "--limit", "12"]
    options += ["--inner-steps", "2", "--steps", "2", "--latent-steps", "2", "--rounds", "1"]
    run_command(monkeypatch, "system", *options, "--out", tmp_path / "out", "--plot", plot)
    drawn = plot.read_text()
    for part in "inner of tiny, planner", "inner of tiny, solver", "outer of tiny, links":
        assert f"loss, {part}" in drawn
    capsys.readouterr()
    out = tmp_path / "without"
    without = [*options, "--steps", "0", "--inner-steps", "0"]
    run_command(monkeypatch, "system", *without, "--out", out, "--plot", tmp_path / "none.svg")
    assert "is not written: no step was taken" in capsys.readouterr().err
    assert not (tmp_path / "none.svg").exists()


def test_gradients_that_the_caller_turned_off(system, examples):
    settings = replace(FEW, steps=2)
    expected = losses_of(train_outer, system, examples, settings)
    with torch.no_grad():
        assert losses_of(train_outer, system, examples, settings) == expected
    with torch.inference_mode():
        assert losses_of(train_outer, system, examples, settings) == expected


def test_outer_links_do_not_go_among_the_agents(examples, tmp_path, monkeypatch, capsys):
    """Here into the folder of the system that they start from."""
    shutil.copytree(Path(minimas.__file__).parent / "tiny", tmp_path / "ck")
    before = sorted(tmp_path.rglob("*"))
    args = [*COMMON, "--checkpoint", tmp_path / "ck", "--init", "random", "--out", tmp_path / "ck"]
    with pytest.raises(InputError, match="is, holds or lies in the folder of planner"):
        run_command(monkeypatch, "outer", *args)
    system = minimas.load_mas_system("tiny", checkpoints=tmp_path / "ck", device="cpu")
    with pytest.raises(InputError, match="is, holds or lies in the folder of planner"):
        train_outer(system, examples, FEW, out=tmp_path / "ck")
    assert sorted(tmp_path.rglob("*")) == before


def test_more_than_can_be_counted(system, examples):
    with pytest.raises(InputError, match=r"--batch-size is 10+, expected at most 1000000000"):
        train_outer(system, examples, TrainSettings(batch_size=10**20), progress=False)
