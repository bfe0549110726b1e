"""Watches its clocks, in a time namespace of its own where it is told offsets (seconds).

    clocks.py LOG [MONOTONIC BOOTTIME]

Each line of LOG: CLOCK_MONOTONIC and CLOCK_BOOTTIME through the vdso and as system calls, in nanoseconds.
"""

import ctypes
import os
import sys
import time

SYS_CLOCK_GETTIME = 228
CLOCK_BOOTTIME, CLONE_NEWTIME = 7, 0x80

libc = ctypes.CDLL(None, use_errno=True)


def by_call(clock: int) -> int:
    """clock_gettime(2), without the vdso (ns)."""
    where = (ctypes.c_long * 2)()
    libc.syscall(SYS_CLOCK_GETTIME, clock, where)
    return where[0] * 1_000_000_000 + where[1]


if len(sys.argv) > 2:
    if libc.unshare(CLONE_NEWTIME):
        sys.exit(os.strerror(ctypes.get_errno()))
    with open("/proc/self/timens_offsets", "w") as stream:
        stream.write(f"monotonic {sys.argv[2]} 0\nboottime {sys.argv[3]} 0\n")
    # The program that is executed lives in the new namespace.
    os.execv(sys.executable, [sys.executable, sys.argv[0], sys.argv[1]])

with open(sys.argv[1], "a", buffering=1) as log:
    while True:
        clocks = [time.monotonic_ns(), time.clock_gettime_ns(CLOCK_BOOTTIME), by_call(1), by_call(CLOCK_BOOTTIME)]
        log.write(" ".join(map(str, clocks)) + "\n")
        # An absolute sleep: with a clock that went back it would not end.
        time.sleep(0.01)
