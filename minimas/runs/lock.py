"""One process for each output: a second run that would write the same file or folder is refused before it loads much.

An output is held by a lock file: NAME.lock beside a file, training.lock in a folder. The operating system's lock on it
(flock) ends with the process that holds it, however it ends. So a lock file that a killed run left holds nothing:
the next run takes it over, and deletes it when it ends. It lies beside the output because other machines see it there,
too. It names its process, for the error message of a run that is refused.

Fallback: some systems and file systems have no such locks. There a lock file holds as long as a process that it names
is alive. Whether one on another machine is, or on this one under Windows, is not known. So the error message says to
delete the file if it is not.
"""

import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..common import InputError, local_path

try:
    import fcntl
except ImportError:  # as on Windows
    fcntl = None  # type: ignore[assignment]

IN_FOLDER = "training.lock"
ATTEMPTS = 100  # to open a lock file that others delete in the same moment
PAUSE = 0.2  # seconds in which another process has written what it is about to write


class Lock:
    """A process's hold on one output.

    option   the option that names it, for error messages
    output   its path; a file and a folder may not exist yet
    folder   whether it is a folder
    lent     whether functions that the holder calls may hold it, too
    """

    def __init__(self, option: str, output: Path, folder: bool = False, lent: bool = False) -> None:
        place = local_path(output).resolve()  # links and other spellings lead to one place
        self.option = option
        self.output = output
        self.lent = lent
        self.file = place / IN_FOLDER if folder else place.with_name(f"{place.name}.lock")
        self.descriptor: int | None = None  # of the lock file, while this process holds it
        self.by_existence = False  # whether this is the fallback
        self.made: list[Path] = []  # folders that were made for the lock file, the innermost first

    def take(self) -> None:
        """Hold the output alone; InputError names the process that holds it already."""
        self.make_folder()
        if locks_work(self.file.parent):
            self.descriptor = self.open_locked(fcntl.LOCK_EX)
            os.ftruncate(self.descriptor, 0)
        else:
            self.by_existence = True
            self.descriptor = self.create()
        os.write(self.descriptor, this_process(self.by_existence))
        if self.by_existence:
            self.check_still_there()

    def share(self) -> None:
        """Hold the output together with the other processes of one run, whose first one has taken it before."""
        if self.descriptor is not None:
            if not self.by_existence:
                self.lower()
            return
        self.make_folder()
        self.by_existence = not locks_work(self.file.parent)
        if self.by_existence:
            self.descriptor = os.open(self.file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        else:
            self.descriptor = self.open_locked(fcntl.LOCK_SH)
        os.write(self.descriptor, this_process(self.by_existence))

    def release(self) -> None:
        """Let go, and delete the lock file unless other processes hold it."""
        if self.descriptor is None:
            self.remove_folders()
            return
        if self.alone():
            with suppress(OSError):  # as on Windows, where an open file cannot be deleted
                self.file.unlink()
        os.close(self.descriptor)
        self.descriptor = None
        self.remove_folders()

    def make_folder(self) -> None:
        """Make the folder of the lock file, and remember what was made for it."""
        folder = self.file.parent
        self.made = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)

    def remove_folders(self) -> None:
        """Remove the folders that were made for the lock file, if nothing else came to be in them."""
        with suppress(OSError):
            for folder in self.made:
                folder.rmdir()

    # The lock of the operating system

    def open_locked(self, kind: int) -> int:
        """A descriptor of the lock file with a lock of this kind on it."""
        for _ in range(ATTEMPTS):
            try:
                descriptor = os.open(self.file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            except PermissionError:
                self.delete_if_free()  # another user's
                continue
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                if is_at(descriptor, self.file):
                    self.check_existence()
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                raise self.refusal() from None
            except InputError:
                os.close(descriptor)
                raise
            os.close(descriptor)  # it was deleted while it was being opened
        raise self.refusal()

    def lower(self) -> None:
        """Turn a lock that excludes others into one that is shared."""
        assert self.descriptor is not None
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # it is given up for a moment, in which another run took it
            raise self.refusal() from None

    def delete_if_free(self) -> None:
        """Delete a lock file that cannot be written to, if nobody holds it: another user's run was killed."""
        descriptor = os.open(self.file, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(descriptor, self.file):
                self.file.unlink()
        except BlockingIOError:
            raise self.refusal() from None
        finally:
            os.close(descriptor)

    def check_existence(self) -> None:
        """InputError if the lock file is that of a living process which found no locks here."""
        if any(process["by_existence"] and is_alive(process) for process in self.holders()):
            raise self.refusal()

    def alone(self) -> bool:
        """Whether this process is the last that holds the output, and its lock file is still in place."""
        assert self.descriptor is not None
        if not is_at(self.descriptor, self.file):
            return False
        if self.by_existence:
            own = (os.getpid(), socket.gethostname())
            others = [other for other in self.holders() if (other["pid"], other["host"]) != own]
            return not any(is_alive(process) for process in others)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    # The fallback

    def create(self) -> int:
        """A descriptor of the lock file, which this process has created."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL
        with suppress(FileExistsError):
            return os.open(self.file, flags, 0o666)
        holders = self.holders()
        if not holders:  # its process has just created it, or was killed before it wrote its name
            time.sleep(PAUSE)
            holders = self.holders()
        if any(is_alive(process) for process in holders):
            raise self.refusal()
        self.file.unlink(missing_ok=True)
        try:
            return os.open(self.file, flags, 0o666)
        except FileExistsError:
            raise self.refusal() from None

    def check_still_there(self) -> None:
        """InputError if another process has replaced the lock file, as it may if both found that of a dead process."""
        assert self.descriptor is not None
        time.sleep(PAUSE)
        if not is_at(self.descriptor, self.file):
            os.close(self.descriptor)
            self.descriptor = None
            raise self.refusal()

    # Who holds it

    def holders(self) -> list[dict]:
        """The processes that the lock file names."""
        found = []
        with suppress(OSError):
            for line in self.file.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, TypeError):  # it is only half written
                    process = dict(json.loads(line))
                    if process.keys() >= {"pid", "host", "by_existence"}:
                        found.append(process)
        return found

    def refusal(self) -> InputError:
        """The error for a run that may not write this output."""
        holders = self.holders()
        if not holders:
            time.sleep(PAUSE)  # it is writing its name
            holders = self.holders()
        holder = next((process for process in holders if is_alive(process)), None)
        if holder is None:
            return InputError(
                f"{self.option} {self.output} is being written by another process: wait until it ends, or give "
                f"another name with {self.option}"
            )
        name = f"process {holder['pid']}"
        deletion = ""
        if holder["host"] != socket.gethostname():
            name += f" on {holder['host']}"
        if not is_certain(holder):
            deletion = f" (if it does not run any more, delete {self.file})"
        return InputError(
            f"{self.option} {self.output} is being written by {name}: wait until it ends or end it{deletion}, or give "
            f"another name with {self.option}"
        )


HELD: list[Lock] = []  # by this process


def let_children_go() -> None:
    """In a forked process: it shares the descriptors, but it does not hold what its parent holds."""
    for lock in HELD:
        if lock.descriptor is not None:
            os.close(lock.descriptor)
            lock.descriptor = None
        lock.made = []
    HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=let_children_go)


@contextmanager
def held(locks: Sequence[Lock], rank: int = 0) -> Iterator[None]:
    """Hold outputs until the block ends. A process of a higher rank than 0 holds none before it calls `share`.

    What this process holds already stays with that holder, if it lends it.
    InputError names the process that holds one of them already.
    """
    lent = {lock.file for lock in HELD if lock.lent}
    own = [lock for lock in locks if lock.file not in lent]
    HELD.extend(own)
    try:
        if rank == 0:
            for lock in own:
                lock.take()
        yield
    finally:
        for lock in reversed(own):
            lock.release()
            if lock in HELD:
                HELD.remove(lock)


def share(locks: Sequence[Lock], rank: int, wait: Callable[[], object]) -> None:
    """Hold outputs in all processes of a run. So they stay held if the first one is killed while others still write.

    wait   returns when all processes have called it
    """
    if rank == 0:
        for lock in locks:
            lock.share()
    wait()
    if rank > 0:
        for lock in locks:
            lock.share()


# Files and processes


def locks_work(folder: Path) -> bool:
    """Whether the operating system and the folder's file system have locks that end with their process."""
    if fcntl is None:
        return False
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".lock.") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def is_at(descriptor: int, file: Path) -> bool:
    """Whether an open file is the one that lies there now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except OSError:
        return False


def this_process(by_existence: bool) -> bytes:
    """The line of this process in a lock file."""
    process = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": started(os.getpid()),
        "by_existence": by_existence,
    }
    return json.dumps(process).encode() + b"\n"


def started(pid: int) -> str | None:
    """When a process of this machine was started, in ticks, "" where that is not known; None if it has ended."""
    if sys.platform != "linux":
        return ""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return None
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]  # Z, X: it has ended, and its parent has not asked


def is_alive(process: dict) -> bool:
    """Whether a process of a lock file may still be running: of one on another machine this is not known."""
    if process["host"] != socket.gethostname() or sys.platform == "win32":
        return True
    with suppress(OSError, OverflowError, TypeError):
        os.kill(process["pid"], 0)
        now = started(process["pid"])
        return now is not None and now == process.get("started", now)
    return False


def is_certain(process: dict) -> bool:
    """Whether a process of a lock file that may still be running does so for certain.

    It may not on another machine. In the fallback it may not where processes of one number cannot be told apart.
    """
    if process["host"] != socket.gethostname():
        return False
    return not process["by_existence"] or bool(started(process["pid"]))
