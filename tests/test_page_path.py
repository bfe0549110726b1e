"""Real processes, real faults: what a program reads while its memory is still arriving."""

import ctypes
import mmap
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from postcopy.dump_side.page_source import FrozenProcess
from postcopy.dump_side.serve import Board, serve_demand
from postcopy.errors import DumpError, ProtocolError
from postcopy.kernel import userfaultfd as uffdio
from postcopy.kernel.libc import address_of, syscall
from postcopy.kernel.page import PAGE_SIZE
from postcopy.page_ranges import PageRange, PageRanges
from postcopy.restore_side.fault_handler import Background
from postcopy.restore_side.filling import Cause, Filling
from postcopy.restore_side.latency import LatencyHistogram
from postcopy.restore_side.residency import AddressSpace
from postcopy.wire import pages as wire
from tests.benchmarks.page_path import (
    BASE,
    FEATURES,
    SYS_MADVISE,
    SYS_MMAP,
    SYS_MPROTECT,
    SYS_MREMAP,
    SYS_MUNMAP,
    PagePath,
    content,
    map_memory,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="userfaultfd for system calls needs root")

MIB = 1 << 20
SIZE = 4 * MIB
REGION = PageRange(BASE, BASE + SIZE)
ELSEWHERE = BASE + (1 << 36)
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
SYS_MLOCK = 149
ZEROS = bytes(PAGE_SIZE)
MODES = [Background("eager"), Background("idle", 0.05), Background("off")]


def read(address: int, length: int = PAGE_SIZE) -> bytes:
    """Memory of this process."""
    return ctypes.string_at(address, length)


def expect(start: int, pages: int, source: int | None) -> None:
    """The pages from ``start`` on are those of the source at ``source``, or zeros."""
    for at in range(0, pages * PAGE_SIZE, PAGE_SIZE):
        expected = ZEROS if source is None else content(source + at)
        assert read(start + at) == expected, f"{start + at:#x} holds {read(start + at, 16).hex()}"


def mremap(old: int, old_length: int, new_length: int, new: int, flags: int = 0) -> None:
    """mremap(2) to a fixed address."""
    syscall("mremap", SYS_MREMAP, old, old_length, new_length, MREMAP_MAYMOVE | MREMAP_FIXED | flags, new)


def finish(path: PagePath) -> dict[str, Any]:
    """Wait for the program and for the drain."""
    path.result()
    return path.report("drained")


def run(program: Callable[[], Any], background: Background, **keywords: Any) -> dict[str, Any]:
    """Run ``program`` in the destination; gives the final report."""
    with PagePath([REGION], program, background, **keywords) as path:
        path.resume()
        return finish(path)


