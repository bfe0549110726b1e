"""Checkpoint directories: what was written comes back, appears whole or not at all, and no damage goes unnoticed."""

import ctypes
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from postcopy import roles
from postcopy.checkpoint import page_writer, writer
from postcopy.checkpoint.format import HEADER_SIZE, About, Kind, pack_header, parse, parse_body
from postcopy.checkpoint.page_file import PageFile
from postcopy.checkpoint.page_writer import CHUNK_PAGES, PageWriter
from postcopy.checkpoint.reader import Checkpoint
from postcopy.checkpoint.writer import Writer
from postcopy.deadline import Interrupted, end_on_signals
from postcopy.dump_side.page_source import FrozenProcess
from postcopy.errors import CannotRun, CheckpointError, DumpError, UsageError
from postcopy.kernel.page import PAGE_SIZE
from postcopy.kernel.rename import rename_new
from postcopy.page_ranges import PageRanges
from postcopy.sent_pages import PageSource
from postcopy.state import Descriptors, Process, Tree, encode
from tests.checkpoints import SPACE, Taken, frozen_state, running, take
from tests.hosts import wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="stopping and reading a process takes root")

FILES = ["manifest", "state", "pages-0.index", "pages-0"]
WITH_HEADER = FILES[:3]
NOBODY = 65534
BASE = 0x7000_0000_0000


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Taken:
    """A checkpoint that no test changes."""
    directory = tmp_path_factory.mktemp("taken")
    with running(directory) as program:
        return take(program.pid, directory / "checkpoint")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Taken:
    """One of another process, with as many pages in its memory."""
    directory = tmp_path_factory.mktemp("other")
    with running(directory) as program:
        return take(program.pid, directory / "checkpoint")


@pytest.fixture
def copy(taken: Taken, tmp_path: Path) -> Path:
    """A copy to do something to."""
    return Path(shutil.copytree(taken.directory, tmp_path / "copy"))


def pages_of(ranges: PageRanges) -> Iterator[int]:
    """The addresses of the pages."""
    for each in ranges:
        yield from range(each.start, each.end, PAGE_SIZE)


def runs_of(checkpoint: Checkpoint, shares: int) -> dict[int, bytes]:
    """The lazy pages by address, as all workers of an eager fill see them; none of them twice."""
    pages: dict[int, bytes] = {}
    for share in range(shares):
        for address, place, length in checkpoint.verified_runs(SPACE, share, shares):
            content = ctypes.string_at(place, length)
            for at in range(0, length, PAGE_SIZE):
                assert address + at not in pages
                pages[address + at] = content[at : at + PAGE_SIZE]
    return pages


def read_everything(directory: Path) -> None:
    """Open a checkpoint and read every page in it in each of the ways there are."""
    checkpoint = Checkpoint.open(directory)
    try:
        checkpoint.sent_content()
        runs_of(checkpoint, 1)
        source = checkpoint.sources[SPACE]
        page = memoryview(bytearray(PAGE_SIZE))
        for address in pages_of(checkpoint.indices[SPACE].held):
            source.read_into(address, page)
    finally:
        checkpoint.close()


