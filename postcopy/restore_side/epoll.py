"""epoll(7): registered again when all targets are there; what the program has been told of is not told again."""

import os
from typing import TYPE_CHECKING

from msgspec import Struct

from postcopy.kernel.batch import Answers
from postcopy.kernel.calls import call
from postcopy.kernel.epoll import (
    EPOLL_CTL_ADD,
    EPOLL_CTL_MOD,
    EPOLLERR,
    EPOLLET,
    EPOLLEXCLUSIVE,
    EPOLLHUP,
    EPOLLIN,
    EPOLLONESHOT,
    EPOLLOUT,
    EPOLLPRI,
    EPOLLRDHUP,
    EPOLLWAKEUP,
    EVENT_SIZE,
    event,
)
from postcopy.open_kinds import Epoll, EpollTarget
from postcopy.state import Slot

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan

_F_SETFL = 4
_PRIVATE = EPOLLET | EPOLLEXCLUSIVE | EPOLLONESHOT | EPOLLWAKEUP
# Kinds in which nothing happens while the program stands still.
_STILL = ("pipe", "event_counter", "signals")
_ANYTHING = EPOLLIN | EPOLLPRI | EPOLLOUT | EPOLLRDHUP | EPOLLERR | EPOLLHUP


class Armed(Struct):
    """One-shot targets that are to be silent: the call that took their event, instance, number and target of each."""

    tries: list[tuple[int, int, EpollTarget]] = []


def rebuild(plan: "Plan", slot: Slot, state: Epoll) -> None:
    """Add the calls that make the instance, without its targets."""
    purpose = f"making an epoll instance (descriptor {slot.fd})"
    opened = plan.next_fd()
    plan.batch.add(call("epoll_create1", 0), purpose)
    if state.flags & os.O_NONBLOCK:
        plan.batch.add(call("fcntl", opened, _F_SETFL, state.flags), purpose)
    plan.settle(opened, slot.fd, slot.close_on_exec, purpose)


def connect(plan: "Plan") -> Armed:
    """Add the calls that register the targets.

    What is ready counts as news when it is registered. So first come the targets of which the program has been told,
    and these events are taken; then the others.
    """
    armed = Armed()
    for number, description in enumerate(plan.state.descriptions):
        if description.epoll is None or plan.shared.descriptions[number][0] != plan.pid:
            continue
        instance = plan.shared.descriptions[number][1]
        told = 0
        for target in description.epoll.targets:
            if _is_disarmed(target):
                _register(plan, instance, target, EPOLL_CTL_ADD, target.events | _ANYTHING)
                room = plan.batch.room(EVENT_SIZE)
                taken = plan.batch.add(call("epoll_wait", instance, room, 1, 0), "taking an event")
                armed.tries.append((taken, instance, target))
            elif _was_told(plan, target):
                _register(plan, instance, target, EPOLL_CTL_ADD, target.events)
                told += 1
        if told:
            room = plan.batch.room(EVENT_SIZE * told)
            plan.batch.add(call("epoll_wait", instance, room, told, 0), "taking events")
        for target in description.epoll.targets:
            if not _is_disarmed(target) and not _was_told(plan, target):
                _register(plan, instance, target, EPOLL_CTL_ADD, target.events)
    return armed


def disarm(plan: "Plan", armed: Armed, answers: Answers) -> None:
    """Add the calls that silence one-shot targets that were not ready for anything, as far as epoll_ctl(2) lets us.

    Errors and hang-ups cannot be left out: these alone would be told once more.
    """
    for taken, instance, target in armed.tries:
        if not answers.value(taken):
            _register(plan, instance, target, EPOLL_CTL_MOD, target.events)


def _was_told(plan: "Plan", target: EpollTarget) -> bool:
    """Whether an event that is there now is no news. What may come from elsewhere meanwhile always is."""
    description = plan.state.descriptions[target.description]
    return not target.pending and any(getattr(description, kind) is not None for kind in _STILL)


def _is_disarmed(target: EpollTarget) -> bool:
    return bool(target.events & EPOLLONESHOT) and not target.events & ~_PRIVATE


def _register(plan: "Plan", instance: int, target: EpollTarget, what: int, events: int) -> None:
    """Add the calls; the target must have the number for a moment under which it was registered."""
    purpose = f"registering descriptor {target.fd} with epoll instance {instance}"
    batch = plan.batch
    made = call("epoll_ctl", instance, what, target.fd, batch.place(event(events, target.data)))
    place = plan.place(target.description, purpose)
    owner = plan.slots.get(target.fd)
    if owner is not None and owner.description == target.description:
        batch.add(made, purpose)
    elif owner is None:
        plan.duplicate(place, target.fd, True, purpose)
        batch.add(made, purpose)
        plan.close(target.fd)
    else:
        aside = plan.parking()
        plan.duplicate(target.fd, aside, True, purpose)
        plan.duplicate(place, target.fd, True, purpose)
        batch.add(made, purpose)
        plan.duplicate(aside, target.fd, owner.close_on_exec, purpose)
        plan.close(aside)
