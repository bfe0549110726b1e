"""Sets of pages, against Python's sets of page numbers."""

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.errors import ProtocolError
from postcopy.kernel.page import ADDRESS_LIMIT, PAGE_SIZE
from postcopy.page_ranges import PageRange, PageRanges
from postcopy.wire import pages as wire

pairs = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 12)).map(
        lambda pair: (pair[0] * PAGE_SIZE, (pair[0] + pair[1]) * PAGE_SIZE)
    ),
    max_size=12,
)


def pages_of(ranges: PageRanges) -> list[int]:
    """The page addresses, in order."""
    return [address for each in ranges for address in range(each.start, each.end, PAGE_SIZE)]


def naive(of: list[tuple[int, int]]) -> set[int]:
    """The page addresses of a list of pairs."""
    return {address for start, end in of for address in range(start, end, PAGE_SIZE)}


@given(pairs)
def test_ranges_are_sorted_disjoint_and_merged(of: list[tuple[int, int]]) -> None:
    ranges = PageRanges.from_pairs(of)
    assert pages_of(ranges) == sorted(naive(of))
    assert ranges.total_pages == len(naive(of))
    listed = list(ranges)
    assert all(before.end < after.start for before, after in itertools.pairwise(listed))


@given(pairs, st.integers(0, 75))
def test_a_page_is_found_by_any_of_its_bytes(of: list[tuple[int, int]], page: int) -> None:
    ranges = PageRanges.from_pairs(of)
    for address in (page * PAGE_SIZE, page * PAGE_SIZE + PAGE_SIZE - 1):
        assert ranges.contains(address) == (page * PAGE_SIZE in naive(of))


@given(pairs, pairs)
def test_subtract_leaves_what_the_other_has_not(of: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    rest = PageRanges.from_pairs(of).subtract(PageRanges.from_pairs(other))
    assert pages_of(rest) == sorted(naive(of) - naive(other))
    assert rest == PageRanges.from_pairs((each.start, each.end) for each in rest)


@given(st.sets(st.integers(0, 60), min_size=30), st.integers(0, 60), st.integers(1, 20))
def test_subtract_of_a_single_range(of: set[int], start: int, pages: int) -> None:
    ranges = PageRanges.from_pairs((page * PAGE_SIZE, (page + 1) * PAGE_SIZE) for page in of)
    other = PageRanges.from_pairs([(start * PAGE_SIZE, (start + pages) * PAGE_SIZE)])
    rest = ranges.subtract(other)
    assert pages_of(rest) == [page * PAGE_SIZE for page in sorted(of - set(range(start, start + pages)))]
    assert rest == PageRanges.from_pairs((each.start, each.end) for each in rest)


@given(pairs, st.integers(0, 70), st.integers(0, 70))
def test_clip_leaves_what_lies_within(of: list[tuple[int, int]], start: int, end: int) -> None:
    clipped = PageRanges.from_pairs(of).clip(start * PAGE_SIZE, end * PAGE_SIZE)
    assert pages_of(clipped) == sorted(naive(of) & set(range(start * PAGE_SIZE, end * PAGE_SIZE, PAGE_SIZE)))


@given(pairs)
def test_ordinals_number_the_pages_in_order(of: list[tuple[int, int]]) -> None:
    ranges = PageRanges.from_pairs(of)
    for ordinal, address in enumerate(pages_of(ranges)):
        assert ranges.ordinal(address) == ordinal
        assert ranges.address(ordinal) == address
    assert ranges.ordinal(100 * PAGE_SIZE) == -1


@given(pairs, st.integers(0, 80), st.integers(1, 30))
def test_stretches_cover_a_window_of_ordinals(of: list[tuple[int, int]], ordinal: int, count: int) -> None:
    ranges = PageRanges.from_pairs(of)
    found = list(ranges.stretches(ordinal, count))
    assert [a for each in found for a in range(each.start, each.end, PAGE_SIZE)] == pages_of(ranges)[
        ordinal : ordinal + count
    ]


@given(pairs)
def test_packing_keeps_everything(of: list[tuple[int, int]]) -> None:
    ranges = PageRanges.from_pairs(of)
    assert PageRanges.unpack(ranges.pack()) == ranges


def packed(*of: tuple[int, int]) -> bytes:
    """What `PageRanges.pack` would make of pairs that it would never hold."""
    return struct.pack(f"<Q{2 * len(of)}Q", len(of), *(s for s, _ in of), *(e for _, e in of))


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        packed((0x1000, 0x2000))[:-1],
        packed((0x1000, 0x2000)) + b"\0",
        struct.pack("<Q", 1 << 60),
        packed((0x1001, 0x2000)),
        packed((0x1000, 0x2001)),
        packed((0x2000, 0x2000)),
        packed((0x3000, 0x2000)),
        packed((0x5000, 0x6000), (0x1000, 0x2000)),
        packed((0x1000, 0x3000), (0x2000, 0x4000)),
        packed((0x1000, 0x2000), (0x2000, 0x3000)),
        packed((0x1000, ADDRESS_LIMIT + PAGE_SIZE)),
    ],
)
def test_unpack_refuses_what_pack_cannot_have_made(bad: bytes) -> None:
    with pytest.raises(ProtocolError):
        PageRanges.unpack(bad)