def refusal(directory: Path) -> str:
    """What is said of a checkpoint that cannot be opened."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    assert caught.value.exit_code == 12
    return str(caught.value)


# -- what was written comes back ---------------------------------------------------------------------------------------


def test_single_pages_come_back_as_they_were(taken: Taken) -> None:
    checkpoint = Checkpoint.open(taken.directory)
    source = checkpoint.sources[SPACE]
    page = memoryview(bytearray(PAGE_SIZE))
    addresses = [address for address in taken.content if not taken.zero.contains(address)]
    random.Random(1).shuffle(addresses)
    for address in addresses:
        source.read_into(address, page)
        assert page == taken.content[address], f"{address:#x}"
    checkpoint.close()


@pytest.mark.parametrize("pages", [2, 16, 63, 64])
def test_stretches_of_pages_come_back_as_they_were(taken: Taken, pages: int) -> None:
    checkpoint = Checkpoint.open(taken.directory)
    source, held = checkpoint.sources[SPACE], checkpoint.indices[SPACE].held
    for first in range(0, held.total_pages, pages):
        for part in held.stretches(first, pages):
            buffer = memoryview(bytearray(part.end - part.start))
            source.read_into(part.start, buffer)
            assert buffer == b"".join(taken.content[a] for a in range(part.start, part.end, PAGE_SIZE))
    checkpoint.close()


@pytest.mark.parametrize("shares", [1, 2, 7, 1000])
def test_workers_of_an_eager_fill_see_each_lazy_page_once(taken: Taken, shares: int) -> None:
    checkpoint = Checkpoint.open(taken.directory)
    wanted = {address: taken.content[address] for address in pages_of(taken.lazy.subtract(taken.zero))}
    assert runs_of(checkpoint, shares) == wanted
    assert checkpoint.plan() == {SPACE: taken.lazy.subtract(taken.zero)}
    checkpoint.close()


def contents(checkpoint: Checkpoint) -> bytes:
    """Of the pages that are sent."""
    pages = checkpoint.sent_content()
    return pages.joined(0, pages.total)


def test_content_of_the_sent_pages_is_in_the_order_of_the_state(taken: Taken) -> None:
    checkpoint = Checkpoint.open(taken.directory)
    assert contents(checkpoint) == b"".join(taken.content[address] for address in pages_of(taken.sent))
    checkpoint.close()


def test_state_and_manifest_come_back(taken: Taken) -> None:
    checkpoint = Checkpoint.open(taken.directory)
    (process,) = taken.tree.processes
    lazy = taken.lazy.subtract(taken.zero).pack()
    expected = replace(taken.tree, processes=[replace(process, memory=replace(process.memory, lazy=lazy))])
    assert checkpoint.tree == expected
    assert (checkpoint.manifest, checkpoint.id, checkpoint.pages_elsewhere) == (taken.manifest, taken.id, False)
    checkpoint.close()


def test_lazy_pages_that_are_zero_take_no_space(taken: Taken) -> None:
    zeros = {address for address in pages_of(taken.lazy) if not any(taken.content[address])}
    assert len(zeros) > CHUNK_PAGES
    assert set(pages_of(taken.zero)) == zeros
    held = taken.sent.total_pages + taken.lazy.total_pages - len(zeros)
    assert (taken.directory / "pages-0").stat().st_size == held * PAGE_SIZE


def test_sent_pages_are_kept_though_they_are_zero(taken: Taken) -> None:
    # A zero page in a private mapping of a file hides what the file has there.
    assert any(not any(taken.content[address]) for address in pages_of(taken.sent))


def test_lazy_pages_that_stay_elsewhere_are_not_held(tmp_path: Path) -> None:
    with running(tmp_path) as program:
        elsewhere = take(program.pid, tmp_path / "checkpoint", pages_elsewhere=True)
    checkpoint = Checkpoint.open(elsewhere.directory)
    assert checkpoint.pages_elsewhere
    assert checkpoint.plan() == {SPACE: PageRanges()}
    assert runs_of(checkpoint, 1) == {}
    assert contents(checkpoint) == b"".join(elsewhere.content[address] for address in pages_of(elsewhere.sent))
    assert PageRanges.unpack(checkpoint.tree.processes[0].memory.lazy) == elsewhere.lazy
    with pytest.raises(CheckpointError, match="not among those held"):
        checkpoint.sources[SPACE].read_into(next(pages_of(elsewhere.lazy)), memoryview(bytearray(PAGE_SIZE)))
    checkpoint.close()


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        with running(tmp_path, pages=16) as program:
            take(program.pid, tmp_path / "checkpoint")
    finally:
        os.umask(previous)
    modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in (tmp_path / "checkpoint").iterdir()}
    assert modes == dict.fromkeys(FILES, 0o600)
    assert stat.S_IMODE((tmp_path / "checkpoint").stat().st_mode) == 0o700


def test_several_processes_read_from_one_open_checkpoint(taken: Taken) -> None:
    checkpoint = Checkpoint.open(taken.directory)
    addresses = list(pages_of(checkpoint.indices[SPACE].held))
    source = checkpoint.sources[SPACE]
    page = memoryview(bytearray(PAGE_SIZE))
    source.read_into(addresses[0], page)

    def reading(seed: int) -> Callable[[], None]:
        def body() -> None:
            for address in random.Random(seed).sample(addresses, len(addresses)):
                source.read_into(address, page)
                if page != taken.content[address]:
                    os._exit(1)

        return body

    readers = [roles.start(f"reader {seed}", reading(seed), dies_with_parent=True) for seed in range(4)]
    assert [reader.wait() for reader in readers] == [0] * 4
    checkpoint.close()


# -- any arrangement of pages ------------------------------------------------------------------------------------------


class Invented(PageSource):
    """Memory whose pages hold their own address, but for those that are zero."""

    def __init__(self, zero: frozenset[int]) -> None:
        self.zero = zero

    def page(self, address: int) -> bytes:
        """The content of a page. Some differ from zero in nothing but the end."""
        if address in self.zero:
            return bytes(PAGE_SIZE)
        own = struct.pack("<Q", address)
        return bytes(PAGE_SIZE - 8) + own if address // PAGE_SIZE % 3 else own * (PAGE_SIZE // 8)

    def read_into(self, address: int, buffer: memoryview) -> None:
        """See `PageSource`."""
        buffer[:] = b"".join(self.page(a) for a in range(address, address + len(buffer), PAGE_SIZE))


spans = st.lists(st.tuples(st.integers(0, 600), st.integers(0, 200)), max_size=6).map(
    lambda found: PageRanges.from_pairs(
        (BASE + start * PAGE_SIZE, BASE + (start + count) * PAGE_SIZE) for start, count in found
    )
)


@pytest.mark.parametrize("workers", [1, 3])
def test_any_arrangement_of_pages_comes_back(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: workers)
    monkeypatch.setattr(page_writer, "_CHUNKS_A_WORKER", 1)

    @settings(deadline=None, max_examples=100 // workers)
    @given(spans, spans, spans, st.integers(1, 40))
    def check(sent: PageRanges, lazy: PageRanges, zero: PageRanges, share: int) -> None:
        lazy = lazy.subtract(sent)
        source = Invented(frozenset(pages_of(zero)))
        fd = os.memfd_create("pages")
        pages = PageWriter(fd, Path("pages"), source, sent, lazy)
        try:
            index = pages.write()
        finally:
            pages.close()
        expected = [a for a in pages_of(index.held) if sent.contains(a) or a not in source.zero]
        assert list(pages_of(index.held)) == expected
        assert set(pages_of(index.zero)) == set(pages_of(lazy)) & source.zero
        assert index.held.total_pages + index.zero.total_pages == sent.total_pages + lazy.total_pages
        assert os.pread(fd, index.page_bytes + 1, 0) == b"".join(source.page(a) for a in expected)
        stored = PageFile(fd, "pages", index)
        found = {}
        for number in range(share):
            for address, place, length in stored.verified_runs(lazy, number, share):
                found[address] = ctypes.string_at(place, length)
        contents = b"".join(found[address] for address in sorted(found))
        assert contents == b"".join(source.page(a) for a in expected if lazy.contains(a))
        stored.close()

    check()


# -- whole or not at all -----------------------------------------------------------------------------------------------


def test_what_exists_already_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        Writer(tmp_path / "there", pages_elsewhere=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["there"]


def test_parent_that_cannot_be_written_to_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for parent, name in ((tmp_path / "missing", "ENOENT"), (tmp_path / "file", "ENOTDIR"), (Path("/proc"), "ENOENT")):
        with pytest.raises(CannotRun, match=name):
            Writer(parent / "checkpoint", pages_elsewhere=False)


def test_directory_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with running(tmp_path, pages=16) as program, frozen_state(program.pid) as (frozen, manifest, tree, pages):
        begun = Writer(tmp_path / "checkpoint", pages_elsewhere=False)
        begun.write_space(SPACE, FrozenProcess(program.pid, frozen.memory), pages.sent, pages.lazy)
        (tmp_path / "checkpoint").mkdir()
        with pytest.raises(DumpError, match=f"giving a name to {tmp_path}/checkpoint: EEXIST"):
            begun.finish(manifest, tree)
        begun.abandon()
    assert not any((tmp_path / "checkpoint").iterdir())
    assert not partial(tmp_path)


def partial(directory: Path) -> list[Path]:
    """What unfinished dumps have left in a directory."""
    return [entry for entry in directory.iterdir() if ".partial-" in entry.name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 4 MiB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mounted)], check=True)
    try:
        yield mounted
    finally:
        subprocess.run(["umount", "-l", str(mounted)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk_is_named_and_nothing_is_left(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: workers)
    with running(tmp_path) as program, frozen_state(program.pid) as (frozen, _, _, pages):
        begun = Writer(small_disk / "checkpoint", pages_elsewhere=False)
        with pytest.raises(DumpError, match=r"writing .*/pages-0: ENOSPC: No space left on device") as caught:
            begun.write_space(SPACE, FrozenProcess(program.pid, frozen.memory), pages.sent, pages.lazy)
        assert "make room" in caught.value.hint
        begun.abandon()
        assert not any(small_disk.iterdir())
        assert os.statvfs(small_disk).f_bavail * PAGE_SIZE == 4 << 20
    assert children_named("postcopy-write") == []


def test_disk_that_is_full_when_only_the_state_is_missing(small_disk: Path, tmp_path: Path) -> None:
    with running(tmp_path, pages=16) as program, frozen_state(program.pid) as (frozen, manifest, tree, pages):
        begun = Writer(small_disk / "checkpoint", pages_elsewhere=True)
        begun.write_space(SPACE, FrozenProcess(program.pid, frozen.memory), PageRanges(), PageRanges())
        (small_disk / "filler").write_bytes(bytes(4096 * (os.statvfs(small_disk).f_bavail - 2)))
        with pytest.raises(DumpError, match=r"writing .*/state: ENOSPC"):
            begun.finish(manifest, tree)
        begun.abandon()
        assert [entry.name for entry in small_disk.iterdir()] == ["filler"]
        assert pages.sent.total_pages


def children_named(name: str) -> list[int]:
    """Processes of this name among our children."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            continue
        if f"({name[:15]})" in fields and int(fields.rpartition(")")[2].split()[1]) == os.getpid():
            found.append(int(pid))
    return found


