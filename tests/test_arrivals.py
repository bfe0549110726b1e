"""Huge pages are put together in order or not at all; what of them may have been dropped is decided or given up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.dump_side.serve import CHUNK_PAGES, _Chunks
from postcopy.huge_pages import HugeArea, HugeAreas
from postcopy.kernel.libc import address_of, memory_at
from postcopy.kernel.page import PAGE_SHIFT, PAGE_SIZE
from postcopy.page_ranges import PageRange, PageRanges
from postcopy.restore_side.arrivals import Arrivals
from postcopy.restore_side.hole_watch import Doubts, Undecided

HUGE = 2 << 20
PIECE = HUGE // 8
PAGE = PageRange(4 * HUGE, 5 * HUGE)


def give(arrivals: Arrivals, number: int, *, streamed: bool = True, page: PageRange = PAGE) -> bytes:
    """Piece ``number`` of a huge page arrives; all of the page once that is there."""
    content = bytes([number + 1]) * PIECE
    part = PageRange(page.start + number * PIECE, page.start + (number + 1) * PIECE)
    whole = arrivals.take(7, page, part, address_of(content), streamed=streamed)
    return bytes(memory_at(whole, HUGE)) if whole else b""


WHOLE = b"".join(bytes([number + 1]) * PIECE for number in range(8))


@pytest.mark.parametrize("streamed", [True, False])
def test_huge_page_is_whole_with_its_last_piece_and_stays_until_it_is_filled(streamed: bool) -> None:
    arrivals = Arrivals()
    arrivals.expect(7, PAGE)
    assert [give(arrivals, number, streamed=streamed) for number in range(7)] == [b""] * 7
    assert give(arrivals, 7, streamed=streamed) == WHOLE
    assert give(arrivals, 7, streamed=streamed) == WHOLE
    arrivals.done(7, PAGE, streamed=streamed)
    assert give(arrivals, 7, streamed=streamed) == b""


def test_huge_page_that_comes_out_of_order_is_dropped() -> None:
    arrivals = Arrivals()
    other = PageRange(PAGE.end, PAGE.end + HUGE)
    for number in (0, 1, 3, 4, 5, 6, 7):
        assert not give(arrivals, number)
    assert not give(arrivals, 0, page=other)
    for number in range(2, 8):
        assert not give(arrivals, number)
    assert [bool(give(arrivals, number)) for number in range(8)] == 7 * [False] + [True]


def test_huge_page_that_nobody_has_asked_for_is_not_kept() -> None:
    arrivals = Arrivals()
    assert not any(give(arrivals, number, streamed=False) for number in range(8))
    arrivals.expect(7, PAGE)
    assert not give(arrivals, 7, streamed=False)


def test_both_channels_bring_a_huge_page_at_once() -> None:
    arrivals = Arrivals()
    arrivals.expect(7, PAGE)
    for number in range(7):
        assert not give(arrivals, number)
        assert not give(arrivals, number, streamed=False)
    assert give(arrivals, 7) == give(arrivals, 7, streamed=False) == WHOLE


SMALL = PageRanges.from_pairs([(0x10000, 0x10000 + 70 * PAGE_SIZE), (3 * HUGE - 5 * PAGE_SIZE, 6 * HUGE + PAGE_SIZE)])
AREAS = HugeAreas([HugeArea(3 * HUGE, 4 * HUGE, 21), HugeArea(4 * HUGE, 6 * HUGE, 21)])


def test_pieces_of_memory_know_their_huge_page() -> None:
    first, second = PageRange(3 * HUGE, 4 * HUGE), PageRange(4 * HUGE, 5 * HUGE)
    start, end = 3 * HUGE - 2 * PAGE_SIZE, 4 * HUGE + PAGE_SIZE
    assert list(AREAS.parts(start, end)) == [
        (PageRange(start, 3 * HUGE), None),
        (first, first),
        (PageRange(4 * HUGE, end), second),
    ]
    assert list(AREAS.parts(6 * HUGE, 7 * HUGE)) == [(PageRange(6 * HUGE, 7 * HUGE), None)]
    assert AREAS.of(SMALL) == PageRanges.from_pairs([(3 * HUGE, 6 * HUGE)])


@given(st.lists(st.integers(0, SMALL.total_pages - 1), max_size=40))
def test_huge_page_is_streamed_without_anything_in_between(demands: list[int]) -> None:
    chunks = _Chunks({7: SMALL}, {7: AREAS})
    sent: list[int] = []
    left = iter(demands)
    while piece := chunks.take():
        space, ranges, first, count = piece
        assert (space, ranges) == (7, SMALL)
        assert 0 < count <= CHUNK_PAGES
        sent += range(first, first + count)
        chunks.promote(7, SMALL.address(next(left, 0)))
    assert sorted(sent) == list(range(SMALL.total_pages))
    places = {ordinal: at for at, ordinal in enumerate(sent)}
    for huge in range(3 * HUGE, 6 * HUGE, HUGE):
        first = SMALL.ordinal(huge)
        assert [places[first + n] - places[first] for n in range(HUGE >> PAGE_SHIFT)] == list(range(512))


def test_range_is_dropped_when_that_is_told() -> None:
    doubts = Doubts()
    doubts.add(0, HUGE, now=0)
    assert doubts.overlap(HUGE - PAGE_SIZE, 2 * HUGE)
    assert not doubts.overlap(HUGE, 2 * HUGE)
    assert doubts.decide(told=False, now=1) == []
    assert doubts.decide(told=True, now=2) == [(0, HUGE)]
    assert not doubts.overlap(0, HUGE)


def test_range_is_not_dropped_when_nothing_is_told_for_long() -> None:
    doubts = Doubts()
    doubts.add(0, HUGE, now=0)
    assert doubts.decide(told=False, now=10**9) == []
    assert not doubts.overlap(0, HUGE)
    with pytest.raises(Undecided):
        doubts.decide(told=True, now=10**9 + 1)


def test_nothing_is_made_of_a_drop_that_may_mean_either_range() -> None:
    doubts = Doubts()
    doubts.add(0, HUGE, now=0)
    doubts.add(HUGE, 2 * HUGE, now=1)
    assert doubts.decide(told=True, now=2) == []
    with pytest.raises(Undecided):
        doubts.decide(told=False, now=10**9)


def test_all_ranges_are_dropped_when_that_is_told_of_each() -> None:
    doubts = Doubts()
    doubts.add(0, HUGE, now=0)
    doubts.add(HUGE, 2 * HUGE, now=1)
    assert doubts.decide(told=True, now=2) == []
    assert doubts.decide(told=True, now=3) == [(0, HUGE), (HUGE, 2 * HUGE)]
