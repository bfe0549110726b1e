"""What a program has changed of its connections after they were foreseen, and before it was frozen."""

import os
from collections.abc import Iterable, Mapping

from postcopy.dump_side import socket_looks
from postcopy.dump_side.opened import Table
from postcopy.dump_side.socket_looks import OfProgram, Seen
from postcopy.errors import DumpError
from postcopy.kernel import socket_options
from postcopy.kernel.batch import RECORD_SIZE
from postcopy.kernel.calls import call
from postcopy.kernel.executor import Executor
from postcopy.kernel.pattern import Blank, Pattern
from postcopy.kernel.socket_look import Told
from postcopy.kernel.socket_options import LIVELY, SO_REUSEADDR, SOL_SOCKET, TCP_ULP, Option
from postcopy.socket_kinds import SocketChange, SocketOption

# What has more to it than its value.
_NOT_ALONE = {TCP_ULP, (SOL_SOCKET, SO_REUSEADDR)}
_F_GETFD, _FD_CLOEXEC = 1, 1


def check_close_on_exec(table: Table, pid: int, executor: Executor) -> None:
    """That it is as foreseen in all descriptors of the process: nobody else can tell of many at once.

    Raises DumpError.
    """
    left, pattern = table.foreseen.pop(pid, []), Pattern()
    pattern.add(call("fcntl", Blank(0), _F_GETFD), "reading the flags of descriptor {}")
    while left:
        batch = executor.batch()
        some, left = left[: batch.free // RECORD_SIZE], left[batch.free // RECORD_SIZE :]
        for slot in some:
            pattern.repeat(batch, (slot.fd,), slot.fd)
        for slot, flags in zip(some, executor.run(batch).results, strict=True):
            if (flags & _FD_CLOEXEC != 0) is not slot.close_on_exec:
                raise _missed(pid, slot.fd)


def changes(otherwise: Iterable[tuple[int, Seen, OfProgram]], pids: Mapping[int, int]) -> list[SocketChange]:
    """Of what `socket_looks.Looks.verify` has found. ``pids``: the processes as the tree numbers them.

    Raises DumpError for what the destination cannot change any more.
    """
    return [_change(pid, pids.get(pid, 0), seen, now) for pid, seen, now in otherwise]


def _change(pid: int, number: int, seen: Seen, now: OfProgram) -> SocketChange:
    fd, _, _, _, kinds, (_, lively, own), _, _ = seen
    flags, delivery, steady = now
    old_flags, old_delivery, old_steady = socket_looks.of_program(seen)
    old, new = (socket_looks.told(kinds, (each, lively, own)) for each in (old_steady, steady))
    before, after = _options(old), _options(new)
    changed = {option for option in before.keys() | after.keys() if before.get(option) != after.get(option)}
    filtered = {(each.filter_length, each.is_filter_locked) for each in (old, new)}
    is_more = (flags ^ old_flags) & ~os.O_NONBLOCK or delivery != old_delivery or len(filtered) > 1
    if not number or is_more or not changed <= after.keys() - _NOT_ALONE:
        raise _missed(pid, fd)
    options = [SocketOption(*option, after[option]) for option in sorted(changed)]
    return SocketChange(number, fd, bool(flags & os.O_NONBLOCK), options)


def _missed(pid: int, fd: int) -> DumpError:
    text = f"process {pid} has changed the connection with descriptor {fd} while it was being frozen"
    return DumpError(text, "it runs on: try again")


def _options(told: Told) -> dict[Option, bytes]:
    named = socket_options.named(told.kind, told.values)
    return {option: value for option, value in named.items() if option not in LIVELY}
