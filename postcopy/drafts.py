"""The state of a frozen tree, told by what is not as its draft said: most of a state is known before the freeze.

What is the same is left out at the source, which must have taken it from the draft, and put back at the destination:
there it is the very same object, by which is seen what has been begun already.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace

from postcopy.errors import ProtocolError
from postcopy.integers import Unsigned
from postcopy.state import Draft, FileIdentity, MappedFile, Memory, Process, Sketch, Tree, Vma

T = TypeVar("T")


class ProcessState(Struct, frozen=True):
    """What is new of a process; ``laid_out``, ``table``: its layout or its descriptor table is that of the draft."""

    process: Process
    laid_out: bool
    table: bool


class State(Struct, frozen=True):
    """What is new in ``tree``, whose processes are told of by themselves.

    ``descriptions``: of each description its number in the draft, or behind these, its place among those of ``tree``;
    ``files``: the same, with the manifest's.
    """

    tree: Tree
    descriptions: list[Unsigned]
    files: list[Unsigned]


def shorten_process(process: Process, sketch: Sketch | None) -> ProcessState:
    """Leave out what ``process`` has from the draft, where that has it."""
    laid_out = sketch is not None and _same(process.memory, sketch.memory)
    table = sketch is not None and process.slots == sketch.slots
    memory = _with_layout(process.memory, _NO_LAYOUT) if laid_out else process.memory
    return ProcessState(replace(process, memory=memory, slots=[] if table else process.slots), laid_out, table)


def complete_process(state: ProcessState, sketch: Sketch | None) -> Process:
    """Put back what was left out. Raises ProtocolError where nobody has said it."""
    process = state.process
    if not (state.laid_out or state.table):
        return process
    if sketch is None:
        raise ProtocolError(f"process.laid_out: the draft has no process {process.pid}")
    memory = _with_layout(process.memory, sketch.memory) if state.laid_out else process.memory
    return replace(process, memory=memory, slots=sketch.slots if state.table else process.slots)


def shorten(tree: Tree, draft: Draft, announced: list[FileIdentity]) -> State:
    """Leave out the processes, what ``tree`` has from ``draft``, and the files that the manifest has ``announced``."""
    descriptions, numbers = _parted(tree.descriptors.descriptions, draft.descriptions)
    files, places = _parted(tree.files, announced)
    found = replace(tree.descriptors, descriptions=descriptions)
    return State(replace(tree, processes=[], descriptors=found, files=files), numbers, places)


def complete(state: State, processes: list[Process], draft: Draft, announced: list[FileIdentity]) -> Tree:
    """Put back what was left out. Raises ProtocolError where nobody has said it."""
    if state.tree.processes:
        raise ProtocolError(f"state.tree.processes: {len(state.tree.processes)} where none are due")
    found = state.tree.descriptors
    descriptions = _joined("descriptions", state.descriptions, draft.descriptions, found.descriptions)
    files = _joined("files", state.files, announced, state.tree.files)
    return replace(state.tree, processes=processes, descriptors=replace(found, descriptions=descriptions), files=files)


def known_parts(draft: Draft) -> Iterator[object]:
    """What of a draft may be in a completed tree, as it is there."""
    for sketch in draft.processes:
        yield sketch.memory.vmas
        yield sketch.slots
    yield from filter(None, draft.descriptions)


def _parted(items: list[T], known: Sequence[T | None]) -> tuple[list[T], list[int]]:
    """The items that are not ``known``; and of all, their numbers among the known ones and then these."""
    places = {id(each): place for place, each in enumerate(known) if each is not None}
    fresh: list[T] = []
    numbers = []
    for item in items:
        place = places.get(id(item))
        if place is None:
            place = len(known) + len(fresh)
            fresh.append(item)
        numbers.append(place)
    return fresh, numbers


def _joined(name: str, numbers: list[int], known: Sequence[T | None], fresh: list[T]) -> list[T]:
    """Back from `_parted`."""
    every = [*known, *fresh]
    try:
        found = [every[number] for number in numbers]
    except IndexError:
        raise ProtocolError(f"state.{name}: {max(numbers)} is none of {len(every)}") from None
    items = [item for item in found if item is not None]
    if len(items) != len(numbers) or len({*numbers}) != len(numbers):
        raise ProtocolError(f"state.{name}: what the draft has not, or the same twice")
    return items


def _same(memory: Memory, drafted: Memory) -> bool:
    # Comparing lists of thousands would take longer than sending them: who has it from the draft has the same list.
    same = memory.vmas is drafted.vmas and memory.files is drafted.files
    return same and (memory.exe, memory.auxv, memory.vdso) == (drafted.exe, drafted.auxv, drafted.vdso)


class _Layout(Struct, frozen=True):
    """What of `Memory` is left out."""

    vmas: list[Vma]
    files: list[MappedFile]
    exe: str
    auxv: bytes
    vdso: bytes


_NO_LAYOUT = _Layout([], [], "", b"", b"")


def _with_layout(memory: Memory, layout: Memory | _Layout) -> Memory:
    return replace(memory, vmas=layout.vmas, files=layout.files, exe=layout.exe, auxv=layout.auxv, vdso=layout.vdso)
