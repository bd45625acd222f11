"""The recursion equals the released procedure, written again on transformers without a cache (stored, and live)."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import checkpoints
import numpy as np
import pytest
import torch
import tqdm
from checkpoints import GOLDENS, QUESTIONS, RECURSION
from safetensors.torch import load_file

import minimas
from minimas.styles import STYLES

STYLE = pytest.mark.parametrize("style", checkpoints.SYSTEMS)
ROUNDS = pytest.mark.parametrize("rounds", checkpoints.ROUNDS)
OPTIONS = RECURSION | {"temperature": 0.0, "retry": False, "keep_latents": True}
EDGES = list(STYLES["sequential_light"].edges)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """style -> (its folders, the system), made once."""
    made = {}

    def get(style):
        if style not in made:
            folders = checkpoints.make_system(tmp_path_factory.mktemp(style), style)
            made[style] = folders, minimas.load_mas_system(style, checkpoints=folders, device="cpu")
        return made[style]

    return get


@pytest.fixture
def system(loaded):
    return loaded("sequential_light")[1]


def assert_same(result, golden):
    """Every latent that passed an edge within 1e-3, the same greedy tokens."""
    ids = golden.pop("ids").tolist()
    latents = {" ".join(map(str, key)): value for key, value in result.latents.items()}
    assert latents.keys() == golden.keys()
    for key in golden:
        assert latents[key].shape == golden[key].shape
        assert (latents[key] - golden[key]).abs().max() < 1e-3, key
    assert result.token_ids == ids[: result.new_tokens] and (
        result.new_tokens == len(ids) or ids[result.new_tokens] == 0
    )


@STYLE
@ROUNDS
@pytest.mark.parametrize("batch_size", (pytest.param(1, marks=pytest.mark.slow), 3))
def test_golden(loaded, style, rounds, batch_size):
    stored = load_file(GOLDENS / f"{style}.safetensors")
    for i, result in enumerate(
        loaded(style)[1].run(QUESTIONS, rounds=rounds, batch_size=batch_size, **OPTIONS)
    ):
        prefix = f"{rounds}/{i}/"
        assert_same(
            result,
            {
                key.removeprefix(prefix): value
                for key, value in stored.items()
                if key.startswith(prefix)
            },
        )


# transformers has no quick way for Qwen3.5 on a CPU: the styles that have it twice, and their third round, are for CI
TWICE = ("distillation", "deliberation")
LIVE = [
    pytest.param(
        style,
        rounds,
        marks=[pytest.mark.slow]
        if style in TWICE or rounds > 1 and style != "sequential_light"
        else [],
    )
    for rounds in checkpoints.ROUNDS
    for style in checkpoints.SYSTEMS
]


@pytest.mark.parametrize("style, rounds", LIVE)
def test_live(loaded, style, rounds):
    pytest.importorskip("transformers")
    from make_goldens import recursion_outputs

    folders, system = loaded(style)
    for question, result in zip(QUESTIONS, system.run(QUESTIONS, rounds=rounds, **OPTIONS)):
        assert_same(result, recursion_outputs(style, folders, rounds, question))


def test_latents_of_every_edge(system):
    result = system.run(["1 + 1"], rounds=2, latent_steps=3, max_new_tokens=2, keep_latents=True)[0]
    assert list(result.latents) == [
        (1, *EDGES[0]),
        (1, *EDGES[1]),
        (1, *EDGES[2]),
        (2, *EDGES[0]),
        (2, *EDGES[1]),
    ]
    assert [latents.shape for latents in result.latents.values()] == [
        (3, 40),
        (3, 56),
        (3, 48),
        (3, 40),
        (3, 56),
    ]


def test_a_latent_step_costs_one_token_and_no_vocabulary(system, monkeypatch):
    """Prompts are read once;
    after that each of m - 1 steps feeds one position, and nobody but the solver's text asks for scores.
    """
    widths = {role: [] for role in system.agents}
    for role, agent in system.agents.items():

        def count(x, positions, cache, last, role=role, forward=agent.model.forward):
            widths[role].append(x.shape[1])
            return forward(x, positions, cache, last)

        monkeypatch.setattr(agent.model, "forward", count)
        if role != "solver":
            monkeypatch.setattr(
                agent.model, "logits", lambda h: pytest.fail("scores for a latent step")
            )
    system.run(
        ["1 + 1", "a longer question"], rounds=2, latent_steps=5, max_new_tokens=3, retry=False
    )
    for role, turns in ("planner", 2), ("critic", 2):
        assert [w for w in widths[role] if w > 1] and len(
            [w for w in widths[role] if w > 1]
        ) == turns
        assert widths[role].count(1) == turns * 4
    assert widths["solver"].count(1) == 4 + 2 and len(widths["solver"]) == 8


def test_what_is_sent_can_be_edited(system):
    """By a caller of recurse and of run, batch by batch: what is put into a Turn is heard, and kept."""
    edge, options = EDGES[0], OPTIONS | {"batch_size": 2}
    plain = system.run(QUESTIONS, **options)
    donor, seen = plain[0].latents[1, *edge], []

    def inject(turn, questions):
        seen.append((turn.round, turn.role, [question.text for question in questions]))
        if edge in turn.sent:
            turn.sent[edge] = donor.expand_as(turn.sent[edge])

    edited = system.run(QUESTIONS, edit=inject, **options)
    assert len(seen) == len(range(0, len(QUESTIONS), 2)) * 9 and seen[-1][2] == QUESTIONS[-1:]
    for before, after in zip(plain, edited):
        assert torch.equal(after.latents[1, *edge], donor)
        assert (
            not torch.equal(after.latents[1, *EDGES[1]], before.latents[1, *EDGES[1]])
            or before is plain[0]
        )
    assert torch.equal(edited[0].latents[1, *EDGES[1]], plain[0].latents[1, *EDGES[1]]), (
        "its own, put there again"
    )


def test_no_latent_steps_leave_slots_empty(system):
    result = system.run(["1 + 1"], rounds=2, latent_steps=0, max_new_tokens=2, keep_latents=True)[0]
    assert {latents.shape[0] for latents in result.latents.values()} == {0} and result.new_tokens


def test_a_prompt_longer_than_the_context_is_told_once(system, monkeypatch, capsys):
    for longest, told in (7, 1), (7, 0), (4000, 0):
        monkeypatch.setattr(
            system.agents["critic"].model.config, "max_position_embeddings", longest
        )
        text = system.run(QUESTIONS[:2], rounds=1, latent_steps=2, max_new_tokens=2)[0].text
        assert capsys.readouterr().err.count("longer than the 7 positions") == told and text


def test_a_row_does_not_depend_on_its_neighbours(system):
    """Greedy and sampled: alone, in a batch, in another order, the same tokens."""
    questions = [
        "What is 2 + 2?",
        "A much longer question about the number of ways to tile a floor of 3 by 8 with dominoes",
        "Why?",
    ]
    for temperature in 0.0, 1.5:
        run = lambda asked, **options: {
            r.question: r.token_ids
            for r in system.run(
                asked,
                rounds=2,
                latent_steps=2,
                max_new_tokens=6,
                temperature=temperature,
                top_p=1.0,
                top_k=0,
                retry=False,
                **options,
            )
        }
        alone = run(questions, batch_size=1)
        assert run(questions, batch_size=3) == run(questions[::-1], batch_size=2) == alone
        other_seed = run(questions, batch_size=3, seed=7)
        assert (other_seed == alone) == (temperature == 0.0)


def test_text_channel(system):
    """The same loop, with words: what an edge carries is the text that the source wrote, and the target reads it."""
    result = system.run(
        ["1 + 1"], rounds=2, max_new_tokens=5, temperature=0.0, channel="text", keep_latents=True
    )[0]
    assert list(result.latents)[:3] == [(1, *edge) for edge in EDGES] and all(
        isinstance(text, str) for text in result.latents.values()
    )
    inbox = {("planner", "critic"): ["Step 1: {question} add"]}
    pieces = system.prompts_for("critic", system.style.questions(["1 + 1"]), inbox)[0]
    assert "Initial Plan:\nStep 1: {question} add\nYou should refine" in "".join(pieces)


def test_retry_asks_once_more_for_an_answer(system):
    """A text without a box gets the request at its end, and the agent's next 16 tokens behind that."""
    plain, retried = (
        system.run(
            ["1 + 1"], rounds=1, latent_steps=2, max_new_tokens=4, temperature=0.0, retry=retry
        )[0]
        for retry in (False, True)
    )
    assert plain.answer is None and plain.new_tokens <= 4
    assert retried.token_ids[: plain.new_tokens] == plain.token_ids and 4 < retried.new_tokens <= 20
    assert retried.text.startswith(plain.text + "\nFinal Answer: \\boxed{")
    solver = system.agents["solver"]
    with torch.no_grad():  # the same by hand: a plain prompt, no template, no question
        ids = torch.tensor(
            [solver.tokenizer.encode(plain.text + "\nFinal Answer: \\boxed{", special=True)]
        )
        h = solver.model(
            solver.model.embed(ids), torch.arange(ids.shape[1])[None], solver.model.make_cache(1)
        )
    assert solver.model.logits(h[0, -1]).argmax().item() == retried.token_ids[plain.new_tokens]


