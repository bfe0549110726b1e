"""``redrafting.py HOW ARGUMENTS``: postcopy ARGUMENTS, but a dump's drafts are not how its program is, and will not be.

So what is begun from them is begun in vain, as where a program changes at the last moment.
"""

import sys
from collections.abc import Callable

from msgspec.structs import replace

from postcopy.cli import main
from postcopy.dump_side import sketches
from postcopy.state import Draft, Lineage, Memory, Sketch, Vma

_PAGE = 4096


def _without_the_last(draft: Draft) -> Draft:
    return replace(draft, processes=draft.processes[:-1])


def _with_one_more(draft: Draft) -> Draft:
    root = draft.processes[0]
    free = max(sketch.pid for sketch in draft.processes) + 1000
    return replace(draft, processes=[*draft.processes, replace(root, pid=free, lineage=_child_of(root))])


def _child_of(root: Sketch) -> Lineage:
    return replace(root.lineage, parent=root.pid, exit_signal=17)


def _in_another_group(draft: Draft) -> Draft:
    *others, last = draft.processes
    return replace(draft, processes=[*others, replace(last, lineage=replace(last.lineage, process_group=last.pid))])


def _of_memory(change: Callable[[Memory], Memory]) -> Callable[[Draft], Draft]:
    return lambda draft: replace(draft, processes=[replace(s, memory=change(s.memory)) for s in draft.processes])


def _is_plain(vma: Vma) -> bool:
    return vma.backing in ("anonymous", "file") and vma.end - vma.start > 2 * _PAGE


def _other_mappings(memory: Memory) -> Memory:
    """Some are missing, some longer or shorter, some protected in another way; and a few that are not to be."""
    vmas = []
    for number, vma in enumerate(memory.vmas):
        if not _is_plain(vma) or number % 5 == 0:
            vmas.append(vma)
        elif number % 5 == 1:
            vmas.append(replace(vma, end=vma.end - _PAGE))
        elif number % 5 == 2:
            vmas.append(replace(vma, prot=vma.prot ^ 1))
        elif number % 5 == 3:
            vmas.append(replace(vma, backing="anonymous", file=-1, offset=0, shared=False, flags=[], name=""))
    return replace(memory, vmas=vmas)


def _in_the_way(memory: Memory) -> Memory:
    """Mapped lowest of all, where the executor would be if it were not."""
    lowest = Vma(0x10000, 0x20000, 3, False, "anonymous", -1, 0, False, [], "")
    return replace(memory, vmas=[lowest, *memory.vmas])


HOW: dict[str, Callable[[Draft], Draft]] = {
    "nothing": lambda draft: Draft(),
    "one-process-less": _without_the_last,
    "one-process-more": _with_one_more,
    "another-group": _in_another_group,
    "other-mappings": _of_memory(_other_mappings),
    "a-mapping-in-the-way": _of_memory(_in_the_way),
    "another-program": _of_memory(lambda memory: replace(memory, exe="/bin/sh")),
    "a-file-that-is-not-there": _of_memory(lambda memory: replace(memory, exe="/nowhere/at/all")),
    "other-descriptors": lambda draft: replace(
        draft,
        processes=[replace(sketch, slots=sketch.slots[1:]) for sketch in draft.processes],
        descriptions=[one and replace(one) for one in draft.descriptions],
    ),
}


if __name__ == "__main__":
    change, draw = HOW[sys.argv.pop(1)], sketches.draw
    sketches.draw = lambda *arguments: change(draw(*arguments))
    main()
