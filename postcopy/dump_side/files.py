"""Regular files, directories, O_PATH descriptors and simple devices: opened again by path at the destination."""

import os
import stat

from postcopy.dump_side.opened import O_PATH, Opened, Refused, Table
from postcopy.kernel.elf import build_id
from postcopy.state import Description, FileIdentity, OpenFile

_DEVICES = {(1, 3): "null", (1, 5): "zero", (1, 7): "full", (1, 8): "random", (1, 9): "urandom"}
_MEMORY_FILESYSTEMS = ("/proc/", "/sys/")


def collect(table: Table, opened: Opened) -> Description | None:
    """The description of a file, directory or device; None for other kinds."""
    if not opened.link.startswith("/"):
        return None
    if opened.flags & O_PATH:
        kind = "path"
    elif opened.mode == stat.S_IFREG:
        kind = "regular"
    elif opened.mode == stat.S_IFDIR:
        kind = "directory"
    elif opened.mode == stat.S_IFCHR and _device(opened) in _DEVICES:
        kind = "device"
    elif opened.mode == stat.S_IFCHR:
        raise Refused(f"{opened.link}: device {_device(opened)} cannot be moved")
    elif opened.mode == stat.S_IFIFO:
        raise Refused(f"{opened.link}: FIFOs cannot be moved yet")
    else:
        return None
    _check_name(opened)
    if kind == "regular":
        writable = opened.flags & os.O_ACCMODE != os.O_RDONLY
        identity = b"" if writable else build_id(opened.link)
        table.needed.append(FileIdentity(opened.link, opened.stat.st_size, identity, changing=writable))
    return Description(file=OpenFile(opened.link, opened.flags, opened.position, kind))


def _device(opened: Opened) -> tuple[int, int]:
    return os.major(opened.stat.st_rdev), os.minor(opened.stat.st_rdev)


def _check_name(opened: Opened) -> None:
    """The file must still be found under its name."""
    if opened.link.endswith(" (deleted)") and not opened.stat.st_nlink:
        raise Refused(f"{opened.link}: deleted files cannot be moved yet")
    if opened.link.startswith(_MEMORY_FILESYSTEMS) and opened.mode == stat.S_IFREG:
        raise Refused(f"{opened.link}: files of the kernel's own filesystems cannot be moved yet")
    try:
        named = os.lstat(opened.link)
    except OSError:
        raise Refused(f"{opened.link}: the file cannot be found under this name any more") from None
    if (named.st_dev, named.st_ino) != (opened.stat.st_dev, opened.stat.st_ino):
        raise Refused(f"{opened.link}: another file has this name now")
