"""Where shared memory is, against a dictionary; and the lock that keeps it from being dropped, against the kernel."""

import ctypes
import mmap
import os
import select
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.kernel import userfaultfd as uffdio
from postcopy.kernel.libc import address_of
from postcopy.kernel.page import PAGE_SIZE
from postcopy.restore_side.hole_lock import HoleLock
from postcopy.restore_side.shared_filling import Part, Parts

PLACES = 40
MADV_REMOVE = 9

libc = ctypes.CDLL(None, use_errno=True)
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

page = st.integers(0, PLACES - 1)
length = st.integers(1, 10)
changes = st.lists(
    st.one_of(st.tuples(st.just("unmap"), page, length), st.tuples(st.just("remap"), page, page, length)), max_size=12
)


def found(parts: Parts) -> dict[int, tuple[int, int]]:
    """Memory and page of it, for each page that has any."""
    pages = ((place, parts.at(place * PAGE_SIZE)) for place in range(2 * PLACES))
    return {place: (part.space, place + (part.offset - part.start) // PAGE_SIZE) for place, part in pages if part}


@given(changes)
def test_parts_follow_what_the_kernel_tells(steps: list[tuple[str, int, int] | tuple[str, int, int, int]]) -> None:
    layout = {place: (7, place) for place in range(5, 20)} | {place: (8, place - 10) for place in range(20, 30)}
    parts = Parts(
        [
            Part(5 * PAGE_SIZE, 20 * PAGE_SIZE, 7, 5 * PAGE_SIZE),
            Part(20 * PAGE_SIZE, 30 * PAGE_SIZE, 8, 10 * PAGE_SIZE),
        ]
    )
    for name, first, *rest in steps:
        pages = rest[-1]
        old = range(first, first + pages)
        if name == "unmap":
            parts.unmap(old.start * PAGE_SIZE, old.stop * PAGE_SIZE)
            layout = {place: what for place, what in layout.items() if place not in old}
        elif abs(rest[0] - first) >= pages:
            new = rest[0]
            # One mremap(2) moves one mapping.
            if len({(layout[p][0], layout[p][1] - p) if p in layout else None for p in old}) > 1:
                continue
            parts.remap(first * PAGE_SIZE, new * PAGE_SIZE, pages * PAGE_SIZE)
            moved = {place - first + new: layout[place] for place in old if place in layout}
            if moved:
                layout = {p: what for p, what in layout.items() if p not in old and not new <= p < new + pages}
            layout |= moved
        assert found(parts) == layout
        assert parts.overlaps(0, 1 << 40) == bool(layout)
    assert found(parts.fork()) == layout


def test_parts_know_a_second_mapping_by_its_first() -> None:
    parts = Parts([Part(5 * PAGE_SIZE, 9 * PAGE_SIZE, 7, 0)])
    parts.remap(6 * PAGE_SIZE, 20 * PAGE_SIZE, 0)
    assert found(parts) == {5: (7, 0), 6: (7, 1), 7: (7, 2), 8: (7, 3), 20: (7, 1), 21: (7, 2), 22: (7, 3)}


@pytest.fixture
def memory() -> Iterator[tuple[int, int, mmap.mmap]]:
    """A file in memory of which the second page is there; a userfaultfd; a mapping of the file."""
    fd = os.memfd_create("locked")
    os.ftruncate(fd, 4 * PAGE_SIZE)
    os.pwrite(fd, b"x" * PAGE_SIZE, PAGE_SIZE)
    uffd = uffdio.userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK)
    uffdio.api(uffd, 0)
    yield fd, uffd, mmap.mmap(fd, 4 * PAGE_SIZE)
    os.close(fd)
    os.close(uffd)


def test_nobody_drops_pages_until_the_lock_is_released(memory: tuple[int, int, mmap.mmap]) -> None:
    fd, uffd, mapping = memory
    lock = HoleLock(fd, PAGE_SIZE, uffd)
    read, write = os.pipe()
    if not (child := os.fork()):
        os.write(write, b"begins")
        status = libc.madvise(address_of(mapping) + PAGE_SIZE, PAGE_SIZE, MADV_REMOVE)
        os.write(write, b"dropped")
        os._exit(-status)
    assert os.read(read, 6) == b"begins"
    assert not select.select([read], [], [], 0.2)[0]
    assert mapping[PAGE_SIZE : PAGE_SIZE + 1] == b"x"
    lock.release()
    assert os.read(read, 7) == b"dropped"
    assert os.waitpid(child, 0)[1] == 0
    assert mapping[: 4 * PAGE_SIZE] == bytes(4 * PAGE_SIZE)
    # It has made no page of its own either.
    assert os.fstat(fd).st_blocks * 512 <= 4 * PAGE_SIZE
