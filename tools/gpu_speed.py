"""How fast a device is, and how much memory it takes: the parts of on_gpu.py that come after the checks.

sequential_light at its true depth (Qwen3-1.7B, Llama-3.2-1B and Qwen2.5-Math-1.5B randomly initialised) in
bfloat16, questions of about 120 tokens, 3 rounds, 32 latent steps and 256 new tokens. --small: narrow, two layers,
float32. What a figure should be is a bar; it is printed beside the figure.

Notation: B rows, T tokens of a prompt, S positions, D width, m latent steps.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

if "--device cpu" in " ".join(sys.argv):
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton: the dry run calls the kernels, too

import bench
import bench_train
import checkpoints
import reference
import torch
import torch.nn.functional as F
import transformers
from on_gpu import note, part_options

import minimas
from minimas import link as link_module
from minimas.agent import load_agent
from minimas.cache import KVCache, masks
from minimas.fast import onednn
from minimas.fast import prepare as prepare_module
from minimas.llama import rope_cos_sin
from minimas.settings import Settings
from minimas.styles import STYLES

STYLE = "sequential_light"
WORTH = (
    1.15  # a kernel must beat torch's operations in a graph by this factor at some number of rows
)
bars = {}


def bar(name, value, least=None, most=None):
    """Report a figure beside what it should be on a GPU."""
    met = (value >= least if most is None else value <= most) if torch.cuda.is_available() else None
    bars[name] = {"value": round(value, 3), "least": least, "most": most, "met": met}
    limit = lambda b: f"at least {b['least']}" if b["most"] is None else f"at most {b['most']}"
    verdict = {True: "met", False: "MISSED", None: "no bar here"}
    note(
        bars=bars,
        summary="; ".join(
            f"{name}: {b['value']} ({limit(b)}, {verdict[b['met']]})" for name, b in bars.items()
        ),
    )


def agent_folders(options):
    """The folders of sequential_light, made by whoever comes first: drawing and writing 9 GB takes a while."""
    folder, dtype = options.work / "system", torch.float32 if options.small else torch.bfloat16
    if not folder.is_dir():
        partial = Path(tempfile.mkdtemp(dir=options.work))
        bench.make_system(
            partial, STYLE, "small" if options.small else "real", dtype, options.device
        )
        partial.rename(folder)
    return {name: folder / name for name in [*STYLES[STYLE].order, "links"]}, dtype


def system(options):
    started = time.perf_counter()
    agent_folders(options)
    note(seconds_to_initialise=time.perf_counter() - started, summary="initialised")


def needed(agent, B, T, S):
    """Bytes that shapes require: (the KV cache of S positions, the widest point of a prefill or a step).

    Widest is the MLP (gate, up, their product, the residual stream and its norm) or the scores, once as they are and
    once in float32.
    """
    c, size = agent.model.config, agent.model.norm.weight.element_size()
    return (
        2 * c.num_hidden_layers * B * c.num_key_value_heads * S * c.head_dim * size,
        max(
            B * T * (3 * c.intermediate_size + 2 * c.hidden_size) * size,
            B * c.vocab_size * (size + 4),
        ),
    )


def median_seconds(f, device, times=3):
    return statistics.median(bench.timed(f, device)[0] for _ in range(times))


# Against transformers


def load_ours(options, settings):
    """minimas, ready to run."""
    folders, dtype = agent_folders(options)
    started = time.perf_counter()
    ours = bench.Ours(
        minimas.load_mas_system(
            STYLE, checkpoints=folders, device=options.device, dtype=dtype, fast=True
        ),
        settings,
    )
    note(seconds_to_load=time.perf_counter() - started)
    return ours


def load_peers(options, ours):
    """transformers with and without its cache, on the same weights."""
    folders, dtype = agent_folders(options)
    models = {
        role: reference.load_model(folders[role], dtype).to(options.device)
        for role in ours.system.agents
    }
    return [
        bench.Peer(ours, folders, cached, models, dtype, options.device) for cached in (True, False)
    ]


def race(options):
    """Whole runs of B questions, the steps of each agent, and memory; then transformers beside whole runs.

    What can go wrong in transformers comes last, and costs no figure of minimas.
    """
    B, m, n, rounds = int(options.argument), 32, 256, 3
    if options.small:
        B, m, n, rounds = min(B, 3), 4, 6, 2
    settings = Settings(rounds=rounds, latent_steps=m, max_new_tokens=n, temperature=0.0)
    ours = load_ours(options, settings)
    asked, device = bench.questions(B, 120), options.device
    note(
        on=torch.cuda.get_device_name() if device == "cuda" else "CPU",
        torch=torch.__version__,
        transformers=transformers.__version__,
        batch=B,
        rounds=rounds,
        latent_steps=m,
        new_tokens=n,
        seconds_of_first_run=bench.timed(lambda: ours.run(asked), device)[0],
    )  # compiles kernels and captures graphs
    seconds = median_seconds(lambda: ours.run(asked), device)
    note(seconds_of_a_run=seconds)
    prompts = dict(bench.prompts_of_a_run(ours, asked))
    of_steps(options, ours, prompts, B, m, n)
    memory_of_a_run(options, ours, asked, prompts, B, m, n)
    cached, released = load_peers(options, ours)
    for peer, least in (released, 20 if B == 1 else 10), (cached, None):  # one whole run each, warm
        for role in prompts:
            peer.think(role, prompts[role], 2)
        peer.write(role, prompts[role], 2)
        taken, result = bench.timed(lambda: peer.run(asked), device)
        note(**{f"seconds_of_{peer.name}": taken})
        if least:
            bar(f"end to end, {peer.name} / minimas, batch {B}", taken / seconds, least)
    apart, same = bench.agree(ours.run(asked), result, torch.bfloat16)
    note(latents_apart=apart, tokens_equal=same, end_to_end_cached_ratio=taken / seconds)


def of_steps(options, ours, prompts, B, m, n):
    """Prefill, latent step and text token of each agent, and the part of the copy bandwidth at which steps read."""
    bytes_per_second, found = (
        bench.copy_bandwidth("cuda") if options.device == "cuda" else bench.read_bandwidth(),
        {},
    )
    note(copy_bandwidth=bytes_per_second)
    for role, asked in prompts.items():
        agent = ours.system.agents[role]
        S = max(map(len, agent.embed(asked)))
        for name, work, count in ("latent step", ours.think, m), ("text token", ours.write, n):
            one, many = (
                [
                    work(role, asked, k),
                    median_seconds(lambda: work(role, asked, k), options.device),
                ][1]
                for k in (1, count)
            )
            step = (many - one) / (count - 1)
            size = bench.step_bytes(agent, B, S + count // 2, name == "text token")
            found[f"{name}, {role}"] = {
                "milliseconds": 1e3 * step,
                "mbu": size / step / bytes_per_second,
                "prefill and first, milliseconds": 1e3 * one,
            }
            note(steps=found)
            if B == 1:
                bar(f"{name} {role}, of the bandwidth", size / step / bytes_per_second, 0.7)


def memory_of_a_run(options, ours, asked, prompts, B, m, n):
    """What a run takes beside the weights, all caches, graphs and workspace included."""
    agents, required, widest = ours.system.agents, 0, 0
    for role, agent in agents.items():
        agent.release()
        T = max(map(len, agent.embed(prompts[role])))
        cache, work = needed(agent, B, T, T + (n if role == ours.system.style.order[-1] else m))
        required, widest = required + cache, max(widest, work)
    _, _, taken = bench_train.peak(lambda: ours.run(asked), options.device)
    note(memory={"bytes": taken, "caches": required, "widest": widest})
    bar(f"memory of a run / its shapes, batch {B}", taken / (required + widest), most=1.1)


# What the kernels are worth


def load(folder, options, dtype, with_kernels):
    """An agent on the fast path with our kernels, or with torch's operations where they would be."""
    if with_kernels:
        from minimas.fast import kernels
    with ExitStack() as stack:
        for module in prepare_module, link_module:
            use = patch.object(
                module, "kernels_for", lambda weight: kernels if with_kernels else None
            )
            stack.enter_context(use)
        stack.enter_context(patch.object(onednn, "can_multiply", lambda weight: False))
        return load_agent(folder, "math", torch.device(options.device), dtype, fast=True)


