"""Attachments of System V segments (shmat(2)): made before all other mappings, and cut to what was left of them."""

from itertools import groupby

from postcopy.kernel.batch import Batch
from postcopy.kernel.calls import call
from postcopy.kernel.page import page_up
from postcopy.kernel.system_v import SHM_RDONLY
from postcopy.state import Memory, SharedMemory, Vma

_PROT_READ, _PROT_WRITE = 1, 2


def rebuild(memory: Memory, states: list[SharedMemory], batch: Batch) -> None:
    """Add the calls."""
    attached = [v for v in memory.vmas if v.backing == "object" and states[v.file].system_v is not None]
    attached.sort(key=_attachment)
    for (base, number), group in groupby(attached, _attachment):
        _attach(base, states[number], list(group), batch)


def _attachment(vma: Vma) -> tuple[int, int]:
    """Where the attachment that a vma is a part of begins, and of which memory it is."""
    return vma.start - vma.offset, vma.file


def _attach(base: int, state: SharedMemory, vmas: list[Vma], batch: Batch) -> None:
    assert state.system_v is not None
    where = f"System V segment {state.system_v.identifier} at {base:#x}"
    writable = any(vma.writable for vma in vmas)
    made = call("shmat", state.system_v.identifier, base, 0 if writable else SHM_RDONLY)
    batch.add(made, f"attaching {where}")
    end = base + page_up(state.size)
    for vma in vmas:
        if vma.start > base:
            batch.add(call("munmap", base, vma.start - base), f"cutting {where}")
        if vma.prot != _PROT_READ | (_PROT_WRITE if writable else 0):
            batch.add(call("mprotect", vma.start, vma.end - vma.start, vma.prot), f"protecting {where}")
        base = vma.end
    if end > base:
        batch.add(call("munmap", base, end - base), f"cutting {where}")