class Interfering(Invented):
    """Does something to its process when the page at the 100th chunk is read."""

    def __init__(self, what: Callable[[], None]) -> None:
        super().__init__(frozenset())
        self.what = what

    def read_into(self, address: int, buffer: memoryview) -> None:
        """See `PageSource`."""
        if address == BASE + 100 * CHUNK_PAGES * PAGE_SIZE:
            self.what()
        super().read_into(address, buffer)


LARGE = PageRanges.from_pairs([(BASE, BASE + 200 * CHUNK_PAGES * PAGE_SIZE)])


def test_killed_worker_ends_the_dump(tmp_path: Path) -> None:
    control = os.getpid()

    def die() -> None:
        assert os.getpid() != control
        os.kill(os.getpid(), signal.SIGKILL)

    begun = Writer(tmp_path / "checkpoint", pages_elsewhere=False)
    with pytest.raises(DumpError, match=r"writing .*/pages-0: a process of ours was killed by SIGKILL"):
        begun.write_space(SPACE, Interfering(die), PageRanges(), LARGE)
    assert children_named("postcopy-write") == []
    begun.abandon()
    assert not any(tmp_path.iterdir())


def test_error_of_a_worker_is_told_with_its_hint(tmp_path: Path) -> None:
    def fail() -> None:
        raise DumpError("pages of process 1 cannot be read: \udcff", "a hint")

    begun = Writer(tmp_path / "checkpoint", pages_elsewhere=False)
    with pytest.raises(DumpError, match="pages of process 1 cannot be read: \udcff") as caught:
        begun.write_space(SPACE, Interfering(fail), PageRanges(), LARGE)
    assert caught.value.hint == "a hint"
    begun.abandon()


