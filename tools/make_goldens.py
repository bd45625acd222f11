"""Write tests/goldens/: what transformers makes of the miniature checkpoints. Needs the oracle extra.

python tools/make_goldens.py                   all of them. Another CPU may come to other last bits
python tools/make_goldens.py qwen3 mistral     those of these decoders, and leave all others as they are
"""

import argparse
import tempfile
from pathlib import Path

import checkpoints
import reference
import torch
from checkpoints import GOLDENS, IDS, QUESTIONS, RECURSION, ROUNDS
from safetensors.torch import load_file, save_file


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


def write_families(names):
    """Write the goldens of these rows of VARIANTS, beside those of others that are there already."""
    file = GOLDENS / "families.safetensors"
    outputs = load_file(file) if file.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            for key, value in family_outputs(name, Path(folder) / name).items():
                outputs[f"{name}/{key}"] = value
    save_file(outputs | {"ids": IDS}, file)


def write_recursions():
    """Write the goldens of all systems."""
    for style in checkpoints.SYSTEMS:
        outputs = {}
        with tempfile.TemporaryDirectory() as folder:
            folders = checkpoints.make_system(Path(folder) / style, style)
            for rounds in ROUNDS:
                for i, question in enumerate(QUESTIONS):
                    for key, value in recursion_outputs(style, folders, rounds, question).items():
                        outputs[f"{rounds}/{i}/{key}"] = value
        save_file(outputs, GOLDENS / f"{style}.safetensors")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows of VARIANTS; default: all")
    names = parser.parse_args().names
    unknown = set(names) - set(checkpoints.VARIANTS)
    if unknown:
        parser.error(f"not in VARIANTS: {', '.join(sorted(unknown))}")
    GOLDENS.mkdir(exist_ok=True)
    write_families(names or checkpoints.VARIANTS)
    if not names:
        write_recursions()


if __name__ == "__main__":
    main()
