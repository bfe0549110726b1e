"""``/proc/locks``: the file locks and leases of this host (proc_locks(5))."""

import re

_INODE = re.compile(r" [0-9a-f]+:[0-9a-f]+:(\d+) ")


def inodes() -> frozenset[int]:
    """The inodes that somebody has locked, on whatever device."""
    with open("/proc/locks") as stream:
        return frozenset(map(int, _INODE.findall(stream.read())))
