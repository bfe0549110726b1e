"""Pages that processes share copy-on-write since a fork: read without a copy, sent once."""

import os
import resource
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
from postcopy.sent_pages import Content
from postcopy.spaces import spaces_of
from tests.hosts import Host, Pair, wait_until
from tests.migrate import move

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
        reader = capture.take()
        pids = capture.frozen.pids
        before = taken(pids)
        content = b""
        for space, frozen in zip(spaces_of(capture.tree), capture.frozen.processes, strict=True):
            piece = reader.read(space)
            content += piece.content
            expected = b"".join(frozen.memory.read(each.start, each.end - each.start) for each in space.sent)
            assert b"".join(content[place * PAGE_SIZE :][:PAGE_SIZE] for place in piece.places) == expected
            assert space.sent.total_pages >= PAGES
            if space.number:
                assert len(piece.content) <= (space.sent.total_pages - PAGES) * PAGE_SIZE
            for each in space.lazy:
                capture.sources[space.number].read_into(each.start, memoryview(bytearray(each.end - each.start)))
        assert taken(pids) < before + PAGES * PAGE_SIZE // 10


MEGABYTES = 64
HEIRS = f"""
import mmap, os, signal, sys, time
pages = {MEGABYTES} * 256
shared = mmap.mmap(-1, pages * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(pages):
    shared[page * 4096 : page * 4096 + 8] = page.to_bytes(8, "little")
children = []
for number in range(3):
    ready, told = os.pipe()
    if not (child := os.fork()):
        # This one alone has the page that is its own.
        shared[number * 4096 + 8] = 1 + number
        os.write(told, b".")
        while not os.path.exists(sys.argv[1] + ".go"):
            time.sleep(0.05)
        for page in range(pages):
            found = shared[page * 4096 : page * 4096 + 9]
            if found != page.to_bytes(8, "little") + bytes([1 + number if page == number else 0]):
                print(os.getpid(), page, found.hex(), file=sys.stderr, flush=True)
                os._exit(1)
        os._exit(0)
    os.read(ready, 1)
    children.append(child)
open(sys.argv[1] + ".ready", "w").close()
statuses = [os.waitpid(child, 0)[1] for child in children]
mine = all([shared[page * 4096 : page * 4096 + 9] == page.to_bytes(9, "little") for page in range(pages)])
sys.exit(0 if mine and not any(statuses) else 1)
"""


def received(host: Host) -> int:
    """Bytes that a host has had from its network."""
    lines = str(host.run(["cat", "/proc/net/dev"]).stdout).splitlines()[2:]
    return sum(int(line.split()[1]) for line in lines if not line.strip().startswith("lo:"))


@pytest.mark.parametrize("background", ["eager", "off"])
def test_lazy_pages_in_common_travel_once(hosts: Pair, tmp_path: Path, background: str) -> None:
    program = hosts.a.popen([sys.executable, "-c", HEIRS, str(tmp_path / "heirs")], pid=4900)
    ready = tmp_path / "heirs.ready"
    wait_until(lambda: ready.exists() or program.poll() is not None, 30, "the children are there")
    before = received(hosts.b)
    migration = move(hosts.a, hosts.b, 4900, restore_options=("--background", background))
    if background == "eager":
        migration.wait_drained()
    (tmp_path / "heirs.go").touch()
    assert migration.restore is not None
    assert migration.restore.wait(60) == 0
    assert received(hosts.b) - before < MEGABYTES * 1.4 * (1 << 20)


def test_pages_are_taken_where_files_must_be_small() -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE_SIZE, limit[1]))
    try:
        content = Content()
        parts = [content.grow(size * PAGE_SIZE) for size in (1, 3, 1)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    for number, part in enumerate(parts, start=1):
        part[:] = bytes([number]) * len(part)
    assert content.size == 5 * PAGE_SIZE
    assert content.read(range(PAGE_SIZE - 1, 4 * PAGE_SIZE + 1)) == b"\1" + b"\2" * 3 * PAGE_SIZE + b"\3"
    # Nobody else can read what is in no file: that is written instead.
    assert content.is_in_file(range(PAGE_SIZE))
    assert not content.is_in_file(range(PAGE_SIZE, 2 * PAGE_SIZE))
    assert not content.is_in_file(range(4 * PAGE_SIZE, 5 * PAGE_SIZE))
    content.close()
