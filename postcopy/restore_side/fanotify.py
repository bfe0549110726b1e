"""fanotify(7): the group with its class, and its marks."""

import os
from typing import TYPE_CHECKING

from postcopy.kernel.calls import call
from postcopy.kernel.fanotify import (
    FAN_MARK_ADD,
    FAN_MARK_DONT_FOLLOW,
    FAN_MARK_EVICTABLE,
    FAN_MARK_IGNORE,
    FAN_MARK_IGNORED_MASK,
    FAN_MARK_IGNORED_SURV_MODIFY,
    FAN_NONBLOCK,
    MARK_KINDS,
)
from postcopy.open_kinds import Fanotify, FanotifyMark
from postcopy.state import Slot

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan

_AT_FDCWD = -100


def rebuild(plan: "Plan", slot: Slot, state: Fanotify) -> None:
    """Add the calls that make the group, without its marks."""
    purpose = f"making a fanotify group (descriptor {slot.fd})"
    opened = plan.next_fd()
    flags = state.made_with | (FAN_NONBLOCK if state.flags & os.O_NONBLOCK else 0)
    plan.batch.add(call("fanotify_init", flags, state.event_flags), purpose)
    plan.settle(opened, slot.fd, slot.close_on_exec, purpose)


def connect(plan: "Plan") -> None:
    """Add the calls that add the marks."""
    for number, description in enumerate(plan.state.descriptions):
        if description.fanotify is None or plan.shared.descriptions[number][0] != plan.pid:
            continue
        for mark in description.fanotify.marks:
            _add(plan, plan.shared.descriptions[number][1], mark)


def _add(plan: "Plan", group: int, mark: FanotifyMark) -> None:
    purpose = f"watching {mark.path} (fanotify)"
    flags = FAN_MARK_ADD | FAN_MARK_DONT_FOLLOW | MARK_KINDS[mark.kind] | mark.flags & FAN_MARK_EVICTABLE
    path = plan.batch.text(mark.path)
    if mark.mask:
        plan.batch.add(call("fanotify_mark", group, flags, mark.mask, _AT_FDCWD, path), purpose)
    if mark.ignored:
        flags |= mark.flags & FAN_MARK_IGNORED_SURV_MODIFY
        flags |= FAN_MARK_IGNORE if mark.flags & FAN_MARK_IGNORE else FAN_MARK_IGNORED_MASK
        plan.batch.add(call("fanotify_mark", group, flags, mark.ignored, _AT_FDCWD, path), purpose)
