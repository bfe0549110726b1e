"""Pseudoterminals: made by us under their numbers before anything else, so that sessions can be born with them."""

import fcntl
import os
import struct
import termios
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from postcopy import pty_queues
from postcopy.errors import RestoreError
from postcopy.kernel import pidfd, pty
from postcopy.kernel.batch import Batch
from postcopy.kernel.calls import call
from postcopy.open_kinds import Pty, PtyEnd
from postcopy.state import Slot

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan

_AT_FDCWD = -100
_PTMX = "/dev/ptmx"


def slave(index: int) -> str:
    """The path of the slave with this number."""
    return f"/dev/pts/{index}"


def resource(index: int) -> str:
    """Under what name the master is among the inherited descriptors; nobody can ask for this one."""
    return f"pty/{index}"


def make(indexes: Iterable[int]) -> dict[str, int]:
    """A master for each number, unlocked; by `resource`. Raises RestoreError where a number is taken."""
    wanted = set(indexes)
    made: dict[int, int] = {}
    others = []
    try:
        # The kernel gives the lowest free number.
        while missing := wanted - made.keys():
            master = os.open(_PTMX, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
            index = pty.number(master, pty.TIOCGPTN)
            if index in wanted:
                made[index] = master
                pty.set_number(master, pty.TIOCSPTLCK, 0)
                continue
            others.append(master)
            if index > min(missing):
                raise RestoreError(f"terminal {slave(min(missing))} is taken here")
    except BaseException as error:
        for master in made.values():
            os.close(master)
        if isinstance(error, OSError):
            raise RestoreError(f"making a pseudoterminal: {error.strerror}") from None
        raise
    finally:
        for master in others:
            os.close(master)
    return {resource(index): master for index, master in made.items()}


def take_control(state: Pty, batch: Batch) -> None:
    """Add the call by which the leader of a new session gets its controlling terminal: the first that it opens."""
    purpose = f"getting the controlling terminal {slave(state.index)}"
    batch.add(call("openat", _AT_FDCWD, batch.text(slave(state.index)), os.O_RDWR), purpose)


def rebuild(plan: "Plan", slot: Slot, state: PtyEnd) -> None:
    """Add the calls that give ``slot`` an end."""
    terminal = plan.state.ptys[state.pty]
    purpose = f"opening terminal {slave(terminal.index)} (descriptor {slot.fd})"
    if state.master:
        name = resource(terminal.index)
        if name not in plan.inherited:
            raise ValueError(f"the manifest did not name terminal {slave(terminal.index)}")
        plan.duplicate(plan.inherited[name], slot.fd, slot.close_on_exec, purpose)
        plan.set_flags(slot.fd, state.flags, purpose)
        return
    opened = plan.next_fd()
    path = plan.batch.text(slave(terminal.index))
    plan.batch.add(call("openat", _AT_FDCWD, path, state.flags | os.O_NOCTTY), purpose)
    plan.settle(opened, slot.fd, slot.close_on_exec, purpose)


def set_up(states: Iterable[Pty], root: int, inherited: Mapping[str, int]) -> None:
    """Set what each terminal has, before it belongs to a session, which would be told. ``root``: a pidfd of the process
    that has the masters by the numbers of ``inherited``. Raises RestoreError."""
    for state in states:
        try:
            master = pidfd.getfd(root, inherited[resource(state.index)])
            fcntl.ioctl(master, pty.TCSETS2, state.settings)
            fcntl.ioctl(master, termios.TIOCSWINSZ, state.window)
            if state.hung_up or state.content is not None:
                peer = pty.open_slave(master)
                if state.content is not None:
                    os.set_blocking(peer, False)
                    pty_queues.put(master, peer, state.settings, state.content)
                os.close(peer)
            # Not earlier: setting up is nothing that its master is to be told.
            pty.set_number(master, pty.TIOCPKT, int(state.packets))
            os.close(master)
        except KeyError:
            raise RestoreError(f"terminal {slave(state.index)} came after the survey; try again") from None
        except OSError as error:
            raise RestoreError(f"setting up terminal {slave(state.index)}: {error.strerror}") from None


def lock(state: Pty, process: int, fd: int) -> None:
    """Keep its slave from being opened, if it was; its master is open as ``fd`` in the process of this pidfd."""
    if state.locked:
        master = pidfd.getfd(process, fd)
        try:
            pty.set_number(master, pty.TIOCSPTLCK, 1)
        finally:
            os.close(master)


def connect(plan: "Plan") -> None:
    """Add the calls by which the leader of a session sets the foreground group of its terminal."""
    for state in plan.state.ptys:
        if state.session == plan.pid and state.foreground:
            purpose = f"setting the foreground group of terminal {slave(state.index)}"
            opened = plan.next_fd()
            plan.batch.add(call("openat", _AT_FDCWD, plan.batch.text("/dev/tty"), os.O_RDWR | os.O_NOCTTY), purpose)
            group = plan.batch.place(struct.pack("<i", plan.shared.nesting.seen(state.foreground, plan.pid)))
            plan.batch.add(call("ioctl", opened, pty.TIOCSPGRP, group), purpose)
            plan.close(opened)
