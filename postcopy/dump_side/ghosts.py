"""Files without a name: deleted ones that are still open, and O_TMPFILE. They travel with their content."""

import errno
import os
import stat

from postcopy.dump_side.opened import Opened, Refused, Table
from postcopy.dump_side.shared_memory import DELETED
from postcopy.kernel import procfs
from postcopy.kernel.holes import data_ranges
from postcopy.open_kinds import Extent, Ghost, GhostOpening
from postcopy.state import Description, FileIdentity, OpenMemory

_O_TMPFILE = 0o20000000 | os.O_DIRECTORY
_KINDS = {stat.S_IFREG: "regular", stat.S_IFDIR: "directory"}


def collect(table: Table, opened: Opened) -> Description | None:
    """The description of a file without a name; None for other kinds. The file itself is added to the table once."""
    if not opened.link.endswith(DELETED) or opened.stat.st_nlink or opened.mode not in _KINDS:
        return None
    # A program in a chroot sees only the mounts within.
    mounts = procfs.mount_ids(opened.pid) | procfs.mount_ids(os.getpid())
    if int(opened.field("mnt_id") or 0) not in mounts:
        # On a mount of the kernel's own, where no program can make another.
        raise Refused(f"{opened.link}: memory of this kind cannot be moved yet")
    key = opened.stat.st_dev, opened.stat.st_ino
    if key in table.mapped_without_name():
        # Mapping and descriptor must stay one file.
        number = table.shared.of_memfd(opened.pid, opened.fd, opened.link, opened.stat)
        return Description(memory=OpenMemory(number, opened.flags, opened.position))
    if key not in table.ghost_numbers:
        # Looking fails where a running process closes it meanwhile: then it has no number.
        looked_at = _file(table, opened)
        table.ghost_numbers[key] = len(table.descriptors.ghosts)
        table.descriptors.ghosts.append(looked_at)
    return Description(ghost=GhostOpening(table.ghost_numbers[key], opened.flags, opened.position))


def _file(table: Table, opened: Opened) -> Ghost:
    directory, name = os.path.split(opened.link.removesuffix(DELETED))
    directory = _nearest(directory, opened)
    table.needed.append(FileIdentity.named(directory, "directory"))
    if opened.flags & _O_TMPFILE == _O_TMPFILE:
        return _ghost(table, opened, "temporary", directory, name, made_with=opened.flags)
    return _ghost(table, opened, _KINDS[opened.mode], directory, name)


def _nearest(directory: str, opened: Opened) -> str:
    """The directory, or what is left of the way to it on the same filesystem."""
    while True:
        try:
            if os.stat(directory).st_dev == opened.stat.st_dev:
                return directory
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise
        if directory in ("/", ""):
            raise Refused(f"{opened.link}: deleted, and its filesystem cannot be found under this name any more")
        directory = os.path.dirname(directory)


def _ghost(table: Table, opened: Opened, kind: str, directory: str, name: str, made_with: int = 0) -> Ghost:
    found = opened.stat
    return Ghost(
        kind=kind,
        directory=directory,
        name=name,
        mode=stat.S_IMODE(found.st_mode),
        uid=found.st_uid,
        gid=found.st_gid,
        times=(found.st_atime_ns, found.st_mtime_ns),
        size=0 if kind == "directory" else found.st_size,
        extents=[] if kind == "directory" else _content(table, opened),
        made_with=made_with,
    )


def _content(table: Table, opened: Opened) -> list[Extent]:
    """What is in the file; read only when the process is frozen. Holes stay holes: lseek(2), SEEK_DATA."""
    own = os.open(f"/proc/{opened.pid}/fd/{opened.fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        ranges = data_ranges(own, os.fstat(own).st_size)
        held, most = sum(map(len, ranges)), table.choices.ghost_limit
        if held > most:
            raise Refused(
                f"{opened.link}: its {held} bytes would travel while the program stands still; the limit is {most}, "
                f"which --ghost-limit {held} raises"
            )
        if not table.frozen:
            return []
        return [Extent(each.start, os.pread(own, len(each), each.start)) for each in ranges]
    finally:
        os.close(own)
