"""Which edges (EPOLLET) of epoll instances the program has yet to be told of.

Nothing shows it but epoll_wait, and what that tells is told for good. So the frozen thread itself makes the call, and
all targets that it may have taken an event of are armed anew by the same list of calls: were we to die in between, the
program would be told of an event twice rather than never. Alive, we leave out what has not been told.
"""

from msgspec import structs

from postcopy.deadline import uninterrupted
from postcopy.dump_side.arena import accepted
from postcopy.dump_side.opened import Table
from postcopy.kernel.batch import RECORD_SIZE
from postcopy.kernel.calls import call
from postcopy.kernel.epoll import (
    EPOLL_CTL_MOD,
    EPOLLET,
    EPOLLEXCLUSIVE,
    EPOLLONESHOT,
    EPOLLWAKEUP,
    EVENT_SIZE,
    event,
    parse,
)
from postcopy.kernel.executor import Executor
from postcopy.open_kinds import Epoll, EpollTarget
from postcopy.state import Description

_EXTRA = 16 * RECORD_SIZE
_PRIVATE = EPOLLET | EPOLLEXCLUSIVE | EPOLLONESHOT | EPOLLWAKEUP


def find(table: Table, pid: int, executor: Executor) -> None:
    """Set ``pending`` of the targets of the epoll instances that this process is the first to have.

    It stays set where it cannot be found out.
    """
    descriptions = table.descriptors.descriptions
    numbers = {slot.fd: slot.description for slot in table.slots[pid]}
    among = {
        number: epoll
        for number in numbers.values()
        if (epoll := descriptions[number].epoll) is not None and any(map(_is_edge, epoll.targets))
    }
    holders = table.first_holders() if among else {}
    instances = [(number, holders[number][1], epoll) for number, epoll in among.items() if holders[number][0] == pid]
    # Arming an inner instance anew is news for an outer one: the outer ones come first.
    instances.sort(key=lambda each: -_depth(descriptions, each[0]))
    for number, fd, epoll in instances:
        if all(_can_be_armed_anew(target, numbers) for target in epoll.targets):
            descriptions[number] = structs.replace(descriptions[number], epoll=_find(fd, epoll, executor))


def _find(instance: int, epoll: Epoll, executor: Executor) -> Epoll:
    batch = executor.batch()
    targets = epoll.targets
    if batch.free < (2 * RECORD_SIZE + EVENT_SIZE) * len(targets) + _EXTRA:
        return epoll
    room = batch.room(EVENT_SIZE * len(targets))
    waited = batch.add(call("epoll_wait", instance, room, len(targets), 0))
    pause = executor.pause(batch)
    armed: dict[int, EpollTarget] = {}
    for target in filter(_is_taken, targets):
        anew = batch.place(event(target.events, target.data))
        armed[batch.add(call("epoll_ctl", instance, EPOLL_CTL_MOD, target.fd, anew), "arming anew")] = target
    # An exception in between would leave the program without its events.
    with uninterrupted():
        answers = executor.run_to(batch, pause)
        told = {data for _, data in parse(answers.read(room, EVENT_SIZE * len(targets)), max(answers.value(waited), 0))}
        for number, target in armed.items():
            if target.data not in told:
                executor.leave_out(number)
        answers = executor.go_on()
    accepted(f"epoll instance {instance}", answers)
    return structs.replace(
        epoll,
        targets=[
            structs.replace(target, pending=target.data in told) if _is_edge(target) else target for target in targets
        ],
    )


def _is_edge(target: EpollTarget) -> bool:
    return bool(target.events & EPOLLET) and not target.events & EPOLLONESHOT


def _is_taken(target: EpollTarget) -> bool:
    """Whether epoll_wait takes the event away: not of level-triggered ones, which stay."""
    return bool(target.events & (EPOLLET | EPOLLONESHOT)) and bool(target.events & ~_PRIVATE)


def _can_be_armed_anew(target: EpollTarget, numbers: dict[int, int]) -> bool:
    """Whether epoll_ctl(2) lets us: by the number under which it was registered, and not with EPOLLEXCLUSIVE."""
    if not _is_taken(target):
        return True
    return numbers.get(target.fd) == target.description and not target.events & EPOLLEXCLUSIVE


def _depth(descriptions: list[Description], number: int) -> int:
    """How deeply instances are nested in this one (epoll(7) allows five levels)."""
    epoll = descriptions[number].epoll
    if epoll is None:
        return 0
    return 1 + max((_depth(descriptions, target.description) for target in epoll.targets), default=0)
