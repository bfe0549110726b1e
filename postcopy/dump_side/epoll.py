"""epoll(7): the targets with what they are watched for; found again where they were duplicated and closed."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from msgspec import structs

from postcopy.dump_side.opened import Opened, Refused, Table
from postcopy.kernel import kcmp, procfs
from postcopy.kernel.epoll import EPOLLET, EPOLLEXCLUSIVE, EPOLLONESHOT, EPOLLWAKEUP
from postcopy.open_kinds import Epoll, EpollTarget
from postcopy.state import Description

_LINE = re.compile(r"tfd: *(\d+) events: *(\w+) data: *(\w+)")
_LINK = "anon_inode:[eventpoll]"
_LOOKS = 3  # a running process may change what we look at
_PRIVATE = EPOLLET | EPOLLEXCLUSIVE | EPOLLONESHOT | EPOLLWAKEUP


def collect(table: Table, opened: Opened) -> Description | None:
    """The description of an epoll instance, without its targets, which `complete` adds; None for other kinds."""
    if opened.link != _LINK:
        return None
    return Description(epoll=Epoll([], opened.flags))


def complete(table: Table, problems: list[str]) -> None:
    """Add the targets of every epoll instance of the tree, now that all that may be one is known."""
    holders = table.first_holders()
    descriptions = table.descriptors.descriptions
    for number, (pid, fd) in holders.items():
        description = descriptions[number]
        if description.epoll is None:
            continue
        try:
            found = _targets(table, pid, fd, holders)
        except (Refused, OSError) as reason:
            if _is_epoll(pid, fd):
                problems.append(f"descriptor {fd} of process {pid}: {reason}")
            continue
        complete = structs.replace(description.epoll, targets=found)
        descriptions[number] = structs.replace(description, epoll=complete)


def _targets(table: Table, pid: int, epoll: int, holders: dict[int, tuple[int, int]]) -> list[EpollTarget]:
    own = {slot.fd: slot.description for slot in table.slots[pid]}
    for look in range(_LOOKS):
        lines = procfs.fdinfo_lines(pid, epoll)
        try:
            return list(_resolved(pid, epoll, own, holders, lines))
        except Refused:
            if table.frozen or look == _LOOKS - 1:
                raise
            # A running process has opened it since its table was looked at.
            own = dict.fromkeys(procfs.descriptors(pid), 0)
            holders = {-fd: (pid, fd) for fd in own}
    raise AssertionError


def _is_epoll(pid: int, fd: int) -> bool:
    with contextlib.suppress(OSError):
        return procfs.link(pid, f"fd/{fd}") == _LINK
    return False


def _resolved(
    pid: int, epoll: int, own: dict[int, int], holders: dict[int, tuple[int, int]], lines: Iterable[str]
) -> Iterator[EpollTarget]:
    which: Counter[int] = Counter()
    for match in filter(None, map(_LINE.match, lines)):
        registered, events, data = int(match[1]), int(match[2], 16), int(match[3], 16)
        candidates = _candidates(pid, registered, own, holders)
        place = pid, epoll, registered, which[registered]
        target = next((number for number, holder, fd in candidates if _is_target(holder, fd, *place)), None)
        if target is None:
            raise Refused(
                f"epoll: what it watches under number {registered} is not in the descriptor table any more, "
                "which cannot be moved"
            )
        which[registered] += 1
        yield EpollTarget(registered, target, events, data, pending=bool(events & ~_PRIVATE))


def _candidates(
    pid: int, registered: int, own: dict[int, int], holders: dict[int, tuple[int, int]]
) -> Iterator[tuple[int, int, int]]:
    """Descriptions that may be the target, with a process and a descriptor: first what has the number now."""
    if registered in own:
        yield own[registered], pid, registered
    for number, (holder, fd) in holders.items():
        yield number, holder, fd


def _is_target(holder: int, fd: int, pid: int, epoll: int, registered: int, which: int) -> bool:
    with contextlib.suppress(OSError):
        return kcmp.is_epoll_target(holder, fd, pid, epoll, registered, which)
    return False
