"""What can be seen of a tree while it runs, for the destination to begin with."""

from collections.abc import Iterable, Mapping

from msgspec.structs import replace

from postcopy.dump_side import lineage, memory
from postcopy.dump_side.opened import Table
from postcopy.dump_side.smaps import Known
from postcopy.errors import ProtocolError
from postcopy.kernel import procfs
from postcopy.page_ranges import PageRanges
from postcopy.soundness import check_message
from postcopy.state import Draft, Sketch

_NO_PAGES = memory.Pages(PageRanges(), PageRanges(), PageRanges())


def draw(
    pids: Iterable[int],
    kin: lineage.Kin,
    sharing: lineage.Sharing,
    known: Mapping[int, Known],
    table: Table,
    vdso: bytes,
) -> Draft:
    """The draft of a tree of processes that all run, in PID namespaces that are not its own; none of another, and none
    where what was read does not fit together, since it has changed meanwhile.

    ``known``: the mappings of each, by its face. Raises OSError: a process has ended.
    """
    if kin.pid_namespaces:
        return Draft()
    sketches = []
    for pid in pids:
        face = kin.face(pid)
        if procfs.stat(face)[3] in "TtZX":
            return Draft()
        layout = known[face].layout
        found = memory.collect(memory.see(face), layout, _NO_PAGES, 0, vdso, 0)
        sketches.append(
            Sketch(
                pid=kin.common(pid),
                threads=len(procfs.tids(face)),
                # The break is told by the process alone, and comes with the state.
                memory=replace(memory.without_objects(found), brk=found.start_brk),
                lineage=kin.lineage(pid),
                slots=[] if pid in sharing.tables else table.slots[face],
                table_of=kin.common(sharing.tables[pid]) if pid in sharing.tables else 0,
                places_of=kin.common(sharing.places[pid]) if pid in sharing.places else 0,
            )
        )
    ready = {id(each.description) for each in table.found.values()}
    draft = Draft(sketches, [one if id(one) in ready else None for one in table.descriptors.descriptions])
    try:
        check_message("draft", draft)
    except ProtocolError:
        return Draft()
    return draft
