"""Runs a Python program where it can do little harm by accident: `python -I guard.py FOLDER SECONDS MEGABYTES`.

FOLDER holds program.py and an empty work/, where the program runs; it reads stdin, and all it prints goes to stderr. Its limits
are the kernel's for one process and, as those do not bound many processes or many files, a watch kept from here over all of
them together. What it started ends with it. The last word, on stdout, is how it ended.

On Linux this process adopts orphans, so one that left the process group is found too; and where the kernel grants namespaces
the program sees no other process, no network, and can write nothing outside work/. Elsewhere only the group is found.
"""

import ctypes
import os
import resource
import signal
import sys
import time
from contextlib import suppress

MB = 1 << 20
PROCESSES, FILES, DISK, DEEPEST = 64, 1000, 64, 100  # at most, for the program and all it started together; MB
CHILD_SUBREAPER, PDEATHSIG = 36, 1  # of prctl
NAMESPACES = 0x10000000 | 0x20000 | 0x20000000 | 0x40000000  # user, mount, pid, net
MS_BIND, MS_REC, MS_PRIVATE, MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, RDONLY = 0x1000, 0x4000, 0x40000, 442, -100, 0x8000, 1


def confine(work):
    """Adopt orphans; then leave the machine's processes, network and files behind, as far as the kernel lets us."""
    libc = ctypes.CDLL(None)
    libc.prctl(CHILD_SUBREAPER, 1, 0, 0, 0)
    if libc.unshare(NAMESPACES) == 0:
        libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None)
        libc.mount(work, work, None, MS_BIND, None)
        for path, depth, to_set, to_clear in (b"/", AT_RECURSIVE, RDONLY, 0), (work, 0, 0, RDONLY):
            attributes = (ctypes.c_uint64 * 4)(to_set, to_clear)
            libc.syscall(MOUNT_SETATTR, AT_FDCWD, path, depth, attributes, ctypes.sizeof(attributes))


def become(program, seconds, megabytes):
    """Turn this process into the program, with its limits on."""
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.dup2(2, 1)
    for name, most in ("CPU", seconds + 1), ("AS", megabytes * MB), ("FSIZE", 8 * MB), ("NPROC", 1024), ("CORE", 0):
        with suppress(ValueError, OSError):  # there is a lower limit; or macOS, which knows RLIMIT_AS but refuses to set it
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    os.execv(sys.executable, [sys.executable, "-I", program])


def descendants():
    """{process: bytes in memory} of all that is below this process, zombies included; none where there is no /proc."""
    parents, memory = {}, {}
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        with suppress(OSError, IndexError), open(f"/proc/{name}/stat", errors="replace") as file:  # it may have ended meanwhile
            fields = file.read().rpartition(")")[2].split()
            parents[int(name)], memory[int(name)] = int(fields[1]), int(fields[21]) * resource.getpagesize()
    below, before = {os.getpid()}, 0
    while len(below) > before:
        before = len(below)
        below |= {process for process, parent in parents.items() if parent in below}
    return {process: memory[process] for process in below & memory.keys() - {os.getpid()}}


def disk_use(work):
    """Number of files in a folder, and the bytes that they take; a folder nested too deep is too many."""
    count, total, folders = 0, 0, [work]
    while folders and count <= FILES:
        with suppress(OSError):  # gone, or forbidden
            for entry in os.scandir(folders.pop()):
                count, total = count + 1, total + entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                    count += FILES if entry.path.count("/") > DEEPEST else 0
    return count, total


def excess(work, megabytes):
    """What the program takes too much of, or None."""
    memory, (count, total) = descendants(), disk_use(work)
    for used, most, what in ((len(memory), PROCESSES, "processes"), (sum(memory.values()) / MB, megabytes, "MB of memory"),
                             (count, FILES, "files"), (total / MB, DISK, "MB of files")):
        if used > most:
            return f"more than {most} {what}"


def watch(program, work, seconds, megabytes):
    """Wait for the program; returns how it ended."""
    deadline, caller, pause = time.monotonic() + seconds, os.getppid(), 0.005
    while True:
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == program:
                    return f"ended with status {os.waitstatus_to_exitcode(ended[1])}"
        except ChildProcessError:
            return "was lost"
        if time.monotonic() > deadline or os.getppid() != caller:
            return f"stopped after {seconds} seconds"
        if reason := excess(work, megabytes):
            return f"stopped at {reason}"
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


def kill(process):
    with suppress(ProcessLookupError, PermissionError):  # gone; or, on macOS, a group of which only a zombie is left
        os.kill(process, signal.SIGKILL)


def end(program):
    """Kill the program and all it started, again and again until nothing is left that could start more."""
    kill(-program)  # its group
    while True:
        for process in descendants():
            kill(process)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
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
