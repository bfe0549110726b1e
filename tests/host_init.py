"""The first process of a test host: makes the namespaces, starts what it is told to, and reaps.

Run by `tests.hosts` as ``python -I -S host_init.py SOCKET NAME FIRST_PID``; nothing else imports it. It talks to the
test over a SOCK_SEQPACKET socket, one JSON object a message, one answer for each request. It imports little, since
every test waits for it to start.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
from typing import Any

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_PIDFD = 0x00001000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
PR_SET_PDEATHSIG = 1
SYS_CLONE3 = 435
SYS_CLOSE_RANGE = 436
FIRST_SPARE_FD = 512
MAX_MESSAGE = 1 << 20

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


class CloneArgs(ctypes.Structure):
    """``struct clone_args`` of clone3(2)."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "flags",
            "pidfd",
            "child_tid",
            "parent_tid",
            "exit_signal",
            "stack",
            "stack_size",
            "tls",
            "set_tid",
            "set_tid_size",
            "cgroup",
        )
    ]


def checked(result: int, what: str) -> int:
    """``result``, or the OSError that libc left in errno."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)}: {what}")
    return result


def fork_at(pid: int | None) -> tuple[int, int]:
    """Fork, at ``pid`` in the own PID namespace if one is given.

    Returns (pid, pidfd) in the parent and (0, -1) in the child.

    clone3(2) rather than a write to ns_last_pid and fork(): nothing else that forks in the host can take the PID in
    between. Python's fork hooks do not run, which is safe here: one thread, and the child only executes.
    """
    pidfd = ctypes.c_int(-1)
    wanted = ctypes.c_int(pid or 0)
    arguments = CloneArgs(
        flags=CLONE_PIDFD,
        pidfd=ctypes.addressof(pidfd),
        exit_signal=signal.SIGCHLD,
        set_tid=ctypes.addressof(wanted) if pid else 0,
        set_tid_size=1 if pid else 0,
    )
    size = ctypes.c_size_t(ctypes.sizeof(arguments))
    child = checked(libc.syscall(SYS_CLONE3, ctypes.byref(arguments), size), f"clone3 at PID {pid}")
    return child, pidfd.value if child else -1


def become_program(request: dict[str, Any], fds: list[int]) -> None:
    """In the new child: the descriptors, session, directory and signals that were asked for, then execve(2)."""
    if request["new_session"]:
        os.setsid()
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP) and signal.getsignal(number) is not None:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    kept = {target: os.dup2(fd, target, inheritable=True) for fd, target in zip(fds, request["targets"], strict=True)}
    # Whatever the program was not given has to be absent: a move would find the test's own descriptors in it.
    for low, high in zip([-1, *sorted(kept)], [*sorted(kept), FIRST_SPARE_FD], strict=True):
        if low + 1 < high:
            libc.syscall(SYS_CLOSE_RANGE, ctypes.c_uint(low + 1), ctypes.c_uint(high - 1), ctypes.c_uint(0))
    os.chdir(request["cwd"])
    os.execvpe(request["argv"][0], request["argv"], request["env"])


class Init:
    """PID 1 of a host: starts programs on request, reaps every child, tells how it ended."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.status_pipes: dict[int, int] = {}
        self.orphans: dict[int, int] = {}

    def serve(self) -> None:
        """Answer requests and reap until the test closes its end of the socket."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        poller = select.poll()
        poller.register(self.control, select.POLLIN)
        poller.register(wake_read, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poller.poll()}
            if wake_read in ready:
                os.read(wake_read, 4096)
                self.reap()
            if self.control.fileno() in ready and not self.answer():
                return

    def reap(self) -> None:
        """Collect every child that has ended; tell those who wait for it."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                pid, status = ended
                code = os.waitstatus_to_exitcode(status)
                pipe = self.status_pipes.pop(pid, None)
                if pipe is None:
                    self.orphans[pid] = code
                    continue
                with contextlib.suppress(BrokenPipeError):
                    os.write(pipe, struct.pack("=i", code))
                os.close(pipe)

    def answer(self) -> bool:
        """Handle one request; False at the end of the connection."""
        message, fds, _, _ = socket.recv_fds(self.control, MAX_MESSAGE, 250, socket.MSG_CMSG_CLOEXEC)
        if not message:
            return False
        request = json.loads(message)
        answer_fds: list[int] = []
        try:
            reply = getattr(self, "do_" + request["op"])(request, fds, answer_fds)
        except OSError as error:
            reply = {"errno": error.errno, "what": str(error)}
        socket.send_fds(self.control, [json.dumps(reply).encode()], answer_fds)
        for fd in answer_fds:
            os.close(fd)
        return True

    def do_spawn(self, request: dict[str, Any], fds: list[int], answer_fds: list[int]) -> dict[str, Any]:
        """Start a program; answers with its PID and its pidfd."""
        status_pipe, *program_fds = fds
        error_read, error_write = os.pipe2(os.O_CLOEXEC)
        # Above every number the program may ask for, so that placing one descriptor never overwrites another.
        spare = [_dup_above(fd) for fd in [*program_fds, error_write]]
        for fd in [*program_fds, error_write]:
            os.close(fd)
        *program_fds, error_write = spare
        try:
            pid, pidfd = fork_at(request["pid"])
            if pid == 0:
                try:
                    become_program(request, program_fds)
                except OSError as error:
                    os.write(error_write, json.dumps([error.errno, request["argv"][0]]).encode())
                finally:
                    os._exit(127)
        except OSError:
            os.close(status_pipe)
            os.close(error_read)
            raise
        finally:
            for fd in spare:
                os.close(fd)
        failure = os.read(error_read, 4096)
        os.close(error_read)
        answer_fds.append(pidfd)
        self.status_pipes[pid] = status_pipe
        if failure:
            number, what = json.loads(failure)
            raise OSError(number, f"{os.strerror(number)}: {what}")
        return {"pid": pid}

    def do_kill(self, request: dict[str, Any], fds: list[int], answer_fds: list[int]) -> dict[str, Any]:
        """Send a signal to a PID of this host."""
        os.kill(request["pid"], request["signal"])
        return {}

    def do_orphans(self, request: dict[str, Any], fds: list[int], answer_fds: list[int]) -> dict[str, Any]:
        """How the processes ended that the host adopted."""
        self.reap()
        return {"orphans": {str(pid): code for pid, code in self.orphans.items()}}


def _dup_above(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_SPARE_FD)


def become_init(control: socket.socket, name: str, first_pid: int) -> None:
    """Live as PID 1 of the new namespaces."""
    checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")
    checked(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "making mounts private")
    checked(libc.mount(b"proc", b"/proc", b"proc", 0, None), "mounting /proc")
    with open("/proc/sys/kernel/ns_last_pid", "w") as last_pid:
        last_pid.write(str(first_pid - 1))
    os.setsid()
    socket.sethostname(name)
    pidfd = os.pidfd_open(os.getpid())
    socket.send_fds(control, [b"{}"], [pidfd])
    os.close(pidfd)
    Init(control).serve()


def main() -> None:
    """Make the namespaces, start the init in them, and end when it ends."""
    control = socket.socket(fileno=int(sys.argv[1]))
    checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")
    namespaces = CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC
    checked(libc.unshare(namespaces), "making namespaces (root is needed)")
    init = os.fork()
    if init == 0:
        become_init(control, sys.argv[2], int(sys.argv[3]))
        os._exit(0)
    control.close()
    os.waitpid(init, 0)


if __name__ == "__main__":
    main()
