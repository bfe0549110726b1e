"""A tree of processes that all count, and check themselves while they do.

Each appends a record ``member number host wrong`` to one log: its place in the tree, its count, the host's name, and
what it found wrong (``-``: nothing). With ``--storm`` every member makes children all the time, which fork, execute a
program, or simply end. SIGTERM ends the root; the others end when their parent has ended.
"""

import argparse
import contextlib
import mmap
import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.programs.cases import libc
from tests.programs.cases.identity import prctl

PR_SET_PDEATHSIG = 1
SYS_GETTID = 186
PAGES = 16
PAUSE = 0.5  # seconds between the rounds of a thread


@dataclass(frozen=True)
class Record:
    """One line of the log."""

    member: int
    number: int
    host: str
    wrong: str


def records(log: Path) -> list[Record]:
    """All complete lines."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [Record(int(m), int(n), h, w) for m, n, h, w in (line.split(" ", 3) for line in lines)]


class Member:
    """One process: what it was when it began."""

    def __init__(self, number: int, log: int, interval: float, threads: int) -> None:
        self._number, self._log, self._interval = number, log, interval
        self._count = 0
        self._memory = mmap.mmap(-1, PAGES * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for page in range(PAGES):
            self._memory[page * mmap.PAGESIZE] = (number + page) % 256
        self._relations = self._look()
        self._wrong: list[str] = []
        self._rounds: dict[int, int] = {}
        for _ in range(threads):
            threading.Thread(target=self._turn, daemon=True).start()
        while len(self._rounds) < threads:
            time.sleep(0.01)
        self._tids = sorted(os.listdir("/proc/self/task"))

    def _turn(self) -> None:
        """A thread that sees whether it is itself."""
        tid = threading.get_native_id()
        self._rounds[tid] = 0
        while True:
            time.sleep(PAUSE)
            self._rounds[tid] += 1
            if libc.syscall(SYS_GETTID) != tid:
                self._wrong.append(f"thread {tid} is {libc.syscall(SYS_GETTID)}")

    def _look(self) -> list[int]:
        # The root's parent is somebody else after a move.
        return [os.getpid(), os.getppid() if self._number else 0, os.getpgid(0), os.getsid(0)]

    def tick(self, children: list[int]) -> None:
        """One record."""
        self._count += 1
        before = dict(self._rounds)
        while any(self._rounds[tid] == rounds for tid, rounds in before.items()):
            time.sleep(0.01)
        wrong, self._wrong = self._wrong, []
        if (tids := sorted(os.listdir("/proc/self/task"))) != self._tids:
            wrong.append(f"had threads {self._tids}, has {tids}")
        if self._look() != self._relations:
            wrong.append(f"was {self._relations}, is {self._look()}")
        page = self._count % PAGES
        if self._memory[page * mmap.PAGESIZE] != (self._number + page) % 256:
            wrong.append(f"page {page} has {self._memory[page * mmap.PAGESIZE]}")
        for child in children:
            try:
                if (found := os.waitpid(child, os.WNOHANG)) != (0, 0):
                    wrong.append(f"child {child} has ended: {found}")
            except ChildProcessError:
                wrong.append(f"{child} is no child any more")
        told = "; ".join(wrong) or "-"
        os.write(self._log, f"{self._number} {self._count} {os.uname().nodename} {told}\n".encode())
        time.sleep(self._interval)


def storm() -> None:
    """Children of each sort, some of which are waited for at once."""
    pids = [os.fork()]
    if not pids[0]:
        if not os.fork():
            time.sleep(0.001)
        os._exit(0)
    pids.append(subprocess.Popen(["/bin/true"]).pid)
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def live(first: int, count: int, width: int, log: int, options: argparse.Namespace) -> None:
    """Be member ``first``, with the members after it, up to ``count`` in all, below."""
    children = []
    rest = count - 1
    at = first + 1
    for left in range(min(width, rest), 0, -1):
        share = -(-rest // left)
        pid = os.fork()
        if not pid:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if first % 3 == 1:
                os.setpgid(0, 0)
            live(at, share, width, log, options)
        children.append(pid)
        at += share
        rest -= share
    member = Member(first, log, options.interval, options.threads)
    while True:
        member.tick(children)
        if options.storm:
            storm()


def main() -> None:
    """Make the tree; each process counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--width", type=int, default=3, help="children of each process")
    parser.add_argument("--interval", type=float, default=0.01, help="seconds between the records of each")
    parser.add_argument("--threads", type=int, default=0, help="of each process, beside the main thread")
    parser.add_argument("--storm", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    log = os.open(options.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    live(0, options.processes, options.width, log, options)


if __name__ == "__main__":
    main()
