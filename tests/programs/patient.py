"""A program that does nothing until it is told, and touches nothing meanwhile: what has come has been asked for.

Its memory is an area of pages that hold their number. SIGUSR1: it checks the next ``A_FEW`` pages, none of them beside
another; SIGUSR2: all. To each it answers with a line in its log: what it has checked, and which were wrong. The first
line is the address of the area. Queued real-time signals and SIGHUP are counted; SIGTERM ends it with a last line that
says how often each has come.
"""

import argparse
import ctypes
import mmap
import os
import signal
import struct
import sys
from collections import Counter
from pathlib import Path

PAGE = mmap.PAGESIZE
A_FEW = 20
STRIDE = 16
COUNTED = {signal.SIGHUP, signal.SIGRTMIN, signal.SIGRTMIN + 1}
_TOLD = {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM}
_WORD = struct.Struct("=Q")


def content(page: int) -> bytes:
    """What a page holds."""
    return _WORD.pack(page + 1) * (PAGE // _WORD.size)


def lines(log: Path) -> list[str]:
    """The answers so far."""
    return log.read_text().split("\n")[:-1] if log.exists() else []


def main() -> int:
    """Fill, then do as told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--log", required=True)
    parser.add_argument("--megabytes", type=int, default=16)
    options = parser.parse_args()
    pages = (options.megabytes << 20) // PAGE
    log = os.open(options.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def say(text: str) -> None:
        os.write(log, f"{text}\n".encode())

    signal.pthread_sigmask(signal.SIG_BLOCK, COUNTED | _TOLD)
    memory = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(pages):
        memory[page * PAGE : (page + 1) * PAGE] = content(page)

    def wrong(page: int) -> bool:
        return memory[page * PAGE : (page + 1) * PAGE] != content(page)

    counts: Counter[int] = Counter()
    next_page = 0
    say(str(ctypes.addressof(ctypes.c_char.from_buffer(memory))))
    while (told := signal.sigwait(COUNTED | _TOLD)) != signal.SIGTERM:
        if told in COUNTED:
            counts[told] += 1
            continue
        last = min(next_page + A_FEW * STRIDE, pages)
        chosen = range(next_page, last, STRIDE) if told == signal.SIGUSR1 else range(pages)
        next_page = last
        say(f"checked {len(chosen)}, wrong {[page for page in chosen if wrong(page)]}")
    # SIGTERM overtakes those of higher numbers (signal(7)).
    while more := signal.sigtimedwait(COUNTED, 0):
        counts[more.si_signo] += 1
    say(" ".join(f"{int(number)}:{counts[number]}" for number in sorted(COUNTED)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
