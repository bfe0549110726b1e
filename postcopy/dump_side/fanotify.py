"""fanotify(7): the class of a group, and its marks. Events that nobody has read cannot be given to another group."""

import os
import re

from postcopy.dump_side import inotify
from postcopy.dump_side.opened import Opened, Refused, Table
from postcopy.kernel import procfs
from postcopy.kernel.fanotify import FAN_CLOEXEC, FAN_NONBLOCK, FAN_PERMISSIONS
from postcopy.kernel.inotify import unread
from postcopy.open_kinds import Fanotify, FanotifyMark
from postcopy.state import Description, FileIdentity

_GROUP = re.compile(r"fanotify flags:(\w+) event-flags:(\w+)")
_MARK = re.compile(
    r"fanotify (?:ino:(?P<inode>\w+) )?(?:sdev:(?P<device>\w+)|mnt_id:(?P<mount>\w+)) "
    r"mflags:(?P<flags>\w+) mask:(?P<mask>\w+) ignored_mask:(?P<ignored>\w+)"
    r"(?: fhandle-bytes:(?P<size>\w+) fhandle-type:(?P<type>\w+) f_handle:(?P<handle>\w+))?\s*$"
)
_CAP_SYS_ADMIN = 21


def collect(table: Table, opened: Opened) -> Description | None:
    """The description of a fanotify group; None for other kinds."""
    if opened.link not in ("anon_inode:fanotify", "anon_inode:[fanotify]"):
        return None
    with opened.duplicate() as own:
        if unread(own):
            raise Refused(f"{opened.link}: events are unread, which cannot be moved; let it read them")
    if not int(procfs.status(table.pid)["CapEff"], 16) >> _CAP_SYS_ADMIN & 1:
        # Nothing shows whether it was made without: then it tells less.
        raise Refused(f"{opened.link}: it belongs to a process without CAP_SYS_ADMIN, which cannot be moved yet")
    lines = [line for line in opened.info if line.startswith("fanotify")]
    group = _GROUP.match(lines[0]) if lines else None
    if group is None:
        raise Refused(f"{opened.link}: what the kernel tells of it cannot be understood")
    return Description(
        fanotify=Fanotify(
            made_with=int(group[1], 16) & ~(FAN_CLOEXEC | FAN_NONBLOCK),
            event_flags=int(group[2], 16),
            marks=[_mark(table, opened, line) for line in lines[1:]],
            flags=opened.flags,
        )
    )


def _mark(table: Table, opened: Opened, line: str) -> FanotifyMark:
    found = _MARK.match(line)
    if found is None:
        raise Refused(f"{opened.link}: a mark of this kind cannot be moved yet: {line}")
    flags, mask, ignored = (int(found[name], 16) for name in ("flags", "mask", "ignored"))
    if mask & FAN_PERMISSIONS:
        raise Refused(f"{opened.link}: it decides what others may do (permission events), which cannot be moved yet")
    kind, path = _place(found)
    if path is None:
        raise Refused(f"{opened.link}: what a mark is on cannot be found by a name: {line}")
    table.needed.append(FileIdentity.named(path))
    return FanotifyMark(kind, path, flags, mask, ignored)


def _place(found: re.Match[str]) -> tuple[str, str | None]:
    """What a mark is on, and a path that leads there; None where there is none."""
    if found["mount"] is not None:
        return "mount", procfs.mountpoint(os.getpid(), int(found["mount"], 16))
    device = int(found["device"], 16)
    if found["inode"] is None:
        points = procfs.mountpoints(os.getpid(), inotify.device_numbers(device))
        return "filesystem", points[0] if points else None
    if found["handle"] is None:
        return "inode", None
    handle = bytes.fromhex(found["handle"])[: int(found["size"], 16)]
    return "inode", inotify.path(device, int(found["type"], 16), handle, int(found["inode"], 16))
