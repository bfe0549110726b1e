"""A program that notices whatever happens to it, and writes it down.

Threads compute in registers and in memory and compare every result; pages are checked and changed at random; signals,
handlers, masks and an interval timer must stay as they are. Each tick of the main thread appends a record to the log:
a number, one more than the last, and the host it runs on. So a second copy of the program would show by numbers that
stand there twice, and a program that is gone by the numbers that no longer come. What is found wrong is a record too,
and then the program ends.
"""

import argparse
import hashlib
import mmap
import os
import random
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TICK_SECONDS = 0.001
PAUSE_SECONDS = 0.002  # else they would keep two processors busy
PAGES_A_TICK = 4
_WORD = struct.Struct("=Q")
_RECORD = struct.Struct("=Q24s32s")
_MASKED = {signal.SIGUSR2, signal.SIGHUP}


@dataclass(frozen=True)
class Record:
    """One line of the log; ``wrong`` is empty in all but the last."""

    number: int
    host: str
    wrong: str


def records(log: Path) -> list[Record]:
    """What has been written so far."""
    content = log.read_bytes() if log.exists() else b""
    whole = len(content) // _RECORD.size * _RECORD.size
    return [
        Record(number, host.rstrip(b"\0").decode(), wrong.rstrip(b"\0").decode())
        for number, host, wrong in _RECORD.iter_unpack(content[:whole])
    ]


class Wrong(Exception):
    """A check has failed."""


class Pages:
    """Memory of which every page holds its number and that of its last change, all over."""

    def __init__(self, count: int) -> None:
        self._memory = mmap.mmap(-1, count * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._changes = [0] * count
        self._choose = random.Random(5)
        for page in range(count):
            self._write(page)

    def _content(self, page: int) -> bytes:
        return _WORD.pack(page << 32 | self._changes[page] | 1 << 31) * (mmap.PAGESIZE // _WORD.size)

    def _write(self, page: int) -> None:
        self._memory[page * mmap.PAGESIZE : (page + 1) * mmap.PAGESIZE] = self._content(page)

    def check(self, page: int) -> None:
        """Compare a page."""
        found = self._memory[page * mmap.PAGESIZE : (page + 1) * mmap.PAGESIZE]
        if found != self._content(page):
            raise Wrong("a page of zeros" if not any(found) else "a wrong page")

    def tick(self) -> None:
        """Check some pages and change them."""
        for _ in range(PAGES_A_TICK):
            page = self._choose.randrange(len(self._changes))
            self.check(page)
            self._changes[page] += 1
            self._write(page)

    def check_all(self) -> None:
        """Compare every page."""
        for page in range(len(self._changes)):
            self.check(page)


def compute_in_vector_registers() -> Callable[[], None]:
    """SHA-256 of a constant, in C and without the interpreter's lock."""
    constant = bytes(range(256)) * 1024
    digest = hashlib.sha256(constant).digest()

    def check() -> None:
        if hashlib.sha256(constant).digest() != digest:
            raise Wrong("a wrong SHA-256")

    return check


def compute_in_float_registers() -> Callable[[], None]:
    """The logistic map: the smallest error anywhere grows until it is seen."""

    def orbit() -> float:
        x = 0.3
        for _ in range(2000):
            x = 3.9 * x * (1.0 - x)
        return x

    expected = orbit()

    def check() -> None:
        if orbit() != expected:
            raise Wrong("a wrong floating-point result")

    return check


def sleep_in_the_kernel() -> Callable[[], None]:
    """Calls that a stop interrupts and that have to be restarted."""
    never = threading.Event()
    read_end, write_end = os.pipe()

    def check() -> None:
        began = time.monotonic()
        if never.wait(0.01):
            raise Wrong("an event that nobody has set")
        time.sleep(0.01)
        if time.monotonic() - began < 0.02:
            raise Wrong("a sleep that was too short")
        os.write(write_end, b"x")
        if os.read(read_end, 10) != b"x":
            raise Wrong("something else in the pipe")

    return check


class Signals:
    """A handler that an interval timer calls, and signals that are blocked."""

    def __init__(self) -> None:
        self.alarms = 0
        signal.pthread_sigmask(signal.SIG_BLOCK, _MASKED)
        signal.signal(signal.SIGALRM, self._ring)
        signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)

    def _ring(self, number: int, frame: object) -> None:
        self.alarms += 1

    def check(self) -> None:
        """That nothing has changed, in the thread that calls."""
        if signal.pthread_sigmask(signal.SIG_BLOCK, []) != _MASKED:
            raise Wrong("another signal mask")
        if signal.getitimer(signal.ITIMER_REAL)[1] != 0.005:
            raise Wrong("another interval timer")
        if signal.sigpending():
            raise Wrong("a pending signal")


class Witness:
    """The program."""

    def __init__(self, log: Path, pages: int, pause: float) -> None:
        """``pause``: seconds between two ticks."""
        self._pause = pause
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._pages = Pages(pages)
        self._signals = Signals()
        self._number = 0
        self._wrong = ""

    def start(self, check: Callable[[], None]) -> None:
        """Repeat a check in a thread of its own."""

        def body() -> None:
            try:
                while True:
                    check()
                    self._signals.check()
                    time.sleep(PAUSE_SECONDS)
            except Wrong as wrong:
                self._wrong = str(wrong)

        threading.Thread(target=body, daemon=True).start()

    def run(self) -> int:
        """Tick until SIGTERM, then check everything."""
        ended = False

        def end(number: int, frame: object) -> None:
            nonlocal ended
            ended = True

        signal.signal(signal.SIGTERM, end)
        try:
            while not ended and not self._wrong:
                self._pages.tick()
                self._signals.check()
                self._number += 1
                self._record()
                time.sleep(self._pause)
            self._pages.check_all()
        except Wrong as wrong:
            self._wrong = str(wrong)
        # From here on the threads miss the timer.
        found = self._wrong
        # The interpreter takes its handlers away when it ends, and one may be on its way to another thread.
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        if found:
            self._record(found)
        return int(bool(found))

    def _record(self, wrong: str = "") -> None:
        os.write(self._log, _RECORD.pack(self._number, os.uname().nodename.encode(), wrong.encode()))


def main() -> int:
    """Start the threads and tick."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--megabytes", type=int, default=4)
    parser.add_argument("--alone", action="store_true", help="one of many programs: fewer threads, fewer ticks")
    parser.add_argument("--few", action="store_true", help="fewer threads")
    options = parser.parse_args()
    pause = 0.02 if options.alone else TICK_SECONDS
    witness = Witness(options.log, (options.megabytes << 20) // mmap.PAGESIZE, pause)
    witness.start(sleep_in_the_kernel())
    if options.alone or options.few:
        return witness.run()
    witness.start(compute_in_vector_registers())
    witness.start(compute_in_float_registers())
    return witness.run()


if __name__ == "__main__":
    sys.exit(main())
