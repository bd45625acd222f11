"""Fixtures of several files, and what must be said before other modules are imported.

What loads torch is imported where it is used: the process that hands tests out to workers needs none of it.
"""

import gc
import inspect
import os
import signal

# One thread, here and in all processes that tests start: miniatures are too small to share, and on a busy machine two
# threads mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import pytest

# Signals as in a terminal, here and in processes that tests start: nohup and background jobs of a shell ignore some.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_xdist_auto_num_workers(config):
    """One more than there are cores, since some tests wait for processes.

    None for tests that are named: each worker takes seconds to import what it needs.
    """
    named = config.option.keyword or any("::" in argument for argument in config.args)
    return 0 if named else (os.cpu_count() or 1) + 1


LONGEST = (
    "grade",
    "train",
    "fast",
    "sandbox",
    "train_api",
    "evaluate",
    "recursion",
    "losses",
    "tiny",
    "interactive",
    "tools",
    "api",
    "docs",
)


def pytest_collection_modifyitems(items):
    """The longest files first: at the end, then, no worker is alone with one of them."""
    place = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_pycollect_makemodule():
    """Before a file of tests is imported."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton: its kernels then run on a CPU


def pytest_collection_finish():
    """Garbage collection took a tenth of the time: collect rarely, and never what was there before the first test."""
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """style -> the folder of a miniature system, made when it is first asked for."""
    import checkpoints

    made = {}

    def folder(style):
        if style not in made:
            made[style] = checkpoints.make_system(tmp_path_factory.mktemp(style), style)
        return made[style]

    return folder


@pytest.fixture
def captures(monkeypatch):
    """What is captured, and run again instead of replayed: all of fast.graphs but CUDA's own part.

    Hooks are not called in what is run again, as a graph would not call them.
    """
    from torch import nn

    from minimas.fast import graphs

    def call_without_hooks(module, *args, **options):
        return module.forward(*args, **options)

    made = []

    def capture(f, pool, stream):
        step = inspect.getclosurevars(f).nonlocals["step"]
        cache = inspect.getclosurevars(step).nonlocals["cache"]
        seen = [dict(vars(c)) for c in cache]  # a graph keeps the addresses it was captured with

        def replay():
            now = [dict(vars(c)) for c in cache]
            for c, attributes in zip(cache, seen):
                vars(c).update(attributes)
            with monkeypatch.context() as patch:
                patch.setattr(nn.Module, "__call__", call_without_hooks)
                f()
            for c, attributes in zip(cache, now):
                vars(c).update(attributes)

        made.append(f)
        return replay

    monkeypatch.setattr(graphs, "capture", capture)
    return made


@pytest.fixture
def gpu(captures, monkeypatch):
    """A fake CUDA device without Triton, whose captured steps are run again."""
    import torch
    from fake_cuda import FakeCUDA

    from minimas import link
    from minimas.fast import graphs, prepare

    gpu = FakeCUDA()

    def capture(f, pool, stream, capture=graphs.capture):
        run = capture(f, pool, stream)

        def replay():
            gpu.in_step = True
            run()
            gpu.in_step = False

        return replay

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    for module in prepare, link:
        monkeypatch.setattr(module, "kernels_for", lambda weight: None)
    yield gpu
    torch.backends.cuda.enable_cudnn_sdp(True)
