"""Regular files, directories, O_PATH descriptors and simple devices: opened again by path."""

import os
from typing import TYPE_CHECKING

from postcopy.kernel.calls import call
from postcopy.state import OpenFile, Slot

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan

_AT_FDCWD = -100
_SEEK_SET = 0
_WITH_POSITION = ("regular", "directory", "live")


def rebuild(plan: "Plan", slot: Slot, file: OpenFile) -> None:
    """Add the calls that open ``file`` at ``slot``."""
    purpose = f"opening {file.path} (descriptor {slot.fd})"
    opened = plan.next_fd()
    at_once = opened == slot.fd
    flags = file.flags | os.O_CLOEXEC if at_once and slot.close_on_exec else file.flags
    plan.batch.add(call("openat", _AT_FDCWD, plan.batch.text(file.path), flags), purpose)
    if file.kind in _WITH_POSITION and file.position:
        plan.batch.add(call("lseek", opened, file.position, _SEEK_SET), f"seeking in {file.path}")
    if not at_once:
        plan.settle(opened, slot.fd, slot.close_on_exec, purpose)
