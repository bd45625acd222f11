"""The processes of one run, as torchrun starts them."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from itertools import count
from typing import Any

from ..common import InputError, no_op

VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# In which processes find each other, however long one may wait for another's work
MEETING = timedelta(minutes=10)
MEETINGS = count()  # in the life of this process; the others count alike
UNSET = ", ".join((*VARIABLES, "LOCAL_WORLD_SIZE"))
TODO = f"start several processes with torchrun, or unset {UNSET} to run one"


@dataclass(frozen=True)
class Processes:
    """Which of the processes of a run this one is.

    rank    its number, from 0
    world   how many there are
    local   its number among those of its machine
    """

    rank: int = 0
    world: int = 1
    local: int = 0


def launched() -> Processes:
    """The processes that the environment describes, one if it describes none.

    InputError if its variables are incomplete, no numbers, or contradict each other.
    """
    world = number_in("WORLD_SIZE")
    rank = number_in("RANK")
    local = number_in("LOCAL_RANK")
    if world is None:
        for name, number in (("RANK", rank), ("LOCAL_RANK", local)):
            if number is not None:
                raise InputError(f"{name} is set in the environment, but WORLD_SIZE is not: {TODO}")
        return Processes()
    if world < 1:
        raise InputError(f"WORLD_SIZE is {world} in the environment, expected 1 or more: {TODO}")
    if world > 1:  # one process needs none of these, which other software sets, too
        check_complete(world)
    for name, number in (("RANK", rank), ("LOCAL_RANK", local)):
        if number is not None and not 0 <= number < world:
            raise InputError(
                f"{name} is {number} in the environment, expected 0 to {world - 1} since WORLD_SIZE is {world}: {TODO}"
            )
    return Processes(rank or 0, world, local or 0)


def check_complete(world: int) -> None:
    """InputError if the environment does not say how several processes find each other."""
    for name in VARIABLES:
        if not os.environ.get(name):
            raise InputError(
                f"WORLD_SIZE is {world} in the environment, but {name} is not set: {TODO}"
            )
    port = number_in("MASTER_PORT")
    if port is None or not 0 < port < 1 << 16:
        raise InputError(f"MASTER_PORT is {port} in the environment, expected 1 to 65535: {TODO}")


def number_in(name: str) -> int | None:
    """The number in a variable of the environment, None if it is not set; InputError if it holds something else."""
    text = os.environ.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise InputError(
            f"{name} is {text!r} in the environment, expected a number: {TODO}"
        ) from None


def sharing_this_machine() -> int:
    """How many processes of the run share this machine; InputError if its variable holds no such number."""
    name = "LOCAL_WORLD_SIZE"
    number = number_in(name)
    if number is None:
        return 1
    if number < 1:
        raise InputError(f"{name} is {number} in the environment, expected 1 or more: {TODO}")
    return number


def join(
    processes: Processes,
    device: str | None,
    backend: str | None = None,
    timeout: timedelta | None = None,
) -> tuple[str | None, Callable[[], object]]:
    """Join the processes of a run -> (the device of this one, a function that waits for all).

    device    that of --device. Each process takes the GPU of its local number.
    backend   of torch.distributed
    timeout   of a wait for the others; None takes that of torch
    Raises InputError if there are too few GPUs, if --device names one, or if the processes do not find each other.
    """
    if processes.world == 1:
        return device, no_op
    import torch  # after the environment is known to be right

    device, backend = device_and_backend(processes, device, backend)
    group = None
    try:
        with ended_by_signals():
            torch.distributed.init_process_group(
                backend,
                timeout=MEETING if timeout else None,
                store=torch.distributed.PrefixStore(f"minimas {next(MEETINGS)}", shared_store()),
                rank=processes.rank,
                world_size=processes.world,
            )
            if timeout:
                group = torch.distributed.new_group(timeout=timeout)
    except (RuntimeError, ValueError, OSError) as e:
        reason = str(e).partition("\n")[0]
        raise InputError(f"the processes do not find each other ({reason}): {TODO}") from e
    return device, partial(wait_for_all, group)


def device_and_backend(
    processes: Processes, device: str | None, backend: str | None
) -> tuple[str | None, str | None]:
    """(the device of this process, the backend of torch.distributed); see `join`."""
    import torch

    if device not in (None, "cpu", "cuda"):
        raise InputError(
            f"--device is {device}, but {processes.world} processes take a GPU each: leave it out"
        )
    if device == "cpu":
        # On a machine with a GPU torch would join the processes through NCCL, too.
        return device, "gloo"
    if not torch.cuda.is_available():
        return device, backend
    gpus = torch.cuda.device_count()
    if processes.local >= gpus:
        raise InputError(
            f"there are more processes than the {gpus} GPUs of this machine: start one for each GPU"
        )
    device = f"cuda:{processes.local}"
    torch.cuda.set_device(device)
    return device, backend


@cache
def shared_store() -> Any:
    """Where the processes write at which addresses they can be reached.

    It outlives the groups that meet there. So each meeting needs a prefix of its own: without one a process can read an
    address of the last meeting, where nobody listens any more.
    """
    import torch

    store, _, _ = next(torch.distributed.rendezvous("env://"))
    return store


def rank_and_world() -> tuple[int, int]:
    """The number of this process in its group of torch.distributed, and how many there are: 0 and 1 without one."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def wait_for_all(group: Any = None) -> None:
    """Return when all processes of the run have called this; InputError if one of them has ended."""
    import torch

    try:
        with ended_by_signals():
            torch.distributed.barrier(group)
    except RuntimeError as e:
        reason = str(e).partition("\n")[0]
        raise InputError(
            f"another process of this run has ended before it was done ({reason}): see what it said, and start the "
            "same command again"
        ) from e


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP end this process while it waits for others.

    It waits within torch, where Python calls no handler of a signal. But Python writes the signal's number into a pipe
    at once, and a thread reads it there.
    """
    if threading.current_thread() is not threading.main_thread():  # another one gets no signals
        yield
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    before = signal.set_wakeup_fd(write_end)
    thread = threading.Thread(target=end_at_signal, args=(read_end,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write_end)
        thread.join()
        os.close(read_end)


def end_at_signal(pipe: int) -> None:
    """End this process with the exit status of the first signal whose number comes through a pipe that ends it."""
    while number := os.read(pipe, 1):
        if number[0] in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", 0)):
            os._exit(128 + number[0])


def leave(processes: Processes) -> None:
    """Leave the group of processes that `join` joined."""
    if processes.world > 1:
        import torch

        torch.distributed.destroy_process_group()
