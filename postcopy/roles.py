"""Processes of ours beside the control process: each plays one role and shares no interpreter with another."""

import contextlib
import logging
import os
import signal
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

from postcopy.deadline import uninterrupted
from postcopy.errors import PostcopyError
from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import address_of, syscall
from postcopy.kernel.prctl import PR_SET_NAME, PR_SET_PDEATHSIG
from postcopy.kernel.sched import scheduling

log = logging.getLogger("postcopy")

# Of the role that this process plays.
_parent = 0


class Role:
    """A running process of ours."""

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)

    def has_ended(self) -> bool:
        """Whether it has ended, well or not."""
        return self._end() is not None

    def ended_badly(self) -> bool:
        """Whether it has ended, and not well."""
        found = self._end()
        return found is not None and found.si_status != 0

    def _end(self) -> os.waitid_result | None:
        try:
            return os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return None

    def kill(self) -> None:
        """End it and wait for its end."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """Its exit code (negative: the signal that ended it); once."""
        try:
            _, status = os.waitpid(self.pid, 0)
        except ChildProcessError:
            return 0
        os.close(self.pidfd)
        return os.waitstatus_to_exitcode(status)


def start(name: str, body: Callable[[], None], *, dies_with_parent: bool, keep: Iterable[int] | None = None) -> Role:
    """Fork a process that runs ``body`` and ends; errors of ours are logged there.

    ``dies_with_parent``: killed by the kernel when the process that calls this ends. With ``keep``, all descriptors
    but these and the standard streams are closed in it.
    """
    parent = os.getpid()
    # An exception out of a signal handler is lost in what the interpreter runs after a fork, and must not lead the new
    # process back into its parent's work.
    with uninterrupted():
        pid = os.fork()
        if not pid:
            _play(name, body, parent, dies_with_parent, keep)
        return Role(name, pid)


def _play(
    name: str, body: Callable[[], None], parent: int, dies_with_parent: bool, keep: Iterable[int] | None
) -> NoReturn:
    global _parent
    _parent = parent
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        scheduling()
        text = name.encode()[:15] + b"\0"
        syscall("naming a process", NUMBERS["prctl"], PR_SET_NAME, address_of(text))
        if dies_with_parent:
            _die_with_parent()
        if keep is not None:
            close_all_but(keep)
        body()
        code = 0
    except PostcopyError as error:
        log.error("%s: %s", name, error)
        code = error.exit_code
    except BaseException:
        log.exception("%s failed; this is a bug", name)
    finally:
        os._exit(code)


@contextlib.contextmanager
def outliving_parent() -> Iterator[None]:
    """Put off the death with the parent, for a role that dies so."""
    _set_death_signal(0)
    try:
        yield
    finally:
        _die_with_parent()


def is_orphaned() -> bool:
    """Whether the parent of this role has ended."""
    return os.getppid() != _parent


def _die_with_parent() -> None:
    _set_death_signal(signal.SIGKILL)
    if is_orphaned():
        os._exit(1)


def _set_death_signal(number: int) -> None:
    syscall("tying a process to its parent", NUMBERS["prctl"], PR_SET_PDEATHSIG, number)


def leave_output(but_logs: bool) -> None:
    """Let go of standard input and output, which who started the command may be reading to their end.

    ``but_logs``: standard error is kept where nobody can be waiting for its end: a terminal or a file.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        if fd < 2 or not (but_logs and stat.S_IFMT(os.fstat(2).st_mode) in (stat.S_IFREG, stat.S_IFCHR)):
            os.dup2(null, fd)
    os.close(null)


def close_all_but(keep: Iterable[int]) -> None:
    """Close every descriptor from 3 on that is not in ``keep``."""
    previous = 2
    for fd in sorted({fd for fd in keep if fd > 2}):
        os.closerange(previous + 1, fd)
        previous = fd
    syscall("closing descriptors", NUMBERS["close_range"], previous + 1, 0xFFFF_FFFF, 0)
