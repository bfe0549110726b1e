"""Open file descriptions that are no files with a name, in words."""

from postcopy.open_kinds import Epoll, Ghost, GhostOpening, TimerDescriptor
from postcopy.state import Description, Descriptors

_CLOCKS = {0: "CLOCK_REALTIME", 1: "CLOCK_MONOTONIC", 7: "CLOCK_BOOTTIME", 8: "CLOCK_REALTIME_ALARM"}


def describe(of: Description, table: Descriptors) -> tuple[str, str]:
    """Its kind, and what is to be said of it."""
    if of.ghost is not None:
        return _ghost(of.ghost, table.ghosts[of.ghost.ghost])
    if of.event_counter is not None:
        return "eventfd", f"{of.event_counter.count}{', a semaphore' if of.event_counter.semaphore else ''}"
    if of.timer is not None:
        return "timerfd", _timer(of.timer)
    if of.signals is not None:
        return "signalfd", f"signals {', '.join(_signals(of.signals.mask)) or 'none'}"
    if of.epoll is not None:
        return "epoll", _epoll(of.epoll)
    if of.inotify is not None:
        return "inotify", ", ".join(f"{watch.number}: {watch.path}" for watch in of.inotify.watches) or "no watches"
    if of.fanotify is not None:
        marks = ", ".join(f"{mark.kind} of {mark.path}" for mark in of.fanotify.marks)
        return "fanotify", marks or "no marks"
    if of.external is not None:
        return "external", f"{of.external.resource}, for which restore is given another (--inherit-fd)"
    if of.terminal is not None:
        side = "master" if of.terminal.master else "slave"
        return "terminal", f"{side} of /dev/pts/{table.ptys[of.terminal.pty].index}"
    if of.queue is not None:
        queue = table.queues[of.queue.queue]
        return "mqueue", f"/{queue.name}, {len(queue.messages)} messages" if queue.name else "a queue without a name"
    if of.process is not None:
        return "pidfd", f"process {of.process.pid}"
    if of.ended is not None:
        return "pidfd", f"a process that has ended with wait status {of.ended.status:#x}"
    return "", ""


def _ghost(opening: GhostOpening, ghost: Ghost) -> tuple[str, str]:
    held = sum(len(extent.content) for extent in ghost.extents)
    return (
        f"{ghost.kind}, deleted",
        f"{ghost.name}, {ghost.size} bytes, {held} of them here, at byte {opening.position}",
    )


def _timer(timer: TimerDescriptor) -> str:
    clock = _CLOCKS.get(timer.clock, f"clock {timer.clock}")
    left = f"{timer.left / 1e9:.3f} s left" if timer.left else "disarmed"
    again = f", then every {timer.interval / 1e9:.3f} s" if timer.interval else ""
    return f"{clock}, {left}{again}, {timer.ticks} expirations unread"


def _signals(mask: int) -> list[str]:
    return [str(number) for number in range(1, 65) if mask >> number - 1 & 1]


def _epoll(epoll: Epoll) -> str:
    return ", ".join(f"{target.fd} ({target.events:#x})" for target in epoll.targets) or "no targets"
