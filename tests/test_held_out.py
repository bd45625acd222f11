"""What a training measures on rows that it leaves out, and what that leaves as it was."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch

import minimas
from minimas.agent import left_pad
from minimas.commands.failures import command
from minimas.common import InputError
from minimas.hear import before_each
from minimas.link import OuterLink
from minimas.settings import Settings
from minimas.train import TrainSettings, links, load_examples, loop, train_outer, train_system
from minimas.train import __main__ as module
from minimas.train.held_out import HeldOut, losses_by_hearing, without
from minimas.train.losses import OuterLoss

FEW = TrainSettings(
    steps=6, batch_size=4, rounds=2, latent_steps=2, init="random", save_every=2, held_out=4
)
COLUMNS = ["held_out_own", "held_out_other", "held_out_none"]


@pytest.fixture(scope="module")
def loaded():
    return minimas.load_mas_system("tiny", device="cpu")


@pytest.fixture
def system(loaded):
    """The tiny system, whose links a test may change."""
    outer = dict(loaded.outer_links)
    yield loaded
    loaded.outer_links.update(outer)


@pytest.fixture(scope="module")
def examples():
    return load_examples("tiny", "tiny", limit=12)


def state(folder):
    return torch.load(folder / "training.pt", weights_only=True)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# Losses


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_losses_are_those_of_what_is_heard(loaded, examples, batch_size):
    """As if each value were heard in a run of its own, in any batch."""
    examples = examples[:6]
    settings = Settings(rounds=2, latent_steps=5).completed(loaded.style)
    values = ("none", "other", "planner>critic=other", "noise", "own")
    found = losses_by_hearing(loaded, examples, settings, values, batch_size)
    assert list(found) == list(values)
    questions = [example.question for example in examples]
    for value in values:
        chosen = replace(settings, hear=value)
        prompts = []

        def note(turn, questions, prompts=prompts):
            if turn.answers:
                prompts.extend(turn.prompts)

        loaded.answer(questions, chosen, edit=note, before=before_each(questions, chosen))
        for prompt, example, losses in zip(prompts, examples, found[value], strict=True):
            alone = links_loss(loaded, prompt, example)
            assert torch.allclose(losses, alone, atol=1e-4), value
    mean = {value: torch.cat(rows).mean() for value, rows in found.items()}
    assert mean["own"] < min(mean["other"], mean["none"])


def test_rows_of_one_question_hear_another_one(loaded, examples):
    """As `other` two rows of the same question hear what the row before both of them sent."""
    settings = Settings(rounds=2, latent_steps=5).completed(loaded.style)
    pair = [examples[0], examples[1]]
    doubled = [examples[0], examples[1], examples[1]]
    once = losses_by_hearing(loaded, pair, settings, ("other",))["other"]
    twice = losses_by_hearing(loaded, doubled, settings, ("other",), batch_size=2)["other"]
    for found, expected in zip(twice, [once[0], once[1], once[1]], strict=True):
        assert torch.allclose(found, expected, atol=1e-4)


def links_loss(system, prompt, example):
    """The cross-entropies of an answer after a prompt, token by token."""
    agent = system.agents["solver"]
    ids = agent.tokenizer.encode(example.text("solver", 2))
    with torch.no_grad():
        x, positions = left_pad(agent.embed([[*prompt, torch.tensor(ids)]]))
        states = agent.model(x, positions, agent.model.make_cache(1, x.shape[1]), last=len(ids) + 1)
        log_p = agent.model.logits(states[0]).log_softmax(-1)
    found = -log_p[:-1].gather(1, torch.tensor(ids)[:, None])[:, 0]
    ending = agent.tokenizer.encode(ending_of(agent))
    return torch.cat([found, -log_p[-1, ending]])


def ending_of(agent):
    from minimas.train.losses import reply_ending

    return reply_ending(agent.tokenizer)


def test_the_own_loss_is_what_links_learn(loaded, examples):
    settings = Settings(rounds=2, latent_steps=3).completed(loaded.style)
    found = losses_by_hearing(loaded, examples, settings, ("own",), 12)["own"]
    loss = OuterLoss(loaded, settings)(examples)
    loss_of_rows = torch.stack([losses.mean() for losses in found])
    assert loss_of_rows.mean().item() == pytest.approx(loss.item(), abs=1e-5)
    for link in loaded.outer_links.values():
        link.requires_grad_(False)


# Trainings


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, examples):
    out = tmp_path_factory.mktemp("unbroken") / "links"
    system = minimas.load_mas_system("tiny", device="cpu")
    train_outer(system, examples, replace(FEW, best=True), out=out, progress=False)
    return out


def test_what_is_measured_and_when(unbroken, system, examples):
    measured = {line["step"]: line for line in lines(unbroken) if "held_out_own" in line}
    assert list(measured) == [0, 2, 4, 6]
    first, *others = lines(unbroken)
    assert list(first) == ["step", *COLUMNS]
    for line in others:
        assert list(line)[:6] == [
            *("step", "loss", "lr", "gradient_norm", "tokens_per_second", "seconds")
        ]
        assert list(line)[6:] == (COLUMNS if line["step"] in measured else [])
    system.outer_links.update(links_in(unbroken, system))
    settings = FEW.completed("outer", system.style).of_the_recursion(system.style)
    found = losses_by_hearing(system, examples[-4:], settings)
    for value, losses in found.items():
        mean = sum(row.mean().item() for row in losses) / 4
        assert measured[6][f"held_out_{value}"] == pytest.approx(mean, abs=0.02), (
            "bfloat16 in files"
        )


def links_in(folder, system):
    from minimas.load import load_outer_links

    found = load_outer_links(folder, "math", system.style.edges, system.agents)
    return {edge: link.float() for edge, link in found.items()}


def test_the_rows_are_left_out_and_nothing_else_changes(unbroken, system, examples, tmp_path):
    """The links are those of a training on the other rows, bit for bit."""
    settings = replace(FEW, held_out=0)
    train_outer(system, examples[:-4], settings, out=tmp_path / "a", progress=False)
    assert same(state(unbroken)["links"], state(tmp_path / "a")["links"])
    losses = lambda folder: [line["loss"] for line in lines(folder) if line["step"]]
    assert losses(unbroken) == losses(tmp_path / "a")
    assert not any(column in line for line in lines(tmp_path / "a") for column in COLUMNS)


@pytest.mark.parametrize("last", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_training_that_is_resumed_is_the_same(unbroken, system, examples, tmp_path, last):
    """Broken off before the first measurement, and after it."""

    def breaks(metrics):
        if metrics["step"] == last:
            raise KeyboardInterrupt

    settings = replace(FEW, best=True)
    out = tmp_path / "links"
    with pytest.raises(KeyboardInterrupt):
        train_outer(system, examples, settings, out=out, progress=False, callback=breaks)
    train_outer(system, examples, settings, out=out, progress=False, resume=True)
    assert same(state(out), state(unbroken))
    without_times = lambda folder: [
        {k: v for k, v in line.items() if k not in ("tokens_per_second", "seconds")}
        for line in lines(folder)
    ]
    assert without_times(out) == without_times(unbroken)
    for file in sorted((unbroken / "best").iterdir()):
        if file.suffix == ".pt":
            assert same(torch.load(file), torch.load(out / "best" / file.name))
        else:
            assert file.read_bytes() == (out / "best" / file.name).read_bytes()


def test_the_best_links_are_those_of_the_lowest_own_loss(system, examples, tmp_path, monkeypatch):
    """Here the losses are made to fall and rise again."""
    made = iter([4.0, 3.0, 1.0, 2.0])
    kept = {}
    measure = HeldOut.measure

    def scripted(*args, **more):
        return {
            value: [torch.tensor([loss])]
            for value, loss in zip(("own", "other", "none"), [next(made), 5.0, 6.0])
        }

    monkeypatch.setitem(HeldOut.measure.__globals__, "losses_by_hearing", scripted)

    def note(metrics):
        kept[metrics["step"]] = {
            edge: link.proj1.weight.detach().bfloat16().clone()
            for edge, link in system.outer_links.items()
        }

    out = tmp_path / "links"
    train_outer(system, examples, replace(FEW, best=True), out=out, progress=False, callback=note)
    assert measure is HeldOut.measure
    best, last = links_in(out / "best", system), links_in(out, system)
    for edge in system.style.edges:
        assert torch.equal(best[edge].proj1.weight.bfloat16(), kept[4][edge])
        assert torch.equal(last[edge].proj1.weight.bfloat16(), kept[6][edge])
    loaded = minimas.load_mas_system("tiny", checkpoints={"links": out / "best"}, device="cpu")
    assert isinstance(loaded.outer_links["solver", "planner"], OuterLink)
    assert state(out)["steppers"][-1] == {"best": 1.0}


def test_a_callback_gets_the_losses_without_a_folder(system, examples, capsys):
    found = []
    train_outer(system, examples, replace(FEW, steps=3), progress=False, callback=found.append)
    assert [set(COLUMNS) <= metrics.keys() for metrics in found] == [False, True, True]
    assert capsys.readouterr().err == ""


def test_the_losses_are_said_beside_the_bar(system, examples, capsys):
    found = []
    train_outer(system, examples, replace(FEW, steps=1), callback=found.append)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.partition(":")[0] for line in said] == ["step 0", "step 1"]
    assert f"held-out loss {found[-1]['held_out_own']:.4f} own, " in said[1]


@pytest.mark.parametrize("steps", [0, 3])
def test_the_start_is_measured_and_may_be_the_best(system, examples, tmp_path, monkeypatch, steps):
    """Here each later loss is made to be higher."""
    made = iter([1.0, 2.0, 3.0, 4.0])

    def scripted(*args, **more):
        own = next(made)
        return {"own": [torch.tensor([own])], "other": [torch.tensor([5.0])]}

    monkeypatch.setitem(HeldOut.measure.__globals__, "losses_by_hearing", scripted)
    out = tmp_path / "links"
    settings = replace(FEW, steps=steps, best=True)
    train_outer(system, examples, settings, out=out, progress=False)
    assert loop.read_metrics(out / "metrics.jsonl")[0] == {
        "step": 0,
        "held_out_own": 1.0,
        "held_out_other": 5.0,
    }
    assert state(out)["steppers"][-1] == {"best": 1.0}
    start = tmp_path / "start"
    train_outer(system, examples, replace(FEW, steps=0), out=start, progress=False)
    for edge, link in links_in(out / "best", system).items():
        for name, weight in links_in(start, system)[edge].state_dict().items():
            assert torch.equal(weight, link.state_dict()[name]), (edge, name)


def test_teacher_forced_links_are_measured_as_they_answer(system, examples):
    found = []
    settings = replace(FEW, steps=2, latents="teacher")
    train_outer(system, examples, settings, progress=False, callback=found.append)
    assert set(COLUMNS) <= found[-1].keys()


def test_the_command_and_its_plot(tmp_path, monkeypatch, capsys):
    args = ["outer", "--style", "tiny", "--data", "tiny", "--limit", "12", "--batch-size", "4"]
    args += ["--rounds", "2", "--latent-steps", "2", "--init", "random", "--device", "cpu"]
    args += ["--steps", "4", "--save-every", "2", "--held-out", "4", "--best"]
    args += ["--out", str(tmp_path / "links"), "--plot", str(tmp_path / "p.svg")]
    monkeypatch.setattr(sys, "argv", ["train", *args])
    command(module.main)
    assert capsys.readouterr().err.count("held-out loss") == 3
    drawn = (tmp_path / "p.svg").read_text()
    assert "held-out loss, outer of tiny" in drawn
    assert all(f">{value}<" in drawn for value in ("own", "other", "none"))
    assert (tmp_path / "links" / "best" / "outerlink_config.json").exists()


def test_a_system_learns_nothing_of_the_rows(tmp_path, examples):
    """Neither its inner links nor the regressions that its outer links start from."""
    settings = TrainSettings(rounds=2, latent_steps=2, ridge_rows=12, held_out=4)
    whole = train_system("tiny", examples[:-4], replace(settings, held_out=0), out=tmp_path / "a")
    found = train_system("tiny", examples, settings, out=tmp_path / "b")
    for edge, link in whole.outer_links.items():
        assert same(link.state_dict(), found.outer_links[edge].state_dict())
    for name in ("planner", "critic", "solver"):
        files = [torch.load(tmp_path / run / name / "adapter.pt") for run in "ab"]
        assert same(*files)


def test_questions_that_come_twice_are_left_out_twice(examples):
    rows = [*examples[:3], examples[1]]
    assert without(rows, examples[1:2]) == [examples[0], examples[2]]


def test_rows_that_are_dropped_are_counted(system, examples, capsys):
    rows = [*examples[:6], examples[6], examples[6], examples[7], examples[6], examples[7]]
    train_outer(system, rows, replace(FEW, steps=0, held_out=2), progress=False)
    assert capsys.readouterr().err == (
        "minimas: 3 of 9 rows are not learned from because their question is among the 2 held out\n"
    )
    train_outer(system, examples, replace(FEW, steps=0, held_out=2), progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "rows, message",
    [
        ((0, 1, 0, 1, 0), "--held-out is 2, and the 3 other rows ask the questions of these"),
        ((0, 1, 2, 2), "--held-out is 2, and the last 2 rows ask the same question"),
    ],
)
def test_rows_that_leave_nothing_to_compare(system, examples, rows, message):
    rows = [examples[i] for i in rows]
    with pytest.raises(InputError, match=message):
        train_outer(system, rows, replace(FEW, held_out=2), progress=False)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"held_out": 1}, "--held-out is 1, and each row hears another one"),
        ({"held_out": 0, "best": True}, "--best goes by the loss of rows that are left out"),
        ({"held_out": 12}, "--held-out is 12, and there are 12 rows"),
        ({"held_out": 99}, "--held-out is 99, and there are 12 rows"),
        ({"held_out": -2}, "--held-out is -2, expected a whole number from 0 up"),
        ({"best": True}, "best keeps links in a folder"),
    ],
    ids=str,
)
def test_what_cannot_be_held_out(system, examples, changes, message):
    with pytest.raises(InputError, match=message):
        train_outer(system, examples, replace(FEW, **changes), progress=False)


def test_other_rows_held_out_are_another_training(unbroken, system, examples, tmp_path):
    out = shutil.copytree(unbroken, tmp_path / "links")
    settings = replace(FEW, best=True)
    other = [*examples[:-1], replace(examples[-1], texts={"solver": ("1",)})]
    with pytest.raises(InputError, match="held_out_hash"):
        train_outer(system, other, settings, out=out, progress=False, resume=True)
    with pytest.raises(InputError, match="best: True there, False now"):
        train_outer(system, examples, FEW, out=out, progress=False, resume=True)
    assert links.BEST == "best" and loop.read_metrics(out / "metrics.jsonl")
