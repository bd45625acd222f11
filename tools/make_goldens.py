"""Write tests/goldens/: what transformers makes of the miniature checkpoints. Needs the oracle extra.

python tools/make_goldens.py
"""

import tempfile
from pathlib import Path

import checkpoints
import reference
import torch
from checkpoints import GOLDENS, IDS, QUESTIONS, RECURSION, ROUNDS
from safetensors.torch import save_file


def family_outputs(name, folder):
    """Last hidden states of all positions and logits of the last 16 for IDS, by transformers."""
    model_type, config = checkpoints.VARIANTS[name]
    h, logits = reference.hidden_and_logits(
        checkpoints.make_agent(folder, model_type, **config), IDS
    )
    return {"h": h.contiguous(), "logits": logits[:, -16:].contiguous()}


def recursion_outputs(style, folders, rounds, question):
    latents, ids = reference.released(
        style, folders, question, rounds, RECURSION["latent_steps"], RECURSION["max_new_tokens"]
    )
    return {" ".join(map(str, key)): value for key, value in latents.items()} | {
        "ids": torch.tensor(ids)
    }


def main():
    GOLDENS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        outputs = {
            f"{name}/{key}": value
            for name in checkpoints.VARIANTS
            for key, value in family_outputs(name, Path(folder) / name).items()
        }
        save_file(outputs | {"ids": IDS}, GOLDENS / "families.safetensors")
        for style in checkpoints.SYSTEMS:
            folders = checkpoints.make_system(Path(folder) / style, style)
            outputs = {
                f"{rounds}/{i}/{key}": value
                for rounds in ROUNDS
                for i, question in enumerate(QUESTIONS)
                for key, value in recursion_outputs(style, folders, rounds, question).items()
            }
            save_file(outputs, GOLDENS / f"{style}.safetensors")


if __name__ == "__main__":
    main()
