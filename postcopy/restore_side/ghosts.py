"""Files without a name: made anew, filled from outside, and opened as often as they were."""

import os
from typing import TYPE_CHECKING

from postcopy.kernel import pidfd
from postcopy.kernel.calls import call
from postcopy.open_kinds import Ghost, GhostOpening
from postcopy.state import Slot

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan

_AT_FDCWD = -100
_SEEK_SET = 0
_NAME_MAX = 255
_O_TMPFILE = 0o20000000 | os.O_DIRECTORY


def _parked(plan: "Plan", number: int) -> int:
    """The number where the file is parked: made here, or taken from who has made it."""
    holder, fd = plan.shared.ghosts[number]
    if holder == plan.pid:
        return _make(plan, plan.state.ghosts[number])
    purpose = f"taking {plan.state.ghosts[number].name} from process {holder}"
    return plan.park(plan.borrow(holder, fd, purpose), purpose)


def _make(plan: "Plan", ghost: Ghost) -> int:
    """Add the calls that make the file, still empty; the number where it is parked."""
    batch = plan.batch
    purpose = f"making {ghost.name}, which has no name any more, in {ghost.directory}"
    with plan.shared.root.entered():
        path = batch.text(_free_name(ghost))
    opened = plan.next_fd()
    if ghost.kind == "temporary":
        batch.add(call("openat", _AT_FDCWD, batch.text(ghost.directory), ghost.made_with, 0o600), purpose)
    elif ghost.kind == "directory":
        batch.add(call("mkdir", path, 0o700), purpose)
        batch.add(call("openat", _AT_FDCWD, path, os.O_RDONLY | os.O_DIRECTORY), purpose)
        batch.add(call("rmdir", path), purpose)
    else:
        batch.add(call("openat", _AT_FDCWD, path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), purpose)
        batch.add(call("unlink", path), purpose)
    return plan.park(opened, purpose)


def _free_name(ghost: Ghost) -> str:
    """A path for a moment: the last one, or one like it where another file has that now."""
    path = os.path.join(ghost.directory, ghost.name)
    if not os.path.lexists(path):
        return path
    stem = os.fsencode(ghost.name)[: _NAME_MAX - 32]
    return os.path.join(ghost.directory, f".{os.fsdecode(stem)}.{os.urandom(8).hex()}")


def open_ghost(plan: "Plan", slot: Slot, state: GhostOpening) -> None:
    """Add the calls that open the parked file once."""
    if state.ghost not in plan.ghosts:
        plan.ghosts[state.ghost] = _parked(plan, state.ghost)
    ghost, parked = plan.state.ghosts[state.ghost], plan.ghosts[state.ghost]
    purpose = f"opening {ghost.name} (descriptor {slot.fd})"
    if state.flags & _O_TMPFILE == _O_TMPFILE:
        # These flags only the opening that makes the file can have.
        plan.duplicate(parked, slot.fd, slot.close_on_exec, purpose)
    else:
        opened = plan.next_fd()
        path = plan.batch.text(f"/proc/self/fd/{parked}")
        # That path is a link.
        plan.batch.add(call("openat", _AT_FDCWD, path, state.flags & ~os.O_NOFOLLOW), purpose)
        plan.settle(opened, slot.fd, slot.close_on_exec, purpose)
    if state.position:
        plan.batch.add(call("lseek", slot.fd, state.position, _SEEK_SET), purpose)


def fill(ghost: Ghost, process: int, fd: int) -> None:
    """Write the content, and set what a file has besides; it is open as ``fd`` in the process of this pidfd.

    Raises OSError.
    """
    theirs = pidfd.getfd(process, fd)
    try:
        _fill(ghost, theirs)
    finally:
        os.close(theirs)


def _fill(ghost: Ghost, theirs: int) -> None:
    # By its path in /proc: the program's descriptor may be for reading only.
    path = f"/proc/self/fd/{theirs}"
    if ghost.kind != "directory":
        own = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.ftruncate(own, ghost.size)
            for extent in ghost.extents:
                _write(own, extent.content, extent.offset)
        finally:
            os.close(own)
    os.chown(path, ghost.uid, ghost.gid)
    os.chmod(path, ghost.mode)
    os.utime(path, ns=ghost.times)


def _write(fd: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
