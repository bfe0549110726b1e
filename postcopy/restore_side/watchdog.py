"""The watchdog: keeps the destination's program from ever seeing a wrong byte, and speaks for it after commit.

It holds a duplicate of every userfaultfd: as long as one is open, a thread that waits for a missing page waits on. If
pages can no longer come, the tree is killed first and the descriptors are closed after. If the watchdog itself dies,
the fault handler, which has them too, does the same.
"""

import contextlib
import logging
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import msgpack

from postcopy import roles
from postcopy.action_scripts import Action, ActionScripts
from postcopy.errors import ConnectionLost, LostAfterCommit, PostcopyError
from postcopy.kernel import procfs, userfaultfd
from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import syscall
from postcopy.kernel.poll import readable
from postcopy.kernel.prctl import PR_SET_PDEATHSIG
from postcopy.restore_side.bulk_receiver import receive_bulk
from postcopy.restore_side.fault_handler import GIVE_UP, Background, FaultHandler
from postcopy.restore_side.handover import Handover
from postcopy.restore_side.leftovers import Leftovers
from postcopy.restore_side.ring import Ring
from postcopy.restore_side.strays import kill_strays
from postcopy.transport import Channels
from postcopy.wire import control
from postcopy.wire.control import Kind

log = logging.getLogger("postcopy")

_REPORT_SIZE = 65536
_MOST_PASSED = 8
_WATCHDOG_DIED = signal.SIGUSR1
_KILLED_SECONDS = 0.5  # for processes to end that have been killed
TAKING_ADDRESSES, COMMITTED, RESUMED = b"a", b"c", b"r"


