"""inotify(7): the watches by number. Events that nobody has read cannot be given to another instance."""

import contextlib
import os
import re

from postcopy.dump_side.opened import Opened, Refused, Table
from postcopy.kernel import inotify, procfs
from postcopy.open_kinds import Inotify, Watch
from postcopy.state import Description, FileIdentity

_LINE = re.compile(
    r"inotify wd:(\w+) ino:(\w+) sdev:(\w+) mask:(\w+) .*?"
    r"(?:fhandle-bytes:(?P<size>\w+) fhandle-type:(?P<type>\w+) f_handle:(?P<handle>\w+))?$"
)
_MINOR_BITS = 20  # of the kernel's own device numbers (include/linux/kdev_t.h)


def collect(table: Table, opened: Opened) -> Description | None:
    """The description of an inotify instance; None for other kinds."""
    if opened.link not in ("anon_inode:inotify", "anon_inode:[inotify]"):
        return None
    with opened.duplicate() as own:
        if unread := inotify.unread(own):
            raise Refused(
                f"{opened.link}: {unread} bytes of events are unread, which cannot be moved; let it read them"
            )
    watches = [_watch(table, opened, match) for line in opened.info if (match := _LINE.match(line))]
    return Description(inotify=Inotify(sorted(watches, key=lambda watch: watch.number), opened.flags))


def _watch(table: Table, opened: Opened, match: re.Match[str]) -> Watch:
    number, inode, device, mask = (int(match[group], 16) for group in (1, 2, 3, 4))
    if match["handle"] is None:
        raise Refused(f"{opened.link}: watch {number} is on a filesystem without file handles; its path is not known")
    handle = bytes.fromhex(match["handle"])[: int(match["size"], 16)]
    found = path(device, int(match["type"], 16), handle, inode)
    if found is None:
        raise Refused(f"{opened.link}: what watch {number} watches (inode {inode}) has no name any more")
    table.needed.append(FileIdentity.named(found))
    return Watch(number, found, mask)


def device_numbers(device: int) -> tuple[int, int]:
    """Major and minor number out of the kernel's own."""
    return device >> _MINOR_BITS, device & (1 << _MINOR_BITS) - 1


def path(device: int, kind: int, handle: bytes, inode: int) -> str | None:
    """The name of a file by its handle; None where it has none."""
    for mountpoint in procfs.mountpoints(os.getpid(), device_numbers(device)):
        with contextlib.suppress(OSError):
            mount = os.open(mountpoint, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                found = inotify.open_by_handle(mount, kind, handle)
            finally:
                os.close(mount)
            try:
                name = os.readlink(f"/proc/self/fd/{found}")
                if os.path.samestat(os.lstat(name), os.fstat(found)) and os.fstat(found).st_ino == inode:
                    return name
            finally:
                os.close(found)
    return None
