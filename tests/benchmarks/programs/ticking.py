"""Reads the clock about every 0.1 ms and notes each gap, with the host it ended on, until SIGTERM.

``ticking.py MIB READY RESULT [files|connections|forks|programs COUNT WHERE]``: holds MIB of memory, and if told so
descriptors: of COUNT files that it makes in the directory WHERE, or of COUNT connections that it accepts at the address
WHERE, port 7300; or children, so that they are COUNT processes: copies of itself, or sleep(1). Makes the file READY,
writes RESULT (JSON) at the end. In between it opens nothing and writes nothing but memory. It ends with 0 if memory,
descriptors and children are then as they were.
"""

import gc
import json
import mmap
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

STEP = 0.0001
# Nanoseconds. Shorter gaps are steps.
SHORTEST = 500_000


PORT = 7300


def hold(kind: str, count: int, where: str) -> Callable[[], bool]:
    """Open what it is to have open; what tells later whether it is as it was."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if kind == "files":
        files = []
        for number in range(count):
            path = Path(where, str(number))
            path.write_bytes(b"%08d" % number)
            files.append(os.open(path, os.O_RDWR))
            os.lseek(files[-1], 4, os.SEEK_SET)
        return lambda: all(os.read(file, 8) == b"%04d" % (number % 10_000) for number, file in enumerate(files))
    if kind in ("forks", "programs"):
        return lead(count - 1, kind == "forks")
    listener = socket.create_server((where, PORT), backlog=count)
    accepted = [listener.accept()[0] for _ in range(count)]
    return lambda: all(each.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) == b"x" for each in accepted)


def lead(count: int, copies: bool) -> Callable[[], bool]:
    """Have so many children; what ends them, and tells whether they were there until then."""
    children = []
    for _ in range(count):
        child = os.fork() if copies else os.posix_spawnp("sleep", ["sleep", "1000000"], os.environ)
        if not child:
            signal.pause()
        children.append(child)

    def end() -> bool:
        for each in children:
            os.kill(each, signal.SIGKILL)
        return all(os.waitpid(each, 0)[1] == signal.SIGKILL for each in children)

    return end


def main() -> None:
    """Fill, tick, tell."""
    size, ready, result = int(sys.argv[1]) << 20, Path(sys.argv[2]), Path(sys.argv[3])
    holds = hold(sys.argv[4], int(sys.argv[5]), sys.argv[6]) if len(sys.argv) > 4 else lambda: True
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page = os.urandom(mmap.PAGESIZE)
    for at in range(0, size, mmap.PAGESIZE):
        memory[at : at + mmap.PAGESIZE] = page
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    clock, sleep = time.monotonic_ns, time.sleep
    gaps: list[tuple[int, str]] = []
    ticks = 0
    gc.disable()
    ready.touch()
    last = clock()
    while not stopped:
        sleep(STEP)
        now = clock()
        if now - last > SHORTEST:
            gaps.append((now - last, os.uname().nodename))
        last = now
        ticks += 1
    complete = all(memory[at : at + mmap.PAGESIZE] == page for at in range(0, size, mmap.PAGESIZE)) and holds()
    result.write_text(json.dumps({"ticks": ticks, "gaps": gaps, "complete": complete}))
    sys.exit(not complete)


if __name__ == "__main__":
    main()