@dataclass
class Watchdog:
    """What the watchdog watches over. It is forked before there is a tree, which ``handovers`` brings.

    ``orders`` is the read end of a pipe from the control process, ``news`` a socket to it. ``scripts``: by which
    addresses may be taken, and given up again if it comes to nothing; ``program``: the PID of its root.
    """

    channels: Channels
    background: Background
    orders: int
    handovers: socket.socket
    news: socket.socket
    namespace_init: int | None
    detached: bool
    leftovers: Leftovers
    scripts: ActionScripts
    program: int
    took_addresses: bool = False
    tree: Handover | None = None
    uffds: list[int] = field(default_factory=list)
    committed: bool = False
    resumed: bool = False

    def run(self) -> None:
        """The body of its process: start handler and receiver, and watch until the last page or the end."""
        os.setsid()
        if self.detached:
            roles.leave_output(but_logs=True)
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        ring = Ring()
        reports, handlers_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._to_handler, from_watchdog = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        handler_body = self._handler_body(ring, handlers_end, from_watchdog)
        handler = roles.start("postcopy-faults", handler_body, dies_with_parent=False)
        from_watchdog.close()
        receiver = roles.start("postcopy-receive", self._receiver_body(ring), dies_with_parent=True)
        handlers_end.close()
        self._reports, self._handler, self._receiver = reports, handler, receiver
        try:
            self._watch()
        except PostcopyError as error:
            self._disaster(error)
        except Exception as error:
            log.exception("watchdog")
            self._disaster(PostcopyError(f"watchdog: {type(error).__name__}: {error}"))
        finally:
            for role in (handler, receiver):
                role.kill()

    def _handler_body(self, ring: Ring, reports: socket.socket, handovers: socket.socket) -> Callable[[], None]:
        watchdog = os.getpid()

        def body() -> None:
            demand = self.channels.demand.socket
            self.channels.bulk.close()
            self._to_handler.close()
            if tree := Handover.receive(handovers):
                args = (tree.spaces, demand, ring, reports, self.background, tree.pidfds, tree.objects)
                faults = FaultHandler(*args)
                _take_over_at_death_of(watchdog, tree, self.namespace_init, faults)
                faults.run()

        return body

    def _receiver_body(self, ring: Ring) -> Callable[[], None]:
        def body() -> None:
            receive_bulk(self.channels.bulk.socket, ring)

        return body

    def _watch(self) -> None:
        poll = select.poll()
        roles_ends = (self._handler.pidfd, self._receiver.pidfd)
        for fd in (self.orders, self.handovers.fileno(), self._reports.fileno(), *roles_ends):
            poll.register(fd, select.POLLIN)
        self.channels.demand.close()
        self.channels.bulk.close()
        while True:
            for fd, _ in poll.poll():
                if fd == self._reports.fileno():
                    if self._take_report():
                        return
                elif fd == self.orders:
                    if self._take_order():
                        poll.unregister(self.orders)
                        # Until now the control process has listened there.
                        poll.register(self.channels.control.fileno(), select.POLLIN)
                elif fd == self.handovers.fileno():
                    self._take_tree()
                    poll.unregister(fd)
                elif fd == self._handler.pidfd:
                    while self._report_is_there():
                        if self._take_report():
                            return
                    raise LostAfterCommit("the fault handler has died")
                elif fd == self._receiver.pidfd:
                    if self._receiver.ended_badly():
                        raise LostAfterCommit("the bulk receiver has died")
                    poll.unregister(fd)
                else:
                    # On this channel nothing is due any more but a failure, or the end of the connection.
                    self.channels.control.receive({})

    def _take_tree(self) -> None:
        """Keep the tree that has been built, and give it to the handler."""
        self.tree = Handover.receive(self.handovers)
        if self.tree is not None:
            self.uffds = [space.uffd for space in self.tree.spaces]
            try:
                self.tree.send(self._to_handler)
            except OSError:
                raise PostcopyError("the fault handler has died") from None
            for each in self.tree.objects:
                os.close(each.fd)

    def _take_order(self) -> bool:
        """Act on the control process's next word; whether it was the last."""
        order = os.read(self.orders, 1)
        if order == TAKING_ADDRESSES:
            self.took_addresses = True
            return False
        if order == COMMITTED:
            self.committed = True
            return False
        if order == RESUMED:
            self.resumed = True
            self.channels.control.send(Kind.RESUMED)
            return True
        if self.committed:
            raise LostAfterCommit("restore died while it resumed the program")
        raise PostcopyError("restore ended before commit")

    def _report_is_there(self) -> bool:
        return readable(self._reports)

    def _take_report(self) -> bool:
        """Act on one report of the handler; whether it was the last."""
        content, fds, _, _ = socket.recv_fds(self._reports, _REPORT_SIZE, _MOST_PASSED)
        if not content:
            raise LostAfterCommit("the fault handler has closed its report channel")
        report: dict[str, Any] = msgpack.unpackb(content)
        self.uffds += fds
        name = report.pop("event")
        if name in ("progress", "filled first"):
            self._tell({"event": name, **report})
        elif name == "gone":
            self._close_those_gone()
        elif name == "lost":
            raise ConnectionLost(str(report.get("reason", "the source is gone")))
        elif name == "drained":
            self._drained(report)
            return True
        return False

    def _close_those_gone(self) -> None:
        gone = [fd for fd in self.uffds if not userfaultfd.mm_exists(fd)]
        for fd in gone:
            self.uffds.remove(fd)
            os.close(fd)

    def _drained(self, report: dict[str, Any]) -> None:
        while not self.resumed:
            # A small program's last page may be here before the word that it runs.
            self._take_order()
        for fd in self.uffds:
            os.close(fd)
        self.uffds = []
        drained = control.Drained(
            faults=report["faults"],
            fault_p50=report["latency_p50_ns"],
            fault_p99=report["latency_p99_ns"],
            fault_max=report["latency_max_ns"],
            bytes_demand=report["bytes_demand"],
            bytes_bulk=report["bytes_bulk"],
            bytes_zero=report["bytes_zero"],
        )
        try:
            self.channels.control.send(Kind.DRAINED, drained)
        except ConnectionLost as error:
            log.warning("every page is in, but the source could not be told: %s", error)
        self._tell({"event": "drained", **report})

    def _tell(self, event: dict[str, Any]) -> None:
        """Pass an event on to the control process, if it still listens."""
        with contextlib.suppress(OSError):
            self.news.send(msgpack.packb(event), socket.MSG_DONTWAIT if event["event"] == "progress" else 0)

    def _disaster(self, error: PostcopyError) -> None:
        """Pages can no longer come: end the tree before the last userfaultfd is closed."""
        if self.committed:
            log.error("%s; the program is killed here, it never saw a wrong byte", error.message)
            with contextlib.suppress(PostcopyError):
                message = f"pages could not be fetched ({error.message}); the program was killed at the destination"
                self.channels.control.send(Kind.FAILED, control.Failed(message, ""))
        if self.tree is not None:
            kill_tree(self.tree, self.namespace_init)
            # Else who waits to punch a hole into shared memory could not end.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handler.pidfd, GIVE_UP)
        if self.took_addresses and not self.committed:
            self.scripts.report(Action.NETWORK_LOCK, self.program)
        _wait_for_end_of(self.uffds)
        self.leftovers.remove()
        self._tell({"event": "lost", "reason": error.message})


