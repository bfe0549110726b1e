"""The cases of `tests.programs.states`: each a piece of process state that can tell whether it is still so."""

import ctypes
import errno
import os
import re
import threading
from pathlib import Path
from typing import Any, ClassVar

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


class Unsupported(Exception):
    """This kernel or C library has no such state; said in the report, and no failure."""


class Case:
    """One piece of state. ``setup`` makes it, ``verify`` says what is wrong with it (None: nothing).

    ``verify`` runs in the thread that ran ``setup``, the main thread.
    """

    directory: ClassVar[Path]
    #: Seconds that the timed waits last, from setup on.
    hold: ClassVar[float]
    #: CLOCK_MONOTONIC in seconds when the last move was over; None when there was none.
    moved_at: ClassVar[float | None] = None

    @classmethod
    def name(cls) -> str:
        """The name in the report: the class name in snake_case."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()

    def setup(self) -> None:
        """Make the state. Raises Unsupported."""
        raise NotImplementedError

    def verify(self) -> str | None:
        """What is wrong, or None."""
        raise NotImplementedError


class ThreadCase(Case):
    """State of one thread: ``prepare`` and ``check`` both run in a thread that lives for this case alone."""

    def prepare(self) -> None:
        """Make the state of the calling thread."""
        raise NotImplementedError

    def check(self) -> str | None:
        """What is wrong with the state of the calling thread, or None."""
        raise NotImplementedError

    def setup(self) -> None:
        """Start the thread and wait until it has prepared."""
        self._error: Exception | None = None
        self._problem: str | None = "the thread never answered"
        self._ready = threading.Event()
        self._asked = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._error:
            raise self._error

    def _live(self) -> None:
        try:
            self.prepare()
        except Exception as error:
            self._error = error
            return
        finally:
            self._ready.set()
        self._asked.wait()
        try:
            self._problem = self.check()
        except Exception as error:
            self._problem = f"{type(error).__name__}: {error}"

    def verify(self) -> str | None:
        """Ask the thread."""
        self._asked.set()
        self._thread.join(10)
        return self._problem


class Snapshot(Case):
    """State that is read in whole: ``take`` must give the same after the move."""

    def arrange(self) -> None:
        """Make the state something other than the default."""

    def take(self) -> dict[str, Any]:
        """The state, by the names of its parts."""
        raise NotImplementedError

    def setup(self) -> None:
        """Arrange and remember."""
        self.arrange()
        self.before = self.take()

    def verify(self) -> str | None:
        """The parts that differ."""
        return differences(self.before, self.take())


def differences(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """What differs, in words; None when nothing does."""
    missing = object()
    found = []
    for key in sorted({*before, *after}):
        old, new = before.get(key, missing), after.get(key, missing)
        if old != new:
            shown = ["absent" if value is missing else repr(value)[:300] for value in (old, new)]
            found.append(f"{key}: was {shown[0]}, is {shown[1]}")
    return "; ".join(found) or None


def unlike(what: str, expected: Any, actual: Any) -> str | None:
    """A problem when the two differ."""
    return None if expected == actual else f"{what}: expected {expected!r}, is {actual!r}"


def first_problem(*problems: str | None) -> str | None:
    """The first that is one."""
    return next((problem for problem in problems if problem), None)


def syscall(number: int, *arguments: int) -> int:
    """A raw system call; the negative errno when it fails, as the kernel itself says it."""
    result: int = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(argument) for argument in arguments))
    return -ctypes.get_errno() if result == -1 else result


def required(result: int, what: str) -> int:
    """``result`` of `syscall`; Unsupported when the kernel does not have it, OSError when it fails."""
    if result in (-errno.ENOSYS, -errno.EINVAL):
        raise Unsupported(f"{what}: {os.strerror(-result)}")
    if result < 0:
        raise OSError(-result, f"{os.strerror(-result)}: {what}")
    return result


def proc_status(*fields: str, task: str = "self") -> dict[str, str]:
    """Fields of /proc/self/status, or of a thread's."""
    path = "/proc/self/status" if task == "self" else f"/proc/self/task/{task}/status"
    with open(path) as status:
        lines = dict(line.rstrip("\n").split(":\t", 1) for line in status if ":\t" in line)
    return {field: lines[field] for field in fields if field in lines}
