"""epoll(7): the targets with what they are watched for; found again where they were duplicated and closed."""

import contextlib
import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from postcopy.dump_side.opened import Opened, Refused, Table
from postcopy.kernel import kcmp, procfs
from postcopy.kernel.epoll import EPOLLET, EPOLLEXCLUSIVE, EPOLLONESHOT, EPOLLWAKEUP
from postcopy.open_kinds import Epoll, EpollTarget
from postcopy.state import Description

_LINE = re.compile(r"tfd: *(\d+) events: *(\w+) data: *(\w+)")
_LOOKS = 3  # a running process may change what we look at
_PRIVATE = EPOLLET | EPOLLEXCLUSIVE | EPOLLONESHOT | EPOLLWAKEUP


def collect(table: Table, opened: Opened) -> Description | None:
    """The description of an epoll instance, without its targets, which `complete` adds; None for other kinds."""
    if opened.link != "anon_inode:[eventpoll]":
        return None
    return Description(epoll=Epoll([], opened.flags))


def complete(table: Table, problems: list[str]) -> None:
    """Add the targets of every epoll instance of the table, now that all that may be one is known."""
    numbers = {slot.fd: slot.description for slot in table.slots}
    seen: set[int] = set()
    for slot in table.slots:
        description = table.descriptions[slot.description]
        if description.epoll is None or slot.description in seen:
            continue
        seen.add(slot.description)
        try:
            found = _targets(table, slot.fd, numbers)
        except (Refused, OSError) as reason:
            if os.path.lexists(f"/proc/{table.pid}/fd/{slot.fd}"):
                problems.append(f"descriptor {slot.fd}: {reason}")
            continue
        complete = dataclasses.replace(description.epoll, targets=found)
        table.descriptions[slot.description] = dataclasses.replace(description, epoll=complete)


def _targets(table: Table, epoll: int, numbers: dict[int, int]) -> list[EpollTarget]:
    for look in range(_LOOKS):
        lines = procfs.fdinfo_lines(table.pid, epoll)
        try:
            return list(_resolved(table, epoll, numbers, lines))
        except Refused:
            if look == _LOOKS - 1:
                raise
    raise AssertionError


def _resolved(table: Table, epoll: int, numbers: dict[int, int], lines: Iterable[str]) -> Iterator[EpollTarget]:
    which: Counter[int] = Counter()
    for match in filter(None, map(_LINE.match, lines)):
        registered, events, data = int(match[1]), int(match[2], 16), int(match[3], 16)
        fd = _where(table, epoll, registered, which[registered], numbers)
        if fd is None:
            raise Refused(
                f"epoll: what it watches under number {registered} is not in the descriptor table any more, "
                "which cannot be moved"
            )
        which[registered] += 1
        yield EpollTarget(registered, numbers[fd], events, data, pending=bool(events & ~_PRIVATE))


def _where(table: Table, epoll: int, registered: int, which: int, numbers: dict[int, int]) -> int | None:
    """A descriptor of the target, first the number under which it was registered."""
    return next(
        (fd for fd in _candidates(registered, numbers) if _is_target(table.pid, fd, epoll, registered, which)), None
    )


def _candidates(registered: int, numbers: dict[int, int]) -> Iterator[int]:
    if registered in numbers:
        yield registered
    yield from {description: fd for fd, description in numbers.items()}.values()


def _is_target(pid: int, fd: int, epoll: int, registered: int, which: int) -> bool:
    with contextlib.suppress(OSError):
        return kcmp.is_epoll_target(pid, fd, epoll, registered, which)
    return False