def test_offloaded_weights_are_there_only_at_work(loaded):
    """The same answers, with weights that are copied in for an agent's turn and gone after it."""
    folders, system = loaded("sequential_scaled")
    offloaded = minimas.load_mas_system(
        "sequential_scaled", checkpoints=folders, device="cpu", offload=True
    )
    addresses = lambda: {
        role: agent.model.norm.weight.data_ptr() for role, agent in offloaded.agents.items()
    }
    resting, at_work, agent = addresses(), [], offloaded.agents["solver"]
    head = agent.model.logits
    agent.model.logits = lambda h: at_work.append(addresses()) or head(h)
    for ours, theirs in zip(
        offloaded.run(QUESTIONS, rounds=2, **OPTIONS), system.run(QUESTIONS, rounds=2, **OPTIONS)
    ):
        assert ours.token_ids == theirs.token_ids
    assert addresses() == resting
    assert (
        all(
            now["solver"] != resting["solver"] and now["planner"] == resting["planner"]
            for now in at_work
        )
        and at_work
    )
    assert agent.model.lm_head.weight is agent.model.embed_tokens.weight, "tied weights stay tied"


def test_a_device_for_each_agent(loaded):
    folders, _ = loaded("sequential_light")
    system = minimas.load_mas_system(
        "sequential_light", checkpoints=folders, device="planner=cpu,critic=cpu,solver=cpu"
    )
    assert {agent.device.type for agent in system.agents.values()} == {"cpu"}
    with pytest.raises(
        minimas.InputError, match="device names planner, expected each of planner, critic, solver"
    ):
        minimas.load_mas_system("sequential_light", checkpoints=folders, device="planner=cpu")


