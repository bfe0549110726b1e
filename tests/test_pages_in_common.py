"""Pages that processes share copy-on-write since a fork: read without a copy, sent once."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from postcopy.dump_side.capture import Capture
from postcopy.dump_side.survey import survey
from postcopy.kernel import procfs
from postcopy.kernel.page import PAGE_SIZE
from postcopy.reporting import Silent
from postcopy.spaces import spaces_of
from tests.hosts import wait_until

PAGES = 2000
FAMILY = f"""
import mmap, os, sys, time
size = {PAGES} * mmap.PAGESIZE
content = b"".join(page.to_bytes(4, "little") * (mmap.PAGESIZE // 4) for page in range({PAGES}))
with open(sys.argv[1], "w+b") as file:
    file.truncate(size)
    # Copied pages of a private mapping travel with the state; anonymous ones are lazy.
    copied = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE)
anonymous = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
copied[:] = anonymous[:] = content
del content
child = os.fork()
if child:
    open(sys.argv[1] + ".ready", "w").close()
time.sleep(1000)
"""


@pytest.fixture
def family(tmp_path: Path) -> Iterator[int]:
    """The PID of a process that shares 16 MB with its child."""
    null = subprocess.DEVNULL
    command = [sys.executable, "-c", FAMILY, str(tmp_path / "file")]
    process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null)
    try:
        wait_until((tmp_path / "file.ready").exists, 20, "the family is ready")
        yield process.pid
    finally:
        for pid in procfs.descendants(process.pid):
            os.kill(pid, 9)
        process.kill()
        process.wait()


def taken(pids: list[int]) -> int:
    """Bytes of memory that these processes take together."""
    rollups = [procfs.read(pid, "smaps_rollup").decode().splitlines() for pid in pids]
    return sum(int(line.split()[1]) for lines in rollups for line in lines if line.startswith("Pss:")) * 1024


def test_pages_in_common_are_sent_once_and_stay_in_common(family: int) -> None:
    _, trusted = survey(family)
    with Capture(family, trusted, Silent()) as capture:
        capture.take()
        pids = capture.frozen.pids
        before = taken(pids)
        pages = capture.sent_pages()
        assert pages.total >= 2 * PAGES
        assert len(pages.content) <= (pages.total - PAGES) * PAGE_SIZE
        first = 0
        for space, frozen in zip(spaces_of(capture.tree), capture.frozen.processes, strict=True):
            expected = b"".join(frozen.memory.read(each.start, each.end - each.start) for each in space.sent)
            assert pages.joined(first, space.sent.total_pages) == expected
            first += space.sent.total_pages
            for each in space.lazy:
                capture.sources[space.number].read_into(each.start, memoryview(bytearray(each.end - each.start)))
        assert taken(pids) < before + PAGES * PAGE_SIZE // 10
