"""Regular files, directories, O_PATH descriptors and simple devices: opened again by path at the destination."""

import os
import stat

from postcopy.dump_side import names
from postcopy.dump_side.opened import O_PATH, Opened, Refused, Table, common
from postcopy.dump_side.shared_memory import DELETED
from postcopy.kernel import procfs
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
    else:
        return None
    if opened.link.startswith(_MEMORY_FILESYSTEMS):
        return _live(table, opened)
    path = _name(opened)
    if kind == "regular":
        writable = opened.flags & os.O_ACCMODE != os.O_RDONLY
        if not writable and path not in table.build_ids:
            table.build_ids[path] = build_id(path)
        identity = b"" if writable else table.build_ids[path]
        table.needed.append(FileIdentity(path, opened.stat.st_size, identity, changing=writable))
    elif kind != "device":
        table.needed.append(FileIdentity.named(path, "directory" if kind == "directory" else "any"))
    return Description(file=OpenFile(path, opened.flags, opened.position, kind))


def _device(opened: Opened) -> tuple[int, int]:
    return os.major(opened.stat.st_rdev), os.minor(opened.stat.st_rdev)


def _live(table: Table, opened: Opened) -> Description:
    """A file of the kernel's own filesystems: that of the process itself, or one that is there on every host."""
    parts = opened.link.split("/")
    path = opened.link
    if parts[1] == "proc" and parts[2].isdigit():
        if opened.stat.st_dev != os.stat("/proc").st_dev:
            return _live_elsewhere(table, opened, parts)
        pid = int(parts[2])
        if path.endswith(DELETED) or pid not in table.pids:
            raise Refused(f"{path}: files of other processes, or of those that have ended, cannot be moved yet")
        parts[2] = "self" if pid == table.pid else str(common(table, pid))
        if parts[3:4] == ["task"] and len(parts) > 4:
            if pid != table.pid or int(parts[4]) not in procfs.tids(pid):
                raise Refused(f"{path}: files of threads elsewhere, or that have ended, cannot be moved yet")
            parts[4] = str(common(table, pid, int(parts[4])))
        return Description(file=OpenFile("/".join(parts), opened.flags, opened.position, "live"))
    table.needed.append(FileIdentity.named(path))
    return Description(file=OpenFile(path, opened.flags, opened.position, "live"))


def _live_elsewhere(table: Table, opened: Opened, parts: list[str]) -> Description:
    """A file of the process itself in the ``/proc`` of a PID namespace that is not ours."""
    numbers = procfs.status(table.pid)["NSpid"].split()
    if parts[2] not in numbers or parts[3:4] == ["task"] or opened.link.endswith(DELETED):
        raise Refused(f"{opened.link}: files of other processes, or of those that have ended, cannot be moved yet")
    path = "/".join(["", "proc", "self", *parts[3:]])
    return Description(file=OpenFile(path, opened.flags, opened.position, "live"))


def _name(opened: Opened) -> str:
    """A name under which the file is found; its last one, or another in the same directory."""
    if opened.is_named:
        return opened.link
    try:
        if os.path.samestat(opened.stat, os.lstat(opened.link)):
            return opened.link
    except OSError:
        pass
    if opened.link.endswith(DELETED):
        try:
            if other := names.in_same_directory(opened.link, opened.stat):
                return other
        except OSError as error:
            raise Refused(f"{opened.link}: its directory cannot be searched: {error.strerror}") from None
        what = "this name of it was deleted, and no other is in the same directory"
        raise Refused(
            f"{opened.link}: {what if opened.stat.st_nlink else 'deleted files of this kind cannot be moved'}"
        )
    if os.path.lexists(opened.link):
        raise Refused(f"{opened.link}: another file has this name now")
    raise Refused(f"{opened.link}: the file cannot be found under this name any more")
