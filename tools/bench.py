"""minimas beside transformers, on equal work:
the same weights, prompts, rounds, latent steps, tokens and dtype, greedy.

    python tools/bench.py --weights real --models FOLDER --batch 1
    python tools/bench.py --device cpu --size wide

The first takes real models at their true depth (`python tools/real_models.py FOLDER` fetches them), with randomly
initialised links; the second the released widths, two layers deep, randomly initialised.

Two peers, both on transformers:
    released   what the released code does: every latent step runs the whole sequence again; `generate` for the text
    cached     the same with transformers' own cache
Both are transformers as it is without options: eager, with `sdpa` attention and a cache that grows. All three sit in
one process with their models loaded, and take turns, so that what disturbs the machine disturbs all alike. On CUDA
attention by cuDNN is off for all of them (load.load_model says why): with it the released procedure would plan anew in
every latent step. At the end latents and tokens are compared. The last line of output is one JSON object; a ratio is
peer time / minimas time, and mbu the part of the bandwidth, measured in the same run, at which steps read their
weights. "fla" there says whether transformers had its fast kernels for Qwen3.5.
"""

import argparse
import copy
import json
import platform
import resource
import statistics
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import checkpoints
import reference
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import minimas
from minimas.config import DTYPES
from minimas.fast.graphs import capture
from minimas.generate import generate
from minimas.link import InnerLink, OuterLink, fused
from minimas.load import on_meta
from minimas.recurse import recurse
from minimas.settings import Settings
from minimas.styles import STYLES

DEPTH_AND_VOCAB = {  # of the released agents; their widths are checkpoints.REAL_WIDTHS
    "Qwen3-1.7B": (28, 151936),
    "Llama3.2-1B": (16, 128256),
    "Llama3.2-3B": (28, 128256),
    "Qwen2.5-Math-1.5B": (28, 151936),
    "DeepSeek-R1-Distill-Qwen-1.5B": (28, 151936),
    "Qwen2.5-Coder-3B": (36, 151936),
    "BioMistral-7B": (32, 32000),
    "Gemma3-4B": (34, 262208),
    "Qwen3.5-2B": (24, 248320),
    "Qwen3.5-4B": (32, 248320),
    "Qwen3.5-9B": (32, 248320),
}
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "vocab_size": 4096,
}


# The systems


def sizes(name, size):
    """(model_type, config) of a released agent in one of the three sizes."""
    kind, config = checkpoints.REAL_WIDTHS[
        "Qwen2.5-Math-1.5B" if name.startswith("DeepSeek") else name
    ]
    depth, vocab = DEPTH_AND_VOCAB[name]
    two = {"num_hidden_layers": 2}
    if kind == "gemma3":
        two["layer_types"] = ["sliding_attention", "full_attention"]
    if kind == "qwen3_5_text":
        two["layer_types"] = ["linear_attention", "full_attention"]
    whole = {key: value for key, value in config.items() if key != "layer_types"} | {
        "num_hidden_layers": depth,
        "layer_types": None,
    }
    return kind, (
        {"small": config | SMALL | two, "wide": config | two, "real": whole}[size]
        | ({"vocab_size": vocab} if size != "small" else {})
    )