def graphed(f, options):
    """f by replay of a CUDA graph."""
    return bench.as_graph(f) if options.device == "cuda" else f


def pairs(mine, theirs, x, positions, rope, cache, mask):
    """{part of a block's step: (by our kernels, by torch)} of one block in both forms; x (B, D)."""
    step, act = mine.forward, {"silu": F.silu}[mine.forward.act]
    name, module = next(
        (name, getattr(mine, name)) for name in ("self_attn", "linear_attn") if hasattr(mine, name)
    )
    inputs, out = ("qkv", "o_proj") if name == "self_attn" else ("inputs", "out_proj")
    a = getattr(theirs, name)
    proj, of_all = getattr(module, out), getattr(module, inputs)
    made = step.product(x, of_all, step.attention_norm)
    y = torch.randn(len(x), proj.in_features, device=x.device).to(x)
    z = step.product(x, mine.mlp.gate_up, step.mlp_norm, act=step.act)

    def ours():
        with patch.object(step, "product", lambda *_: made):
            return (
                step.delta(module, x, cache)
                if name == "linear_attn"
                else step.attend(module, x, positions, rope, cache)
            )

    def torchs():
        parts = made[:, None].split(of_all.sizes, -1)
        with (
            patch.object(a, inputs, lambda _: parts),
            patch.object(getattr(a, out), "forward", lambda y: y),
        ):
            return a(x[:, None], positions, rope, mask, cache)

    def gate_up():
        gate, up = theirs.mlp.gate_up(theirs.post_attention_layernorm(x))
        return act(gate) * up

    return {
        "linear in": (
            lambda: step.product(x, of_all, step.attention_norm),
            lambda: getattr(a, inputs)(theirs.input_layernorm(x)),
        ),
        "linear out": (lambda: step.add(x, y, proj, None), lambda: x + getattr(a, out)(y)),
        "linear gate_up": (
            lambda: step.product(x, mine.mlp.gate_up, step.mlp_norm, act=step.act),
            gate_up,
        ),
        "linear down": (
            lambda: step.add(x, z, mine.mlp.down_proj, None),
            lambda: x + theirs.mlp.down_proj(z),
        ),
        "norm": (lambda: mine.input_layernorm(x), lambda: theirs.input_layernorm(x)),
        "delta" if name == "linear_attn" else "attend": (ours, torchs),
    }


