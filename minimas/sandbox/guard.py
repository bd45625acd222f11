"""Runs a Python program where it can do little harm by accident: `python -I guard.py FOLDER SECONDS MEGABYTES`.

FOLDER holds main.py, which is run, a file stdin for it, and an empty work/, where it runs. All that it prints goes to
stderr; stdout then says how it ended. The kernel limits each of its processes, and because that does not limit many
processes or many files, this process watches all of them together. What the program started ends with it. It is
stopped, too, when the pipe on this process's own stdin is closed: so the caller stops it, even by dying.

On Linux this process adopts orphans, so that it finds those that left the process group, too. If the kernel grants
namespaces, the program sees no other process and no network but its own loopback, and can write only in work/ and in a
/dev/shm of its own, where Python's locks and shared memory are. Elsewhere only the process group is found.
"""

import ctypes
import os
import resource
import select
import signal
import sys
import time
from contextlib import suppress
from typing import NoReturn

MB = 1 << 20  # bytes

# The most that the program and all it started may have together
PROCESSES = max(64, 2 * (os.cpu_count() or 1))  # a multiprocessing.Pool() has one for each CPU
FILES = 1000
DISK = 64  # MB of files
DEEPEST = 100  # slashes in the path of a folder
LONGEST = 2000  # characters of such a path: from 4096 on the kernel takes it no more, and nothing below is found

# From Linux's headers
CHILD_SUBREAPER = 36  # prctl: adopt orphans
PDEATHSIG = 1  # prctl: the signal to get when the parent ends
NEW_MOUNTS = 0x20000
NAMESPACES = 0x10000000 | NEW_MOUNTS | 0x20000000 | 0x40000000  # unshare: user, mount, pid, net
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8  # mount
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MOUNT_SETATTR = 442  # the number of a system call
AT_FDCWD = -100  # its argument: a path from the current folder
AT_RECURSIVE = 0x8000  # its argument: and all mounts below
AF_INET, SOCK_DGRAM = 2, 2  # socket
SIOCSIFFLAGS = 0x8914  # ioctl: set the flags of a network interface
IFF_UP = 1  # the flag of one that is up
NOBODY = 65534

LIBC = ctypes.CDLL(None)


def confine(work: bytes) -> bool:
    """Hide the machine's processes and network and protect its files; whether the kernel allows it.

    This process goes on to see all processes: only the children that it starts from here on are in the new namespace.
    """
    user = os.geteuid()
    group = os.getegid()
    if LIBC.unshare(NAMESPACES) != 0:
        return False
    # The program keeps its user, whom files belong to; root becomes a user without its powers.
    write("/proc/self/uid_map", f"{user or NOBODY} {user} 1")
    write("/proc/self/setgroups", "deny")  # else the next file may not be written
    write("/proc/self/gid_map", f"{group or NOBODY} {group} 1")
    LIBC.mount(None, b"/", None, MS_REC | MS_PRIVATE, None)
    LIBC.mount(work, work, None, MS_BIND, None)
    set_attributes(b"/", AT_RECURSIVE, MS_RDONLY, 0)
    set_attributes(work, 0, 0, MS_RDONLY)
    size = f"size={DISK}m,nr_inodes={FILES},mode=1777".encode()
    LIBC.mount(b"tmpfs", b"/dev/shm", b"tmpfs", MS_NOSUID | MS_NODEV, size)
    start_loopback()
    return True


def write(file: str, text: str) -> None:
    """Write a text into a file of the kernel, if it allows that."""
    with suppress(OSError), open(file, "w") as out:
        out.write(text)


def set_attributes(path: bytes, depth: int, to_set: int, to_clear: int) -> None:
    """Set and clear attributes of the mount at a path, or of all below it."""
    attributes = (ctypes.c_uint64 * 4)(to_set, to_clear)
    size = ctypes.sizeof(attributes)
    LIBC.syscall(MOUNT_SETATTR, AT_FDCWD, path, depth, attributes, size)


