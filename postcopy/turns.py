"""Work on many processes by turns: while one of them is busy on its own, the next ones are given something to do."""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice


def by_turns(works: Iterable[Iterator[None]], at_once: int | None = None) -> None:
    """A step of one after that of another, until all have come to their ends; of ``at_once`` of them at a time."""
    coming = iter(works)
    waiting = deque(islice(coming, at_once))
    while waiting:
        work = waiting.popleft()
        waiting.extend([work] if next(work, work) is None else islice(coming, 1))
