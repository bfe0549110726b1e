"""What makes sense of open file descriptions: the lines of `postcopy.soundness` for `postcopy.open_kinds`."""

import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from postcopy import in_flight
from postcopy.kernel.fanotify import MARK_KINDS
from postcopy.kernel.pty import SETTINGS_SIZE, WINDOW_SIZE
from postcopy.open_kinds import (
    Delivery,
    EndedProcess,
    Epoll,
    EpollTarget,
    EventCounter,
    Extent,
    External,
    Fanotify,
    FanotifyMark,
    Ghost,
    GhostOpening,
    Inotify,
    Lock,
    PidDescriptor,
    Pty,
    PtyContent,
    PtyEnd,
    SignalDescriptor,
    TimerDescriptor,
    Watch,
)
from postcopy.pty_queues import MOST_OUTPUT, MOST_TYPED
from postcopy.state import StandardStream, Tree

_INT32, _UINT32, _INT64, _UINT64 = range(1 << 31), range(1 << 32), range(1 << 63), range(1 << 64)
_NAME_MAX, _PATH_MAX = 255, 4096
_FILE_KINDS = frozenset({"regular", "directory", "temporary"})

NUMBERS: Mapping[type, Mapping[str, range]] = {
    Delivery: {"kind": range(3), "owner": range(1 << 22), "signal": range(65), "flags": _UINT32},
    EndedProcess: {"identity": _UINT64, "status": range(1 << 16), "flags": _UINT32},
    Epoll: {"flags": _UINT32},
    EpollTarget: {"events": _UINT32, "data": _UINT64},
    EventCounter: {"count": range((1 << 64) - 1), "flags": _UINT32},
    Extent: {"offset": _INT64},
    Fanotify: dict.fromkeys(("made_with", "event_flags", "flags"), _UINT32),
    FanotifyMark: {"flags": _UINT32, "mask": _UINT64, "ignored": _UINT64},
    Ghost: {"mode": range(0o10000), "uid": _UINT32, "gid": _UINT32, "size": _INT64, "made_with": _UINT32},
    GhostOpening: {"flags": _UINT32, "position": _INT64},
    Inotify: {"flags": _UINT32},
    Lock: {"type": range(2), "start": _INT64, "length": _INT64},
    PidDescriptor: {"flags": _UINT32},
    Pty: {"index": _INT32, "session": range(1 << 22), "foreground": range(1 << 22)},
    PtyContent: {"stopped": range(3)},
    PtyEnd: {"flags": _UINT32},
    SignalDescriptor: {"mask": _UINT64, "flags": _UINT32},
    TimerDescriptor: dict.fromkeys(("left", "at", "interval"), _INT64)
    | {"clock": range(16), "set_with": range(4), "ticks": _UINT64, "flags": _UINT32},
    Watch: {"number": _INT32, "mask": _UINT32, "ghost": range(-1, 1 << 31)},
}

LENGTHS: Mapping[type, Mapping[str, range]] = {
    External: {"resource": range(1, 2 * _PATH_MAX)},
    Ghost: {"name": range(_NAME_MAX + 1)},
    PtyContent: {"output": range(MOST_OUTPUT + 1)},
    Pty: {"settings": range(SETTINGS_SIZE, SETTINGS_SIZE + 1), "window": range(WINDOW_SIZE, WINDOW_SIZE + 1)},
}

CHOICES: Mapping[type, Mapping[str, frozenset[str]]] = {
    FanotifyMark: {"kind": frozenset(MARK_KINDS)},
    Ghost: {"kind": _FILE_KINDS},
    Lock: {"kind": frozenset({"posix", "ofd", "flock", "lease"})},
}

PATHS: Mapping[type, tuple[str, ...]] = {FanotifyMark: ("path",), Watch: ("path",)}


