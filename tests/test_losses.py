"""What links learn: losses and their gradients are right, reach every link, and leave the agents unchanged."""

import copy
import random

import checkpoints
import pytest
import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers

import minimas
from minimas.agent import left_pad
from minimas.link import fused
from minimas.prompts import Question
from minimas.recurse import recurse
from minimas.settings import Settings
from minimas.styles import STYLES
from minimas.tiny.task import questions
from minimas.tokenizer import load_tokenizer
from minimas.train import losses, ridge, tiny
from minimas.train.examples import TargetTurn, TrainExample, load_examples
from minimas.train.loop import adamw, fit
from minimas.train.losses import IGNORED, InnerLoss, OuterLoss

STYLES_IN_SMALL = list(checkpoints.SYSTEMS)
TURNS = [
    TargetTurn(Question("1 + 1?"), {"planner": "Add."}, "Add 1 and 1."),
    TargetTurn(Question("What is 2 * 3?"), {"planner": "Multiply"}, "So: 2 * 3"),
]


def examples_for(style):
    """Two examples of different lengths for all agents of a style."""
    texts = ["Add them, carefully."[: 9 + 2 * i] for i in range(len(style.order))]
    return [
        TrainExample(Question("1 + 1?"), {role: (text,) for role, text in zip(style.order, texts)}),
        TrainExample(
            Question("What is two times three?"),
            {role: (text[::-1] + " 6",) for role, text in zip(style.order, texts)},
        ),
    ]


CHAINS = load_examples("tiny", "tiny", limit=2)


def load(folders, style="sequential_light"):
    """A system of miniatures; or the tiny one, of the same families as sequential_light, whose prompts are short."""
    if style == "tiny":
        return minimas.load_mas_system("tiny", device="cpu")
    return minimas.load_mas_system(style, checkpoints=folders(style), device="cpu")


def outer_loss(system, rounds, latent_steps, *options, **more):
    settings = Settings(rounds=rounds, latent_steps=latent_steps).completed(system.style)
    return OuterLoss(system, settings, *options, **more)


def double(system):
    for module in [
        *system.outer_links.values(),
        *(m for a in system.agents.values() for m in (a.model, a.inner_link)),
    ]:
        module.double()
    return system


def gradients(loss, module):
    for p in module.parameters():
        p.grad = None
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def test_teacher_forcing_lines_up(folders):
    """The states of a reply in a batch are those of its row alone, whatever the lengths of the other rows."""
    system = load(folders)
    critic = system.agents["critic"]
    h, ids = losses.forced_turns(system, "critic", TURNS)
    for b, turn in enumerate(TURNS):
        reply = critic.tokenizer.encode(turn.reply) + [critic.tokenizer.eos_id]
        assert ids[b][ids[b] != IGNORED].tolist() == reply
        prompt = system.prompts_for(
            "critic", [turn.question], {("planner", "critic"): [turn.inbox["planner"]]}
        )
        x, positions = left_pad(critic.embed([[*prompt[0], torch.tensor(reply)]]))
        states = critic.model(x, positions, critic.model.make_cache(1))[0, -len(reply) - 1 :]
        assert (h[b, -len(reply) - 1 :] - states).abs().max() < 1e-5


def test_a_reply_is_cut_to_the_longest(folders, monkeypatch):
    told = []
    monkeypatch.setattr(losses, "warn_once", told.append)
    system = load(folders)
    prompt = len(
        system.agents["critic"].tokens(
            system.prompts_for("critic", [TURNS[0].question], {("planner", "critic"): ["Add."]})[0]
        )[0]
    )
    _, ids = losses.forced_turns(system, "critic", TURNS[:1], longest=prompt + 5)
    assert ids.tolist() == [system.agents["critic"].tokenizer.encode(TURNS[0].reply)[:5]]
    _, ids = losses.forced_turns(system, "critic", TURNS[:1], longest=prompt + 1)
    assert ids.shape == (1, 1) and not told
    _, ids = losses.forced_turns(system, "critic", TURNS[:1], longest=prompt)
    assert ids.shape == (1, 1), "at least one token is kept"
    (message,) = told
    assert message.startswith(f"--max-length is {prompt}, and a prompt leaves no position of it")