def test_tools_need_a_style_that_calls_them(system):
    with pytest.raises(minimas.InputError, match="use style deliberation"):
        system.run(["1 + 1"], tools=("python",))


def test_settings_out_of_range(system):
    for name, value in (
        ("rounds", 0),
        ("latent_steps", -1),
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("batch_size", 0),
        ("channel", "smoke"),
        ("temperature", "hot"),
    ):
        with pytest.raises(minimas.InputError, match=name):
            system.run(["1 + 1"], **{name: value})
    for no_text in " ", None, 7:
        with pytest.raises(minimas.InputError, match="empty or no text"):
            system.run(["1 + 1", no_text])
    with pytest.raises(minimas.InputError, match="a lone surrogate"):
        system.run(["1 + 1 \ud83d"])


def test_threads_take_turns():
    """Agents keep what they read last, so a system answers one batch at a time."""
    system, asked = (
        minimas.load_mas_system("tiny", device="cpu"),
        [f"{n} +5 *3 -4" for n in range(5)] * 2,
    )
    alone = [result.text for result in system.run(text for text in asked)]
    with ThreadPoolExecutor(3) as pool:
        together = pool.map(lambda text: system.run([text], rounds=np.int64(3)), asked)
        assert [result.text for (result,) in together] == alone


def test_an_agent_that_nobody_hears(monkeypatch):
    """The answer is written once, in the last turn, though the last agent sends nothing in earlier rounds."""
    tiny = STYLES["tiny"]
    edges = {edge: key for edge, key in tiny.edges.items() if edge != ("solver", "planner")}
    monkeypatch.setitem(STYLES, "open", dataclasses.replace(tiny, edges=edges))
    system, written = minimas.load_mas_system("open", device="cpu"), []
    write = minimas.system.write_answers
    monkeypatch.setattr(
        minimas.system, "write_answers", lambda *args: written.append(args) or write(*args)
    )
    assert len(system.run(["7 +5"], rounds=3)) == len(written) == 1


def test_a_slot_without_an_edge(monkeypatch):
    tiny = STYLES["tiny"]
    edges = {edge: key for edge, key in tiny.edges.items() if edge != ("planner", "critic")}
    monkeypatch.setitem(STYLES, "cut", dataclasses.replace(tiny, edges=edges))
    with pytest.raises(
        minimas.InputError,
        match="the prompt of critic has a slot for planner, who has sent it nothing",
    ):
        minimas.load_mas_system("cut", device="cpu").run(["7 +5"])


@pytest.mark.parametrize("channel", ("latent", "text"))
def test_the_progress_bar_is_full_at_the_end(channel, monkeypatch):
    """Its total is the most that a run can tick."""
    ticks, totals = [], []
    bar = tqdm.tqdm

    class Bar(bar):
        def __init__(self, *args, **options):
            totals.append(options["total"])
            super().__init__(*args, **options)

        def update(self, n=1):
            ticks.append(n)
            return super().update(n)

    monkeypatch.setattr(minimas.system, "tqdm", Bar)
    minimas.load_mas_system("tiny", device="cpu").run(["7 +5 *3"], channel=channel, progress=True)
    assert sum(ticks) == totals[0] and all(n >= 0 for n in ticks)
