"""Pseudoterminals whose master is in the tree: both ends, their settings, whose controlling terminal they are."""

import contextlib
import fcntl
import os
import select
import stat
import termios
from collections.abc import Iterator

from msgspec import structs

from postcopy import pty_queues
from postcopy.deadline import uninterrupted
from postcopy.dump_side.opened import Opened, Refused, Table, common
from postcopy.dump_side.peek import in_peace
from postcopy.kernel import procfs, pty
from postcopy.open_kinds import Pty, PtyContent, PtyEnd
from postcopy.state import Description, OpenFile

_MASTER, _CONTROLLING = (5, 2), (5, 0)
_SLAVES = range(136, 144)
_SLAVE_PATH = "/dev/pts/"
# Where it may be that the kernel has more that it has not looked at, nothing is taken out (n_tty_receive_buf_common).
_MOST_TYPED, _MOST_LINES = pty_queues.MOST_TYPED - 5, 2048


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
        for end in ((pid, fd), *slaves[:1]):
            _check_modes(*end)
        hung_up = not slaves and _is_hung_up(master)
        content = None
        if not table.frozen:
            _check_typing(name)
        elif slaves or hung_up:
            content = peek(master, name)
        return Pty(
            index=index,
            settings=pty.settings(master),
            window=pty.window(master),
            locked=bool(pty.number(master, pty.TIOCGPTLCK)),
            packets=bool(pty.number(master, pty.TIOCGPKT)),
            session=common(table, session) if session else 0,
            foreground=_group(table, foreground),
            hung_up=hung_up,
            content=content,
        )


def _check_modes(pid: int, fd: int) -> None:
    """What an end has besides. Raises Refused, OSError."""
    opened = Opened.look(pid, fd)
    with opened.duplicate() as end:
        if discipline := pty.number(end, pty.TIOCGETD):
            raise Refused(f"{opened.link}: it has another line discipline ({discipline}), which cannot be moved yet")
        if pty.number(end, pty.TIOCGEXCL):
            raise Refused(f"{opened.link}: it is exclusive (TIOCEXCL), which cannot be moved yet")


def _group(table: Table, group: int) -> int:
    """A process group as the tree numbers it; 0 where it has no member any more."""
    for pid in table.pids:
        with contextlib.suppress(OSError):
            if group and os.getpgid(pid) == group:
                return int(procfs.status(pid)["NSpgid"].split()[table.level])
    return 0


def _check_typing(name: str) -> None:
    """What is typed and not read is to be typed again; raises Refused where that is not allowed to us."""
    master, slave = os.openpty()
    try:
        fcntl.ioctl(slave, termios.TIOCSTI, b"x")
    except OSError as error:
        raise Refused(f"{name}: typing at a terminal takes CAP_SYS_ADMIN here ({error.strerror})") from None
    finally:
        os.close(master)
        os.close(slave)


def peek(master: int, name: str) -> PtyContent | None:
    """What is in a terminal that nobody uses now; it is left as it is. Raises Refused, OSError."""
    slave = _opened(master)
    packets = bool(pty.number(master, pty.TIOCGPKT))
    try:
        settings = pty.settings(master)
        if packets and pty_queues.is_ready(master, select.POLLPRI):
            raise Refused(f"{name}: in packet mode, and its master has yet to read what has changed; try again")
        waiting, canonical = pty_queues.typed(slave), pty_queues.is_canonical(settings)
        if waiting >= (_MOST_LINES if canonical else _MOST_TYPED):
            raise Refused(_too_much(name, waiting))
        # Of a line that is being typed, nothing is told.
        if canonical or waiting or _is_used(master, slave):
            return _look_into(master, slave, settings, packets, name)
        return None
    finally:
        os.close(slave)


def _opened(master: int) -> int:
    """A description of its slave of our own."""
    with uninterrupted():
        locked = pty.number(master, pty.TIOCGPTLCK)
        pty.set_number(master, pty.TIOCSPTLCK, 0)
        try:
            slave = pty.open_slave(master)
        finally:
            pty.set_number(master, pty.TIOCSPTLCK, locked)
    os.set_blocking(slave, False)
    return slave


def _too_much(name: str, length: int) -> str:
    return f"{name}: {length} typed bytes are unread, which is too much to be moved; try again"


def _is_used(master: int, slave: int) -> bool:
    """Whether there is output in it, or none can be written."""
    return pty_queues.is_ready(master, select.POLLIN) or not pty_queues.is_ready(slave, select.POLLOUT)


def _look_into(master: int, slave: int, settings: bytes, packets: bool, name: str) -> PtyContent | None:
    def look() -> object:
        pty.set_number(master, pty.TIOCPKT, 0)
        try:
            content = pty_queues.take(master, slave, settings)
            pty_queues.put(master, slave, settings, content)
        finally:
            pty.set_number(master, pty.TIOCPKT, int(packets))
        return structs.astuple(content)

    found = in_peace(look, [master, slave])
    if found is None:
        raise Refused(f"{name}: what is in it could not be read")
    content = PtyContent(*found)
    if len(content.typed) > _MOST_TYPED:
        raise Refused(_too_much(name, len(content.typed)))
    return content if content != PtyContent(b"", [], b"", False, pty_queues.NOT_STOPPED) else None


def _is_hung_up(master: int) -> bool:
    poll = select.poll()
    poll.register(master, 0)
    return bool(poll.poll(0))


def _check_holders(table: Table, index: int) -> None:
    own = {each for pid in table.pids for each in (pid, *procfs.descendants(pid))} | {os.getpid()}
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in own and any(index == number for number, _, _ in _ends(int(name))):
            raise Refused(f"{_SLAVE_PATH}{index}: process {name}, which is not moved, has this terminal open too")
