"""The spaces of a tree: what has pages, as the page protocol and checkpoint directories number it."""

from msgspec import Struct

from postcopy.huge_pages import HugeArea, HugeAreas, is_lazy, is_lazy_object
from postcopy.page_ranges import PageRanges
from postcopy.state import Process, Tree

# F_SEAL_WRITE, F_SEAL_FUTURE_WRITE (fcntl(2)): whoever fills the memory must have done so before.
_SEALED = 0x8 | 0x10


class Space(Struct, frozen=True):
    """A process's memory, or memory that processes may share: its number, whose it is, pages sent and left lazy."""

    number: int
    owner: str
    sent: PageRanges
    lazy: PageRanges


def spaces_of(tree: Tree) -> list[Space]:
    """All of them, in the order in which the content of the pages that are sent follows the state.

    Raises ProtocolError for ranges that are none.
    """
    return [*map(space_of, tree.processes), *spaces_shared(tree)]


def space_of(process: Process) -> Space:
    """That of one process. Raises as above."""
    owner, memory = f"process {process.pid}", process.memory
    return Space(process.space, owner, PageRanges.unpack(memory.sent), PageRanges.unpack(memory.lazy))


def spaces_shared(tree: Tree) -> list[Space]:
    """Those that processes may share. Raises as above."""
    return [
        Space(each.space, f"shared memory {number}", PageRanges.unpack(each.sent), PageRanges.unpack(each.lazy))
        for number, each in enumerate(tree.shared_memory)
    ]


def filled_first(tree: Tree) -> frozenset[int]:
    """The numbers of those spaces whose lazy pages must be there before the tree runs.

    Who touches a missing page by a shared mapping waits for it (userfaultfd). Not so read(2), which takes it for a
    hole; so all memory comes first that the program has or can get a descriptor of, or a mapping that `restore` has not
    made, or that it maps in a way that userfaultfd does not cover.
    """
    first = {each.memory.memory for each in tree.descriptors.descriptions if each.memory is not None}
    for number, each in enumerate(tree.shared_memory):
        if each.system_v is not None or each.seals & _SEALED or (each.huge_shift and not is_lazy_object(each)):
            first.add(number)
    for process in tree.processes:
        for vma in process.memory.vmas:
            # Without VM_MAYWRITE: EPERM (fs/userfaultfd.c). A private page of zeros would hide the shared one.
            if vma.backing == "object" and not (vma.shared and vma.writable):
                first.add(vma.file)
    return frozenset(tree.shared_memory[number].space for number in first)


def pushed(tree: Tree) -> dict[int, PageRanges]:
    """The lazy pages, by space, that the bulk stream brings: all but those that are `filled_first`, on demand."""
    first = filled_first(tree)
    return {space.number: space.lazy for space in spaces_of(tree) if space.number not in first}


def huge_areas(tree: Tree) -> dict[int, HugeAreas]:
    """The lazy hugetlb memory of the spaces that have any."""
    found = {
        process.space: HugeAreas(HugeArea(v.start, v.end, v.huge_shift) for v in process.memory.vmas if is_lazy(v))
        for process in tree.processes
        if any(map(is_lazy, process.memory.vmas))
    }
    first = filled_first(tree)
    for each in tree.shared_memory:
        if is_lazy_object(each) and each.space not in first:
            found[each.space] = HugeAreas([HugeArea(0, each.size, each.huge_shift)])
    return found
