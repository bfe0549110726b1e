"""The page path between real processes, over loopback: a source, a destination, and the four processes between them.

``python -m tests.benchmarks.page_path`` touches 1 GiB and prints what the touching process saw, beside the limits of
this machine.
"""

import argparse
import json
import mmap
import os
import pickle
import random
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import msgpack

from postcopy.dump_side.page_source import FrozenProcess
from postcopy.dump_side.serve import Board, serve_demand, stream_bulk
from postcopy.kernel import userfaultfd as uffdio
from postcopy.kernel._libc import ffi
from postcopy.kernel.libc import syscall
from postcopy.kernel.page import PAGE_SIZE
from postcopy.page_ranges import PageRange, PageRanges
from postcopy.restore_side.bulk_receiver import receive_bulk
from postcopy.restore_side.fault_handler import Background, FaultHandler, HandedSpace
from postcopy.restore_side.ring import Ring

BASE = 0x6100_0000_0000
SPACE = 7
FEATURES = (
    uffdio.UFFD_FEATURE_EVENT_FORK
    | uffdio.UFFD_FEATURE_EVENT_REMAP
    | uffdio.UFFD_FEATURE_EVENT_REMOVE
    | uffdio.UFFD_FEATURE_EVENT_UNMAP
)
SYS_MMAP, SYS_MPROTECT, SYS_MUNMAP, SYS_MREMAP, SYS_MADVISE = 9, 10, 11, 25, 28
MAP_FIXED_NOREPLACE = 0x100000


def memory(address: int, length: int) -> Any:
    """Mapped memory of this process as something that can be read and assigned."""
    return memoryview(ffi.buffer(ffi.cast("char *", address), length)).cast("B")