def test_misaligned_and_backward_pairs_are_refused() -> None:
    for bad in ((1, PAGE_SIZE), (0, 1), (PAGE_SIZE, 0), (-PAGE_SIZE, 0), (0, ADDRESS_LIMIT + PAGE_SIZE)):
        with pytest.raises(ValueError, match="not a range"):
            PageRanges.from_pairs([bad])


def test_a_range_knows_its_pages() -> None:
    assert PageRange(0x1000, 0x4000).pages == 3


HEADER = struct.Struct("<IIQII")


@pytest.mark.parametrize(
    "fields",
    [
        (0, 0, 0, 0, 0),
        (wire.PAGES, 1, 0x1000, 1, 4096),
        (wire.REQUEST, 1, 0x1000, 1, 1),
        (wire.REQUEST, 1, 0x1000, 0, 0),
        (wire.REQUEST, 1, 0x1000, wire.MOST_DEMAND_PAGES + 1, 0),
        (wire.REQUEST, 1, 0x1001, 1, 0),
        (wire.REQUEST, 1, ADDRESS_LIMIT, 1, 0),
        (wire.BACKGROUND, 0, 0, 2, 0),
    ],
)
def test_bad_frames_from_the_destination_are_refused(fields: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError):
        wire.parse_demand(HEADER.pack(*fields))


@pytest.mark.parametrize(
    "fields",
    [
        (99, 0, 0, 0, 0),
        (wire.REQUEST, 1, 0x1000, 1, 0),
        (wire.PAGES, 1, 0x1000, 1, 4095),
        (wire.PAGES, 1, 0x1000, 0, 0),
        (wire.PAGES, 1, 0x1000, 1 << 20, (1 << 32) - 1),
        (wire.PAGES, 1, 0x1008, 1, 4096),
        (wire.END, 0, 0, 0, 1),
        (wire.FAILED, 0, 0, 0, 1 << 20),
    ],
)
def test_bad_frames_from_the_source_are_refused(fields: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError):
        wire.parse_answer(HEADER.pack(*fields))


def test_frames_come_back_as_they_were_sent() -> None:
    assert wire.parse_demand(wire.request(3, 0x5000, 2)) == (wire.REQUEST, 3, 0x5000, 2, 0)
    assert wire.parse_demand(wire.background(True)).pages == 1
    assert wire.parse_demand(wire.finish()).kind == wire.FINISH
    assert wire.parse_answer(wire.end()).kind == wire.END
    failed = wire.failed("no such\nprocess")
    assert wire.reason_of(failed[wire.HEADER_SIZE :]) == "no such?process"
    buffer = bytearray(wire.HEADER_SIZE)
    wire.pages_header_into(buffer, 0, 3, 0x5000, 2)
    assert wire.parse_answer(buffer) == (wire.PAGES, 3, 0x5000, 2, 8192)
