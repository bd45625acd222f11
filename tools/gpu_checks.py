"""Whether results are right on a device: the parts of on_gpu.py that come first.

The fast path and the plain path on the device, in float32 and bfloat16, beside the plain path on the CPU in float64,
from the same weights (rounded to bfloat16). An error is the distance of two vectors over the length of the true one,
the largest over rows and states. A score is compared in standard deviations of its row over the vocabulary.

Notation: B prompts, m latent steps, D width.
"""

import copy
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from importlib.util import find_spec
from pathlib import Path

import checkpoints
import torch
from on_gpu import HERE, note, part_options

from minimas.agent import left_pad, load_agent
from minimas.fast.graphs import Graphs
from minimas.generate import generate
from minimas.link import InnerLink, OuterLink, fused
from minimas.settings import Settings

STATES = {
    torch.float32: (1e-4, 2e-3),  # one prompt of 40 of a Qwen3.5 is off by 4e-5 in latent steps
    torch.bfloat16: (2e-2, 0.7),
}  # errors that are always right, and never
SCORES = {torch.float32: (1e-3, 1e-2), torch.bfloat16: (0.1, 1.0)}
WORDS = 12  # new tokens of a text
OTHER = {"top_p": 1.0, "top_k": 0}
TEXTS = {  # B prompts, settings; "reply": a tool replies; "ends": one token of nine ends a text, so the batch shrinks
    "text": (3, {"temperature": 0.0}),
    "text of 40": (40, {"temperature": 0.0}),
    "reply": (3, {"temperature": 0.0}),
    "sampled": (3, {"temperature": 1.2, "top_p": 0.9, "top_k": 20}),
    "ends": (8, {"temperature": 1.5, **OTHER}),
}


def is_right(found, plain, bounds):
    """Whether an error of the fast path is small, or no more than three times that of the plain path."""
    small, never = bounds
    return found <= max(small, min(3 * plain, never))  # False of NaN


# Agents


