"""Namespaces: the program comes to live in those of ``restore``, so it must have lived in those of ``dump``.

PID namespaces that a tree has made itself are those of `pid_namespaces`.
"""

import os

_REFUSED = {"net": "network", "uts": "host name (UTS)", "ipc": "IPC", "cgroup": "cgroup"}
_COMMON_TO_A_TREE = ("net", "uts", "ipc", "cgroup", "user", "time")
_OWN_OF_A_THREAD = ("net", "mnt", "uts", "ipc", "cgroup", "pid_for_children")


def problems(pid: int) -> list[str]:
    """Namespaces that cannot be moved yet."""
    found = [
        f"it lives in another {text} namespace, which cannot be moved yet"
        for kind, text in _REFUSED.items()
        if differ(f"/proc/{pid}/ns/{kind}", f"/proc/self/ns/{kind}")
    ]
    if differ(f"/proc/{pid}/ns/mnt", "/proc/self/ns/mnt") and mounts(str(pid)) != mounts("self"):
        found.append("it lives in a mount namespace with other mounts, which cannot be moved yet")
    return found


def problems_of_thread(pid: int, tid: int) -> list[str]:
    """Namespaces that a thread has for itself."""
    return [
        f"thread {tid} lives in another {kind} namespace than its process, which cannot be moved yet"
        for kind in _OWN_OF_A_THREAD
        if differ(f"/proc/{pid}/task/{tid}/ns/{kind}", f"/proc/{pid}/ns/{kind}")
    ]


def problems_of_member(pid: int, root: int) -> list[str]:
    """Namespaces that a process does not share with the root of its tree."""
    return [
        f"it lives in another {kind} namespace than the root of the tree, which cannot be moved yet"
        for kind in _COMMON_TO_A_TREE
        if differ(f"/proc/{pid}/ns/{kind}", f"/proc/{root}/ns/{kind}")
    ]


def differ(one: str, other: str) -> bool:
    """Whether two links of ``/proc/PID/ns`` lead to different namespaces; not so where one of them is gone."""
    try:
        return os.readlink(one) != os.readlink(other)
    except OSError:
        return False


def mounts(who: str) -> set[tuple[str, ...]]:
    """Device, root and mount point of each mount but ``/proc``, which ``restore`` mounts itself where it must."""
    with open(f"/proc/{who}/mountinfo", errors="surrogateescape") as stream:
        lines = [line.split(" ") for line in stream]
    return {(words[2], words[3], words[4]) for words in lines if words[4] != "/proc"}