def test_writer_killed_while_it_writes_leaves_nothing_that_opens(tmp_path: Path) -> None:
    reached, tell = os.pipe()

    def block() -> None:
        os.write(tell, b"x")
        signal.pause()

    def body() -> None:
        Writer(tmp_path / "checkpoint", pages_elsewhere=False).write_space(
            SPACE, Interfering(block), PageRanges(), LARGE
        )

    dump = roles.start("dump", body, dies_with_parent=True)
    assert os.read(reached, 1)
    workers = grandchildren(dump.pid)
    assert workers
    dump.kill()
    wait_until(lambda: not any(alive(pid) for pid in workers), 10, "the workers end with the dump")
    assert not (tmp_path / "checkpoint").exists()
    (left,) = partial(tmp_path)
    assert "did not come to its end" in refusal(left)
    left.rename(tmp_path / "renamed")
    assert f"{tmp_path}/renamed/manifest is missing" in refusal(tmp_path / "renamed")


def grandchildren(pid: int) -> list[int]:
    """The children of a process."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("step", ["_make_durable", "rename_new"])
def test_writer_killed_before_it_has_given_the_name_leaves_nothing_that_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(writer, step, die)
    with running(tmp_path, pages=16) as program:
        dump = roles.start("dump", lambda: ignore(take(program.pid, tmp_path / "checkpoint")), dies_with_parent=True)
        assert dump.wait() == -signal.SIGKILL
        assert alive(program.pid)
    assert not (tmp_path / "checkpoint").exists()
    (left,) = partial(tmp_path)
    assert {entry.name for entry in left.iterdir()} == set(FILES)
    assert "did not come to its end" in refusal(left)


def ignore(_: object) -> None:
    """For bodies of processes, which give nothing back."""


def test_signal_that_comes_while_the_name_is_given_takes_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(old: Path, new: Path) -> None:
        # To this thread: another one of the test runner's would be told as well, and this one later.
        signal.raise_signal(signal.SIGTERM)
        rename_new(old, new)

    monkeypatch.setattr(writer, "rename_new", interrupted)
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    end_on_signals()
    try:
        with running(tmp_path, pages=16) as program, pytest.raises(Interrupted):
            take(program.pid, tmp_path / "checkpoint")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    assert not (tmp_path / "checkpoint").exists()
    assert not partial(tmp_path)


def test_state_that_could_not_be_restored_is_not_written(tmp_path: Path) -> None:
    with running(tmp_path, pages=16) as program, frozen_state(program.pid) as (frozen, manifest, tree, pages):
        begun = Writer(tmp_path / "checkpoint", pages_elsewhere=False)
        begun.write_space(SPACE, FrozenProcess(program.pid, frozen.memory), pages.sent, pages.lazy)
        (process,) = tree.processes
        unsound = replace(tree, processes=[replace(process, pid=process.pid + 1)])
        with pytest.raises(DumpError, match=rf"state\.processes\[0\]\.threads\[0\]\.tid: {process.pid} is not the pid"):
            begun.finish(manifest, unsound)
        begun.abandon()
    assert not partial(tmp_path)


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_HEADER)
def test_any_flipped_bit_is_found_when_it_is_opened(copy: Path, name: str) -> None:
    path = copy / name
    content = bytearray(path.read_bytes())
    generator = random.Random(name)
    within = [generator.randrange(8 * HEADER_SIZE, 8 * len(content)) for _ in range(60)]
    for bit in (*range(8 * HEADER_SIZE), *within, 8 * len(content) - 1):
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        said = refusal(copy)
        assert said.startswith(f"{path}: "), said
        assert "byte" in said, said
        content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    read_everything(copy)


def test_any_flipped_bit_of_a_page_is_found_before_a_byte_is_handed_out(copy: Path) -> None:
    path = copy / "pages-0"
    generator = random.Random(3)
    size = path.stat().st_size
    checkpoint = Checkpoint.open(copy)
    held, sent = checkpoint.indices[SPACE].held, PageRanges.unpack(checkpoint.tree.processes[0].memory.sent)
    with open(path, "r+b", buffering=0) as stream:
        for bit in [0, 8 * size - 1, *(generator.randrange(8 * size) for _ in range(100))]:
            flip(stream.fileno(), bit)
            place = bit // 8
            address = held.address(place // PAGE_SIZE)
            buffer = memoryview(bytearray(b"\xaa" * PAGE_SIZE))
            fresh = Checkpoint.open(copy)
            with pytest.raises(CheckpointError, match=rf"{path}: bytes \d+ to \d+ .* checksum") as caught:
                fresh.sources[SPACE].read_into(address, buffer)
            start, end = (int(word) for word in str(caught.value).split() if word.isdigit())
            assert start <= place < end
            if sent.contains(address):
                with pytest.raises(CheckpointError, match=f"{path}: bytes {start} to {end} "):
                    fresh.sent_content()
            else:
                with pytest.raises(CheckpointError, match=f"{path}: bytes {start} to {end} "):
                    assert address not in runs_of(fresh, 3)
            fresh.close()
            flip(stream.fileno(), bit)
    checkpoint.close()
    read_everything(copy)


def flip(fd: int, bit: int) -> None:
    """Turn one bit of a file over."""
    (byte,) = os.pread(fd, 1, bit // 8)
    os.pwrite(fd, bytes([byte ^ 1 << bit % 8]), bit // 8)


def test_page_that_was_read_stays_what_it_was(copy: Path) -> None:
    checkpoint = Checkpoint.open(copy)
    held = checkpoint.indices[SPACE].held
    source, page = checkpoint.sources[SPACE], memoryview(bytearray(PAGE_SIZE))
    address = held.address(0)
    source.read_into(address, page)
    before = bytes(page)
    with open(copy / "pages-0", "r+b", buffering=0) as stream:
        flip(stream.fileno(), 7)
    source.read_into(address, page)
    assert page == before
    checkpoint.close()


@pytest.mark.parametrize("name", FILES)
def test_file_that_is_cut_off_empty_or_longer_is_named(copy: Path, name: str) -> None:
    path = copy / name
    content = path.read_bytes()
    for length in {0, 1, HEADER_SIZE - 1, HEADER_SIZE, len(content) // 2, len(content) - 1}:
        path.write_bytes(content[:length])
        said = refusal(copy)
        assert said.startswith(f"{path}: ") and "byte" in said, said
    path.write_bytes(content + b"\0")
    assert refusal(copy).startswith(f"{path}: ")


@pytest.mark.parametrize("name", FILES)
def test_file_that_is_missing_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert f"{copy / name} is missing" in refusal(copy)


def test_page_file_that_is_cut_off_after_the_opening_is_an_error(copy: Path) -> None:
    checkpoint = Checkpoint.open(copy)
    os.truncate(copy / "pages-0", PAGE_SIZE)
    with pytest.raises(CheckpointError, match="pages-0: ends at byte 4096: it was cut off"):
        runs_of(checkpoint, 1)
    with pytest.raises(CheckpointError, match="pages-0: ends at byte 4096: it was cut off"):
        checkpoint.sources[SPACE].read_into(checkpoint.indices[SPACE].held.address(1), memoryview(bytearray(PAGE_SIZE)))
    checkpoint.close()


@pytest.mark.parametrize("name", FILES)
def test_file_of_another_checkpoint_is_found(copy: Path, other: Taken, name: str) -> None:
    shutil.copy(other.directory / name, copy / name)
    said = ""
    try:
        read_everything(copy)
    except CheckpointError as error:
        said = str(error)
    # Where all else is that of the other, the odd one out is the manifest.
    wrong = ["state"] if name == "manifest" else [name]
    assert any(said.startswith(f"{copy / file}: ") for file in wrong), said
    if name != "pages-0":
        assert "another checkpoint" in said


@pytest.mark.parametrize(
    ("one", "another"), [("manifest", "state"), ("state", "pages-0.index"), ("manifest", "pages-0")]
)
def test_files_that_have_changed_places_are_found(copy: Path, one: str, another: str) -> None:
    swap(copy, one, another)
    said = refusal(copy)
    assert said.startswith((f"{copy / one}: byte", f"{copy / another}: byte")), said


def swap(directory: Path, one: str, another: str) -> None:
    """Give each file the other's name."""
    (directory / one).rename(directory / "aside")
    (directory / another).rename(directory / one)
    (directory / "aside").rename(directory / another)


