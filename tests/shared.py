"""What several test files share, and no test: systems of miniatures, what they are asked, links and their inputs."""

import checkpoints
import pytest
import torch
from checkpoints import QUESTIONS

import minimas
from minimas.link import InnerLink, OuterLink

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
OPTIONS = {
    "rounds": 2,
    "latent_steps": 3,
    "max_new_tokens": 8,
    "retry": False,
    "keep_latents": True,
}
ASKED = [*QUESTIONS, "And one more?", "5"]


def load(folders, style, **options):
    return minimas.load_mas_system(
        style, checkpoints=folders(style), **{"device": "cpu", "fast": True, **options}
    )


def assert_same(ours, plain):
    for a, b in zip(ours, plain, strict=True):
        assert (
            a.token_ids == b.token_ids and a.text == b.text and a.latents.keys() == b.latents.keys()
        )
        assert all((a.latents[key].cpu() - b.latents[key]).abs().max() < 1e-4 for key in b.latents)


LINKS = pytest.mark.parametrize(
    "link",
    (
        checkpoints.randomize(InnerLink(64), 1, 0.2),
        checkpoints.randomize(OuterLink(64, 40), 2, 0.2),
    ),
)


def states(*shape, dtype=torch.float32):
    """Hidden states as they are met: a mean that is not zero, a few channels that are large."""
    h = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) + 0.3
    h[..., :3] *= 20
    return h.to(dtype)


def scripted(agent, scripts, monkeypatch):
    """Let row b write scripts[b], token by token, whatever the model would."""
    ids = [agent.tokenizer.encode(script) for script in scripts]
    step = iter(range(10_000))

    def logits(h):
        n, scores = next(step), torch.zeros(len(h), agent.model.config.vocab_size, device=h.device)
        for b, row in enumerate(ids):
            scores[b, row[min(n, len(row) - 1)]] = 1
        return scores

    monkeypatch.setattr(agent.model, "logits", logits)


SCRIPTS = [
    # as long as the other: rows that end leave
    "Try <python> print(6 * 7) </python> so that makes \\boxed{42}<|im_end|>",
    "No tool is needed here, and none shall cut a text: \\boxed{7}<|im_end|>",
]