@pytest.mark.parametrize("background", MODES, ids=lambda mode: mode.mode)
def test_every_page_arrives_as_it_was(background: Background) -> None:
    stats = run(lambda: expect(BASE, SIZE // PAGE_SIZE, BASE), background)
    assert stats["bytes_demand"] + stats["bytes_bulk"] == SIZE
    assert stats["bytes_zero"] == 0


def test_off_brings_nothing_that_was_not_touched() -> None:
    with PagePath([REGION], lambda: expect(BASE + MIB, 1, BASE + MIB), Background("off")) as path:
        path.resume()
        path.result()
        progress = path.report("progress")
        while progress["pages_left"] == SIZE // PAGE_SIZE:
            progress = path.report("progress")
        assert progress["pages_left"] == SIZE // PAGE_SIZE - 1
        assert path.board.bulk_bytes == 0
        assert path.board.demand_requests == 1


def test_untouched_memory_is_filled_by_the_background_alone() -> None:
    with PagePath([REGION], lambda: None, Background("eager")) as path:
        stats = path.report("drained")
        assert stats["bytes_bulk"] == SIZE
        path.resume()
        path.result()


def test_sequential_reading_without_background_asks_for_growing_windows() -> None:
    stats = run(lambda: expect(BASE, SIZE // PAGE_SIZE, BASE), Background("off"))
    assert stats["faults"] < SIZE // PAGE_SIZE // 20


def test_pages_the_source_never_had_are_zero_and_need_no_network() -> None:
    lazy = PageRanges.from_pairs([(BASE, BASE + MIB), (BASE + 2 * MIB, BASE + 3 * MIB)])

    def program() -> None:
        expect(BASE + MIB, 256, None)
        expect(BASE + 3 * MIB, 256, None)
        expect(BASE, 256, BASE)
        expect(BASE + 2 * MIB, 256, BASE + 2 * MIB)

    stats = run(program, Background("off"), lazy=lazy)
    assert stats["bytes_zero"] == 2 * MIB
    assert stats["bytes_demand"] == 2 * MIB


def test_pages_that_the_bulk_stream_lacks_are_asked_for() -> None:
    plan = PageRanges.from_pairs([(BASE, BASE + MIB)])
    with PagePath([REGION], lambda: None, Background("eager"), plan=plan) as path:
        stats = path.report("drained")
        assert (stats["bytes_bulk"], stats["bytes_demand"]) == (MIB, SIZE - MIB)
        path.resume()
        path.result()


@pytest.mark.parametrize("background", MODES, ids=lambda mode: mode.mode)
def test_moved_memory_keeps_its_contents(background: Background) -> None:
    def program() -> None:
        expect(BASE, 3, BASE)
        mremap(BASE, MIB, MIB, ELSEWHERE)
        expect(ELSEWHERE, 100, BASE)
        mremap(BASE + MIB, MIB, MIB, BASE)
        expect(BASE, 256, BASE + MIB)
        mremap(BASE + 2 * MIB, MIB, 2 * MIB, ELSEWHERE + 8 * MIB)
        expect(ELSEWHERE + 8 * MIB, 256, BASE + 2 * MIB)
        expect(ELSEWHERE + 9 * MIB, 256, None)
        mremap(BASE + 3 * MIB, MIB, MIB // 2, ELSEWHERE + 16 * MIB)
        expect(ELSEWHERE + 16 * MIB, 128, BASE + 3 * MIB)
        expect(ELSEWHERE + 100 * PAGE_SIZE, 156, BASE + 100 * PAGE_SIZE)

    run(program, background)


@pytest.mark.parametrize("background", MODES, ids=lambda mode: mode.mode)
def test_a_move_that_leaves_the_old_range_mapped_leaves_zeros_there(background: Background) -> None:
    def program() -> None:
        mremap(BASE, MIB, MIB, ELSEWHERE, MREMAP_DONTUNMAP)
        expect(BASE, 256, None)
        expect(ELSEWHERE, 256, BASE)
        expect(BASE + MIB, 768, BASE + MIB)

    run(program, background)


@pytest.mark.parametrize("background", MODES, ids=lambda mode: mode.mode)
def test_memory_moved_onto_lazy_memory_replaces_it(background: Background) -> None:
    def program() -> None:
        mremap(BASE, MIB, MIB, BASE + 2 * MIB)
        expect(BASE + 2 * MIB, 256, BASE)
        expect(BASE + MIB, 256, BASE + MIB)
        expect(BASE + 3 * MIB, 256, BASE + 3 * MIB)

    run(program, background)


@pytest.mark.parametrize("background", MODES, ids=lambda mode: mode.mode)
def test_dropped_pages_are_zero_even_if_they_were_on_their_way(background: Background) -> None:
    def program() -> None:
        expect(BASE, 4, BASE)
        for at in range(0, MIB, 16 * PAGE_SIZE):
            read(BASE + at)
            syscall("madvise", SYS_MADVISE, BASE + at, 8 * PAGE_SIZE, mmap.MADV_DONTNEED)
            expect(BASE + at, 8, None)
        for at in range(0, MIB, 16 * PAGE_SIZE):
            expect(BASE + at, 8, None)
            expect(BASE + at + 8 * PAGE_SIZE, 8, BASE + at + 8 * PAGE_SIZE)
        expect(BASE + MIB, 768, BASE + MIB)

    run(program, background)


@pytest.mark.parametrize("background", MODES, ids=lambda mode: mode.mode)
def test_new_memory_where_lazy_memory_was_is_zero(background: Background) -> None:
    def program() -> None:
        syscall("munmap", SYS_MUNMAP, BASE + MIB, MIB)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
        syscall("mmap", SYS_MMAP, BASE + MIB, MIB, mmap.PROT_READ, flags, -1, 0)
        syscall("mmap", SYS_MMAP, BASE + 2 * MIB, MIB, mmap.PROT_READ, flags, -1, 0)
        expect(BASE + MIB, 512, None)
        expect(BASE, 256, BASE)
        expect(BASE + 3 * MIB, 256, BASE + 3 * MIB)

    run(program, background)


def test_mappings_split_without_an_event_are_filled_all_the_same() -> None:
    def program() -> None:
        for at in range(PAGE_SIZE, SIZE, 3 * PAGE_SIZE):
            syscall("mprotect", SYS_MPROTECT, BASE + at, PAGE_SIZE, mmap.PROT_READ)
        expect(BASE, SIZE // PAGE_SIZE, BASE)

    run(program, Background("idle", 0.0))


@pytest.mark.parametrize("background", MODES, ids=lambda mode: mode.mode)
def test_locked_memory_that_grows_by_a_move_is_populated_before_the_move_is_told(background: Background) -> None:
    def program() -> None:
        syscall("mlock", SYS_MLOCK, BASE, MIB // 4)
        mremap(BASE, MIB // 4, MIB // 2, ELSEWHERE)
        # Still one mapping, as the program knows it.
        mremap(ELSEWHERE, MIB // 2, MIB // 2, ELSEWHERE + MIB)
        expect(ELSEWHERE + MIB, 64, BASE)
        expect(ELSEWHERE + MIB + MIB // 4, 64, None)
        expect(BASE + MIB // 4, 960, BASE + MIB // 4)

    run(program, background)


def _with_lazy_memory(then: Callable[[], None], locked: int = 0) -> tuple[int, int]:
    """A child with lazy memory at BASE, of which the first bytes are there and ``locked``, and its userfaultfd; what
    ``then`` changes of the layout ends when its events are read."""
    here, there = socket.socketpair()
    pid = os.fork()
    if not pid:
        uffd = uffdio.userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK)
        uffdio.api(uffd, FEATURES)
        map_memory(BASE, MIB)
        if locked:
            syscall("mlock", SYS_MLOCK, BASE, locked)
        uffdio.register(uffd, BASE, MIB, uffdio.UFFDIO_REGISTER_MODE_MISSING)
        socket.send_fds(there, [b"u"], [uffd])
        then()
        signal.pause()
    _, (uffd,), _, _ = socket.recv_fds(here, 1, 1)
    here.close()
    there.close()
    return pid, uffd


def test_memory_that_was_populated_is_in_one_piece_when_its_thread_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    grown = MIB // 2 + 2 * PAGE_SIZE
    pid, uffd = _with_lazy_memory(lambda: mremap(BASE, MIB // 2, grown, ELSEWHERE), locked=MIB // 2)
    read_messages = uffdio.read_messages
    populated = set[int]()

    def goes_on(fd: int) -> list[uffdio.Message]:
        # Whoever waits for its event to be read does.
        if populated:
            assert f"{ELSEWHERE:x}-{ELSEWHERE + grown:x} " in Path(f"/proc/{pid}/maps").read_text()
        return read_messages(fd)

    monkeypatch.setattr(uffdio, "read_messages", goes_on)
    try:
        filling = Filling(lambda mm: None)
        mm = filling.adopt(uffd, AddressSpace(0, PageRanges()))
        messages = list[uffdio.Message]()
        while not any(isinstance(message, uffdio.Remap) for message in messages):
            assert select.select([uffd], [], [], 10)[0], "the move did not come about"
            messages = filling.read_messages(mm)
            for message in messages:
                if isinstance(message, uffdio.PageFault):
                    while not filling.zero(mm, message.address):
                        pass
                    populated.add(message.address)
        assert populated == {ELSEWHERE + MIB // 2, ELSEWHERE + MIB // 2 + PAGE_SIZE}
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(uffd)


def _in_child(body: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        body()
        status = 0
    finally:
        os._exit(status)


@pytest.mark.parametrize("background", MODES, ids=lambda mode: mode.mode)
def test_parent_and_children_each_get_every_page(background: Background) -> None:
    def program() -> None:
        expect(BASE, 10, BASE)

        def grandchild_reads() -> None:
            expect(BASE, 256, None)
            expect(BASE + MIB, 768, BASE + MIB)

        def child() -> None:
            expect(BASE + MIB, 50, BASE + MIB)
            syscall("madvise", SYS_MADVISE, BASE, MIB, mmap.MADV_DONTNEED)
            grandchild = _in_child(grandchild_reads)
            mremap(BASE + 2 * MIB, MIB, MIB, ELSEWHERE)
            expect(ELSEWHERE, 256, BASE + 2 * MIB)
            assert os.waitpid(grandchild, 0)[1] == 0

        pid = _in_child(child)
        syscall("munmap", SYS_MUNMAP, BASE + 2 * MIB, MIB)
        expect(BASE, 512, BASE)
        expect(BASE + 3 * MIB, 256, BASE + 3 * MIB)
        assert os.waitpid(pid, 0)[1] == 0

    with PagePath([REGION], program, background) as path:
        path.resume()
        finish(path)
        forked = [message for message in path.messages if message["event"] == "forked"]
        assert len(forked) == path.forks


@pytest.mark.parametrize("background", MODES, ids=lambda mode: mode.mode)
def test_what_fork_has_left_out_does_not_come_to_where_the_child_has_something_else(background: Background) -> None:
    left_out, grown = BASE + MIB, 16 * PAGE_SIZE

    def program() -> None:
        syscall("madvise", SYS_MADVISE, left_out, MIB, mmap.MADV_DONTFORK)

        def child() -> None:
            # Answered once it is known with which layout it was born.
            expect(BASE + 2 * MIB, 1, BASE + 2 * MIB)
            mremap(BASE, PAGE_SIZE, grown, left_out)
            expect(left_out, 1, BASE)
            expect(left_out + PAGE_SIZE, 15, None)

        pid = _in_child(child)
        assert os.waitpid(pid, 0)[1] == 0
        expect(BASE, SIZE // PAGE_SIZE, BASE)

    run(program, background)


@pytest.mark.parametrize("background", MODES, ids=lambda mode: mode.mode)
def test_a_child_has_what_another_thread_had_moved_and_not_told_yet(background: Background) -> None:
    old = BASE + SIZE - MIB

    def program() -> None:
        with pytest.raises(OSError):
            # The hole behind it is an error, found when the mapping is locked already and nothing populated.
            syscall("mlock", SYS_MLOCK, old, 2 * MIB)
        moving = threading.Thread(target=_grow_elsewhere, args=[old])
        moving.start()
        while f"{ELSEWHERE:x}-" not in Path("/proc/self/maps").read_text():
            pass
        # The thread waits for pages to be populated, which come only after a while, and tells of the move after that.
        pid = _in_child(lambda: expect(ELSEWHERE, MIB // PAGE_SIZE, old))
        moving.join()
        expect(ELSEWHERE, MIB // PAGE_SIZE, old)
        assert os.waitpid(pid, 0)[1] == 0
        expect(BASE, (SIZE - MIB) // PAGE_SIZE, BASE)

    run(program, background)


def _grow_elsewhere(old: int) -> None:
    arguments = old, MIB, MIB + 2 * PAGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, ELSEWHERE
    ctypes.CDLL(None).syscall(*(ctypes.c_long(each) for each in (SYS_MREMAP, *arguments)))


def test_threads_that_move_memory_about_see_only_their_own_pages() -> None:
    parts = 8
    part = SIZE // parts

    def move_about(number: int, failures: list[str]) -> None:
        at, source = BASE + number * part, BASE + number * part
        try:
            for round_ in range(6):
                to = ELSEWHERE + (number * 16 + round_) * MIB
                mremap(at, part, part, to)
                at = to
                expect(at + round_ * 16 * PAGE_SIZE, 16, source + round_ * 16 * PAGE_SIZE)
            expect(at, part // PAGE_SIZE, source)
        except BaseException as error:
            failures.append(repr(error))

    def program() -> None:
        failures: list[str] = []
        threads = [threading.Thread(target=move_about, args=(number, failures)) for number in range(parts)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert not failures, failures

    run(program, Background("eager"))


def test_a_process_that_is_gone_lacks_nothing() -> None:
    with PagePath([REGION], lambda: os.kill(os.getpid(), 9), Background("off")) as path:
        path.resume()
        stats = path.report("drained")
        assert stats["bytes_demand"] == 0


def test_exec_ends_the_need_for_pages() -> None:
    with PagePath([REGION], lambda: os.execv("/bin/sleep", ["sleep", "100"]), Background("off")) as path:
        path.resume()
        path.report("drained")


def _unmaps_and_waits(unmapped: bool) -> tuple[int, int]:
    """A child with lazy memory at BASE, and its userfaultfd; its munmap(2) ends when its event is read."""

    def unmaps() -> None:
        if unmapped:
            syscall("munmap", SYS_MUNMAP, BASE + MIB // 2, MIB // 2)

    return _with_lazy_memory(unmaps)


def test_an_address_space_in_the_middle_of_a_change_does_not_hold_up_the_others_for_ever() -> None:
    lazy = PageRanges.from_pairs([(BASE, BASE + MIB // 4)])
    pages = mmap.mmap(-1, MIB // 4)
    filling = Filling(lambda mm: None)
    children = [_unmaps_and_waits(unmapped) for unmapped in (True, False)]
    try:
        changing, calm = children
        while not select.select([changing[1]], [], [], 1)[0]:
            pass
        for _, uffd in children:
            filling.adopt(uffd, AddressSpace(0, lazy))
        assert not filling.fill(0, BASE, 1, address_of(pages), Cause.BULK)
        assert [mm.residency.absent_pages for mm in filling.mms.values()] == [64, 63]
        assert not filling.others_wait()
        time.sleep(0.1)
        assert filling.mms[changing[1]].stuck
        assert not filling.mms[calm[1]].stuck
        assert filling.others_wait()
        filling.fill(0, BASE, 64, address_of(pages), Cause.BULK)
        assert filling.incomplete == {filling.mms[changing[1]]}
        assert not filling.others_wait()
        assert uffdio.read_messages(changing[1])
        filling.mms[changing[1]].end_stall()
        while not filling.fill(0, BASE, 64, address_of(pages), Cause.BULK):
            pass
        assert not filling.incomplete
    finally:
        for pid, uffd in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(uffd)


def test_the_kernel_is_asked_about_what_may_have_been_unmapped_before_it_came() -> None:
    there, elsewhere = BASE, BASE + MIB
    old = [BASE - 8 * MIB, BASE - 4 * MIB, there - PAGE_SIZE, elsewhere + PAGE_SIZE]
    residency = AddressSpace(0, PageRanges.from_pairs((place, place + PAGE_SIZE) for place in old))
    pid, uffd = _unmaps_and_waits(False)
    try:
        filling = Filling(lambda mm: None)
        filling.adopt(uffd, residency)
        for place, new in zip(old, (there, elsewhere), strict=False):
            residency.remap(place, new, PAGE_SIZE)
            residency.unmap(place, place + PAGE_SIZE)
        residency.unmap(there - PAGE_SIZE, there + PAGE_SIZE)
        residency.unmap(elsewhere, elsewhere + 2 * PAGE_SIZE)
        assert residency.absent_pages == 2
        assert filling.settled(filling.mms[uffd])
        assert residency.absent_pages == 1
        assert residency.lookup(there) == 0
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(uffd)


def _never_wakes(path: PagePath) -> None:
    reason = path.report("lost")["reason"]
    assert reason
    # The reader stays blocked: no answer, and no zeros.
    assert not select.select([path._control], [], [], 0.2)[0]
    handler = path.pids["handler"]
    assert os.waitpid(handler, os.WNOHANG) == (0, 0)


def test_readers_stay_blocked_when_the_demand_channel_is_lost() -> None:
    with PagePath([REGION], lambda: expect(BASE + MIB, 1, BASE + MIB), Background("off")) as path:
        path.kill("server")
        path.resume()
        _never_wakes(path)


def test_readers_stay_blocked_when_the_source_process_is_lost() -> None:
    with PagePath([REGION], lambda: expect(BASE + MIB, 1, BASE + MIB), Background("off")) as path:
        path.kill("source")
        path.resume()
        _never_wakes(path)
        assert "ESRCH" in path.messages[-1]["reason"]


def test_loss_of_the_bulk_stream_is_told() -> None:
    with PagePath([REGION], lambda: expect(BASE + MIB, 1, BASE + MIB), Background("off")) as path:
        path.kill("streamer")
        assert "bulk channel" in path.report("lost")["reason"]


def test_malformed_requests_end_the_server_with_a_reason() -> None:
    here, there = socket.socketpair()
    here.sendall(b"\xff" * wire.HEADER_SIZE)
    with pytest.raises(ProtocolError):
        serve_demand(there, {}, Board())
    header = wire.parse_answer(here.recv(wire.HEADER_SIZE))
    assert header.kind == wire.FAILED
    assert "kind" in wire.reason_of(here.recv(header.length))


def test_a_page_that_cannot_be_read_is_an_error_that_names_the_errno() -> None:
    with pytest.raises(DumpError, match=r"EFAULT|EIO"):
        FrozenProcess(os.getpid()).read_into(PAGE_SIZE, memoryview(bytearray(PAGE_SIZE)))


def test_quantiles_are_close() -> None:
    histogram = LatencyHistogram()
    for duration in range(1, 100_001):
        histogram.add(duration)
    for part in (0.01, 0.5, 0.99):
        assert abs(histogram.quantile(part) - part * 100_000) <= 0.07 * part * 100_000
    assert histogram.quantile(1.0) == histogram.longest == 100_000