def questions(B, longest):
    """B prompts of token ids, of unequal lengths up to `longest`, the longest last."""
    random = torch.Generator().manual_seed(longest)
    lengths = [max(3, longest * (b + 1) // B) for b in range(B)]
    return [[torch.randint(8, 250, (n,), generator=random)] for n in lengths]


ASKED = [
    questions(1, 24),
    questions(3, 100),
    questions(40, 9),
    questions(1, 24),
]  # later ones fill more, and less


def error(y, truth):
    """The largest error over rows and states (B, m, D)."""
    y, truth = y.double().cpu(), truth.double().cpu()
    return ((y - truth).norm(dim=-1) / truth.norm(dim=-1)).max().item()


def states(agent, asked, m=5):
    """The last states of prompts, and those of the latent steps after them, on the CPU in float64."""
    H = agent.think(asked, m).double().cpu()
    return {"prefill": H[:, :1], "latent steps": H[:, 1:]}


def reply(b, ids):
    """What a tool answers text 1 after its fourth token: more than there is room for."""
    return list(range(60, 100)) if b == 1 and len(ids) == 4 else []


def text(agent, name):
    """The token ids of TEXTS[name]."""
    B, settings = TEXTS[name]
    vocabulary = len(agent.model.embed_tokens.weight)
    agent.generation_config.eos_ids = tuple(range(0, vocabulary, 9)) if name == "ends" else ()
    return generate(
        agent,
        questions(B, 9 if B == 40 else 70),
        list(range(B)),
        Settings(**settings, max_new_tokens=WORDS),
        reply=reply if name == "reply" else None,
    )


def regret(truth, name, texts):
    """How far the score of a token that was written stays below the highest, at most: 0 if each was the best."""
    asked, worst = questions(TEXTS[name][0], 9 if len(texts) == 40 else 70), 0.0
    for prompt, ids in zip(asked, texts):
        x, positions = left_pad(truth.embed([[*prompt, torch.tensor(ids)]]))
        h = truth.model(x, positions, truth.model.make_cache(1, x.shape[1]), last=len(ids) + 1)[
            0, :-1
        ]
        scores = truth.model.logits(h).cpu()
        lost = (
            scores.max(-1).values - scores.gather(1, torch.tensor(ids)[:, None])[:, 0]
        ) / scores.std(-1)
        written = torch.ones(len(ids), dtype=torch.bool)
        if len(ids) > WORDS:
            written[4:44] = False  # the reply of the tool
        worst = max(worst, lost[written].max().item())
    return worst


def make_agent(folder, kind, config):
    """A miniature's folder, whose inner link hardly listens to the state: with one that does, latent steps of a random
    decoder make of a rounding in bfloat16 another state, on every path.
    """
    config = {key: value for key, value in config.items() if key != "layers"}
    checkpoints.make_agent(folder, kind, dtype=torch.bfloat16, **config)
    D = config.get("hidden_size", checkpoints.SIZES["hidden_size"])
    link = checkpoints.randomize(InnerLink(D), 1, 0.1 * D**-0.5)
    link.post_ln.bias.data *= 10 * D**-0.5
    checkpoints.save_link(link, Path(folder) / "adapter.pt", torch.bfloat16)
    return Path(folder)


def agents(folder, device, dtype):
    """The plain and the fast agent of a folder; the fast one looks at what it writes every fourth token."""
    plain, fast = (
        load_agent(folder, "math", torch.device(device), dtype, fast=not plain)
        for plain in (True, False)
    )
    fast.steps.sync_every = 4 if isinstance(fast.steps, Graphs) else 1
    return plain, fast


def true_agent(folder, device, wide, found, wrong):
    """The plain agent in float64 on the CPU; of a wide one, for which a core is too slow, on the device after a look at
    whether both are equal there.
    """
    truth = load_agent(folder, "math", torch.device("cpu"), torch.float64)
    if wide:
        cpu, truth = (
            truth,
            load_agent(folder, "math", torch.device(device), torch.float64),
        )
        for what, true in states(cpu, ASKED[0]).items():
            found[f"{what}, float64"] = error(
                states(truth, ASKED[0])[what], true
            )  # angles are float32 in all dtypes
            wrong += (
                []
                if found[f"{what}, float64"] < 1e-6
                else [f"{what} in float64 differ from the CPU's"]
            )
    return truth


def compare(folder, device, wide=False, spoil=lambda agent: None):
    """{"wrong": what the fast agent of a folder gets wrong, and the errors (fast, plain) of all that was compared}.

    spoil(agent) may change the fast one, to see whether that is noticed.
    """
    found, wrong = {}, []
    truth = true_agent(folder, device, wide, found, wrong)
    true_states, true_texts = (
        [states(truth, asked) for asked in ASKED],
        {name: text(truth, name) for name in TEXTS},
    )
    for dtype in torch.float32, torch.bfloat16:
        plain, fast = agents(folder, device, dtype)
        spoil(fast)
        for i, (asked, true) in enumerate(zip(ASKED, true_states)):
            a, b = states(fast, asked), states(plain, asked)
            for what in true:
                pair = error(a[what], true[what]), error(b[what], true[what])
                found[f"{what}, batch {len(asked)}{' again' * (i == 3)}, {dtype}"] = pair
                wrong += (
                    []
                    if is_right(*pair, STATES[dtype])
                    else [f"{what} of batch {len(asked)} in {dtype}: {pair}"]
                )
        for name in TEXTS:
            ids, plainly = text(fast, name), text(plain, name)
            equal = sum(a == b for a, b in zip(ids, true_texts[name])) / len(ids)
            pair = (
                [regret(truth, name, texts) for texts in (ids, plainly)]
                if TEXTS[name][1]["temperature"] == 0
                else None
            )
            found[f"{name}, {dtype}"] = {"equal": equal, "regret": pair}
            if pair and not is_right(*pair, SCORES[dtype]) or dtype == torch.float32 and equal < 1:
                wrong.append(
                    f"{name} in {dtype}: {equal:.0%} of the texts equal, scores lost {pair}"
                )
    return {"wrong": wrong, "found": found}


def poison():
    """Leave NaN in the memory that the allocator hands out next."""
    [
        torch.full((n,), float("nan"), device="cuda")
        for n in [512] * 4000 + [2**18] * 200 + [2**24] * 32
    ]


def cases(kind, small):
    """(name, config, kind of case) of a family: a miniature, its real widths, then the other miniatures; if
    small only the first.

    Kinds are miniature, wide, and unwritten: a miniature with NaN in all memory before it is written.
    """
    variants = [(name, config) for name, (of, config) in checkpoints.VARIANTS.items() if of == kind]
    wide = (
        []
        if small
        else [
            (name, config) for name, (of, config) in checkpoints.REAL_WIDTHS.items() if of == kind
        ]
    )
    return [
        (*variants[0], "miniature"),
        *((*case, "wide") for case in wide),
        (*variants[0], "unwritten"),
        *((*case, "miniature") for case in variants[1:] if not small),
    ]


@torch.no_grad()
def case_result(folder, options, config, case):
    """What `compare` finds for one case of a family, or the error that it raised."""
    torch.use_deterministic_algorithms(
        case == "unwritten", warn_only=True
    )  # with it unwritten memory is filled, also in
    torch.utils.deterministic.fill_uninitialized_memory = True  # graphs
    if options.device == "cuda":
        poison()
    try:
        return compare(make_agent(folder, options.argument, config), options.device, case == "wide")
    except Exception as e:  # other cases may be right
        traceback.print_exc()
        return {"wrong": [f"{type(e).__name__}: {str(e)[:200]}"]}


def family(options):
    """All cases of a model_type."""
    wrong = []
    for name, config, case in cases(options.argument, options.small):
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            result = case_result(folder, options, config, case)
        wrong += [f"{name}, {case}: {what}" for what in result["wrong"]]
        note(**{f"{name}, {case}": result}, summary=summary(wrong, f"{name}, {case}"))
    return wrong


def summary(wrong, last):
    return f"{len(wrong)} wrong, first {wrong[0]}" if wrong else f"all right, up to {last}"


# Links, kernels, tests


@torch.no_grad()  # or the kernels would not be used
def links(options):
    """Fused links beside plain ones, at rows that the kernels take and more."""
    wrong, D = [], (64, 40, 48) if options.small else (2048, 1536, 4096)
    for name, link in (
        ("inner", InnerLink(D[0])),
        ("outer", OuterLink(D[0], D[1])),
        ("outer back", OuterLink(D[1], D[0])),
        ("outer wide", OuterLink(D[2], D[0])),
    ):
        checkpoints.randomize(link, 1, 0.2).to(torch.bfloat16).requires_grad_(False)
        for dtype in torch.float32, torch.bfloat16:
            plain, truth = (
                copy.deepcopy(link).to(options.device, dtype),
                copy.deepcopy(link).double(),
            )
            quick = fused(plain)
            for rows in 1, 3, 32, 33, 64:
                h = (
                    torch.randn(
                        rows, link.proj1.in_features, generator=torch.Generator().manual_seed(rows)
                    )
                    + 0.3
                )
                h[:, :3] *= 20  # as states are: a few channels are large
                h = h.to(dtype)
                pair = [
                    error(form(h.to(options.device)), truth(h.double())) for form in (quick, plain)
                ]
                found = f"{name}, {rows} rows, {dtype}"
                note(**{found: pair})
                wrong += [] if is_right(*pair, STATES[dtype]) else [f"{found}: {pair}"]
    note(summary=summary(wrong, "the last link"))
    return wrong


def kernels(options):
    """Each kernel once, in the forms that compile_kernels.py compiles."""
    import compile_kernels

    compile_kernels.new = lambda *shape, dtype=torch.float32: {
        torch.int64: lambda: torch.full(shape, 700, device=options.device),  # a position
        torch.int32: lambda: torch.zeros(shape, dtype=dtype, device=options.device),
    }.get(dtype, lambda: torch.randn(shape, device=options.device).to(dtype))()
    sizes = (
        {
            "attention": checkpoints.SIZES,
            "delta": checkpoints.SIZES | checkpoints.FAMILIES["qwen3_5_text"][0],
        }
        if options.small
        else {
            "attention": checkpoints.REAL_WIDTHS["Qwen3-1.7B"][1],
            "delta": checkpoints.REAL_WIDTHS["Qwen3.5-4B"][1],
        }
    )
    for B, dtype in (
        (1, torch.float32),
        *([] if options.device == "cpu" else [(32, torch.bfloat16)]),
    ):
        compile_kernels.attention_block(sizes["attention"], B, dtype, norms=True)
        compile_kernels.attention_block(
            sizes["attention"], B, dtype, window=512, norms=True, gated=True
        )
        compile_kernels.delta_block(sizes["delta"], B, dtype)
        note(**{f"ran with {B} rows in {dtype}": True})
    if options.device == "cuda":
        torch.cuda.synchronize()


def memcheck(options):
    """The kernels under compute-sanitizer; without a GPU in Triton's interpreter, to see that they can be called."""
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    checked, log = options.device == "cuda", options.work / "memcheck.log"
    if not find_spec("triton") or checked and not tool:
        return note(
            skipped=f"{'compute-sanitizer' if checked else 'Triton'} is not on this machine"
        )
    command, more = [sys.executable, __file__, "kernels", *sys.argv[2:]], {"TRITON_INTERPRET": "1"}
    if checked:  # each tensor gets memory of its own, so that an access beyond its end is one
        command = [
            tool,
            "--target-processes",
            "application-only",
            "--error-exitcode",
            "9",
            "--print-limit",
            "5",
            *command,
        ]
        more = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code = subprocess.run(command, env=os.environ | more).returncode
    if (
        code and log.is_file() and "Device not supported" in log.read_text(errors="replace")
    ):  # as in some containers
        return note(skipped="compute-sanitizer does not support this machine")
    note(
        memcheck=checked,
        summary=("memcheck found nothing" if checked else "the kernels can be called")
        * (code == 0),
    )
    return ["errors"] if code else []


def tests(options):
    """The tests of kernels, fast path and links as they are; in small ones of links only."""
    if not find_spec("pytest"):
        return note(skipped="pytest is not on this machine")
    import pytest

    counts, failed = {}, []

    class Watch:
        def pytest_runtest_logreport(self, report):
            if report.when == "call" or not report.passed:
                counts[report.outcome] = counts.get(report.outcome, 0) + 1
                if report.failed:
                    print(
                        report.longreprtext
                    )  # now, as pytest tells it at its end, which may not come
                    failed.append(report.nodeid)
                note(
                    counts=counts, failed=failed, summary=f"{counts} {failed[:3] if failed else ''}"
                )

    which = (
        ["test_link.py"] if options.small else ["test_kernels.py", "test_fast.py", "test_link.py"]
    )
    # In place of the options of pyproject.toml, which are for many cores and one thread each
    which_tests = ["-o", "addopts=", "-m", "not slow and not real"]
    parallel = ["-n", "6"] if find_spec("xdist") and not options.small else []
    code = pytest.main(
        [
            "-v",
            "--tb=short",
            "--no-summary",
            "-p",
            "no:cacheprovider",
            *which_tests,
            *parallel,
            *(str(HERE.parent / "tests" / name) for name in which),
        ],
        plugins=[Watch()],
    )
    return failed or (["pytest ended badly"] if code else [])


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*deterministic")
    warnings.filterwarnings("error", message="Triton cannot")  # then there are no kernels to check
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product
    options = part_options()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device here: --small --device cpu is the dry run")
    sys.exit(
        1
        if {
            "family": family,
            "links": links,
            "kernels": kernels,
            "memcheck": memcheck,
            "tests": tests,
        }[options.part](options)
        else 0
    )
