"""The program of `make demo`: counts, in and over a lot of memory, and says where and how it goes.

Every page holds the number of its last change. Each tick changes one page and checks another; a line every third of
a second says on which host it runs, and the longest time it stood still since the line before. At SIGTERM it checks
every page and ends with 0 if all are right.
"""

import argparse
import mmap
import os
import random
import signal
import struct
import sys
import time

LINE_EVERY = 0.33
PAGE = mmap.PAGESIZE
WORD = struct.Struct("=Q")


def main() -> int:
    """Fill, count until SIGTERM, check everything."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=256)
    options = parser.parse_args()
    pages = (options.megabytes << 20) // PAGE

    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    choose = random.Random(1)
    memory = bytearray(pages * PAGE)
    for page in range(pages):
        memory[page * PAGE : (page + 1) * PAGE] = WORD.pack(page) * (PAGE // WORD.size)
    changed = list(range(pages))

    def is_right(page: int) -> bool:
        return (
            WORD.unpack_from(memory, page * PAGE)
            == WORD.unpack_from(memory, (page + 1) * PAGE - WORD.size)
            == (changed[page],)
        )

    count = pages
    wrong = 0
    longest = 0.0
    last = line = time.monotonic()
    while not stopped:
        page = choose.randrange(pages)
        count += 1
        changed[page] = count
        memory[page * PAGE : (page + 1) * PAGE] = WORD.pack(count) * (PAGE // WORD.size)
        wrong += not is_right(choose.randrange(pages))
        time.sleep(0.0005)
        now = time.monotonic()
        longest = max(longest, now - last)
        last = now
        if now - line >= LINE_EVERY:
            print(
                f"PID {os.getpid()} on {os.uname().nodename}: count {count - pages:6}, {options.megabytes} MiB,"
                f" {wrong} wrong pages, longest gap {longest * 1000:5.1f} ms",
                flush=True,
            )
            line, longest = now, 0.0
    wrong += sum(not is_right(page) for page in range(pages))
    print(f"PID {os.getpid()} on {os.uname().nodename}: checked all {pages} pages, {wrong} wrong", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
