"""Who looks at which sockets of a tree that has many, and takes which connections apart: control and `postcopy-look`.

Repair is a state of the connection, not of the descriptor: two processes that take the same one apart would read what
is in the other one's queue. So each connection belongs to one of the two, or to neither. That is settled before the
freeze; what the program makes in between belongs to neither.
"""

from collections.abc import Mapping

from msgspec import Struct

# So few of a process are looked at sooner than another process of ours has told of them.
_MANY = 32
# Control puts together what both have found, too: with this share, both have equally much to do.
_OURS = 0.32


class Share(Struct, frozen=True):
    """``descriptors``: of sockets, in their order, by process; ``connections``: by inode."""

    descriptors: Mapping[int, list[int]] = {}
    connections: frozenset[int] = frozenset()


class Division(Struct, frozen=True):
    """Control's share, and that of `postcopy-look`; ``locked``: which connections nothing more comes for, by their ends
    (struct sockaddr, local and remote)."""

    ours: Share = Share()
    theirs: Share = Share()
    locked: frozenset[tuple[bytes, bytes]] = frozenset()


def divide(sockets: Mapping[int, Mapping[int, int]], locked: frozenset[tuple[bytes, bytes]]) -> Division:
    """``sockets``: of each process its descriptors that are sockets, with their inodes."""
    ours, theirs = dict[int, list[int]](), dict[int, list[int]]()
    holders: dict[int, set[str]] = {}
    for pid, inodes in sockets.items():
        fds = sorted(inodes)
        first = int(_OURS * len(fds))
        if len(fds) >= _MANY:
            ours[pid], theirs[pid] = fds[:first], fds[first:]
        for place, fd in enumerate(fds):
            holder = "nobody" if pid not in ours else "we" if place < first else "they"
            holders.setdefault(inodes[fd], set()).add(holder)

    def alone(holder: str) -> frozenset[int]:
        return frozenset(inode for inode, found in holders.items() if found == {holder})

    return Division(Share(ours, alone("we")), Share(theirs, alone("they")), locked)
