"""Bring a process into being: with the PID it had, an empty address space, and ourselves as parent and tracer."""

import contextlib
import os
import resource
import signal
from collections.abc import Iterable

from postcopy.errors import RestoreError
from postcopy.kernel import clone3, procfs, ptrace, tiny_elf
from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import address_of, syscall
from postcopy.kernel.process_memory import ProcessMemory

_AT_EMPTY_PATH = 0x1000
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

    ``pid`` is how we see it, ``inner_pid`` how it sees itself. It dies with us until it is detached.
    """

    def __init__(self, pid: int, inner_pid: int) -> None:
        self.pid = pid
        self.inner_pid = inner_pid
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


def give_birth(inner_pid: int, mount_namespace: int | None) -> Newborn:
    """Make the process. Raises RestoreError: the PID is taken, or the kernel refuses.

    ``mount_namespace``: a descriptor of the mount namespace to live in, None for our own.
    """
    go_read, go_write = os.pipe()
    program = tiny_elf.as_memfd()
    lender = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            child = clone3.fork(signal.SIGCHLD, inner_pid)
        except FileExistsError:
            raise RestoreError(
                f"PID {inner_pid} is taken on this host", "end that process, or restore with --new-pid-namespace"
            ) from None
        if not child:
            _become_tiny(go_read, go_write, program, lender, mount_namespace)
        try:
            ptrace.seize(child, OPTIONS)
            os.write(go_write, b"g")
            _until_event(child, ptrace.PTRACE_EVENT_EXEC)
            # get_signal() is the clean place to start from: the execve itself must return first.
            ptrace.interrupt(child)
            ptrace.cont(child)
            _until_event(child, ptrace.PTRACE_EVENT_STOP)
            return Newborn(child, inner_pid)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, ptrace.WALL)
            raise
    finally:
        for fd in (go_read, go_write, program, lender):
            os.close(fd)


def _until_event(tid: int, event: int) -> None:
    while True:
        stop = ptrace.wait(tid)
        if stop.ended is not None:
            raise RestoreError(f"the new process {tid} ended before it could be built")
        if stop.event == event:
            return
        ptrace.cont(tid, stop.signal if not stop.event else 0)


def _become_tiny(go_read: int, go_write: int, program: int, lender: int, mount_namespace: int | None) -> None:
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


def ranges_in_use(pid: int) -> list[range]:
    """The address ranges that a new process occupies."""
    return [range(line.start, line.end) for line in procfs.for_each_vma(pid)]