def kernel_agents(options):
    """Folders of an agent with attention and of one with Gated DeltaNets, and their dtype; miniatures for an
    interpreter.
    """
    folder = options.work / "delta"
    if options.small:
        return (
            checkpoints.make_agent(options.work / "attention", "qwen3"),
            checkpoints.make_agent(folder, "qwen3_5_text"),
            torch.float32,
        )
    folders, dtype = agent_folders(options)
    kind, config = bench.sizes("Qwen3.5-4B", "wide")
    config |= {"num_hidden_layers": 8, "layer_types": ["linear_attention"] * 8, "vocab_size": 1100}
    bench.make_agent(folder, kind, config, dtype, options.device)
    return folders["planner"], folder, dtype


def kernels(options):
    """Each kernel beside torch's operations in its place, both as graphs over all layers of a model."""
    if options.device == "cpu" and not find_spec("triton"):
        return note(skipped="Triton is not on this machine")
    attention, delta, dtype = kernel_agents(options)
    best, table = {}, {}
    for folder, parts in (attention, None), (delta, ("delta",)):
        quick, plain = (
            load(folder, options, dtype, with_kernels).model for with_kernels in (True, False)
        )
        for B in (1,) if options.small else (1, 2, 4, 8, 16, 32):
            positions = torch.full((B, 1), 448, device=options.device)
            cache = quick.make_cache(B, 512)
            for c in cache:
                if isinstance(c, KVCache):
                    c.filled = c.capacity  # as in a graph
            x = torch.randn(B, quick.config.hidden_size, device=options.device).to(dtype)
            rope = rope_cos_sin(positions, quick.frequency)
            layers_of_both = zip(quick.layers, plain.layers, cache, masks(cache, positions, 1))
            blocks = [
                pairs(mine, theirs, x, positions, rope, c, mask)
                for mine, theirs, c, mask in layers_of_both
            ]
            blocks = blocks[:1] if options.small else blocks
            for part in parts or blocks[0]:
                forms = [
                    graphed(lambda i=i: [block[part][i]() for block in blocks], options)
                    for i in (0, 1)
                ]
                ours, theirs = bench.in_turns(forms, options.device, 1 if options.small else 20)
                table.setdefault(part, {})[B] = {
                    "microseconds": 1e6 * ours / len(blocks),
                    "ratio": theirs / ours,
                }
                kernel = part.split()[0]
                best[kernel] = max(best.get(kernel, 0), theirs / ours)
                goes = [name for name, ratio in best.items() if ratio < WORTH]
                told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in best.items())
                note(
                    kernels=table,
                    goes=goes,
                    summary=f"torch in a graph / kernel, best of all rows: {told}; at least "
                    f"{WORTH} to stay; goes: {', '.join(goes) or 'none'}",
                )


