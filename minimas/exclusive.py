"""A lock that one thread holds at a time."""

from threading import Lock, get_ident


class Exclusive:
    """A lock that its holder may take again, as threading.RLock; but any thread may let it go.

    Whoever iterates over a text that is being written holds its System, and may go on in another thread.

    holder   the thread that took it; None if nobody has it
    depth    how often it was taken and not yet let go
    """

    def __init__(self) -> None:
        self.lock = Lock()
        self.holder: int | None = None
        self.depth = 0

    def __enter__(self) -> None:
        thread = get_ident()
        if self.holder != thread:
            self.lock.acquire()
            self.holder = thread
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.holder = None
            self.lock.release()