def _ghost(ghost: Ghost) -> Iterator[str]:
    if not ghost.directory.startswith("/"):
        yield f"directory: {ghost.directory[:80]!r} is no absolute path"
    if "/" in ghost.name or "\0" in ghost.name + ghost.directory or not ghost.name:
        yield f"name: {ghost.name[:80]!r} is no name of a file"
    end = 0
    for number, extent in enumerate(ghost.extents):
        if extent.offset < end:
            yield f"extents[{number}].offset: {extent.offset} is before the end of the one before it, {end}"
        end = extent.offset + len(extent.content)
    if end > ghost.size:
        yield f"size: {ghost.size}, and content up to {end}"


def tree(whole: Tree) -> Iterator[str]:
    """That what refers to something refers to what is there, and open."""
    table = whole.descriptors
    open_ones = {slot.description for process in whole.processes for slot in process.slots}
    on_their_way = in_flight.makers(whole).keys()
    for number in range(len(table.descriptions)):
        if number not in open_ones and number not in on_their_way:
            yield f"descriptors.descriptions[{number}]: no descriptor refers to it"
        if number in on_their_way and not in_flight.can_be_made(table.descriptions[number]):
            yield f"descriptors.descriptions[{number}]: on its way in a socket, and not of a kind that can be"
    for number, description in enumerate(table.descriptions):
        opening, epoll, end = description.ghost, description.epoll, description.terminal
        if end is not None and end.pty >= len(table.ptys):
            yield f"descriptors.descriptions[{number}].terminal.pty: {end.pty} is none of the {len(table.ptys)}"
        if opening is not None and opening.ghost >= len(table.ghosts):
            yield f"descriptions[{number}].ghost.ghost: {opening.ghost} is none of the {len(table.ghosts)} files"
        for at, watch in enumerate(description.inotify.watches if description.inotify is not None else ()):
            if watch.ghost >= 0 and (watch.ghost not in open_ones or table.descriptions[watch.ghost].ghost is None):
                yield f"descriptions[{number}].inotify.watches[{at}].ghost: {watch.ghost} is none without a name"
        for at, target in enumerate(epoll.targets if epoll is not None else ()):
            if target.description not in open_ones:
                yield f"descriptions[{number}].epoll.targets[{at}].description: {target.description} is not open"
    referring = {
        "deliveries": [delivery.description for delivery in table.deliveries],
        "locks": [lock.description for lock in table.locks],
    }
    owners = {0, *(process.pid for process in whole.processes)}
    for at, lock in enumerate(table.locks):
        if lock.owner not in owners:
            yield f"locks[{at}].owner: there is no process {lock.owner}"
    for name, numbers in referring.items():
        for at, number in enumerate(numbers):
            if number not in open_ones:
                yield f"{name}[{at}].description: {number} is not open"


def _pty(pty: Pty) -> Iterator[str]:
    content = pty.content
    if content is not None and sum(len(line) or 1 for line in (*content.lines, content.typed)) > MOST_TYPED:
        yield f"content: more than the {MOST_TYPED} bytes that can be typed"


def _stream(stream: StandardStream) -> Iterator[str]:
    if len(stream.settings) not in (0, SETTINGS_SIZE):
        yield f"settings: a length of {len(stream.settings)} is neither 0 nor {SETTINGS_SIZE}"


#: Signals that never end a process.
NOT_ENDING = frozenset(
    {
        signal.SIGCHLD,
        signal.SIGCONT,
        signal.SIGSTOP,
        signal.SIGTSTP,
        signal.SIGTTIN,
        signal.SIGTTOU,
        signal.SIGURG,
        signal.SIGWINCH,
    }
)


def _ended(state: EndedProcess) -> Iterator[str]:
    ended_by = state.status & 0xFF
    if ended_by > signal.SIGRTMAX or ended_by in NOT_ENDING or (ended_by and state.status >> 8):
        yield f"status: {state.status:#x} is none of a process without a core dump"


CHECKS: Mapping[type, Callable[[Any], Iterator[str]]] = {
    EndedProcess: _ended,
    Ghost: _ghost,
    Pty: _pty,
    StandardStream: _stream,
}
