"""What this machine can do at best: the limits that the page path is measured against.

``python -m tests.benchmarks.limits`` prints them.
"""

import json
import mmap
import os
import signal
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from postcopy.kernel import userfaultfd as uffdio
from postcopy.kernel.libc import address_of
from postcopy.kernel.page import PAGE_SIZE
from postcopy.kernel.process_vm import process_vm_readv

_REQUEST = struct.Struct("<Q")


def _anonymous(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _child(body: Callable[[], object]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        body()
        status = 0
    finally:
        os._exit(status)


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _connection() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        there, _ = server.accept()
    for each in (here, there):
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return here, there


def _registered(size: int) -> tuple[int, int, int]:
    """A process with ``size`` bytes of missing memory: (its pid, its userfaultfd, the address)."""
    here, there = socket.socketpair()

    def body() -> None:
        region = _anonymous(size)
        uffd = uffdio.userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK)
        uffdio.api(uffd, 0)
        uffdio.register(uffd, address_of(region), size, uffdio.UFFDIO_REGISTER_MODE_MISSING)
        socket.send_fds(there, [_REQUEST.pack(address_of(region))], [uffd])
        signal.pause()

    pid = _child(body)
    packed, fds, _, _ = socket.recv_fds(here, _REQUEST.size, 1)
    here.close()
    there.close()
    return pid, fds[0], _REQUEST.unpack(packed)[0]


def _pump_once(pid: int, source: int, size: int, piece: int) -> float:
    # In this order: a target that had inherited the connection would keep it open.
    target, uffd, address = _registered(size)
    here, there = _connection()

    def send() -> None:
        buffer = memoryview(bytearray(piece))
        here.close()
        for at in range(0, size, piece):
            process_vm_readv(pid, source + at, buffer)
            there.sendall(buffer)
        there.recv(1)

    begun = time.perf_counter()
    sender = _child(send)
    there.close()
    buffer = _anonymous(piece)
    view = memoryview(buffer)
    data = address_of(buffer)
    for at in range(0, size, piece):
        have = 0
        while have < piece:
            have += here.recv_into(view[have:])
        done = 0
        while done < piece:
            done += uffdio.copy(uffd, address + at + done, data + done, piece - done)
    seconds = time.perf_counter() - begun
    here.close()
    os.waitpid(sender, 0)
    os.close(uffd)
    _end(target)
    return seconds


def pump(size: int = 1 << 30, rounds: int = 3) -> dict[str, Any]:
    """The same bytes by process_vm_readv, one TCP stream over loopback and UFFDIO_COPY, while nothing touches them.

    One process at each end; pieces of 64 KiB to 4 MiB, the best of ``rounds`` each.
    """
    here, there = socket.socketpair()

    def body() -> None:
        region = _anonymous(size)
        page = os.urandom(PAGE_SIZE)
        for at in range(0, size, PAGE_SIZE):
            region[at : at + PAGE_SIZE] = page
        there.send(_REQUEST.pack(address_of(region)))
        signal.pause()

    pid = _child(body)
    source = _REQUEST.unpack(here.recv(_REQUEST.size))[0]
    pieces = [1 << shift for shift in range(16, 23)]
    seconds = {piece: min(_pump_once(pid, source, size, piece) for _ in range(rounds)) for piece in pieces}
    _end(pid)
    here.close()
    there.close()
    best = min(seconds, key=lambda piece: seconds[piece])
    return {
        "seconds": round(seconds[best], 3),
        "gb_per_second": round(size / seconds[best] / 1e9, 2),
        "best_piece": best,
        "all": {piece >> 10: round(taken, 3) for piece, taken in seconds.items()},
    }


def bare_fault(faults: int = 5000) -> dict[str, float]:
    """A 4 KiB fault over idle loopback TCP with one UFFDIO_COPY; both ends block. Microseconds, as the faulter sees."""
    here, there = _connection()
    results, results_child = socket.socketpair()
    handed, handed_child = socket.socketpair()

    def touch() -> None:
        region = _anonymous(faults * PAGE_SIZE)
        uffd = uffdio.userfaultfd(os.O_CLOEXEC)
        uffdio.api(uffd, 0)
        uffdio.register(uffd, address_of(region), len(region), uffdio.UFFDIO_REGISTER_MODE_MISSING)
        socket.send_fds(handed_child, [b"u"], [uffd])
        handed_child.recv(1)
        times = []
        for at in range(0, len(region), PAGE_SIZE):
            before = time.perf_counter_ns()
            region[at]
            times.append(time.perf_counter_ns() - before)
        times.sort()
        results_child.send(struct.pack("<dd", times[faults // 2] / 1e3, times[faults * 99 // 100] / 1e3))

    def serve() -> None:
        page = b"x" * PAGE_SIZE
        while there.recv(_REQUEST.size):
            there.sendall(page)

    def handle(uffd: int) -> None:
        os.set_blocking(uffd, True)
        buffer = memoryview(bytearray(PAGE_SIZE))
        data = address_of(buffer)
        while True:
            (address,) = struct.unpack_from("=16xQ", os.read(uffd, 32))
            here.send(_REQUEST.pack(address))
            have = 0
            while have < PAGE_SIZE:
                have += here.recv_into(buffer[have:])
            uffdio.copy(uffd, address & -PAGE_SIZE, data, PAGE_SIZE)

    toucher = _child(touch)
    server = _child(serve)
    _, fds, _, _ = socket.recv_fds(handed, 1, 1)
    handler = _child(lambda: handle(fds[0]))
    handed.send(b"g")
    median, p99 = struct.unpack("<dd", results.recv(16))
    os.waitpid(toucher, 0)
    for pid in (server, handler):
        _end(pid)
    os.close(fds[0])
    for each in (here, there, results, results_child, handed, handed_child):
        each.close()
    return {"median_us": round(median, 1), "p99_us": round(p99, 1)}


if __name__ == "__main__":
    print("pump", json.dumps(pump()))
    print("bare fault", json.dumps(bare_fault()))
