"""Filling all of a built tree's memory from a checkpoint directory, before it runs."""

import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from functools import partial

from postcopy import roles
from postcopy.checkpoint.reader import Checkpoint
from postcopy.errors import RestoreError
from postcopy.kernel import userfaultfd
from postcopy.kernel.libc import address_of, memory_at
from postcopy.kernel.page import PAGE_SHIFT
from postcopy.page_ranges import PageRange, PageRanges
from postcopy.restore_side.fault_handler import HandedSpace
from postcopy.restore_side.shared_filling import HandedObject
from postcopy.roles import Role
from postcopy.trouble import Trouble

_MOST_WORKERS = 4


def fill(checkpoint: Checkpoint, spaces: Sequence[HandedSpace], objects: Sequence[HandedObject]) -> None:
    """Put every lazy page of the checkpoint where it belongs; each is verified before.

    Raises CheckpointError for the first that is not what it was, RestoreError where the kernel refuses it.
    """
    shares = min(os.cpu_count() or 1, _MOST_WORKERS)
    trouble = Trouble()
    workers: list[Role] = []
    try:
        for share in range(1, shares):
            body = trouble.telling(partial(_fill_share, checkpoint, spaces, objects, share, shares))
            workers.append(roles.start("postcopy-fill", body, dies_with_parent=True))
        _fill_share(checkpoint, spaces, objects, 0, shares)
        while workers:
            if code := workers.pop().wait():
                raise trouble.of(code, "filling the program's memory", RestoreError)
    finally:
        for worker in workers:
            worker.kill()
        trouble.close()


def _fill_share(
    checkpoint: Checkpoint, spaces: Sequence[HandedSpace], objects: Sequence[HandedObject], share: int, shares: int
) -> None:
    for each in spaces:
        huge = list(_huge_pages(each))
        apart = PageRanges.from_pairs(huge)
        for address, data, length in checkpoint.verified_runs(each.space, share, shares, apart):
            _copy(each.uffd, address, data, length)
        for page in huge[share::shares]:
            content = memoryview(bytearray(page.end - page.start))
            checkpoint.sources[each.space].read_into(page.start, content)
            _copy(each.uffd, page.start, address_of(content), len(content))
    for shared in objects:
        # Not by write(2), which files of huge pages have not.
        with mmap.mmap(shared.fd, shared.size) as mapping:
            for offset, data, length in checkpoint.verified_runs(shared.space, share, shares):
                end = min(offset + length, shared.size)
                mapping[offset:end] = memory_at(data, end - offset)


def _huge_pages(space: HandedSpace) -> Iterator[PageRange]:
    """Those that it lacks: they can only be filled whole."""
    for area in space.huge.areas if space.huge else ():
        for part, _ in space.lazy.overlapping(area.start, area.end):
            yield from (PageRange(at, at + (1 << area.shift)) for at in range(part.start, part.end, 1 << area.shift))


def _copy(uffd: int, address: int, data: int, length: int) -> None:
    done = 0
    while done < length:
        try:
            done += userfaultfd.copy(uffd, address + done, data + done, length - done)
        except OSError as error:
            pages = (length - done) >> PAGE_SHIFT
            if error.errno != errno.ENOENT or pages == 1:
                raise RestoreError(f"filling memory at {address + done:#x}: UFFDIO_COPY: {error.strerror}") from None
            # The run crosses the border of two mappings.
            half = pages // 2 << PAGE_SHIFT
            _copy(uffd, address + done, data + done, half)
            done += half