def start_loopback() -> None:
    """Let programs talk to themselves over 127.0.0.1 and ::1, in the network namespace that is theirs alone."""
    any_socket = LIBC.socket(AF_INET, SOCK_DGRAM, 0)
    request = b"lo".ljust(16, b"\0") + IFF_UP.to_bytes(2, sys.byteorder)  # struct ifreq
    LIBC.ioctl(any_socket, SIOCSIFFLAGS, request.ljust(40, b"\0"))
    os.close(any_socket)


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends."""
    if sys.platform == "linux":
        LIBC.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def adopt_orphans() -> NoReturn:
    """Be the first process of the namespace: it cannot be killed from inside, and when it ends, all others do.

    The program is the second, since the kernel spares the first the signals that end any other process.
    """
    end_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # what it adopted is gone as soon as it ends
    while True:
        signal.pause()


def become(folder: str, seconds: int, megabytes: int, confined: bool) -> NoReturn:
    """Replace this process by the program, with its limits set, and with the signals of an ordinary process."""
    os.setsid()
    end_with_parent()
    if confined:  # a /proc that shows the processes of the namespace, to the program only
        LIBC.unshare(NEW_MOUNTS)
        flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
        LIBC.mount(b"proc", b"/proc", b"proc", flags, None)
    os.dup2(os.open(os.path.join(folder, "stdin"), os.O_RDONLY), 0)
    os.dup2(2, 1)
    for number in signal.valid_signals():
        with suppress(OSError, ValueError):  # of some there is nothing to set
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    limits = {
        "CPU": seconds + 1,
        "AS": megabytes * MB,
        "FSIZE": 8 * MB,
        "NPROC": 1024,
        "CORE": 0,
    }
    for name, most in limits.items():
        # a lower limit is set; macOS knows RLIMIT_AS, but refuses to set it
        with suppress(ValueError, OSError):
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    program = os.path.join(folder, "main.py")
    # -u: what goes to stdout and to stderr is seen in the order written
    os.execv(sys.executable, [sys.executable, "-I", "-u", program])


def descendants() -> dict[int, int]:
    """{process: bytes in memory} of all descendants of this process, zombies included; {} if there is no /proc."""
    parents = {}
    memory = {}
    names = os.listdir("/proc") if os.path.isdir("/proc") else []
    for name in filter(str.isdigit, names):
        try:
            with open(f"/proc/{name}/stat", errors="replace") as file:
                # after the name: state, parent, ..., pages in memory
                fields = file.read().rpartition(")")[2].split()
            parents[int(name)] = int(fields[1])
            memory[int(name)] = int(fields[21]) * resource.getpagesize()
        except (OSError, IndexError):  # it has ended
            continue
    below = {os.getpid()}
    before = 0
    while len(below) > before:
        before = len(below)
        below |= {process for process, parent in parents.items() if parent in below}
    below.remove(os.getpid())
    return {process: memory[process] for process in below & memory.keys()}


def disk_use(work: str) -> tuple[int, int]:
    """(number of files in a folder, the bytes that they take); a folder that is nested too deep counts as too many."""
    count = 0
    total = 0
    folders = [work]
    while folders and count <= FILES:
        with suppress(OSError):  # gone, or forbidden
            for entry in os.scandir(folders.pop()):
                count += 1
                total += entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                    if entry.path.count("/") > DEEPEST or len(entry.path) > LONGEST:
                        count += FILES
    return count, total


def shared_memory_use() -> int:
    """The bytes in /dev/shm, those of files that have no name any more included."""
    with suppress(OSError):  # there is none
        use = os.statvfs("/dev/shm")
        return (use.f_blocks - use.f_bfree) * use.f_frsize
    return 0


def excess(work: str, megabytes: int, first: int | None) -> str | None:
    """A text that says what the program takes too much of, or None.

    first   the first process of its namespace, which is no part of it; None without namespaces
    """
    memory = descendants()
    count, total = disk_use(work)
    if first is not None:
        memory.pop(first, None)
        total += shared_memory_use()
    for used, most, what in (
        (len(memory), PROCESSES, "processes"),
        (sum(memory.values()) / MB, megabytes, "MB of memory"),
        (count, FILES, "files"),
        (total / MB, DISK, "MB of files"),
    ):
        if used > most:
            return f"more than {most} {what}"
    return None


def watch(program: int, first: int | None, work: str, seconds: int, megabytes: int) -> str:
    """Wait until the program ends or has to be stopped; returns a text that says how it ended."""
    deadline = time.monotonic() + seconds
    caller = os.getppid()
    pause = 0.005
    events = [0]  # what cuts a pause short: its stdin is closed
    if hasattr(os, "pidfd_open"):
        with suppress(OSError):  # an old kernel
            events.append(os.pidfd_open(program))  # or the program has ended
    while True:
        process, status = os.waitpid(-1, os.WNOHANG)  # 0 if none has ended
        while process != 0:
            if process == program:
                return f"ended with status {os.waitstatus_to_exitcode(status)}"
            process, status = os.waitpid(-1, os.WNOHANG)
        if time.monotonic() > deadline:
            return f"stopped after {seconds} seconds"
        if reason := excess(work, megabytes, first):
            return f"stopped at {reason}"
        ready = select.select(events, [], [], pause)[0]
        if 0 in ready or os.getppid() != caller:
            return "stopped by its caller"
        pause = min(2 * pause, 0.1)


def kill(process: int) -> None:
    """Kill a process, or a group if the number is negative."""
    # It is gone; or on macOS, only a zombie of the group is left.
    with suppress(ProcessLookupError, PermissionError):
        os.kill(process, signal.SIGKILL)


def end(program: int, first: int | None) -> None:
    """Kill the program and all that it started, again and again until nothing is left that could start more."""
    if first is not None:
        kill(first)  # the kernel kills all others in its namespace
    kill(-program)  # its group
    with suppress(ChildProcessError):  # raised by waitpid when none is left
        while True:
            for process in descendants():
                kill(process)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.005)


def main(folder: str, seconds: int, megabytes: int) -> None:
    """Start the program, watch it, end all that it started, and say how it ended."""
    work = os.path.join(folder, "work")
    confined = False
    if sys.platform == "linux":
        LIBC.prctl(CHILD_SUBREAPER, 1, 0, 0, 0)
        confined = confine(os.fsencode(work))
    os.chdir(work)
    first = os.fork() if confined else None
    if first == 0:
        adopt_orphans()
    program = os.fork()
    if program == 0:
        become(folder, seconds, megabytes, confined)
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
        ending = watch(program, first, work, seconds, megabytes)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end(program, first)
    print(ending)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
