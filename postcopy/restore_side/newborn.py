"""What an address space has when it is forked, by what its userfaultfd tells."""

from collections.abc import Callable, Iterable
from itertools import islice

from postcopy.kernel import userfaultfd as uffdio
from postcopy.kernel.page import PAGE_SHIFT, PAGE_SIZE, page_down
from postcopy.restore_side.residency import AddressSpace

# Some 10 ms.
_MOST_QUESTIONS = 4096


def holes(residency: AddressSpace, registered: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    """Where missing pages would be by ``residency``, and a child has nothing when it is born (MADV_DONTFORK).

    ``registered``: whether a range is in one mapping; those that are not are halved. Where that would take too long,
    the rest is left to be found out by filling.
    """
    found = []
    runs = islice(residency.missing(), _MOST_QUESTIONS)
    asked = [(run.address, run.address + (run.pages << PAGE_SHIFT)) for run in runs]
    # It grows meanwhile.
    for start, end in islice(asked, _MOST_QUESTIONS):
        if registered(start, end - start):
            continue
        if end - start == PAGE_SIZE:
            found.append((start, end))
        else:
            middle = page_down((start + end) // 2)
            asked += (start, middle), (middle, end)
    return found


def was_registered(uffd: int, early: Iterable[uffdio.Message], start: int, length: int = PAGE_SIZE) -> bool:
    """Whether a range was in one mapping when the child was born, as far as it is told; EAGAIN: its layout is changing.

    Of more than a page it is not told where the layout has changed since.
    """
    for message in early:
        match message:
            case uffdio.Remap(old, new, moved):
                changed = [(old, old + moved, True), (new, new + moved, False)]
            case uffdio.Unmap(first, last):
                changed = [(first, last, True)]
            case _:
                continue
        for first, last, was in changed:
            if first < start + length and start < last:
                return was and length == PAGE_SIZE
    return uffdio.registered(uffd, start, length)
