"""Reads the clock about every 0.1 ms and notes each gap, with the host it ended on, until SIGTERM.

``ticking.py MIB READY RESULT``: holds MIB of memory, makes the file READY, writes RESULT (JSON) at the end. In between
it opens nothing and writes nothing but memory. It ends with 0 if its memory is then as it was.
"""

import gc
import json
import mmap
import os
import signal
import sys
import time
from pathlib import Path

STEP = 0.0001
# Nanoseconds. Shorter gaps are steps.
SHORTEST = 500_000


def main() -> None:
    """Fill, tick, tell."""
    size, ready, result = int(sys.argv[1]) << 20, Path(sys.argv[2]), Path(sys.argv[3])
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
    complete = all(memory[at : at + mmap.PAGESIZE] == page for at in range(0, size, mmap.PAGESIZE))
    result.write_text(json.dumps({"ticks": ticks, "gaps": gaps, "complete": complete}))
    sys.exit(not complete)


if __name__ == "__main__":
    main()
