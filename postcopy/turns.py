"""Work on many processes by turns: while one of them is busy on its own, the next ones are given something to do."""

from collections import deque
from collections.abc import Iterable, Iterator


def by_turns(works: Iterable[Iterator[None]]) -> None:
    """A step of one after that of another, until all have come to their ends."""
    waiting = deque(works)
    while waiting:
        work = waiting.popleft()
        if next(work, work) is None:
            waiting.append(work)
