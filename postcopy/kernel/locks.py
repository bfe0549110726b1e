"""``/proc/locks``: the file locks and leases of this host (proc_locks(5))."""

import os
import re

_FILE = re.compile(r" ([0-9a-f]+):([0-9a-f]+):(\d+) ")


def files() -> frozenset[tuple[int, int]]:
    """The device and inode of what somebody has locked."""
    with open("/proc/locks") as stream:
        found = _FILE.findall(stream.read())
    return frozenset((os.makedev(int(major, 16), int(minor, 16)), int(inode)) for major, minor, inode in found)
