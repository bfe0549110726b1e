"""The spaces of a tree: what has pages, as the page protocol and checkpoint directories number it."""

from dataclasses import dataclass

from postcopy.page_ranges import PageRanges
from postcopy.state import Tree


@dataclass(frozen=True)
class Space:
    """A process's memory, or memory that processes may share: its number, whose it is, pages sent and left lazy."""

    number: int
    owner: str
    sent: PageRanges
    lazy: PageRanges

    @property
    def sent_bytes(self) -> int:
        """How long the content of the pages is that are sent along."""
        return sum(each.end - each.start for each in self.sent)


def spaces_of(tree: Tree) -> list[Space]:
    """All of them, in the order in which the content of the pages that are sent follows the state.

    Raises ProtocolError for ranges that are none.
    """
    return [
        *(
            Space(
                each.space,
                f"process {each.pid}",
                PageRanges.unpack(each.memory.sent),
                PageRanges.unpack(each.memory.lazy),
            )
            for each in tree.processes
        ),
        *(
            Space(each.space, f"shared memory {number}", PageRanges.unpack(each.sent), PageRanges.unpack(each.lazy))
            for number, each in enumerate(tree.shared_memory)
        ),
    ]