def content(source_address: int) -> bytes:
    """What the source has in the page at this address."""
    return struct.pack("<QQ", source_address, ~source_address & (1 << 64) - 1) * (PAGE_SIZE // 16)


def map_memory(start: int, length: int) -> None:
    """Private anonymous memory at a fixed address."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    syscall("mmap", SYS_MMAP, start, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)


class PagePath:
    """Source and destination of ``mapped`` ranges, of which the source has the pages ``lazy``.

    ``program`` runs in the destination once the handler runs; what it returns is the answer of `result`. Leaving the
    scope ends every process.
    """

    def __init__(
        self,
        mapped: Sequence[PageRange],
        program: Callable[[], Any],
        background: Background,
        lazy: PageRanges | None = None,
        plan: PageRanges | None = None,
    ) -> None:
        self.lazy = PageRanges.from_pairs((each.start, each.end) for each in mapped) if lazy is None else lazy
        self.plan = self.lazy if plan is None else plan
        self._mapped = mapped
        self._program = program
        self._background = background
        self._descriptors: set[int] = set()
        self.pids: dict[str, int] = {}
        # Peak resident memory of the processes that have been ended.
        self.peak_kib: dict[str, int] = {}
        # Their user and system time.
        self.cpu_seconds: dict[str, tuple[float, float]] = {}
        self.forked: list[int] = []
        self.forks = 0
        self._reported = 0
        self.messages: list[dict[str, Any]] = []

    def __enter__(self) -> "PagePath":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # The handler last: when it ends, the threads that it has left blocked would go on with zeros.
        for name in sorted(self.pids, key=lambda each: each == "handler"):
            self.kill(name)
        for fd in (*self._descriptors, *self.forked):
            with suppress(OSError):
                os.close(fd)

    def kill(self, name: str) -> None:
        """End one of the processes by SIGKILL."""
        pid = self.pids.pop(name)
        os.kill(pid, signal.SIGKILL)
        usage = os.wait4(pid, 0)[2]
        self.peak_kib[name] = usage.ru_maxrss
        self.cpu_seconds[name] = (round(usage.ru_utime, 2), round(usage.ru_stime, 2))

    def _pair(self, kind: int = socket.SOCK_STREAM) -> tuple[socket.socket, socket.socket]:
        pair = socket.socketpair(socket.AF_UNIX, kind)
        self._descriptors.update(each.fileno() for each in pair)
        return pair

    def _connection(self) -> tuple[socket.socket, socket.socket]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            here = socket.create_connection(server.getsockname())
            there, _ = server.accept()
        for each in (here, there):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._descriptors.add(each.fileno())
        return here, there

    def _spawn(self, name: str, body: Callable[[], object], keep: set[int]) -> None:
        pid = os.fork()
        if pid:
            self.pids[name] = pid
            return
        status = 1
        try:
            for fd in self._descriptors - keep:
                os.close(fd)
            body()
            status = 0
        finally:
            os._exit(status)

    def _start(self) -> None:
        ready, ready_child = self._pair()
        self._spawn("source", lambda: self._source(ready_child), {ready_child.fileno()})
        self._control, control_child = self._pair()
        self._spawn("destination", lambda: self._destination(control_child), {control_child.fileno()})
        assert ready.recv(1) == b"r"
        _, fds, _, _ = socket.recv_fds(self._control, 1, 1)
        uffd = fds[0]
        demand, demand_source = self._connection()
        bulk, bulk_source = self._connection()
        self.reports, reports_child = self._pair(socket.SOCK_SEQPACKET)
        board, ring = Board(), Ring()
        sources = {SPACE: FrozenProcess(self.pids["source"])}
        plan = {SPACE: self.plan}
        self._uffd = uffd
        self._descriptors.add(uffd)
        pidfd = os.pidfd_open(self.pids["destination"])
        self._descriptors.add(pidfd)
        self.board = board
        handed = [HandedSpace(SPACE, uffd, self.lazy)]
        handler = FaultHandler(handed, demand, ring, reports_child, self._background, [pidfd])
        self._spawn("server", lambda: serve_demand(demand_source, sources, board), {demand_source.fileno()})
        self._spawn("streamer", lambda: stream_bulk(bulk_source, plan, sources, board), {bulk_source.fileno()})
        self._spawn("receiver", lambda: receive_bulk(bulk, ring), {bulk.fileno()})
        self._spawn("handler", handler.run, {demand.fileno(), reports_child.fileno(), uffd, pidfd})
        for each in (ready, ready_child, control_child, demand, demand_source, bulk, bulk_source, reports_child):
            self._descriptors.discard(each.fileno())
            each.close()

    def _source(self, ready: socket.socket) -> None:
        for each in self._mapped:
            map_memory(each.start, each.end - each.start)
        for each in self.lazy:
            written = memory(each.start, each.end - each.start)
            for at in range(0, len(written), PAGE_SIZE):
                written[at : at + PAGE_SIZE] = content(each.start + at)
        ready.send(b"r")
        signal.pause()

    def _destination(self, control: socket.socket) -> None:
        uffd = uffdio.userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK)
        uffdio.api(uffd, FEATURES)
        for each in self._mapped:
            map_memory(each.start, each.end - each.start)
            uffdio.register(uffd, each.start, each.end - each.start, uffdio.UFFDIO_REGISTER_MODE_MISSING)
        socket.send_fds(control, [b"u"], [uffd])
        os.close(uffd)
        assert control.recv(1) == b"g"
        try:
            answer = (True, self._program())
        except BaseException as error:
            answer = (False, repr(error))
        control.sendall(pickle.dumps(answer))
        control.shutdown(socket.SHUT_WR)
        control.recv(1)

    def resume(self) -> None:
        """Let the program of the destination run."""
        self._control.sendall(b"g")

    def result(self) -> Any:
        """What the program returned; raises AssertionError if it raised."""
        received = bytearray()
        while True:
            drained = any(message["event"] == "drained" for message in self.messages[-1:])
            ready, _, _ = select.select([self._control] if drained else [self._control, self.reports], [], [])
            if self.reports in ready:
                self._receive_report()
            if self._control in ready:
                part = self._control.recv(1 << 20)
                if not part:
                    break
                received += part
        ok, answer = pickle.loads(bytes(received))
        assert ok, answer
        return answer

    def report(self, *events: str) -> dict[str, Any]:
        """The next report of one of these kinds."""
        while True:
            while self._reported < len(self.messages):
                message = self.messages[self._reported]
                self._reported += 1
                if message["event"] in events:
                    return message
            self._receive_report()

    def _receive_report(self) -> None:
        packed, fds, _, _ = socket.recv_fds(self.reports, 4096, 1)
        assert packed, "the handler has ended"
        self.messages.append(msgpack.unpackb(packed))
        self.forked += fds
        if self.messages[-1]["event"] == "drained":
            # As a watchdog would: while anybody holds a userfaultfd open, faults and layout changes wait for a reader.
            for fd in (self._uffd, *self.forked):
                os.close(fd)
            self._descriptors.discard(self._uffd)
            self.forks = len(self.forked)
            self.forked.clear()


def _touch(start: int, order: Sequence[int]) -> dict[str, float]:
    """Read a byte of each page, in this order; a touch of more than 5 us has been a fault."""
    view = memory(start, len(order) * PAGE_SIZE)
    clock = time.perf_counter_ns
    times = []
    begun = clock()
    for page in order:
        before = clock()
        view[page * PAGE_SIZE]
        taken = clock() - before
        if taken > 5000:
            times.append(taken)
    total = clock() - begun
    times.sort()
    figures: dict[str, float] = {"seconds": round(total / 1e9, 3), "faults": len(times)}
    for name, part in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("max", 1)):
        figures[name] = round(times[min(int(part * len(times)), len(times) - 1)] / 1000, 1) if times else 0
    return figures


def touching(size: int, pattern: str, background: Background, stride: int = 1) -> dict[str, Any]:
    """Touch ``size`` bytes right after resume, and what that took: seconds, and microseconds a fault."""
    region = PageRange(BASE, BASE + size)
    order = list(range(size // PAGE_SIZE))
    if pattern == "random":
        random.Random(1).shuffle(order)
    if pattern == "none":
        order = order[:1]
    with PagePath([region], lambda: _touch(BASE, order), background) as path:
        path.resume()
        begun = time.perf_counter()
        figures: dict[str, Any] = dict(path.result())
        drained = path.report("drained")
        figures["drained_seconds"] = round(time.perf_counter() - begun, 3)
        figures["handler"] = drained
    figures["peak_kib"] = path.peak_kib
    figures["cpu_seconds"] = path.cpu_seconds
    return figures


def main() -> None:
    """Print the figures."""
    from tests.benchmarks import limits

    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patterns", default="random,sequential")
    parser.add_argument("--modes", default="eager")
    parser.add_argument("--limits", action="store_true")
    options = parser.parse_args()
    if options.limits:
        print("pump", json.dumps(limits.pump(options.mib << 20)))
        print("bare fault", json.dumps(limits.bare_fault()))
    for mode in options.modes.split(","):
        for pattern in options.patterns.split(","):
            for _ in range(options.rounds):
                figures = touching(options.mib << 20, pattern, Background(mode))
                print(mode, pattern, json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
