"""Runs a Python program where it can do little harm by accident: `python -I guard.py FOLDER SECONDS MEGABYTES`.

FOLDER holds program.py and an empty work/, where the program runs. It reads this process's stdin; all that it prints
goes to stderr; stdout then says how it ended. The kernel limits each of its processes, and because that does not limit
many processes or many files, this process watches all of them together. What the program started ends with it.

On Linux this process adopts orphans, so that it finds those that left the process group, too. If the kernel grants
namespaces, the program sees no other process and no network, and can write only in work/. Elsewhere only the process
group is found.
"""

import ctypes
import os
import resource
import signal
import sys
import time
from contextlib import suppress

MB = 1 << 20  # bytes

# The most that the program and all it started may have together
PROCESSES = 64
FILES = 1000
DISK = 64  # MB of files
DEEPEST = 100  # slashes in the path of a folder
LONGEST = 2000  # characters of such a path: from 4096 on the kernel takes it no more, and nothing below is found

# From Linux's headers
CHILD_SUBREAPER, PDEATHSIG = 36, 1  # prctl: adopt orphans; the signal to get when the parent ends
NAMESPACES = 0x10000000 | 0x20000 | 0x20000000 | 0x40000000  # unshare: user, mount, pid, net
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000  # mount
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, RDONLY = (
    442,
    -100,
    0x8000,
    1,
)  # the number of a system call, and its arguments


def confine(work):
    """Adopt orphans; then hide the machine's processes and network, and protect its files, if the kernel allows it."""
    libc = ctypes.CDLL(None)
    libc.prctl(CHILD_SUBREAPER, 1, 0, 0, 0)
    if libc.unshare(NAMESPACES) == 0:
        libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None)
        libc.mount(work, work, None, MS_BIND, None)
        for path, depth, to_set, to_clear in (b"/", AT_RECURSIVE, RDONLY, 0), (work, 0, 0, RDONLY):
            attributes = (ctypes.c_uint64 * 4)(to_set, to_clear)
            libc.syscall(
                MOUNT_SETATTR, AT_FDCWD, path, depth, attributes, ctypes.sizeof(attributes)
            )


def become(program, seconds, megabytes):
    """Replace this process by the program, with its limits set."""
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.dup2(2, 1)
    for name, most in (
        ("CPU", seconds + 1),
        ("AS", megabytes * MB),
        ("FSIZE", 8 * MB),
        ("NPROC", 1024),
        ("CORE", 0),
    ):
        with suppress(
            ValueError, OSError
        ):  # a lower limit is set; macOS knows RLIMIT_AS, but refuses to set it
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    os.execv(sys.executable, [sys.executable, "-I", program])


def descendants():
    """{process: bytes in memory} of all descendants of this process, zombies included; {} if there is no /proc."""
    parents, memory = {}, {}
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        with (
            suppress(OSError, IndexError),
            open(f"/proc/{name}/stat", errors="replace") as file,
        ):  # it may have ended
            fields = (
                file.read().rpartition(")")[2].split()
            )  # after the name: state, parent, ..., pages in memory
            parents[int(name)], memory[int(name)] = (
                int(fields[1]),
                int(fields[21]) * resource.getpagesize(),
            )
    below, before = {os.getpid()}, 0
    while len(below) > before:
        before = len(below)
        below |= {process for process, parent in parents.items() if parent in below}
    return {process: memory[process] for process in below & memory.keys() - {os.getpid()}}


def disk_use(work):
    """(number of files in a folder, the bytes that they take); a folder that is nested too deep counts as too many."""
    count, total, folders = 0, 0, [work]
    while folders and count <= FILES:
        with suppress(OSError):  # gone, or forbidden
            for entry in os.scandir(folders.pop()):
                count, total = count + 1, total + entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                    count += (
                        FILES if entry.path.count("/") > DEEPEST or len(entry.path) > LONGEST else 0
                    )
    return count, total


def excess(work, megabytes):
    """A text that says what the program takes too much of, or None."""
    memory, (count, total) = descendants(), disk_use(work)
    for used, most, what in (
        (len(memory), PROCESSES, "processes"),
        (sum(memory.values()) / MB, megabytes, "MB of memory"),
        (count, FILES, "files"),
        (total / MB, DISK, "MB of files"),
    ):
        if used > most:
            return f"more than {most} {what}"


def watch(program, work, seconds, megabytes):
    """Wait until the program ends or has to be stopped; returns a text that says how it ended."""
    deadline, caller, pause = time.monotonic() + seconds, os.getppid(), 0.005
    while True:
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == program:
                return f"ended with status {os.waitstatus_to_exitcode(ended[1])}"
        if time.monotonic() > deadline or os.getppid() != caller:
            return f"stopped after {seconds} seconds"
        if reason := excess(work, megabytes):
            return f"stopped at {reason}"
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


def kill(process):
    with suppress(
        ProcessLookupError, PermissionError
    ):  # it is gone; or on macOS, only a zombie of the group is left
        os.kill(process, signal.SIGKILL)


def end(program):
    """Kill the program and all that it started, again and again until nothing is left that could start more."""
    kill(-program)  # its group
    with suppress(ChildProcessError):  # raised by waitpid when none is left
        while True:
            for process in descendants():
                kill(process)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.005)


def main(folder, seconds, megabytes):
    work = os.path.join(folder, "work")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    if sys.platform == "linux":
        confine(os.fsencode(work))
    os.chdir(work)
    program = os.fork()
    if program == 0:
        become(os.path.join(folder, "program.py"), seconds, megabytes)
    try:
        ending = watch(program, work, seconds, megabytes)
    finally:
        end(program)
    print(ending)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
