"""Times a training step of minimas beside the same step on transformers, and measures the memory it adds to the models.

    python tools/bench_train.py --device cpu --size wide

The step trains the outer links of a style: latents from teacher-forced texts (80 per turn), three rounds, the answer's
loss in the last round, gradients of all links. Two peers, both with transformers' gradient checkpointing:
    released   as the released code: one row after another, scores over the vocabulary at every position of every agent
    batched    all rows at once, scores only for the answer
All run in one process, in turns. Losses and gradients are compared first. The last line of output is a JSON object.
"""

import argparse
import ctypes
import json
import platform
import statistics
import tempfile
import threading
from pathlib import Path

import reference
import torch
import torch.nn.functional as F
import transformers
from bench import Peer, make_system, questions, timed

import minimas
from minimas.config import DTYPES
from minimas.settings import Settings
from minimas.styles import STYLES
from minimas.train.examples import TrainExample
from minimas.train.losses import OuterLoss, checkpoint_activations, reply_ending

LATENTS = 80
LIBC = ctypes.CDLL("libc.so.6") if platform.system() == "Linux" else None


class TrainingPeer(Peer):
    def __init__(self, system, folders, models, dtype, device, batched):
        self.system = system
        super().__init__(type("", (), {"system": system}), folders, True, models, dtype, device)
        self.batched, self.name = batched, "batched" if batched else "released"
        self.inner = {
            role: {name: t.to(dtype) for name, t in link.items()}
            for role, link in self.inner.items()
        }
        self.outer = {
            edge: {name: t.float().requires_grad_(True) for name, t in link.items()}
            for edge, link in self.outer.items()
        }

    def step(self, examples, rounds):
        for link in self.outer.values():
            for t in link.values():
                t.grad = None
        parts, total = [examples] if self.batched else [[example] for example in examples], 0.0
        for part in parts:
            loss = self.loss(part, rounds) * len(part) / len(examples)
            loss.backward()
            total += loss.item()
        return total

    def loss(self, examples, rounds):
        inbox, order = {}, self.system.style.order
        for r in range(1, rounds + 1):
            for role in order:
                model, tokenizer = self.models[role], self.system.agents[role].tokenizer
                replies = [
                    tokenizer.encode(example.text(role, r) + reply_ending(tokenizer))
                    for example in examples
                ]
                ids = [torch.tensor(reply, device=self.device) for reply in replies]
                prompts = self.system.prompts_for(
                    role, [example.question for example in examples], inbox
                )
                E, N = (
                    model.get_input_embeddings(),
                    len(ids[0]),
                )  # all texts have the same length here
                x, mask = self.embed(
                    role, [[*prompt, E(reply)] for prompt, reply in zip(prompts, ids)]
                )
                last = role == order[-1]
                if self.batched:
                    states = model.model(
                        inputs_embeds=x, attention_mask=mask, use_cache=False
                    ).last_hidden_state
                    if last and r == rounds:
                        scores = model.lm_head(states[:, -N - 1 : -1])
                        return F.cross_entropy(scores.float().flatten(0, 1), torch.cat(ids))
                else:
                    out = model(
                        inputs_embeds=x,
                        attention_mask=mask,
                        use_cache=False,
                        output_hidden_states=True,
                    )
                    states = out.hidden_states[-1]
                    if last:
                        loss = F.cross_entropy(
                            out.logits[:, -N - 1 : -1].float().flatten(0, 1), torch.cat(ids)
                        )
                        if r == rounds:
                            return loss
                z = reference.inner(self.inner[role], states[:, -N:])
                for edge, link in self.outer.items():
                    if edge[0] == role:
                        inbox[edge] = reference.outer(link, z.float())[:, :LATENTS].to(
                            E.weight.dtype
                        )


class Ours:
    """minimas; `rows` are computed at once, one group after another."""

    def __init__(self, name, loss, rows):
        self.name, self.objective, self.rows = name, loss, rows

    def step(self, examples, rounds):
        self.objective.zero_grad()
        total = 0.0
        for part in [examples[i : i + self.rows] for i in range(0, len(examples), self.rows)]:
            loss = self.objective(part) * len(part) / len(examples)
            loss.backward()
            total += loss.item()
        return total


