"""Session and process group, and what ties the process to others."""

from postcopy.kernel import procfs
from postcopy.state import Lineage


def problems(pid: int) -> list[str]:
    """What cannot be moved yet: for now, children."""
    if found := procfs.children(pid):
        return [f"it has children ({', '.join(map(str, found))}); only single processes can be moved yet"]
    return []


def collect(pid: int) -> Lineage:
    """The session and group, with the process's own marked by its pid as it sees itself (0: from outside)."""
    fields = procfs.stat(pid)
    inner = int(procfs.status(pid)["NSpid"].split()[-1])
    group, session, foreground = (int(fields[i]) for i in (5, 6, 8))
    return Lineage(
        session=inner if session == pid else 0,
        process_group=inner if group == pid else 0,
        foreground=foreground == group,
    )