def _take_over_at_death_of(watchdog: int, tree: Handover, namespace_init: int | None, faults: FaultHandler) -> None:
    """In the fault handler: when the watchdog dies, end the tree before the last userfaultfd is closed."""

    def end(*_: object) -> NoReturn:
        log.error("the watchdog has died; the program is killed here, it never saw a wrong byte")
        kill_tree(tree, namespace_init)
        faults.unlock()
        _wait_for_end_of([fd for fd in _own_userfaultfds() if fd != faults.own_uffd])
        os._exit(1)

    signal.signal(_WATCHDOG_DIED, end)
    syscall("following the watchdog", NUMBERS["prctl"], PR_SET_PDEATHSIG, _WATCHDOG_DIED)
    if os.getppid() != watchdog:
        end()


def _own_userfaultfds() -> list[int]:
    found = []
    for fd in procfs.descriptors(os.getpid()):
        with contextlib.suppress(OSError):
            if procfs.link(os.getpid(), f"fd/{fd}") == "anon_inode:[userfaultfd]":
                found.append(fd)
    return found


def _wait_for_end_of(uffds: list[int]) -> None:
    """Until the address spaces are gone; who is still there after a while is looked for in all of the host."""
    look = time.monotonic() + _KILLED_SECONDS
    while left := [fd for fd in uffds if userfaultfd.mm_exists(fd)]:
        time.sleep(0.01)
        if time.monotonic() > look:
            kill_strays(left)
            look = time.monotonic() + _KILLED_SECONDS


def kill_tree(tree: Handover, namespace_init: int | None) -> None:
    """SIGKILL its processes and all their descendants; with a PID namespace of its own, everything in it."""
    # Once one has ended, its PID may be somebody else's.
    alive = [(pid, pidfd) for pid, pidfd in tree.processes if not readable(pidfd)]
    doomed = [pidfd for _, pidfd in alive]
    with contextlib.ExitStack() as opened:
        for pidfd in _born_since({pid for pid, _ in alive}):
            opened.callback(os.close, pidfd)
            doomed.append(pidfd)
        if namespace_init is not None:
            doomed.append(namespace_init)
        for pidfd in doomed:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _born_since(known: set[int]) -> list[int]:
    """Pidfds of the descendants of processes, but for themselves."""

    def descendants() -> set[int]:
        return {each for pid in known for each in procfs.descendants(pid)} - known

    found: dict[int, int] = {}
    for pid in descendants():
        with contextlib.suppress(OSError):
            found[pid] = os.pidfd_open(pid)
    # Between a look and the opening, a PID may have become somebody else's: what is opened and not there, is not meant.
    still = descendants()
    for pid in found.keys() - still:
        os.close(found.pop(pid))
    return list(found.values())