def examples_of(style, B, prompt_tokens, reply_tokens):
    """B examples whose texts all have reply_tokens words of one token each."""
    asked = questions(B, prompt_tokens)
    random = torch.Generator().manual_seed(1)
    text = lambda: " ".join(
        f"w{i}" for i in torch.randint(0, 1000, (reply_tokens,), generator=random).tolist()
    )
    return [
        TrainExample(style.question(question), {role: (text(),) for role in style.order})
        for question in asked
    ]


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak(work, device):
    """work() -> its result, its seconds, and the most bytes it allocated at a time."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        seconds, result = timed(work, device)
        return result, seconds, torch.cuda.max_memory_allocated() - before
    LIBC.malloc_trim(0)  # or freed memory that the process still holds would hide new allocations
    before, highest, done = resident(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            highest[0] = max(highest[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds, result = timed(work, device)
    done.set()
    watcher.join()
    return result, seconds, highest[0] - before


def gradients(runner, system):
    if isinstance(runner, Ours):
        return {
            edge: torch.cat([p.grad.flatten() for p in link.parameters()])
            for edge, link in system.outer_links.items()
        }
    return {
        edge: torch.cat(
            [runner.outer[edge][name].grad.flatten() for name, _ in link.named_parameters()]
        )
        for edge, link in system.outer_links.items()
    }


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--size", choices=("small", "wide", "real"), default="small", help="as in bench.py")
    add(
        "--style",
        choices=[style for style in STYLES if style != "tiny"],
        default="sequential_light",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of agents; default: float32 on cpu, bfloat16 on cuda",
    )
    add("--batch", type=int, default=8)
    add("--rounds", type=int, default=3)
    add("--prompt-tokens", type=int, default=120)
    add("--reply-tokens", type=int, default=100, help=f"of every text, at least {LATENTS}")
    add("--latent-steps", type=int, default=32, help="of the roll-out")
    add("--repeats", type=int, default=3)
    add(
        "--only",
        help="names in the table, separated by semicolons, to run beside minimas instead of all",
    )
    args = parser.parse_args()
    args.dtype = args.dtype or {"cpu": "float32", "cuda": "bfloat16"}[args.device]
    return args


@torch.no_grad()
def systems(args, folder):
    """A system that recomputes activations, one with the same weights that keeps them, and both peers."""
    style, dtype = STYLES[args.style], DTYPES[args.dtype]
    folders = make_system(folder, args.style, args.size, dtype, args.device)
    system, kept = (
        minimas.load_mas_system(
            args.style, checkpoints=folders, device=args.device, dtype=args.dtype
        )
        for _ in range(2)
    )
    for role, agent in kept.agents.items():
        agent.model.load_state_dict(
            system.agents[role].model.state_dict(), assign=True
        )  # one copy of the weights
    models = {
        role: reference.load_model(folders[role], dtype).to(args.device) for role in style.order
    }
    peers = [
        TrainingPeer(system, folders, models, dtype, args.device, batched)
        for batched in (False, True)
    ]
    for model in models.values():
        model.requires_grad_(False).gradient_checkpointing_enable()
        model.train()  # checkpointing is off in eval mode
    for one in system, kept:
        for link in one.outer_links.values():
            link.float()
    checkpoint_activations(system)
    return system, kept, peers


def runners(args, system, kept, peers):
    """All lines of the table, minimas first, or those that --only names."""
    forced = Settings(rounds=args.rounds, latent_steps=LATENTS).completed(system.style)
    thought = Settings(rounds=args.rounds, latent_steps=args.latent_steps).completed(system.style)
    teacher, B = OuterLoss(system, forced, teacher=True), args.batch
    every = [
        Ours("minimas", teacher, B),
        Ours("minimas, 2 rows at once", teacher, 2),
        Ours("minimas, row by row", teacher, 1),
        Ours("minimas, keeping activations", OuterLoss(kept, forced, teacher=True), B),
        Ours(f"minimas, roll-outs of {args.latent_steps}", OuterLoss(system, thought), B),
        *peers,
    ]
    return [
        runner
        for runner in every
        if not args.only or runner.name in ["minimas", *args.only.split(";")]
    ]


def measure(args, system, runners, compared):
    """Losses, bytes and lists of seconds by runner's name; gradients by name of the runners in `compared`."""
    examples = examples_of(STYLES[args.style], args.batch, args.prompt_tokens, args.reply_tokens)
    losses, memory, seconds, found = {}, {}, {}, {}
    for i in range(-1, args.repeats + 1):  # -1: warm-up, 0: memory and gradients, then times
        if args.device == "cpu":  # while memory is measured, what is freed is returned at once
            LIBC.mallopt(-3, 1 << 20 if i == 0 else 1 << 25)  # M_MMAP_THRESHOLD
        for runner in runners:
            loss, s, taken = peak(
                lambda: runner.step(examples[:1] if i < 0 else examples, args.rounds), args.device
            )
            if i > 0:
                seconds.setdefault(runner.name, []).append(s)
            if i == 0:
                losses[runner.name], memory[runner.name] = loss, taken
                if runner in compared:
                    found[runner.name] = gradients(runner, system)
    return losses, memory, seconds, found


def main():
    args = arguments()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        system, kept, peers = systems(args, Path(folder))
    lines = runners(args, system, kept, peers)
    losses, memory, seconds, found = measure(args, system, lines, [lines[0], *peers])
    apart = {
        name: max(
            ((found["minimas"][edge] - g).norm() / g.norm()).item() for edge, g in own.items()
        )
        for name, own in found.items()
        if name != "minimas"
    }
    time = {name: statistics.median(times) for name, times in seconds.items()}
    print(
        f"{'':32s}{'seconds per step':>20s}{'MiB above models':>20s}{'loss':>10s}{'gradient differs by':>20s}"
    )
    for name, times in seconds.items():
        spread = f"{time[name]:.2f} ±{50 * (max(times) - min(times)) / time[name]:.0f}%"
        difference = f"{apart[name]:>20.1e}" if name in apart else ""
        print(
            f"{name:32s}{spread:>20s}{memory[name] / 2**20:>20.0f}{losses[name]:>10.4f}{difference}"
        )
    if args.dtype == "float32" and max(apart.values(), default=0) > 1e-3:
        raise SystemExit("the gradients differ")
    ratios = {
        name: {
            "time_ratio": round(time[name] / time["minimas"], 2),
            "memory_ratio": round(memory[name] / memory["minimas"], 2),
        }
        for name in time
        if name != "minimas"
    }
    card = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{torch.get_num_threads()} threads"
    )
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "on": card,
    }
    result = {
        "against": ratios,
        "seconds": time,
        "bytes": memory,
        "losses": losses,
        "gradients_apart": apart,
        "size": args.size,
        "style": args.style,
        "device": args.device,
        "dtype": args.dtype,
        "batch": args.batch,
        "versions": versions,
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
