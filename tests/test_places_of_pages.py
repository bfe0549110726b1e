"""Which pages of a state are in no mapping that can have them: compared with sets of pages."""

from hypothesis import given
from hypothesis import strategies as st

from postcopy.kernel.page import PAGE_SIZE
from postcopy.page_ranges import PageRanges
from postcopy.soundness import _outside
from postcopy.state import Vma

BASE = 0x7000_0000_0000


def at(page: int) -> int:
    """The address of a page."""
    return BASE + page * PAGE_SIZE


def vma(start: int, pages: int, backing: str) -> Vma:
    """A mapping."""
    return Vma(at(start), at(start + pages), 3, False, backing, -1, 0, False, [], "")


@st.composite
def layouts(draw: st.DrawFn) -> list[Vma]:
    """Mappings in order, with and without holes between them."""
    found, start = [], draw(st.integers(0, 5))
    for _ in range(draw(st.integers(0, 6))):
        pages = draw(st.integers(1, 5))
        found.append(vma(start, pages, draw(st.sampled_from(["anonymous", "vdso"]))))
        start += pages + draw(st.integers(0, 2))
    return found


@given(layouts(), st.sets(st.integers(0, 40)))
def test_pages_outside_of_the_mappings_that_can_have_them_are_found(vmas: list[Vma], pages: set[int]) -> None:
    ranges = PageRanges.from_pairs((at(page), at(page + 1)) for page in pages)
    can = {
        page
        for each in vmas
        if each.backing == "anonymous"
        for page in range((each.start - BASE) // PAGE_SIZE, (each.end - BASE) // PAGE_SIZE)
    }
    found = [
        page
        for start, end in _outside(ranges, vmas, lambda vma: vma.backing == "anonymous")
        for page in range((start - BASE) // PAGE_SIZE, (end - BASE) // PAGE_SIZE)
    ]
    assert found == sorted(pages - can)
