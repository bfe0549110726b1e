"""Pseudoterminals whose master is in the tree: both ends, their settings, whose controlling terminal they are."""

import contextlib
import os
import select
import stat
from collections.abc import Iterator

from postcopy.dump_side.opened import Opened, Refused, Table, common
from postcopy.kernel import procfs, pty
from postcopy.open_kinds import Pty, PtyEnd
from postcopy.state import Description, OpenFile

_MASTER, _CONTROLLING = (5, 2), (5, 0)
_SLAVES = range(136, 144)
_SLAVE_PATH = "/dev/pts/"


def collect(table: Table, opened: Opened) -> Description | None:
    """The description of an end of a pseudoterminal of the tree, or of /dev/tty where it is one; None for others."""
    if opened.mode != stat.S_IFCHR:
        return None
    device = os.major(opened.stat.st_rdev), os.minor(opened.stat.st_rdev)
    if device == _CONTROLLING and _controlling(table) in _masters(table):
        return Description(file=OpenFile(opened.link, opened.flags, 0, "device"))
    if device == _MASTER:
        index = int(opened.field("tty-index") or 0)
    elif device[0] in _SLAVES and opened.link.startswith(_SLAVE_PATH) and opened.link[len(_SLAVE_PATH) :].isdigit():
        index = int(opened.link[len(_SLAVE_PATH) :])
    else:
        return None
    if index not in _masters(table):
        return None
    if index not in table.pty_numbers:
        found = _look(table, index)
        table.pty_numbers[index] = len(table.descriptors.ptys)
        table.descriptors.ptys.append(found)
    return Description(terminal=PtyEnd(table.pty_numbers[index], device == _MASTER, opened.flags))


def _controlling(table: Table) -> int:
    """The number of the controlling terminal of the process whose table is being collected; -1 for none."""
    device = pty.as_shown(int(procfs.stat(table.pid)[7]))
    return os.minor(device) if os.major(device) in _SLAVES else -1


def _masters(table: Table) -> dict[int, tuple[int, int]]:
    """The pseudoterminals whose master a process of the tree has, with that and its descriptor."""
    if table.masters is None:
        table.masters = {}
        for pid in table.pids:
            for index, master, fd in _ends(pid):
                if master:
                    table.masters.setdefault(index, (pid, fd))
    return table.masters


def _ends(pid: int) -> Iterator[tuple[int, bool, int]]:
    """The ends of pseudoterminals that a process has: number, whether it is the master, descriptor."""
    with contextlib.suppress(OSError):
        for fd in procfs.descriptors(pid):
            with contextlib.suppress(OSError, ValueError):
                link = procfs.link(pid, f"fd/{fd}")
                if link.startswith(_SLAVE_PATH) and link != "/dev/pts/ptmx":
                    yield int(os.path.basename(link)), False, fd
                elif link.endswith("/ptmx"):
                    yield int(procfs.fdinfo(pid, fd)["tty-index"]), True, fd


def _look(table: Table, index: int) -> Pty:
    _check_holders(table, index)
    pid, fd = _masters(table)[index]
    opened = Opened.look(pid, fd)
    with opened.duplicate() as master:
        session, foreground = pty.session(master)
        name = f"{opened.link} ({_SLAVE_PATH}{index})"
        if session and session not in table.pids:
            raise Refused(f"{name}: it is the controlling terminal of session {session}, which is not moved along")
        slaves = [(each, own) for each in table.pids for number, end, own in _ends(each) if number == index and not end]
        waiting = pty.unread(master) + sum(_unread(*each) for each in slaves[:1])
        if waiting:
            raise Refused(f"{name}: {waiting} bytes in it are unread, which cannot be moved yet; try again")
        return Pty(
            index=index,
            settings=pty.settings(master),
            window=pty.window(master),
            locked=bool(pty.number(master, pty.TIOCGPTLCK)),
            packets=bool(pty.number(master, pty.TIOCGPKT)),
            session=common(table, session) if session else 0,
            foreground=_group(table, foreground),
            hung_up=not slaves and _is_hung_up(master),
        )


def _group(table: Table, group: int) -> int:
    """A process group as the tree numbers it; 0 where it has no member any more."""
    for pid in table.pids:
        with contextlib.suppress(OSError):
            if group and os.getpgid(pid) == group:
                return int(procfs.status(pid)["NSpgid"].split()[table.level])
    return 0


def _unread(pid: int, fd: int) -> int:
    with Opened.look(pid, fd).duplicate() as slave:
        return pty.unread(slave)


def _is_hung_up(master: int) -> bool:
    poll = select.poll()
    poll.register(master, 0)
    return bool(poll.poll(0))


def _check_holders(table: Table, index: int) -> None:
    own = {each for pid in table.pids for each in (pid, *procfs.descendants(pid))} | {os.getpid()}
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in own and any(index == number for number, _, _ in _ends(int(name))):
            raise Refused(f"{_SLAVE_PATH}{index}: process {name}, which is not moved, has this terminal open too")
