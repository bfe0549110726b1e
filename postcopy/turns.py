"""Work on many processes by turns: while one of them is busy on its own, the next ones are given something to do."""

from collections import deque
from collections.abc import Iterable, Iterator


def by_turns(works: Iterable[Iterator[None]], at_once: int | None = None) -> None:
    """A step of one after that of another, until all have come to their ends; of ``at_once`` of them at a time.

    Each is asked for, and makes its first step, as soon as there is room for it.
    """
    coming = iter(works)
    waiting: deque[Iterator[None]] = deque()
    are_coming = True
    while are_coming or waiting:
        work = None
        if are_coming and (at_once is None or len(waiting) < at_once):
            work = next(coming, None)
            are_coming = work is not None
        if work is None and waiting:
            work = waiting.popleft()
        if work is not None and next(work, work) is None:
            waiting.append(work)
