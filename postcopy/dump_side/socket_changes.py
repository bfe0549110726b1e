"""What was foreseen of a tree's connections and was otherwise when it was frozen; and what could not be foreseen."""

import fcntl
from collections.abc import Iterable, Mapping

from postcopy.dump_side import socket_looks
from postcopy.dump_side.arena import accepted
from postcopy.dump_side.opened import Table
from postcopy.dump_side.socket_looks import Otherwise
from postcopy.errors import DumpError
from postcopy.kernel import socket_options
from postcopy.kernel.batch import RECORD_SIZE
from postcopy.kernel.calls import call
from postcopy.kernel.executor import Executor
from postcopy.kernel.pattern import Blank, Pattern
from postcopy.kernel.socket_look import Told
from postcopy.kernel.socket_options import Option
from postcopy.socket_kinds import SocketChange, SocketOption
from postcopy.state import Slot, Tree


def read_close_on_exec(table: Table, pid: int, executor: Executor) -> None:
    """Ask the process for what is not known of its descriptors: nobody else can tell of many at once.

    Raises DumpError.
    """
    left, pattern = table.foreseen.pop(pid, []), Pattern()
    pattern.add(call("fcntl", Blank(0), fcntl.F_GETFD), "reading the flags of descriptor {}")
    closing: set[int] = set()
    while left:
        batch = executor.batch()
        some, left = left[: batch.free // RECORD_SIZE], left[batch.free // RECORD_SIZE :]
        for fd in some:
            pattern.repeat(batch, (fd,), fd)
        answers = accepted(f"process {pid}", executor.run(batch))
        closing.update(fd for fd, flags in zip(some, answers.results, strict=True) if flags & fcntl.FD_CLOEXEC)
    if closing:
        table.slots[pid] = [
            Slot(slot.fd, slot.fd in closing or slot.close_on_exec, slot.description) for slot in table.slots[pid]
        ]


def changes(otherwise: Iterable[Otherwise], tree: Tree) -> list[SocketChange]:
    """What the destination has to change of the tree. Raises DumpError for what it cannot change any more."""
    found = list(otherwise)
    places = _places(tree) if found else {}
    return [_change(each, *places[each.inode]) for each in found if each.inode in places]


def _places(tree: Tree) -> Mapping[int, tuple[int, int]]:
    """A process and a descriptor of each IP socket, by inode."""
    inodes = {number: one.inet.socket.inode for number, one in enumerate(tree.descriptors.descriptions) if one.inet}
    return {
        inodes[slot.description]: (process.pid, slot.fd)
        for process in tree.processes
        for slot in process.slots
        if slot.description in inodes
    }


def _change(otherwise: Otherwise, pid: int, fd: int) -> SocketChange:
    _, lively, own = otherwise.answers
    old = socket_looks.told(otherwise.kinds, otherwise.answers)
    new = socket_looks.told(otherwise.kinds, (otherwise.steady, lively, own))
    before, after = _options(old), _options(new)
    changed = {option for option in before.keys() | after.keys() if before.get(option) != after.get(option)}
    filters = {(each.filter_length, each.is_filter_locked) for each in (old, new)}
    if otherwise.is_locked or len(filters) > 1 or not changed <= after.keys() & socket_options.changeable(new.kind):
        raise DumpError(
            f"process {pid} has changed the connection with descriptor {fd} while it was being frozen",
            "it runs on: try again",
        )
    values = {option: after[option] for option in socket_options.together(changed) if option in after}
    return SocketChange(pid, fd, [SocketOption(*option, value) for option, value in socket_options.in_order(values)])


def _options(told: Told) -> dict[Option, bytes]:
    return socket_options.named(told.kind, told.values)
