"""Session and process group, and what ties the process to others."""

from collections.abc import Iterator

from postcopy.dump_side import namespaces
from postcopy.kernel import kcmp, procfs
from postcopy.state import Lineage

_PF_EXITING = 0x4  # include/linux/sched.h


def problems(pid: int, frozen: bool = False) -> list[str]:
    """What cannot be moved yet: children, namespaces, and what single threads have for themselves.

    ``frozen``: all of it has been asked before; what nearly nobody does in between, and takes long, is left out.
    """
    others = [tid for tid in procfs.tids(pid) if tid != pid]
    found = [problem for tid in others for problem in _of_thread(pid, tid)]
    if not frozen:
        found += namespaces.problems(pid)
        found += [problem for tid in others for problem in namespaces.problems_of_thread(pid, tid)]
    if children := procfs.children(pid):
        found.append(f"it has children ({', '.join(map(str, children))}); only single processes can be moved yet")
    return found


def _of_thread(pid: int, tid: int) -> Iterator[str]:
    """What a thread does not share with its process."""
    try:
        if not kcmp.same_table(pid, tid) and not _is_ending(pid, tid):
            yield f"thread {tid} has a descriptor table of its own (unshare), which cannot be moved yet"
        if not kcmp.same_places(pid, tid) and not _is_ending(pid, tid):
            yield f"thread {tid} has a working directory of its own (unshare), which cannot be moved yet"
    except OSError:
        return  # it has ended while we looked


def _is_ending(pid: int, tid: int) -> bool:
    """Whether a thread is in exit(2), where it first gives up what it shares and only then is seen to be gone."""
    return bool(int(procfs.stat(pid, tid)[9]) & _PF_EXITING)


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