@pytest.fixture
def two_spaces(tmp_path: Path) -> Path:
    """A checkpoint with the address spaces of two processes."""
    begun = Writer(tmp_path / "two", pages_elsewhere=False)
    processes: list[Process] = []
    for space in (0, 1):
        directory = tmp_path / str(space)
        directory.mkdir()
        with running(directory, pages=64) as program, frozen_state(program.pid) as (frozen, manifest, tree, pages):
            begun.write_space(space, FrozenProcess(program.pid, frozen.memory), pages.sent, pages.lazy)
            parent = processes[0].pid if processes else 0
            lineage = replace(tree.processes[0].lineage, parent=parent)
            processes.append(replace(tree.processes[0], space=space, slots=[], lineage=lineage))
    begun.finish(manifest, Tree(processes, [], Descriptors([], []), []))
    return tmp_path / "two"


def test_several_address_spaces(two_spaces: Path) -> None:
    checkpoint = Checkpoint.open(two_spaces)
    assert sorted(checkpoint.plan()) == [0, 1]
    sent = sum(PageRanges.unpack(process.memory.sent).total_pages for process in checkpoint.tree.processes)
    assert checkpoint.sent_content().content.size == sent * PAGE_SIZE
    checkpoint.close()


def test_files_that_two_address_spaces_have_exchanged_are_found(two_spaces: Path) -> None:
    swap(two_spaces, "pages-0.index", "pages-1.index")
    assert f"{two_spaces}/pages-0.index: byte 12: this belongs to address space 1" in refusal(two_spaces)
    swap(two_spaces, "pages-0.index", "pages-1.index")
    swap(two_spaces, "pages-0", "pages-1")
    with pytest.raises(CheckpointError, match=f"{two_spaces}/pages-0: "):
        read_everything(two_spaces)


