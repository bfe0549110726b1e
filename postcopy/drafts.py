"""The state of a frozen tree, told by what is not as its draft said: most of a state is known before the freeze.

What is the same is left out at the source, which must have taken it from the draft, and put back at the destination.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from postcopy.errors import ProtocolError
from postcopy.integers import Pid
from postcopy.state import Draft, Memory, Tree


@dataclass(frozen=True, slots=True)
class State:
    """What is new in ``tree``. ``laid_out``: the processes whose layout is that of the draft, and left out."""

    tree: Tree
    laid_out: list[Pid]


def shorten(tree: Tree, draft: Draft) -> State:
    """Leave out what ``tree`` has from ``draft``."""
    drafted = {sketch.pid: sketch.memory for sketch in draft.processes}
    known = [each.pid for each in tree.processes if each.pid in drafted and _same(each.memory, drafted[each.pid])]
    left_out = set(known)
    processes = [
        replace(each, memory=replace(each.memory, vmas=[], files=[], exe="", auxv=b"", vdso=b""))
        if each.pid in left_out
        else each
        for each in tree.processes
    ]
    return State(replace(tree, processes=processes), known)


def complete(state: State, draft: Draft) -> Tree:
    """Put back what was left out. Raises ProtocolError where the draft has not said it."""
    drafted = {sketch.pid: sketch.memory for sketch in draft.processes}
    left_out = set(state.laid_out)
    if unknown := left_out - drafted.keys():
        raise ProtocolError(f"state.laid_out: the draft has no process {min(unknown)}")
    processes = [
        replace(each, memory=_laid_out(each.memory, drafted[each.pid])) if each.pid in left_out else each
        for each in state.tree.processes
    ]
    return replace(state.tree, processes=processes)


def known_parts(draft: Draft) -> Iterator[object]:
    """What of a draft may be in a completed tree, as it is there."""
    return (sketch.memory.vmas for sketch in draft.processes)


def _same(memory: Memory, drafted: Memory) -> bool:
    # Comparing lists of thousands would take longer than sending them: who has it from the draft has the same list.
    same = memory.vmas is drafted.vmas and memory.files is drafted.files
    return same and (memory.exe, memory.auxv, memory.vdso) == (drafted.exe, drafted.auxv, drafted.vdso)


def _laid_out(memory: Memory, drafted: Memory) -> Memory:
    return replace(
        memory,
        vmas=drafted.vmas,
        files=drafted.files,
        exe=drafted.exe,
        auxv=drafted.auxv,
        vdso=drafted.vdso,
    )
