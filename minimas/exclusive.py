"""A lock that one thread holds at a time."""

from threading import Lock, get_ident

from .common import InputError


class Exclusive:
    """A lock that its holder may take again, as threading.RLock. But it may pass to another thread, which lets it go.

    Whoever iterates over a text that is being written holds its System, and may go on in another thread.

    holder   the thread that has it; None if nobody has
    depth    how often it was taken and not yet let go
    shut     whether its holder cannot take it again, since a text is being written
    """

    def __init__(self) -> None:
        self.lock = Lock()
        self.holder: int | None = None
        self.depth = 0
        self.shut = False

    def __enter__(self) -> None:
        # Read before `holder`: only the holder shuts it, and this thread does not while it is here.
        shut = self.shut
        thread = get_ident()
        if self.holder != thread:
            self.lock.acquire()
            self.holder = thread
        elif shut:
            raise InputError(
                "this system is writing a text, which this thread was the last to take a piece of: iterate to its "
                "end, or close it, before you use the system for something else"
            )
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.holder = None
            self.lock.release()

    def pass_on(self) -> None:
        """Let the thread that goes on have it."""
        self.holder = get_ident()