def a_step(agent, B, layers, S=512):
    """A latent step of B rows through the first blocks, and its cache."""
    agent.model.layers = agent.model.layers[:layers]
    cache = agent.model.make_cache(B, S)[:layers]
    for c in cache:
        c.filled = c.capacity
    x = torch.randn(B, 1, agent.model.config.hidden_size, device=agent.device).to(
        agent.model.norm.weight
    )
    positions = torch.full((B, 1), S - 64, device=agent.device)
    return lambda: agent.inner_link(agent.model(x, positions, cache, last=1)).to(x.dtype), [
        x,
        *(getattr(c, name) for c in cache for name in c.tensors),
    ]


def compiled(agent, B, layers, options):
    """The plain step by torch.compile, with its own CUDA graphs; in ours, should it decline to make some."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step, tensors = a_step(agent, B, layers)
    for t in tensors:
        torch._dynamo.mark_static_address(t)
    how = (
        {"mode": "reduce-overhead"} if options.device == "cuda" else {"backend": "aot_eager"}
    )  # the dry run only traces
    f = torch.compile(step, dynamic=False, **how)

    def run():
        torch.compiler.cudagraph_mark_step_begin()
        return f()

    with patch.object(
        KVCache, "sees_all", lambda *_: False
    ):  # as on CUDA: no look at a tensor breaks the graph
        for _ in range(3):  # compiles, records, replays
            run()
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    return graphed(f, options) if skipped else run, skipped


def ways(options):
    """The same latent step in three ways: our kernels in a graph, torch in a graph, and torch.compile."""
    (folders, dtype), layers, table = agent_folders(options), 1 if options.small else 8, {}
    counts = (
        {"planner": (1,)}
        if options.small
        else {"planner": (1, 32, 8), "critic": (1, 32), "solver": (1, 32)}
    )
    for role, rows in counts.items():
        quick, plain = (
            load(
                folders[role], options, dtype, with_kernels
            )  # an interpreter of them would take minutes
            for with_kernels in (options.device == "cuda", False)
        )
        bare = load_agent(folders[role], "math", torch.device(options.device), dtype)
        for B in rows:
            started = time.perf_counter()
            run, skipped = compiled(bare, B, layers, options)
            seconds = time.perf_counter() - started
            forms = [graphed(a_step(agent, B, layers)[0], options) for agent in (quick, plain)] + [
                run
            ]
            ours, torchs, by_compile = bench.in_turns(
                [lambda f=f: [f() for _ in range(5)] for f in forms],
                options.device,
                2 if options.small else 20,
            )
            table[f"{role}, {B} rows"] = {
                "milliseconds": 200 * ours,
                "torch": torchs / ours,
                "compile": by_compile / ours,
                "seconds to compile": seconds,
                "graphs that compile declined": skipped,
            }
            told = "; ".join(
                f"{name}: torch {t['torch']:.2f}, compile {t['compile']:.2f}"
                for name, t in table.items()
            )
            near = max(t["compile"] for t in table.values()) < WORTH
            note(
                ways=table,
                summary=f"time / ours, {layers} layers: {told}; kernels.py "
                + (
                    "goes: compile is within 15 % everywhere"
                    if near
                    else "stays: compile is not within 15 % everywhere"
                ),
            )


# Others


def links(options):
    """Both links, plain and fused, at 1 to 64 rows."""
    args = SimpleNamespace(device=options.device, dtype="float32" if options.small else "bfloat16")
    table = (
        bench.links(args, ((64, None), (64, 40)), (1, 64)) if options.small else bench.links(args)
    )
    note(links=table)
    for row in table:
        if row["rows"] == 1:
            bar(f"{row['link']}, of the bandwidth", row["mbu"], 0.8)
            bar(f"{row['link']}, plain / fused", row["ratio"], 1.5)


def long(options):
    """Each agent: a prompt of 8,192 tokens and 1,000 steps after it."""
    (folders, dtype), table = agent_folders(options), {}
    T, m = (300, 10) if options.small else (8192, 1000)
    for role in STYLES[STYLE].order:
        agent = load_agent(folders[role], "math", torch.device(options.device), dtype, fast=True)
        asked = [[torch.randint(0, 1000, (T,), generator=torch.Generator().manual_seed(0))]]
        think = lambda n: (agent.drop_prefix(), agent.think(asked, n))[1]
        think(3)  # compiles
        agent.release()  # or its cache would not count
        H, _, taken = bench_train.peak(lambda: think(m + 1), options.device)  # captures
        prefill, whole = (
            median_seconds(lambda: think(n), options.device, times)
            for n, times in ((1, 3), (m + 1, 1))
        )
        cache, widest = needed(agent, 1, T, T + m + 1)
        table[role] = {
            "prefill, seconds": prefill,
            "step, milliseconds": 1e3 * (whole - prefill) / m,
            "bytes": taken,
            "cache": cache,
            "widest": widest,
            "finite": bool(H.isfinite().all()),
        }
        note(long=table)
        bar(f"{role}, memory / its shapes", taken / (cache + widest), most=1.1)


def train(options):
    """A training step of the outer links, two layers of each agent, beside transformers with all rows at once."""
    small = ("--size", "small", "--batch", "2") if options.small else ("--size", "wide")
    arguments = [
        "bench_train.py",
        "--device",
        options.device,
        "--repeats",
        "1",
        "--only",
        "batched",
        *small,
    ]
    with patch.object(sys, "argv", arguments), torch.enable_grad():
        result = bench_train.main()
    against = result["against"]["batched"]
    note(
        train=result,
        summary=f"batched / minimas: time {against['time_ratio']}, memory {against['memory_ratio']}",
    )


START = """
import json, pathlib, sys, time
started, found = time.perf_counter(), {}

