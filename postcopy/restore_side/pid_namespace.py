"""A PID namespace of the tree's own, with its own ``/proc``: for when the PID is taken on this host."""

import contextlib
import os
import select
import signal

from postcopy.errors import RestoreError
from postcopy.kernel import clone3
from postcopy.kernel.batch import Batch
from postcopy.kernel.calls import NUMBERS, call
from postcopy.kernel.libc import address_of, syscall
from postcopy.restore_side.root import Root
from postcopy.roles import leave_output

_NR_MOUNT = NUMBERS["mount"]
_MS_REC, _MS_PRIVATE, _MS_SLAVE, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 0x4000, 0x40000, 0x80000, 2, 4, 8


def part_mounts(batch: Batch) -> None:
    """Add the calls by which a process gets a mount namespace of its own, out of which nothing that it mounts comes."""
    batch.add(call("unshare", clone3.CLONE_NEWNS), "making its mount namespace")
    batch.add(call("mount", 0, batch.text("/"), 0, _MS_REC | _MS_PRIVATE, 0), "parting its mounts from those here")


def mount_proc(batch: Batch) -> None:
    """Add the call by which a process mounts the ``/proc`` of its PID namespace."""
    proc, flags = batch.text("proc"), _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    batch.add(call("mount", proc, batch.text("/proc"), proc, flags, 0), "mounting /proc")


class PidNamespace:
    """The namespaces, and the init process that keeps them: it waits for orphans, and ends after the last process."""

    def __init__(self, root: Root) -> None:
        """Make them; ``root``: in which directory ``/proc`` is. Raises OSError (see `refused`)."""
        ready_read, ready_write = os.pipe()
        self._root_read, self._root_write = os.pipe()
        self.init_pid = clone3.fork(signal.SIGCHLD, flags=clone3.CLONE_NEWPID | clone3.CLONE_NEWNS)
        if not self.init_pid:
            try:
                os.close(self._root_write)
                _be_init(ready_write, self._root_read, root)
            finally:
                os._exit(1)
        os.close(ready_write)
        os.close(self._root_read)
        if not os.read(ready_read, 1):
            os.waitpid(self.init_pid, 0)
            raise RestoreError("the new PID namespace could not be given its /proc", "CAP_SYS_ADMIN is needed")
        os.close(ready_read)
        self.pidfd = os.pidfd_open(self.init_pid)
        self.mount_namespace = os.open(f"/proc/{self.init_pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        namespace = os.open(f"/proc/{self.init_pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._namespace, self._own = namespace, own

    def enter(self) -> None:
        """From here on our children are born in it."""
        syscall("entering the PID namespace", NUMBERS["setns"], self._namespace, clone3.CLONE_NEWPID)

    def leave(self) -> None:
        """From here on our children are born in our own again."""
        syscall("leaving the PID namespace", NUMBERS["setns"], self._own, clone3.CLONE_NEWPID)

    def entrust(self, root_inner_pid: int) -> None:
        """Tell init which process it stays for; without this it ends with us."""
        os.write(self._root_write, root_inner_pid.to_bytes(4, "little"))

    def kill(self) -> None:
        """End init, and so everything in the namespace."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.init_pid, 0)


def _be_init(ready: int, root_read: int, directory: Root) -> None:
    """The init process: mount ``/proc``, then wait for orphans until the root and all of them have ended."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    proc, root, none = b"proc\0", b"/\0", b"none\0"
    where = b"/proc\0"
    what = "mounting /proc"
    syscall(what, _NR_MOUNT, address_of(none), address_of(root), 0, _MS_REC | _MS_SLAVE, 0)
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    with directory.entered():
        syscall(what, _NR_MOUNT, address_of(proc), address_of(where), address_of(proc), flags, 0)
    leave_output(but_logs=False)
    os.write(ready, b"r")
    os.closerange(3, root_read)
    os.closerange(root_read + 1, 4096)
    named = os.read(root_read, 4)
    if len(named) < 4:
        os._exit(0)  # restore has died before commit
    with contextlib.suppress(ProcessLookupError):
        root_fd = os.pidfd_open(int.from_bytes(named, "little"))
        poll = select.poll()
        poll.register(root_fd, select.POLLIN)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while not poll.poll(1000):
            _reap(os.WNOHANG)
    _reap(0)
    os._exit(0)


def _reap(flags: int) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, flags)[0]:
            pass
