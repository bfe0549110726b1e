"""seccomp(2) filters: of all threads, and of one."""

import ctypes
import errno
import struct
import threading
import time
from pathlib import Path

from tests.programs.cases import Case, first_problem, proc_status, required, syscall, unlike

SYS_ACCT, SYS_SWAPOFF, SYS_USTAT, SYS_SECCOMP = 163, 168, 136, 317
SECCOMP_SET_MODE_FILTER, FLAG_TSYNC, FLAG_LOG = 1, 1, 2
RET_ALLOW, RET_ERRNO = 0x7FFF0000, 0x00050000
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06


def refuse(number: int, error: int, flags: int = 0) -> None:
    """Add a filter by which system call ``number`` fails with ``error``."""
    lines = [
        (LOAD, 0, 0, 0),
        (JUMP_IF_EQUAL, 0, 1, number),
        (RETURN, 0, 0, RET_ERRNO | error),
        (RETURN, 0, 0, RET_ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
    program = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", len(lines), ctypes.addressof(code)))
    made = required(syscall(SYS_SECCOMP, SECCOMP_SET_MODE_FILTER, flags, ctypes.addressof(program)), "seccomp")
    if made:
        raise OSError(errno.EBUSY, f"thread {made} has another filter, and cannot be synchronized")


def outcomes() -> dict[int, int]:
    """What calls answer that nobody else makes: each fails even without a filter, but otherwise."""
    return {number: syscall(number, 1, 1) for number in (SYS_ACCT, SYS_SWAPOFF, SYS_USTAT)}


class SeccompFilters(Case):
    """Two filters that all threads share, and two more, in order, of a thread of its own."""

    def setup(self) -> None:
        """The shared ones by TSYNC; then a thread adds its own."""
        refuse(SYS_ACCT, 71, FLAG_TSYNC | FLAG_LOG)
        refuse(SYS_SWAPOFF, 72, FLAG_TSYNC)
        self.asked, ready = threading.Event(), threading.Event()
        self.seen: list[object] = []
        self.thread = threading.Thread(target=self.live, args=(ready,), daemon=True)
        self.thread.start()
        ready.wait()
        self.before = self.take()

    def live(self, ready: threading.Event) -> None:
        """The thread: of two filters that refuse the same call, the younger one decides."""
        refuse(SYS_USTAT, 73)
        refuse(SYS_USTAT, 74)
        before = self.take()
        ready.set()
        self.asked.wait()
        self.seen += [before, self.take()]

    def take(self) -> tuple[dict[int, int], dict[str, str]]:
        """What is refused, and how many filters there are."""
        fields = proc_status("Seccomp", "Seccomp_filters", "NoNewPrivs", task=str(threading.get_native_id()))
        return outcomes(), fields

    def verify(self) -> str | None:
        """As before in both threads, and in a new one; and the filters are still shared: TSYNC is possible again."""
        self.asked.set()
        self.thread.join(10)
        new: list[object] = []
        thread = threading.Thread(target=lambda: new.append(self.take()))
        thread.start()
        thread.join(10)
        if problem := first_problem(
            unlike("outcomes in the main thread", self.before, self.take()),
            unlike("outcomes in a new thread", [self.before], new),
            unlike("outcomes in the thread with filters of its own", *(self.seen or [True, "no answer"])),
            unlike("first shared filter", -71, self.before[0][SYS_ACCT]),
        ):
            return problem
        # For a moment, a thread that has been joined is still there, with filters of its own.
        until = time.monotonic() + 10
        while Path(f"/proc/self/task/{self.thread.native_id}").exists() and time.monotonic() < until:
            time.sleep(0.001)
        refuse(SYS_USTAT, 75, FLAG_TSYNC)
        return unlike("a filter for all threads", -75, outcomes()[SYS_USTAT])
