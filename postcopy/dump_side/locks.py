"""File locks and leases (fcntl(2), flock(2)), as the fdinfo of the description shows them that they were taken by."""

import fcntl
import re

from postcopy.dump_side.opened import Opened, Refused, Table, common
from postcopy.open_kinds import Lock

_LINE = re.compile(r"lock:\s+\d+: (\w+)\s+(\w+)\s+(\w+) -?\d+ \S+ (\d+) (\w+)")
_KINDS = {"POSIX": "posix", "OFDLCK": "ofd", "FLOCK": "flock", "LEASE": "lease"}
_TYPES = {"READ": fcntl.F_RDLCK, "WRITE": fcntl.F_WRLCK}


def collect(table: Table, opened: Opened, description: int, new: bool) -> list[Lock]:
    """The locks that belong to the process, and those of the description where it is ``new``.

    Raises Refused where they are not to be moved, or cannot be.
    """
    return [_lock(table, opened, description, line) for line in opened.info[3:] if _is_wanted(line, new)]


def _is_wanted(line: str, new: bool) -> bool:
    return line.startswith("lock:") and (new or " POSIX " in line)


def _lock(table: Table, opened: Opened, description: int, line: str) -> Lock:
    if not table.choices.file_locks:
        raise Refused(
            f"{opened.link}: it has file locks or leases, which somebody else could get while the program moves; "
            "to move them all the same, give --file-locks"
        )
    match = _LINE.match(line)
    if match is None or match[1] not in _KINDS or match[3] not in _TYPES:
        raise Refused(f"{opened.link}: locks of this kind cannot be moved: {line.removeprefix('lock:').strip()}")
    if match[1] == "LEASE" and match[2] != "ACTIVE":
        raise Refused(f"{opened.link}: its lease is just being broken; try again")
    kind, start = _KINDS[match[1]], int(match[4])
    length = 0 if match[5] == "EOF" else int(match[5]) - start + 1
    owner = common(table, opened.pid) if kind == "posix" else 0
    return Lock(description, owner, kind, _TYPES[match[3]], start, length)
