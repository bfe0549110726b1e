"""Touches each page of its memory once, as soon as it finds itself on another host, and times it.

``touching.py MIB ORDER READY RESULT``: ORDER is ``random`` or ``sequential``. Makes the file READY when it is prepared.
After the touching it waits for SIGUSR1 (every page is in), touches everything again for the cost of the loop itself,
checks every byte, and writes RESULT (JSON).
"""

import array
import gc
import json
import mmap
import os
import random
import signal
import sys
import time
import zlib
from pathlib import Path
from typing import Any

# A touch of more nanoseconds than this has been a fault (or a loss of the processor).
FAULT = 5_000


def touch(memory: mmap.mmap, order: "array.array[int]") -> "tuple[int, list[int]]":
    """Nanoseconds that touching took in all, and each touch that was a fault."""
    clock = time.perf_counter_ns
    times: list[int] = []
    note = times.append
    begun = clock()
    for at in order:
        before = clock()
        memory[at]
        taken = clock() - before
        if taken > FAULT:
            note(taken)
    return clock() - begun, times


def percentiles(times: list[int]) -> dict[str, float]:
    """Of these nanoseconds, in microseconds."""
    times = sorted(times) or [0]
    parts = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
    return {name: times[min(int(part * len(times)), len(times) - 1)] / 1e3 for name, part in parts.items()}


def main() -> None:
    """Fill, wait for the move, touch, tell."""
    size, pattern, ready, result = int(sys.argv[1]) << 20, sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page = os.urandom(mmap.PAGESIZE - 8)
    for at in range(0, size, mmap.PAGESIZE):
        memory[at : at + mmap.PAGESIZE] = at.to_bytes(8, "little") + page
    checksum = zlib.crc32(memory)
    order = array.array("Q", range(0, size, mmap.PAGESIZE))
    if pattern == "random":
        random.Random(1).shuffle(order)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    gc.disable()
    hostname = os.uname
    home = hostname().nodename
    ready.touch()
    while hostname().nodename == home:
        pass
    total, times = touch(memory, order)
    signal.sigwait({signal.SIGUSR1})
    loop, noise = touch(memory, order)
    figures: dict[str, Any] = {
        "seconds": total / 1e9,
        "loop_seconds": loop / 1e9,
        "faults": len(times),
        "faults_of_loop": len(noise),
        "complete": zlib.crc32(memory) == checksum,
        **percentiles(times),
    }
    result.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