def mark(name):
    found[name] = time.perf_counter() - started - sum(found.values())
    told = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found.items())
    print("\\n@", json.dumps({"start": found, "summary": told}), flush=True)

import torch
from minimas.agent import load_agent
from minimas.generate import generate
from minimas.settings import Settings
torch.set_grad_enabled(False)  # or neither kernels nor graphs would be used
mark("import")
agent = load_agent(pathlib.Path(sys.argv[1]), "math", torch.device(sys.argv[2]), None, fast=True)
agent.generation_config.eos_ids = ()
mark("load")
for n, name in (1, "first token"), (17, "17 tokens, kernels compiled and captured"), (17, "17 tokens again"):
    generate(agent, [[torch.arange(100)]], [0], Settings(max_new_tokens=n, temperature=0.0))
    mark(name)
"""


def start(options):
    """Seconds from the start of a process that has compiled nothing before; files are in main memory."""
    folders, _ = agent_folders(options)
    environment = os.environ | {"TRITON_CACHE_DIR": str(options.work / "triton")}
    subprocess.run(
        [sys.executable, "-c", START, folders["planner"], options.device],
        env=environment,
        check=True,
    )


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    options = part_options()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device here: --small --device cpu is the dry run")
    with torch.no_grad():
        {
            "system": system,
            "race": race,
            "kernels": kernels,
            "ways": ways,
            "links": links,
            "long": long,
            "train": train,
            "start": start,
        }[options.part](options)
