"""inotify(7): the watches with their numbers."""

import os
from typing import TYPE_CHECKING

from postcopy.kernel.calls import call
from postcopy.kernel.inotify import IN_DONT_FOLLOW, INOTIFY_IOC_SETNEXTWD
from postcopy.open_kinds import Inotify
from postcopy.state import Slot

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan


def rebuild(plan: "Plan", slot: Slot, state: Inotify) -> None:
    """Add the calls that make the instance, without its watches."""
    purpose = f"making an inotify instance (descriptor {slot.fd})"
    opened = plan.next_fd()
    plan.batch.add(call("inotify_init1", state.flags & os.O_NONBLOCK), purpose)
    plan.settle(opened, slot.fd, slot.close_on_exec, purpose)


def connect(plan: "Plan") -> None:
    """Add the calls that add the watches."""
    for number, description in enumerate(plan.state.descriptions):
        if description.inotify is None or plan.shared.descriptions[number][0] != plan.pid:
            continue
        instance = plan.shared.descriptions[number][1]
        for watch in description.inotify.watches:
            purpose = f"watching {watch.path}"
            plan.batch.add(call("ioctl", instance, INOTIFY_IOC_SETNEXTWD, watch.number), purpose)
            # The path is that of the file itself, or a link to what is open.
            path, mask = watch.path, watch.mask | IN_DONT_FOLLOW
            if watch.ghost >= 0:
                path, mask = f"/proc/self/fd/{plan.place(watch.ghost, purpose)}", watch.mask
            plan.batch.add(call("inotify_add_watch", instance, plan.batch.text(path), mask), purpose)
