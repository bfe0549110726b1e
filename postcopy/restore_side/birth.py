"""Bring a process into being: with the PID it had, an empty address space, and ourselves as parent and tracer."""

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn

from postcopy.errors import RestoreError
from postcopy.kernel import clone3, procfs, ptrace, tiny_elf
from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import address_of, refused, syscall
from postcopy.kernel.prctl import PR_GET_CHILD_SUBREAPER, PR_SET_CHILD_SUBREAPER
from postcopy.kernel.process_memory import ProcessMemory
from postcopy.restore_side.root import HERE, Root

_AT_EMPTY_PATH = 0x1000
_INIT = 1
_MOST_SECONDS, _BETWEEN_LOOKS = 2.0, 0.0005
_LENDER = 900  # too high for any other descriptor of ours
OPTIONS = (
    ptrace.PTRACE_O_TRACESYSGOOD
    | ptrace.PTRACE_O_TRACEFORK
    | ptrace.PTRACE_O_TRACECLONE
    | ptrace.PTRACE_O_TRACEEXEC
    | ptrace.PTRACE_O_EXITKILL
)


class Newborn:
    """A stopped process with one thread that holds nothing but the tiny program, the vdso and a stack.

    ``pid`` is how we see it, ``number`` how the tree does. It dies with us until it is detached.
    """

    def __init__(self, pid: int, number: int) -> None:
        self.pid = pid
        self.number = number
        self.pidfd = os.pidfd_open(pid)
        self.memory = ProcessMemory(pid)

    def close(self) -> None:
        """Give the descriptors back."""
        self.memory.close()
        os.close(self.pidfd)

    def kill(self) -> None:
        """End it and wait for its end."""
        tids: list[int] = []
        with contextlib.suppress(OSError):
            tids = procfs.tids(self.pid)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        # The leader's end is reported when all other threads have been waited for.
        for tid in (*tids[1:], self.pid):
            with contextlib.suppress(ChildProcessError):
                while ptrace.wait(tid).ended is None:
                    pass


def kill(newborns: Iterable[Newborn]) -> None:
    """End them and wait for their ends."""
    newborns = list(newborns)
    for newborn in newborns:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(newborn.pidfd, signal.SIGKILL)
    for newborn in reversed(newborns):
        newborn.kill()


def take_back(newborns: Sequence[Newborn]) -> None:
    """End them and see to it that their PIDs can be had again. Raises RestoreError where that takes too long."""
    with contextlib.ExitStack() as stack:
        for newborn in newborns:
            stack.callback(newborn.close)
        # Who has lost his parent by this is ours to wait for: nobody knows when the host's init does. As long as one of
        # them is a zombie, the number of its process group is taken, too.
        stack.enter_context(_as_subreaper())
        kill(newborns)
        deadline = time.monotonic() + _MOST_SECONDS
        left = [newborn.pid for newborn in newborns]
        while left := [pid for pid in left if not _is_gone(pid)]:
            if time.monotonic() > deadline:
                raise RestoreError(f"process {left[0]}, which was made too early, does not end")
            time.sleep(_BETWEEN_LOOKS)


def _is_gone(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, ptrace.WALL | os.WNOHANG)
    return not procfs.exists(pid)


@contextlib.contextmanager
def _as_subreaper() -> Iterator[None]:
    what, before = "becoming a subreaper", bytearray(4)
    syscall(what, NUMBERS["prctl"], PR_GET_CHILD_SUBREAPER, address_of(before))
    syscall(what, NUMBERS["prctl"], PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        syscall(what, NUMBERS["prctl"], PR_SET_CHILD_SUBREAPER, before[0])


def give_birth(number: int, mount_namespace: int | None, init: bool = False, root: Root = HERE) -> Newborn:
    """Make the process. Raises RestoreError: the PID is taken, or the kernel refuses.

    ``mount_namespace``: a descriptor of the mount namespace to live in, None for our own. ``init``: it is to be the
    init of a new PID namespace. ``root``: its root directory.
    """
    go_read, go_write = os.pipe()
    program = tiny_elf.as_memfd()
    lender = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def become() -> NoReturn:
        _become_tiny(go_read, go_write, program, lender, mount_namespace, root)

    try:
        try:
            if init and mount_namespace is not None:
                child = _by_midwife(number, become)
            else:
                pids, flags = ((_INIT, number), clone3.CLONE_NEWPID) if init else ((number,), 0)
                child = clone3.fork(signal.SIGCHLD, pids, flags)
        except FileExistsError:
            raise RestoreError(
                f"PID {number} is taken on this host", "end that process, or restore with --new-pid-namespace"
            ) from None
        if not child:
            become()
        try:
            ptrace.seize(child, OPTIONS)
            os.write(go_write, b"g")
            _until_event(child, ptrace.PTRACE_EVENT_EXEC)
            # get_signal() is the clean place to start from: the execve itself must return first.
            ptrace.interrupt(child)
            ptrace.cont(child)
            _until_event(child, ptrace.PTRACE_EVENT_STOP)
            return Newborn(child, number)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, ptrace.WALL)
            raise
    finally:
        for fd in (go_read, go_write, program, lender):
            os.close(fd)


def _by_midwife(number: int, become: Callable[[], NoReturn]) -> int:
    """Have the init of a new PID namespace made by a process that lives in the one around it, as a child of ours.

    Whose children are born in another namespace than its own can make no further one (copy_pid_ns, EINVAL).
    """
    before = {*procfs.children(os.getpid())}
    own = number - 1 if number > _INIT + 1 else number + 1
    midwife = clone3.fork(signal.SIGCHLD, (own,))
    if not midwife:
        status = 1
        try:
            if not clone3.fork(0, (_INIT, number), clone3.CLONE_NEWPID | clone3.CLONE_PARENT):
                become()
            status = 0
        except OSError as error:
            status = error.errno or status
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(midwife, 0)[1])
    if status:
        raise refused(f"making a process with PID {number}", abs(status))
    (child,) = {*procfs.children(os.getpid())} - before
    return child


def _until_event(tid: int, event: int) -> None:
    while True:
        stop = ptrace.wait(tid)
        if stop.ended is not None:
            raise RestoreError(f"the new process {tid} ended before it could be built")
        if stop.event == event:
            return
        ptrace.cont(tid, stop.signal if not stop.event else 0)


def _become_tiny(
    go_read: int, go_write: int, program: int, lender: int, mount_namespace: int | None, root: Root
) -> NoReturn:
    """In the child: wait until it is traced, then execute the tiny program."""
    try:
        os.close(go_write)
        if not os.read(go_read, 1):
            os._exit(1)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        os.dup2(lender, lender_number())
        if mount_namespace is not None:
            syscall("entering the mount namespace", NUMBERS["setns"], mount_namespace, clone3.CLONE_NEWNS)
        root.enter()
        empty, none = b"\0", bytes(8)
        syscall(
            "executing the tiny program",
            NUMBERS["execveat"],
            program,
            address_of(empty),
            address_of(none),
            address_of(none),
            _AT_EMPTY_PATH,
        )
    finally:
        os._exit(1)


def lender_number() -> int:
    """The descriptor by which a new process has the directory of our descriptors, which it can open anew there."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(_LENDER, hard - 1) if hard != resource.RLIM_INFINITY else _LENDER
