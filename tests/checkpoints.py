"""Checkpoints of real programs, for the tests of the directory format: taken in this process, without a session."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from postcopy.checkpoint.writer import Writer
from postcopy.dump_side.collect import collect
from postcopy.dump_side.freeze import Frozen
from postcopy.dump_side.frozen_tree import FrozenTree
from postcopy.dump_side.looks import Looker
from postcopy.dump_side.page_source import FrozenProcess
from postcopy.dump_side.shared_memory import SharedObjects
from postcopy.dump_side.smaps import SmapsReader
from postcopy.dump_side.survey import survey
from postcopy.kernel.page import PAGE_SIZE
from postcopy.page_ranges import PageRanges
from postcopy.spaces import Space, spaces_of
from postcopy.state import Manifest, Tree
from tests.hosts import wait_until

SPACE = 0

# Memory of every kind that a checkpoint treats in its own way; its addresses are the first line of the output.
PROGRAM = """
import mmap, os, signal, sys, threading
PAGE = 4096
private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
import ctypes
def address(area):
    return ctypes.addressof(ctypes.c_char.from_buffer(area))
# Pages of random content, zero pages among them, whole chunks of zeros, and pages that do not exist at all.
mixed = mmap.mmap(-1, {pages} * PAGE, private)
for page in range({pages}):
    kind = page % 7 if page % 1024 < 512 else page % 1024 // 128
    if kind in (1, 4):
        mixed[page * PAGE] = 1
        mixed[page * PAGE] = 0
    elif kind == 5:
        mixed[(page + 1) * PAGE - 1] = 7
    elif kind != 6:
        mixed[page * PAGE : (page + 1) * PAGE] = os.urandom(PAGE)
with open(sys.argv[1], "wb") as stream:
    stream.write(bytes(64 * PAGE))
mapped = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 64 * PAGE, mmap.MAP_PRIVATE)
for page in range(0, 64, 3):
    mapped[page * PAGE] = page % 2
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
os.kill(os.getpid(), signal.SIGUSR2)
threading.Thread(target=signal.pause, daemon=True).start()
print(address(mixed), address(mapped), flush=True)
signal.pause()
"""


@dataclass
class Program:
    """The running program; ``mixed`` and ``mapped``: where its memory lies."""

    pid: int
    mixed: int
    mapped: int


@dataclass
class Taken:
    """A checkpoint and what was in the frozen process: the pages by address, those that were zero, the state."""

    directory: Path
    id: bytes
    manifest: Manifest
    tree: Tree
    sent: PageRanges
    lazy: PageRanges
    zero: PageRanges
    content: dict[int, bytes]


@contextlib.contextmanager
def running(directory: Path, pages: int = 2048) -> Iterator[Program]:
    """The program, with an area of ``pages`` pages; it ends with the scope."""
    output = directory / "output"
    with open(output, "wb") as stdout:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(pages=pages), str(directory / "mapped")],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stdout,
            start_new_session=True,
        )
    try:
        wait_until(lambda: output.read_bytes().endswith(b"\n"), 20, "the program is ready")
        yield Program(process.pid, *map(int, output.read_text().split()))
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def frozen_state(pid: int) -> Iterator[tuple[Frozen, Manifest, Tree, Space]]:
    """A process, frozen while inside, and its state."""
    manifest, trusted = survey(pid)
    frozen = FrozenTree(pid)
    smaps, looker = SmapsReader(trusted.known), Looker(trusted.known)
    try:
        frozen.freeze()
        tree = collect(frozen, smaps, looker, trusted, {}, SharedObjects())
        smaps.verify()
        yield frozen.root, manifest, tree, spaces_of(tree)[SPACE]
    finally:
        frozen.thaw()
        smaps.close()
        looker.close()
        frozen.close()


def take(pid: int, directory: Path, *, pages_elsewhere: bool = False) -> Taken:
    """A checkpoint of a process, which runs on."""
    with frozen_state(pid) as (frozen, manifest, tree, pages):
        writer = Writer(directory, pages_elsewhere=pages_elsewhere)
        try:
            lazy = PageRanges() if pages_elsewhere else pages.lazy
            zero = writer.write_space(SPACE, FrozenProcess(pid, frozen.memory), pages.sent, lazy)
            identity = writer.finish(manifest, tree)
        except BaseException:
            writer.abandon()
            raise
        content = {
            address: frozen.memory.read(address, PAGE_SIZE)
            for ranges in (pages.sent, pages.lazy)
            for each in ranges
            for address in range(each.start, each.end, PAGE_SIZE)
        }
    return Taken(directory, identity, manifest, tree, pages.sent, pages.lazy, zero, content)


def files_of(directory: Path) -> list[Path]:
    """The files of a checkpoint, by name."""
    return sorted(directory / name for name in os.listdir(directory))