def make_agent(folder, kind, config, dtype, device):
    """The folder of an agent whose weights transformers drew, with a tokenizer that takes words for tokens."""
    checkpoints.make_agent(
        folder,
        kind,
        dtype=dtype,
        hidden_size=config["hidden_size"],
        num_hidden_layers=1,
        layer_types=["full_attention"],
    )
    own, specials, _ = checkpoints.FAMILIES[kind]
    config = (
        checkpoints.SIZES | own | {key: value for key, value in config.items() if key != "layers"}
    )
    kinds = config.pop("layer_types", None)
    if kinds:
        config["layer_types"] = kinds
    if kind == "mistral":
        config["sliding_window"] = 4096
    config = transformers.AutoConfig.for_model(
        "gemma3_text" if kind == "gemma3" else kind, **config
    )
    with torch.device(device):
        transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    words = [*specials, "?", *(f"w{i}" for i in range(1000))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    return config.hidden_size


def make_system(folder, style, size, dtype, device):
    repositories, widths = checkpoints.RELEASED[style][0], {}
    for role in STYLES[style].order:
        name = next(name for name in DEPTH_AND_VOCAB if repositories[role].endswith(name))
        widths[role] = make_agent(folder / role, *sizes(name, size), dtype, device)
    checkpoints.make_links(folder / "links", STYLES[style].edges, widths, dtype=dtype)
    return {name: folder / name for name in [*STYLES[style].order, "links"]}


REAL = {
    "planner": "Qwen2.5-Coder-0.5B-Instruct",
    "critic": "SmolLM2-135M-Instruct",
    "solver": "Qwen2.5-Coder-0.5B-Instruct",
}


def make_real_system(folder, models, dtype):
    """The same of sequential_light from real models, with randomly initialised links."""
    widths = {}
    for seed, (role, name) in enumerate(REAL.items()):
        (folder / role).mkdir()
        for file in (models / name).iterdir():
            (folder / role / file.name).symlink_to(file.resolve())
        widths[role] = json.loads((models / name / "config.json").read_text())["hidden_size"]
        link = checkpoints.randomize(InnerLink(widths[role]), seed, widths[role] ** -0.5)
        checkpoints.save_link(link, folder / role / "adapter.pt", dtype)
    checkpoints.make_links(folder / "links", STYLES["sequential_light"].edges, widths, dtype=dtype)
    return {name: folder / name for name in [*REAL, "links"]}


def real_questions(B, n):
    """B passages of about n tokens of this repository's documentation."""
    words = (
        (Path(__file__).parent.parent / "docs" / "reading.md").read_text(encoding="utf-8").split()
    )
    return [" ".join(words[300 * b :][: n // 2]) for b in range(B)]


def questions(B, n, seed=0):
    """B questions of about n words, which are tokens here."""
    random = torch.Generator().manual_seed(seed)
    lengths = [
        n + int(torch.randint(-n // 10, n // 10 + 1, (), generator=random)) for _ in range(B)
    ]
    return [
        " ".join(f"w{i}" for i in torch.randint(0, 1000, (length,), generator=random).tolist())
        for length in lengths
    ]


# The three who race. Each has think(role, prompts, m), write(role, prompts, n) and run(questions):
# tokens, and latents by edge.


class Ours:
    name = "minimas"

    def __init__(self, system, settings):
        self.system, self.settings = system, settings
        for agent in system.agents.values():
            agent.generation_config.eos_ids = ()

    def think(self, role, prompts, m, go_on=False):
        agent = self.system.agents[role]
        if not go_on:
            agent.drop_prefix()
        return agent.think(prompts, m)

    def write(self, role, prompts, n):
        agent = self.system.agents[role]
        return generate(
            agent, prompts, [0] * len(prompts), replace(self.settings, max_new_tokens=n)
        )

    def run(self, asked):
        latents = {}
        for turn in recurse(self.system, self.system.style.questions(asked), self.settings):
            latents |= {(turn.round, *edge): z for edge, z in turn.sent.items()}
        return self.write(turn.role, turn.prompts, self.settings.max_new_tokens), latents


class Peer:
    """transformers, with or without its cache.

    Prompts are rendered and tokenized by minimas, as text is not what is measured.
    """

    def __init__(self, ours, folders, cached, models, dtype, device):
        self.ours, self.cached, self.models, self.device = ours, cached, models, device
        self.name = "cached" if cached else "released"
        load = lambda file: {
            k: v.to(device) for k, v in torch.load(file, weights_only=True).items()
        }
        self.inner = {role: load(folders[role] / "adapter.pt") for role in models}
        listed = json.loads((folders["links"] / "outerlink_config.json").read_text())["adapters"]
        self.outer = {
            (a["source_role"], a["target_role"]): load(folders["links"] / a["filename"])
            for a in listed
        }

    def embed(self, role, prompts):
        """Left-padded embeddings (B, T, D) and attention mask (B, T)."""
        tokenizer, E = (
            self.ours.system.agents[role].tokenizer,
            self.models[role].get_input_embeddings(),
        )
        rows = []
        for pieces in prompts:
            ids = [
                torch.tensor(tokenizer.encode(p), dtype=torch.long, device=self.device)
                if isinstance(p, str)
                else p
                for p in pieces
            ]
            rows.append(torch.cat([p if p.is_floating_point() else E(p) for p in ids]))
        T = max(map(len, rows))
        x = torch.stack(
            [torch.cat([row.new_zeros(T - len(row), row.shape[1]), row]) for row in rows]
        )
        return x, torch.tensor(
            [[0] * (T - len(row)) + [1] * len(row) for row in rows], device=self.device
        )

    def think(self, role, prompts, m, go_on=False):
        (x, mask), body, H, past = self.embed(role, prompts), self.models[role].model, [], None
        for _ in range(m):
            out = body(
                inputs_embeds=x, attention_mask=mask, past_key_values=past, use_cache=self.cached
            )
            h, past = out.last_hidden_state[:, -1:], out.past_key_values
            H.append(h)
            z = reference.inner(self.inner[role], h)
            x, mask = (
                z if self.cached else torch.cat([x, z], 1),
                torch.cat([mask, mask.new_ones(len(mask), 1)], 1),
            )
        return torch.cat(H, 1)

    def write(self, role, prompts, n):
        x, mask = self.embed(role, prompts)
        ids = self.models[role].generate(
            inputs_embeds=x,
            attention_mask=mask,
            max_new_tokens=n,
            do_sample=False,
            use_cache=True,
            top_k=None,
            top_p=None,
            temperature=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        return ids.tolist()

    def run(self, asked):
        system, settings, inbox, latents = self.ours.system, self.ours.settings, {}, {}
        order = system.style.order
        for r in range(1, settings.rounds + 1):
            for role in order:
                prompts = system.prompts_for(role, system.style.questions(asked), inbox)
                if (r, role) == (settings.rounds, order[-1]):
                    return self.write(role, prompts, settings.max_new_tokens), latents
                Z = reference.inner(
                    self.inner[role], self.think(role, prompts, settings.latent_steps)
                )
                for edge, link in self.outer.items():
                    if edge[0] == role:
                        inbox[edge] = latents[r, *edge] = reference.outer(link, Z)


# Measuring


def timed(f, device):
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = f()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def race(runners, repeats, device, work):
    """{name: [seconds]} of work(runner), in turns, after one round to warm up; `repeats` is {name: times}.

    On a CPU the slow peer is not warmed up if it runs once only.
    """
    for runner in runners:
        if repeats[runner.name] > (runner.name == "released" and device == "cpu"):
            work(runner)
    times = {runner.name: [] for runner in runners}
    for i in range(max(repeats.values())):
        for runner in runners:
            if i < repeats[runner.name]:
                times[runner.name].append(timed(lambda: work(runner), device)[0])
    return times


def read_bandwidth():
    """Bytes per second at which a CPU reads one large tensor, to add it up."""
    a = torch.ones(1 << 28)
    a.sum()
    return 4 * len(a) / min(timed(a.sum, "cpu")[0] for _ in range(5))


def copy_bandwidth(device):
    """Bytes per second that large copies read and write."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    copies = lambda: [
        b.copy_(a) for _ in range(10)
    ]  # together: to wait for each would take some percent of its time
    copies()
    return 20 * len(a) / min(timed(copies, device)[0] for _ in range(3))


def step_bytes(agent, B, S, text):
    """Bytes that one step must read: the layers, what makes a token or the next latent of a state, and S cached
    positions.

    The weights are those of a decoder as its config makes it: an agent on the fast path holds some in another form.
    """
    dtype = agent.model.norm.weight.dtype
    model = on_meta(type(agent.model), agent.model.config).to(dtype)
    size = lambda module: sum(p.numel() * p.element_size() for p in module.parameters())
    D = model.config.hidden_size
    cache = sum(
        c.k[..., :1, :].numel() * 2 * min(S, c.k.shape[2]) * c.k.element_size()
        if hasattr(c, "k")
        else 2 * c.state.numel() * 4
        for c in model.make_cache(B, S)
    )
    return (
        size(model.layers) + (size(model.lm_head) if text else 2 * D * D * dtype.itemsize) + cache
    )


def agree(ours, peer, dtype):
    """How far the latents of two runs are apart, and the part of their tokens that is the same."""
    (ids, latents), (their_ids, their_latents) = ours, peer
    apart = max(
        (
            (latents[key].float() - their_latents[key].float()).norm()
            / their_latents[key].float().norm()
        ).item()
        for key in their_latents
    )
    same = statistics.mean(a == b for row, other in zip(ids, their_ids) for a, b in zip(row, other))
    if dtype == torch.float32 and (apart > 1e-3 or same < 1):
        raise SystemExit(
            f"the runs differ: latents by {apart:.1e} of their norm, {same:.1%} of the tokens equal"
        )
    return apart, same


def show(name, times, scale=1.0, unit="ms"):
    cells = [
        f"{1e3 * scale * statistics.median(t):10.2f} ±{50 * (max(t) - min(t)) / statistics.median(t):3.0f}%"
        if t
        else " " * 16
        for t in (times.get("minimas"), times.get("cached"), times.get("released"))
    ]
    print(f"{name:28s}" + "".join(f"{cell:>18s}" for cell in cells), flush=True)


def prompts_of_a_run(ours, asked):
    """(role, its prompts) turn by turn, as `recurse` would have them; what is heard is random."""
    system, inbox, turns = ours.system, {}, []
    for _ in range(ours.settings.rounds):
        for role in system.style.order:
            turns.append((role, system.prompts_for(role, system.style.questions(asked), inbox)))
            for edge, _ in system.outer_links.items():
                if edge[0] == role:
                    hearer = system.agents[edge[1]]
                    some = hearer.model.embed(torch.arange(1000, device=hearer.device))
                    shape = (len(asked), ours.settings.latent_steps, some.shape[1])
                    noise = torch.randn(shape, device=some.device).to(some)
                    inbox[edge] = noise * some.std()
    return turns


def compare(args, ours, cached, released, asked):
    settings, style = ours.settings, ours.system.style
    m, n, last = settings.latent_steps, settings.max_new_tokens, ours.system.style.order[-1]
    both, few = (
        {"minimas": args.repeats, "cached": args.repeats},
        {"minimas": args.repeats, "cached": args.repeats, "released": args.released_repeats},
    )
    print(
        f"{'':28s}{'minimas':>18s}{'cached':>18s}{'released':>18s}   (median ms, half the spread)"
    )
    cold, step, rollout = ({name: 0.0 for name in few} for _ in range(3))
    result, steps, median = {"agents": {}}, {}, statistics.median
    ratio = lambda times, name: (
        round(median(times[name]) / median(times["minimas"]), 2) if times[name] else None
    )

    def add(total, times):
        for name, t in times.items():
            total[name] += median(t) if t else float("nan")

    turns = prompts_of_a_run(ours, asked)
    prompts = dict(turns)  # the last round's, whose slots are filled
    for role in style.order:
        one = race([ours, cached], both, args.device, lambda who: who.think(role, prompts[role], 1))
        many = race(
            [ours, cached], both, args.device, lambda who: who.think(role, prompts[role], m)
        )
        per_step = {name: [(t - median(one[name])) / (m - 1) for t in many[name]] for name in both}
        show(f"prefill, {role}", one), show(f"latent step, {role}", per_step)
        add(cold, one), add(step, per_step), add(rollout, many)
        steps[role] = median(per_step["minimas"])
        result["agents"][role] = {
            "cold_prefill_ratio": ratio(one, "cached"),
            "latent_ratio": ratio(per_step, "cached"),
        }
        uncached = race(
            [released],
            {"released": min(1, args.released_repeats)},
            args.device,
            lambda who: who.think(role, prompts[role], m),
        )
        add(rollout, uncached)
        show(f"roll-out of {m}, {role}", many | uncached)
    prefill = race(
        [ours, cached],
        both,
        args.device,
        lambda who: [
            who.think(role, asked_now, 1, go_on=i >= len(style.order))
            for i, (role, asked_now) in enumerate(turns)
        ],
    )
    show(f"all {len(turns)} prefills of a run", prefill)
    first = race([ours, cached], both, args.device, lambda who: who.write(last, prompts[last], 1))
    text = race([ours, cached], both, args.device, lambda who: who.write(last, prompts[last], n))
    token = {name: [(t - median(first[name])) / (n - 1) for t in text[name]] for name in both}
    show(f"text token, {last}", token)
    whole = race([ours, cached, released], few, args.device, lambda who: who.run(asked))
    show("whole question", whole, 1 / len(asked))
    runs = {
        who.name: who.run(asked)
        for who in ((ours, cached, released) if args.size == "small" else (ours, cached))
    }
    for name in list(runs)[1:]:
        apart, same = agree(runs["minimas"], runs[name], args.quantize or DTYPES[args.dtype])
        print(
            f"against {name}: latents {apart:.1e} of their norm apart, {same:.1%} of {len(asked) * n} tokens equal"
        )
    part = lambda total, name: (
        round(total[name] / total["minimas"], 2) if total[name] == total[name] else None
    )
    result["vs_released"] = {
        "latent_ratio": part(rollout, "released"),
        "end_to_end_ratio": ratio(whole, "released"),
    }
    result["vs_cached"] = {
        "prefill_ratio": ratio(prefill, "cached"),
        "cold_prefill_ratio": part(cold, "cached"),
        "latent_ratio": part(step, "cached"),
        "decode_ratio": ratio(token, "cached"),
        "end_to_end_ratio": ratio(whole, "cached"),
    }
    bandwidth = copy_bandwidth("cuda") if args.device == "cuda" else read_bandwidth()
    S, agents = len(asked[0].split()) + 100 + m, ours.system.agents
    result["latent_mbu"] = {
        role: round(
            step_bytes(agents[role], len(asked), S, False) / steps[role] / bandwidth,
            3,
        )
        for role in style.order
    }
    result["decode_mbu"] = round(
        step_bytes(agents[last], len(asked), S, True) / median(token["minimas"]) / bandwidth,
        3,
    )
    print(f"bandwidth {bandwidth / 1e9:.1f} GB/s")
    return result


def profile(args, ours, asked):
    """Where minimas' time goes: the operators of one whole run."""
    activities = [torch.profiler.ProfilerActivity.CPU] + (
        [torch.profiler.ProfilerActivity.CUDA] if args.device == "cuda" else []
    )
    ours.run(asked)
    with torch.profiler.profile(activities=activities) as seen:
        ours.run(asked)
    print(
        seen.key_averages().table(
            sort_by=f"self_{args.device}_time_total", row_limit=20, max_name_column_width=50
        )
    )


def links(args, sizes=((2048, None), (2048, 2048), (4096, 2560)), counts=(1, 2, 4, 8, 16, 32, 64)):
    """Both links at the released sizes, in their two forms; mbu: part of the copy bandwidth at which a fused one reads
    its weights. Returns the rows of the table; `sizes` are D and D', which is None for an inner link.

    On CUDA in turn over so many copies that none is still in the chip's cache, as a graph, which is how a latent step
    runs them; the last column is the ratio without a graph, when the host launches each kernel.
    """
    dtype, bandwidth, cuda = DTYPES[args.dtype], copy_bandwidth(args.device), args.device == "cuda"
    print(
        f"{'milliseconds':24s}{'rows':>6s}{'plain':>10s}{'fused':>10s}{'ratio':>8s}{'mbu':>7s}"
        + "   no graph" * cuda
    )
    table = []
    for D, target in sizes:
        name = f"outer {D} > {target}" if target else f"inner {D}"
        plain = (
            (OuterLink(D, target) if target else InnerLink(D))
            .to(args.device, dtype)
            .requires_grad_(False)
        )
        size = sum(p.numel() for p in plain.parameters()) * dtype.itemsize
        plain = [copy.deepcopy(plain) for _ in range(2**29 // size if cuda else 5)]
        forms = [plain, [fused(link) for link in plain]]
        for rows in counts:
            h = torch.randn(rows, D, device=args.device).to(dtype)
            eager = [lambda form=form: [link(h) for link in form] for form in forms]
            slow, fast = in_turns([as_graph(f) for f in eager] if cuda else eager, args.device)
            without = in_turns(eager, args.device) if cuda else (0, 1)
            mbu = size * len(plain) / fast / bandwidth
            print(
                f"{name:24s}{rows:6d}{1e3 * slow / len(plain):10.4f}{1e3 * fast / len(plain):10.4f}{slow / fast:8.2f}"
                f"{mbu:7.2f}" + f"{without[0] / without[1]:11.2f}" * cuda,
                flush=True,
            )
            table.append(
                {
                    "link": name,
                    "rows": rows,
                    "milliseconds": 1e3 * fast / len(plain),
                    "ratio": slow / fast,
                    "mbu": mbu,
                }
            )
    return table


def as_graph(f):
    """f captured, after one run to warm up."""
    f()
    torch.cuda.synchronize()
    return capture(f, torch.cuda.graph_pool_handle(), torch.cuda.Stream())


def in_turns(functions, device, times=30):
    """Median seconds of each of these functions."""
    seen = [[] for _ in functions]
    for _ in range(times):
        for f, times_of in zip(functions, seen):
            times_of.append(timed(f, device)[0])
    return [statistics.median(times_of) for times_of in seen]


def scale(args, ours):
    """minimas alone: time of a whole run and peak memory, one size varied at a time; then whether memory grows.

    Memory is compared after 200 and after 400 questions:
    before, allocator and oneDNN still meet lengths they have not seen.
    """
    first = ours.system.style.order[0]
    print(f"{'':24s}{'seconds':>10s}{'peak memory, MiB':>20s}")

    def point(name, B=1, length=120, m=8, rounds=1, roll_out=False):
        asked, ours.settings = (
            questions(B, length),
            replace(ours.settings, rounds=rounds, latent_steps=m, max_new_tokens=8),
        )
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        prompts = ours.system.prompts_for(first, ours.system.style.questions(asked), {})
        work = (lambda: ours.think(first, prompts, m)) if roll_out else (lambda: ours.run(asked))
        if args.device == "cuda":
            work()  # compiles kernels and captures graphs
        seconds, _ = timed(work, args.device)
        peak = (
            torch.cuda.max_memory_allocated()
            if args.device == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        print(f"{name:24s}{seconds:10.2f}{peak / 2**20:20.0f}", flush=True)

    for B in 1, 2, 4, 8, 16, 32, 64:
        point(f"batch {B}", B=B)
    for rounds in 1, 2, 3, 4:
        point(f"rounds {rounds}", rounds=rounds)
    for m in 8, 16, 32, 64, 128:
        point(f"latent steps {m}", m=m)
    for length in 128, 512, 2048, 8192:
        point(f"prompt {length} (roll-out)", length=length, roll_out=True)
    resident = lambda: (
        torch.cuda.memory_allocated()
        if args.device == "cuda"
        else int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    )
    ours.settings = replace(ours.settings, rounds=2, latent_steps=8, max_new_tokens=8)
    for n in range(1, 51):
        ours.run(questions(8, 120, seed=n))
        if n == 25:
            before = resident()
    print(
        f"memory after 400 questions, against after 200: {(resident() - before) / 2**20:+.1f} MiB"
    )


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add(
        "--size",
        choices=("small", "wide", "real"),
        default="small",
        help="small: narrow, within a minute; wide: the released widths, 2 layers; real: the released depth, too",
    )
    add(
        "--weights",
        choices=("random", "real"),
        default="random",
        help="real: those of real models, at their true depth",
    )
    add(
        "--models", type=Path, help="the folder of real models that tools/real_models.py has filled"
    )
    add(
        "--style",
        choices=[style for style in STYLES if style != "tiny"],
        default="sequential_light",
    )
    add(
        "--dtype", choices=("float32", "bfloat16"), help="default: float32 on cpu, bfloat16 on cuda"
    )
    add(
        "--quantize",
        choices=("int8", "int4"),
        help="minimas with quantised weights, against transformers with those of --dtype",
    )
    add("--batch", type=int, default=4)
    add("--rounds", type=int, default=3)
    add("--latent-steps", type=int, default=32)
    add("--new-tokens", type=int, default=32)
    add(
        "--prompt-tokens",
        type=int,
        default=120,
        help="of a question, without what is said around it",
    )
    add("--repeats", type=int, default=3)
    add(
        "--released-repeats",
        type=int,
        default=1,
        help="whole runs of the slow peer; 0 leaves it out",
    )
    add("--profile", action="store_true", help="no race: where minimas spends its time")
    add(
        "--links",
        action="store_true",
        help="no race: the links in their plain and their fused form",
    )
    add(
        "--scale",
        action="store_true",
        help="no race: minimas' time and memory against prompt length, batch, rounds and latent steps",
    )
    args = parser.parse_args()
    args.dtype = args.dtype or {"cpu": "float32", "cuda": "bfloat16"}[args.device]
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    if args.links:
        links(args)
        return
    real = args.weights == "real"
    asked = (real_questions if real else questions)(args.batch, args.prompt_tokens)
    with tempfile.TemporaryDirectory() as folder:
        dtype = DTYPES[args.dtype]
        folders = (
            make_real_system(Path(folder), args.models, dtype)
            if real
            else make_system(Path(folder), args.style, args.size, dtype, args.device)
        )
        settings = Settings(
            rounds=args.rounds,
            latent_steps=args.latent_steps,
            max_new_tokens=args.new_tokens,
            temperature=0.0,
        )
        ours = Ours(
            minimas.load_mas_system(
                args.style,
                checkpoints=folders,
                device=args.device,
                dtype=args.dtype,
                quantize=args.quantize,
                fast=True,
            ),
            settings,
        )
        if args.profile or args.scale:
            return profile(args, ours, asked) if args.profile else scale(args, ours)
        load = lambda name: reference.load_model(name, dtype).to(args.device)
        names = {
            role: args.models / REAL[role] if real else folders[role] for role in ours.system.agents
        }
        loaded = {
            name: load(name) for name in set(names.values())
        }  # one model serves both roles that it has
        hf = {role: loaded[name] for role, name in names.items()}
        cached, released = (
            Peer(ours, folders, cached, hf, dtype, args.device) for cached in (True, False)
        )
        result = compare(args, ours, cached, released, asked)
    card = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{torch.get_num_threads()} threads"
    )
    result |= {
        "weights": args.weights,
        "size": "real" if real else args.size,
        "style": args.style,
        "device": args.device,
        "dtype": args.dtype,
        "quantize": args.quantize,
        "batch": args.batch,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "fla": find_spec("fla") is not None,
            "on": card,
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
