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
    matches = [match for line in opened.info if (match := _LINE.match(line))]
    watches = [_watch(table, opened, match) for match in matches]
    state = Inotify(sorted(watches, key=lambda watch: watch.number), opened.flags)
    nameless = {
        watch.number: (os.makedev(*device_numbers(int(match[3], 16))), int(match[2], 16))
        for watch, match in zip(watches, matches, strict=True)
        if not watch.path
    }
    if nameless:
        table.watched_ghosts.append((state, nameless))
    return Description(inotify=state)


def complete(table: Table, problems: list[str]) -> None:
    """Once all tables have been collected: which open files are those without a name that are watched."""
    found = table.descriptors
    numbers = {id(each.inotify): number for number, each in enumerate(found.descriptions) if each.inotify is not None}
    openings = {each.ghost.ghost: number for number, each in enumerate(found.descriptions) if each.ghost is not None}
    for state, nameless in table.watched_ghosts:
        # A running process may have closed it while it was being looked at.
        number = numbers.get(id(state), -1)
        if number >= 0:
            watches = [_completed(table, watch, nameless, openings, problems) for watch in state.watches]
            found.descriptions[number] = Description(inotify=Inotify(watches, state.flags))


def _completed(
    table: Table, watch: Watch, nameless: dict[int, tuple[int, int]], openings: dict[int, int], problems: list[str]
) -> Watch:
    if watch.path:
        return watch
    ghost = table.ghost_numbers.get(nameless[watch.number], -1)
    if ghost not in openings:
        inode = nameless[watch.number][1]
        problems.append(
            f"inotify: what watch {watch.number} watches (inode {inode}) has no name and is not open as a file"
        )
        return watch
    file = table.descriptors.ghosts[ghost]
    return Watch(watch.number, os.path.join(file.directory, file.name), watch.mask, openings[ghost])


def _watch(table: Table, opened: Opened, match: re.Match[str]) -> Watch:
    number, inode, device, mask = (int(match[group], 16) for group in (1, 2, 3, 4))
    if match["handle"] is None:
        raise Refused(f"{opened.link}: watch {number} is on a filesystem without file handles; its path is not known")
    handle = bytes.fromhex(match["handle"])[: int(match["size"], 16)]
    found = path(device, int(match["type"], 16), handle, inode)
    if found is None:
        return Watch(number, "", mask)  # for `complete`
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
