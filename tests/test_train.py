"""Link training: gradients are right, reach what they must, and leave the agents alone."""

import pytest
import torch

import checkpoints
import minimas
from minimas import train
from minimas.recurse import STYLES, Settings


@pytest.fixture
def system(tmp_path):
    torch.manual_seed(0)
    return minimas.load_mas_system("sequential_light", checkpoints=checkpoints.make_system(tmp_path), device="cpu", plain=True)


TURNS = [train.Turn("1 + 1?", {"planner": "Add."}, "Add 1 and 1."), train.Turn("What is 2 * 3?", {"planner": "Multiply"}, "So: 2 * 3")]


def test_teacher_forcing_lines_up(system):
    """Row by row, the states that predict a reply are those before its tokens, whatever its neighbours' lengths."""
    critic = system.agents["critic"]
    h, ids = train.forced_turns(system, "critic", TURNS)
    for b, turn in enumerate(TURNS):
        reply = critic.tokenizer.encode(turn.reply) + [critic.tokenizer.eos_id]
        assert ids[b][ids[b] != train.IGNORED].tolist() == reply
        prompt = system.prompts("critic", system.read([turn.question]), {("planner", "critic"): [turn.inbox["planner"]]})
        x, positions = critic.embed([[*prompt[0], torch.tensor(reply)]])
        states = critic.model(x, positions, critic.model.make_cache(1))[0, -len(reply) - 1:-1]
        assert (h[b, -len(reply):] - states).abs().max() < 1e-5




def test_gradient_through_rounds_equals_finite_differences(system):
    for module in [*system.outer_links.values(), *(m for a in system.agents.values() for m in (a.model, a.inner_link))]:
        module.double()
    settings = Settings(rounds=2, latent_steps=3)
    links = torch.nn.ModuleList(system.outer_links.values()).requires_grad_(True)
    loss_of = lambda: train.answer_loss(system, ["1 + 1?", "What is two times three?"], ["2", "It is 6"], settings)
    loss_of().backward()
    for link in links:
        weight, direction = link.proj2.weight, torch.randn_like(link.proj2.weight)
        expected = (weight.grad * direction).sum().item()
        assert expected != 0, "every edge, the feedback included, has its share in the answer"
        around = []
        for sign in 1, -1:
            with torch.no_grad():
                weight += sign * 1e-5 * direction
                around.append(loss_of().item())
                weight -= sign * 1e-5 * direction
        assert (around[0] - around[1]) / 2e-5 == pytest.approx(expected, rel=1e-4)


def test_the_loss_is_that_of_inference(system):
    """The training graph (a cache that grows) and the run (a cache written in place) send the same latents."""
    sent = {}
    result = system.run(["1 + 1?"], rounds=2, latent_steps=3, max_new_tokens=1, retry=False, keep_latents=True)[0]
    with torch.enable_grad():
        minimas.recurse.recurse(system, system.read(["1 + 1?"]), Settings(rounds=2, latent_steps=3), hear=lambda r, edge, z, _: sent.update({(r, *edge): z[0]}))
    assert sent.keys() == result.latents.keys() and all((sent[key] - result.latents[key]).abs().max() < 1e-5 for key in sent)


def test_inner_training_lowers_its_loss_and_leaves_agents_alone(system):
    before = {name: p.clone() for name, p in system.agents["critic"].model.named_parameters()}
    losses = train.train_inner(system, "critic", lambda step: TURNS, steps=30, lr=3e-3)
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in system.agents["critic"].model.named_parameters())
    assert not any(p.requires_grad for p in system.agents["critic"].inner_link.parameters())


def test_outer_training_lowers_its_loss(system):
    turns = [train.Turn(turn.question, {}, turn.reply) for turn in TURNS]
    warm = train.warm_up_outer(system, ("planner", "critic"), lambda step: turns, steps=30, lr=3e-3)
    assert warm[-1] < 0.7 * warm[0]
    batch = (["1 + 1?", "2 * 3?"], ["2", "6"], Settings(rounds=2, latent_steps=2))
    losses = train.train_outer(system, lambda step: batch, steps=15, lr=3e-3)
    assert losses[-1] < losses[0]


def test_same_text_aligns_tokenizers(system):
    """Each source token is met by the mean of the target's tokens that cover the same characters."""
    planner, critic = system.agents["planner"], system.agents["critic"]
    wanted = train.same_text(planner, critic, "a=1")
    assert torch.equal(wanted, critic.model.embed(torch.tensor(critic.tokenizer.encode("a=1"))))
    words = checkpoints.byte_tokenizer([])
    words.add_tokens(["a="])
    planner.tokenizer.fast = words
    wanted = train.same_text(planner, critic, "a=1")
    tokens = critic.model.embed(torch.tensor(critic.tokenizer.encode("a=1")))
    assert torch.allclose(wanted, torch.stack([tokens[:2].mean(0), tokens[2]]))


def test_saved_links_load_again(system, tmp_path):
    train.save_inner_link(tmp_path, system.agents["solver"].inner_link)
    train.save_outer_links(tmp_path, system.style, system.outer_links)
    models = {role: agent.model for role, agent in system.agents.items()}
    loaded = minimas.load.load_outer_links(tmp_path, "math", STYLES["sequential_light"].edges, models, dict.fromkeys(models, "cpu"))
    for edge, link in system.outer_links.items():
        assert torch.equal(loaded[edge].proj1.weight, link.proj1.weight.bfloat16().float()), "written in bfloat16, widened for its agent"
    assert torch.equal(minimas.load.load_inner_link(tmp_path, "math", 56).proj1.weight, system.agents["solver"].inner_link.proj1.weight.bfloat16())