# -- made for something else, or by somebody else ----------------------------------------------------------------------


def test_newer_version_is_refused(copy: Path) -> None:
    for name in WITH_HEADER:
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:8] + struct.pack("<H", 2) + content[10:])
        assert f"{copy / name}: byte 8: format version 2; this postcopy reads version 1" in refusal(copy)
        (copy / name).write_bytes(content)


def change_about(directory: Path, change: Callable[[About], About]) -> None:
    """Write another manifest, with the right checksum."""
    path = directory / "manifest"
    checkpoint, body = parse(str(path), path.read_bytes(), Kind.MANIFEST)
    changed = encode(change(parse_body(str(path), About, body)))
    path.write_bytes(pack_header(Kind.MANIFEST, 0, checkpoint, changed) + changed)


def test_other_architecture_is_refused(copy: Path) -> None:
    change_about(copy, lambda about: replace(about, architecture="m68k\x1b[2J"))
    assert f"{copy}/manifest: architecture: m68k\\x1b[2J; this host's is x86_64" in refusal(copy)


def test_other_page_size_is_refused(copy: Path) -> None:
    change_about(copy, lambda about: replace(about, page_size=65536))
    assert f"{copy}/manifest: page_size: 65536 bytes; this host's is 4096" in refusal(copy)


def test_missing_cpu_feature_is_named(copy: Path) -> None:
    change_about(copy, lambda about: replace(about, cpu_features=[*about.cpu_features, "avx1024"]))
    assert "manifest: cpu_features: this host's CPU lacks what the program may use: avx1024" in refusal(copy)
    Checkpoint.open(copy, any_host=True).close()