@pytest.mark.parametrize(
    "kind, ending",
    [
        ("qwen3", "<|im_end|>"),
        ("llama", "<|eot_id|>"),
        ("gemma3", "<end_of_turn>"),
        ("mistral", "</s>"),
    ],
)
def test_a_reply_ends_as_the_template_ends_it(tmp_path, kind, ending):
    folder = checkpoints.make_agent(tmp_path, kind)
    assert losses.reply_ending(load_tokenizer(folder)) == ending
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert losses.reply_ending(load_tokenizer(folder)) == load_tokenizer(folder).named["eos_token"]


def test_token_loss_is_cross_entropy(monkeypatch):
    monkeypatch.setattr(losses, "SCORES_AT_ONCE", 3)
    torch.manual_seed(0)
    h, head, ids = (
        torch.randn(2, 6, 8, dtype=torch.double, requires_grad=True),
        torch.randn(11, 8, dtype=torch.double),
        torch.randint(0, 11, (2, 5)),
    )
    ids[0, :2] = IGNORED
    lm_head = torch.nn.Linear(8, 11, bias=False)
    lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    agent = type("", (), {"model": type("", (), {"lm_head": lm_head})})
    loss = losses.next_token_loss(agent, h[:, :-1], ids)
    expected = (
        sum(F.cross_entropy(h[b, :-1] @ head.T, ids[b], ignore_index=IGNORED) for b in range(2)) / 2
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, theirs = (
        torch.autograd.grad(3 * value, h, retain_graph=True)[0] for value in (loss, expected)
    )
    assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("teacher, rows", ((False, 2), (True, 1)))
def test_gradient_through_rounds_equals_finite_differences(folders, teacher, rows):
    system = double(load(folders, "tiny"))
    loss = outer_loss(system, 2, 3, teacher, other_rounds=0.3)
    batch = CHAINS[:rows]
    loss(batch).backward()
    for link in loss.links:
        weight, direction = link.proj2.weight, torch.randn_like(link.proj2.weight)
        expected = (weight.grad * direction).sum().item()
        assert expected != 0, "every edge affects the answer, feedback included"
        around = []
        for sign in 1, -1:
            with torch.no_grad():
                weight += sign * 1e-5 * direction
                around.append(loss(batch).item())
                weight -= sign * 1e-5 * direction
        assert (around[0] - around[1]) / 2e-5 == pytest.approx(expected, rel=1e-4)


# transformers is slow at it: here Qwen3, Llama, Qwen2, Gemma 3 and Qwen3.5, in CI Mistral and all styles.
QUICK = {
    ("sequential_light", True),
    ("sequential_light", False),
    ("sequential_scaled", True),
}


@pytest.mark.parametrize(
    "style, teacher",
    [
        pytest.param(style, teacher, marks=[] if (style, teacher) in QUICK else [pytest.mark.slow])
        for teacher in (True, False)
        for style in STYLES_IN_SMALL
    ],
)
def test_gradients_equal_those_of_transformers(folders, style, teacher, monkeypatch):
    """Three rounds of every style, two rows at once here and one after the other there.

    Both sides run in float64: in float32, rounding alone moves some gradients by more than a mistake might.
    transformers asks for float32 in places and is given float64 there too.
    """
    pytest.importorskip("transformers")
    import reference

    system = double(load(folders, style))
    loss, batch = outer_loss(system, 3, 2, teacher, other_rounds=0.5), examples_for(STYLES[style])
    mean = loss(batch)
    ours = gradients(mean, loss)
    agents, links = reference.parts(style, folders(style))
    for agent in agents.values():
        agent.model.double()
        agent.inner = {name: t.double() for name, t in agent.inner.items()}
    links = {
        edge: {name: t.double().requires_grad_(True) for name, t in link.items()}
        for edge, link in links.items()
    }
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    total = 0
    for example in batch:
        texts = {role: said[0] for role, said in example.texts.items()}
        *others, final = reference.outer_loss(
            style, agents, links, example.question.text, texts, 3, 2, teacher
        )
        total = total + (final + 0.5 * sum(others) / 2) / len(batch)
    total.backward()
    assert mean.item() == pytest.approx(total.item(), rel=1e-6)
    for i, edge in enumerate(system.outer_links):
        for name, parameter in links[edge].items():
            difference = ours[f"links.{i}.{name}"] - parameter.grad
            assert difference.norm() <= 1e-6 * parameter.grad.norm() > 0, (edge, name)


@pytest.mark.parametrize(
    "style, teacher, rows",
    [
        ("tiny", False, 2),
        pytest.param("sequential_scaled", False, 2, marks=pytest.mark.slow),
        ("sequential_scaled", True, 1),
        *(
            pytest.param(style, False, 2, marks=pytest.mark.slow)  # the same decoders
            for style in ("sequential_light", "mixture", "distillation", "deliberation")
        ),
    ],
)
def test_activation_checkpointing_changes_nothing(folders, style, teacher, rows):
    batch = CHAINS[:rows] if style == "tiny" else examples_for(STYLES[style])[:rows]
    results = []
    for checkpointed in False, True:
        system, calls = double(load(folders, style)), []
        system.agents[system.style.order[-1]].model.layers[0].mlp.register_forward_pre_hook(
            lambda *_: calls.append(1)
        )
        if checkpointed:
            losses.checkpoint_activations(system)
        loss = outer_loss(system, 2, 2, teacher)
        value = loss(batch)
        forwards = len(calls)
        results.append((value.item(), gradients(value, loss), len(calls) - forwards))
    (value, plain, none), (value_again, recomputed, again) = results
    assert value == pytest.approx(value_again, rel=1e-12) and none == 0 < again
    assert all(
        (plain[name] - recomputed[name]).norm() <= 1e-9 * plain[name].norm() for name in plain
    )


def test_the_loss_is_that_of_inference(folders):
    """The training graph (a cache that grows) and the run (a cache written in place) send the same latents."""
    system, sent = load(folders), {}
    result = system.run(
        ["1 + 1?"], rounds=2, latent_steps=3, max_new_tokens=1, retry=False, keep_latents=True
    )[0]
    with torch.enable_grad():
        settings = Settings(rounds=2, latent_steps=3).completed(system.style)
        for turn in recurse(system, system.style.questions(["1 + 1?"]), settings):
            sent |= {(turn.round, *edge): z[0] for edge, z in turn.sent.items()}
    assert sent.keys() == result.latents.keys()
    assert all((sent[key] - result.latents[key]).abs().max() < 1e-5 for key in sent)


def test_teacher_latents_are_the_states_at_the_first_tokens(folders, monkeypatch):
    system, sent = load(folders), {}
    loss, batch = outer_loss(system, 1, 4, teacher=True), examples_for(STYLES["sequential_light"])

    def listening(*args, **options):
        for turn in recurse(*args, **options):
            sent.update(turn.sent)
            yield turn

    monkeypatch.setattr(losses, "recurse", listening)
    loss(batch)
    planner, link = system.agents["planner"], system.outer_links["planner", "critic"]
    for example, latents in zip(batch, sent["planner", "critic"]):
        ids = planner.tokenizer.encode(example.text("planner", 1) + "<|im_end|>")
        prompt = system.prompts_for("planner", [example.question], {})[0]
        x, positions = left_pad(planner.embed([[*prompt, torch.tensor(ids)]]))
        h = planner.model(x, positions, planner.model.make_cache(1))[0, -len(ids) :]
        assert (latents - link(planner.inner_link(h[:4]))).abs().max() < 1e-5


def test_texts_of_each_round(folders):
    """If an example has a text per round, each round learns its own; other rounds count with the weight
    other_rounds.
    """
    system = load(folders)
    batch = [
        TrainExample(
            Question("1 + 1?"),
            {"planner": ("a", "b"), "critic": ("c",), "solver": ("one", "two", "three")},
        )
    ]
    means = [outer_loss(system, r, 2)(batch).item() for r in (1, 2, 3)]
    loss = outer_loss(system, 3, 2, other_rounds=0.4)(batch).item()
    assert loss == pytest.approx(means[2] + 0.4 * (means[0] + means[1]) / 2, rel=1e-5)
    assert batch[0].turn(system.style, "planner", 2) == TargetTurn(
        batch[0].question, {"solver": "one"}, "b"
    )
    assert batch[0].turn(system.style, "solver", 3) == TargetTurn(
        batch[0].question, {"critic": "c"}, "three"
    )


def test_inner_loss(folders):
    """1 - cos between the link's output for the state before a token and the token's embedding, plus the squared
    error.
    """
    system = load(folders)
    critic, loss = system.agents["critic"], InnerLoss(system, "critic", mse=0.5)
    expected = []
    for turn in TURNS:
        h, ids = losses.forced_turns(system, "critic", [turn])
        predicted, target = critic.inner_link(h[0, :-1]), critic.model.embed(ids[0])
        cosines = (predicted * target).sum(1) / predicted.norm(dim=1) / target.norm(dim=1)
        expected.append((1 - cosines + 0.5 * ((predicted - target) ** 2).mean(1)).mean())
    assert loss(TURNS).item() == pytest.approx(sum(expected).item() / 2, rel=1e-5)


def test_inner_training_lowers_its_loss_and_leaves_agents_alone(folders):
    system = load(folders)
    before = {name: p.clone() for name, p in system.agents["critic"].model.named_parameters()}
    loss = InnerLoss(system, "critic")
    values = fit(lambda step, part: loss(TURNS), [adamw(loss, 5e-3)], 20, "inner")
    assert values[-1] < 0.8 * values[0]
    assert all(
        torch.equal(p, before[name]) for name, p in system.agents["critic"].model.named_parameters()
    )


def test_outer_training_lowers_its_loss(folders):
    system = load(folders)
    loss, batch = outer_loss(system, 2, 2), examples_for(STYLES["sequential_light"])
    frozen = [
        p
        for agent in system.agents.values()
        for p in [*agent.model.parameters(), *agent.inner_link.parameters()]
    ]
    before = [p.clone() for p in frozen]
    values = fit(lambda step, part: loss(batch), [adamw(loss, 3e-3)], 4, "outer")
    assert values[-1] < values[0]
    assert all(torch.equal(*pair) and pair[0].grad is None for pair in zip(frozen, before))


@pytest.mark.parametrize("longest", (4096, "cut"))
def test_ridge_start_is_the_regression(folders, longest):
    """No other map of the same turns has a lower regression loss, and the link is that map.

    If a reply is cut to `longest` positions, only the tokens that are kept count.
    """
    system, edge = double(load(folders)), ("planner", "critic")
    planner, link = system.agents["planner"], system.outer_links[edge]
    turns = [
        TargetTurn(Question(f"{n} + {n}?"), {}, f"Add {n} to {n} and say {2 * n}.")
        for n in range(20)
    ]
    if longest == "cut":
        longest = 12 + len(
            planner.tokens(system.prompts_for("planner", [turns[-1].question], {})[0])[0]
        )
    ridge.set_outer_link(
        system, edge, ridge.read_replies(system, "planner", turns, longest), strength=0.05
    )
    xs, ys = [], []
    for turn in turns:
        h, ids = losses.forced_turns(system, "planner", [turn], longest)
        places, y = ridge.overlapping_tokens(planner, system.agents["critic"], turn.reply)
        assert places == list(range(len(y))), "both tokenizers split the text alike"
        n = min(len(y), ids.shape[1])  # without the token that ends the reply
        xs.append(planner.inner_link(h[0, :n])), ys.append(y[:n])
    x, y = torch.cat(xs), torch.cat(ys)
    b, s = y.mean(0), y.std(0, unbiased=False)
    assert torch.allclose(link.ln_target.weight, s, rtol=1e-6) and torch.allclose(
        link.ln_target.bias, b, rtol=1e-6
    )
    W, x0 = link.residual_proj.weight, x - x.mean(0)
    penalty = 0.05 * x0.square().mean(0).mean()
    gradient = (x0 @ W.T - (y - b) / s).T @ x0 / len(x) + penalty * W
    assert gradient.norm() < 1e-8 * W.norm(), "at the minimum"
    expected = F.layer_norm((x - x.mean(0)) @ W.T, (len(b),)) * s + b
    assert (link(x) - expected).abs().max() < 1e-10
    assert F.cosine_similarity(link(x) - b, y - b).mean() > 0.5


@pytest.mark.parametrize(
    "dtype, bound", [(torch.float64, 2e-3), (torch.float32, 2e-3), (torch.bfloat16, 2e-2)]
)
def test_inner_ridge_is_the_regression(folders, dtype, bound):
    """The link is the regression on normed states, up to the error that set_inner_link states, and more so than to what
    bfloat16 makes of weights. It points where the next token's embedding points.
    """
    system = double(load(folders))
    planner, turns = (
        system.agents["planner"],
        [TargetTurn(Question(f"{n} + {n}?"), {}, f"{n} and {n} is {2 * n}.") for n in range(20)],
    )
    readings = ridge.read_replies(system, "planner", turns)
    ridge.set_inner_link(planner, readings, strength=0.05)
    h, y = (
        torch.cat([reading.h for reading in readings]),
        planner.model.embed(torch.cat([reading.ids for reading in readings])),
    )
    u = F.layer_norm(h, h.shape[-1:])
    b, s, u0 = y.mean(0), y.std(0, unbiased=False) + 1e-12, u - u.mean(0)
    penalty = 0.05 * u0.square().mean(0).mean()
    W = torch.linalg.lstsq(
        u0.T @ u0 / len(u) + penalty * torch.eye(u.shape[1]).to(u), u0.T @ ((y - b) / s) / len(u)
    ).solution
    expected = F.layer_norm(u0 @ W, b.shape) * s + b
    link = load_copy(planner.inner_link, dtype)
    got = link(h.to(dtype)).double()
    assert (got - expected).norm() / (expected - b).norm() < bound
    assert F.cosine_similarity(got - b, y - b).mean() > 0.5
    assert torch.allclose(
        fused(link)(h.to(dtype)).double(), got, atol=3 * bound * s.max().item(), rtol=0
    )


def load_copy(link, dtype):
    copied = copy.deepcopy(link).to(torch.bfloat16 if dtype == torch.bfloat16 else dtype)
    return copied.requires_grad_(False)


@pytest.mark.parametrize("count", (2, 99))
def test_ridge_start_of_one_token_is_finite(folders, count):
    """With 99 equal rows, rounding makes their variance negative unless it is clamped."""
    system, edge = load(folders), ("planner", "critic")
    ridge.set_outer_link(
        system,
        edge,
        ridge.read_replies(system, "planner", [TargetTurn(Question("1?"), {}, "1")] * count),
    )
    h = torch.randn(3, system.agents["planner"].model.config.hidden_size)
    one = system.agents["critic"].model.embed(
        torch.tensor(system.agents["critic"].tokenizer.encode("1"))
    )
    assert (system.outer_links[edge](h) - one).abs().max() < 1e-3, "there is only one token to say"


def test_ridge_alone_carries_the_tiny_system():
    """Chains of up to nine steps, over links trained without any gradient."""
    system = minimas.load_mas_system("tiny", device="cpu")
    torch.manual_seed(0)
    tiny.randomise_outer_links(system.outer_links.values())
    chains = questions("validation", 5)
    assert tiny.accuracy(system, chains, rounds=3)["percent"] < 30
    for edge in system.outer_links:
        ridge.set_outer_link(
            system,
            edge,
            ridge.read_replies(system, edge[0], tiny.turns(random.Random(str(edge)), edge[0], 100)),
        )
    assert tiny.accuracy(system, chains, rounds=3)["percent"] > 75


def test_overlapping_tokens_align_tokenizers(folders):
    """Each source token is paired with the mean of the target's tokens for the same characters."""
    system = load(folders)
    planner, critic = system.agents["planner"], system.agents["critic"]
    places, means = ridge.overlapping_tokens(planner, critic, "a=1")
    assert places == [0, 1, 2] and torch.equal(
        means, critic.model.embed(torch.tensor(critic.tokenizer.encode("a=1")))
    )
    words = checkpoints.byte_tokenizer([])
    words.add_tokens(["a="])
    planner.tokenizer.fast = words
    places, means = ridge.overlapping_tokens(planner, critic, "a=1")
    tokens = critic.model.embed(torch.tensor(critic.tokenizer.encode("a=1")))
    assert places == [0, 1] and torch.allclose(means, torch.stack([tokens[:2].mean(0), tokens[2]]))
    critic.tokenizer.fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    planner.tokenizer.fast = checkpoints.byte_tokenizer([])
    assert ridge.overlapping_tokens(planner, critic, "a =")[0] == [0, 2], (
        "the target has no token for the blank"
    )


def test_examples_of_the_tiny_task_are_its_notes():
    first = load_examples("tiny", STYLES["tiny"], STYLES["tiny"].order, limit=50)
    assert len(first) == 50
    for example in first:
        steps = len(example.question.text.split()) - 1
        assert example.text("solver", 3).endswith("}") and all(
            len(texts) == 3 for texts in example.texts.values()
        )
        assert example.text("planner", 1).startswith("a") and example.text("solver", 3).startswith(
            "abcdefghi"[steps - 1]
        )