def test_manifest_that_does_not_fit_the_page_files_is_refused(copy: Path) -> None:
    change_about(copy, lambda about: replace(about, spaces=[]))
    assert f"{copy}/manifest: spaces: " in refusal(copy)


@pytest.mark.parametrize("name", [".", *FILES])
def test_what_another_user_owns_is_refused(copy: Path, name: str) -> None:
    os.chown(copy / name, NOBODY, -1)
    assert f"{copy / name} belongs to user {NOBODY}" in refusal(copy)


@pytest.mark.parametrize("name", [".", *FILES])
@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_what_others_can_write_is_refused(copy: Path, name: str, mode: int) -> None:
    (copy / name).chmod(mode | 0o100)
    assert f"{copy / name} can be written by others" in refusal(copy)


@pytest.mark.parametrize("name", FILES)
def test_symbolic_links_are_refused(copy: Path, tmp_path: Path, name: str) -> None:
    (copy / name).rename(tmp_path / "elsewhere")
    (copy / name).symlink_to(tmp_path / "elsewhere")
    assert f"{copy / name} is a symbolic link" in refusal(copy)


def test_directory_that_is_a_symbolic_link_is_refused(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copy)
    assert f"{tmp_path}/link is a symbolic link" in refusal(tmp_path / "link")


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_regular_file_is_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name, 0o600)
    assert f"{copy / name} is not a regular file" in refusal(copy)


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "Not a directory" in refusal(tmp_path / "file")
    assert "No such file or directory" in refusal(tmp_path / "missing")


def test_file_of_absurd_size_is_not_read(copy: Path) -> None:
    os.truncate(copy / "state", 1 << 42)
    assert f"{copy}/state: 4398046511104 bytes are more than any checkpoint has there" in refusal(copy)
