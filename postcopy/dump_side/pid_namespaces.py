"""The PID namespaces that a tree has made itself, and the mount namespaces that differ by their ``/proc`` alone."""

import fcntl
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from postcopy.dump_side import namespaces
from postcopy.kernel import procfs
from postcopy.nesting import COMMON, PidNamespace

_NS_GET_PARENT = 0xB702  # ioctl_nsfs(2)
_NOT_MOVED = -1


def level(status: Mapping[str, str]) -> int:
    """Of the PID namespaces that ``NSpid`` and its like tell numbers of, that in which a tree with this root is named.

    An init is made together with its namespace, so it is named as the one around it names it.
    """
    names = status["NStgid"].split()
    return len(names) - 1 - (len(names) > 1 and names[-1] == "1")


class Looking:
    """A look at the namespaces of a tree; ``statuses``: of its processes and zombies, the root first, by our PIDs.

    ``problems``: why a process cannot be moved, with its PID; `found` is then without it.
    """

    def __init__(
        self, statuses: Mapping[int, Mapping[str, str]], faces: Mapping[int, int], zombies: Iterable[int] = ()
    ) -> None:
        self.problems: list[tuple[int, str]] = []
        self._statuses = statuses
        self._faces = faces
        self._zombies = set(zombies)
        self._root = next(iter(statuses))
        self._level = level(statuses[self._root])
        self._links = {pid: _link(face, "pid") for pid, face in faces.items()}
        self._inits = {
            self._links[pid]: pid for pid in statuses if self._depth(pid) and self._names(pid, "NStgid")[-1] == 1
        }
        self._parents: dict[int, int] = {}
        for pid in sorted(self._inits.values(), key=self._depth):
            self._parents[pid] = COMMON if self._depth(pid) == 1 else self._inits.get(_parent_of(pid), COMMON)

    def _names(self, pid: int, key: str) -> list[int]:
        """The numbers from the common namespace inwards."""
        return [int(word) for word in self._statuses[pid][key].split()[self._level :]]

    def _depth(self, pid: int) -> int:
        return len(self._names(pid, "NStgid")) - 1

    def found(self, tids: Mapping[int, Iterable[str]] | None = None) -> list[PidNamespace]:
        """The namespaces, outer ones first. ``tids``: of each process the ``NSpid`` of its threads."""
        common = self._common()
        names: dict[int, dict[int, int]] = {init: {} for init in self._parents}
        awaited: dict[int, list[int]] = defaultdict(list)
        for pid in self._statuses:
            around = self._around(pid, common)
            if around is None:
                self.problems.append((pid, _foreign("pid")))
                continue
            for init, common_number, number in self._numbers(pid, around, (tids or {}).get(pid, ())):
                names[init][common_number] = number
            if pid not in self._zombies:
                self._look_for_children(pid, around, awaited)
        self._look_for_strangers()
        mounted = self._mounts()
        common_names = {pid: self._names(pid, "NStgid")[0] for pid in self._statuses}
        return [
            PidNamespace(
                init=common_names[init],
                parent=common_names[parent] if parent else COMMON,
                names=sorted(names[init].items()),
                awaited_by=[common_names[pid] for pid in awaited[init]],
                mounted_for=[common_names[pid] for pid in mounted[init]],
            )
            for init, parent in self._parents.items()
        ]

    def _numbers(self, pid: int, around: list[int], tids: Iterable[str]) -> Iterator[tuple[int, int, int]]:
        """Within which namespace (by its init) which task, session or group has which number; ``tids``: of threads."""
        if not around:
            return
        numbers = [self._names(pid, key) for key in ("NStgid", "NSsid", "NSpgid")]
        numbers += [[int(word) for word in each.split()[self._level :]] for each in tids]
        for common_number, *inner in filter(any, numbers):
            for init, number in zip(around, inner, strict=False):
                if common_number and number:
                    yield init, common_number, number

    def _common(self) -> str:
        """The link of the common namespace; empty where nobody is in it, and so nobody can be in one like it."""
        return next((self._links[pid] for pid in self._statuses if not self._depth(pid)), "")

    def _around(self, pid: int, common: str) -> list[int] | None:
        """The namespaces that a process is in, by their inits, from the outside; None where one is not of the tree."""
        if not self._depth(pid):
            return [] if self._links[pid] == common else None
        init = self._inits.get(self._links[pid], COMMON)
        found: list[int] = []
        while init != COMMON:
            found.insert(0, init)
            init = self._parents[init]
        return found if len(found) == self._depth(pid) else None

    def _look_for_children(self, pid: int, around: list[int], awaited: dict[int, list[int]]) -> None:
        """Whether the next child of a process is born in its own namespace."""
        link = _link(self._faces[pid], "pid_for_children")
        if link == self._links[pid]:
            return
        init = self._inits.get(link)
        if not link:
            if os.path.lexists(f"/proc/{self._faces[pid]}/ns/pid_for_children") and not _has_ended(self._faces[pid]):
                self.problems.append((pid, "its children will live in a PID namespace that nobody is in yet (unshare)"))
        elif init is None or self._parents[init] != (around[-1] if around else COMMON) or init in self._zombies:
            self.problems.append((pid, "its children would live in another PID namespace, whose init is not there"))
        else:
            awaited[init].append(pid)

    def _look_for_strangers(self) -> None:
        """Processes that were not born in the tree but live in its namespaces, and would end with the init."""
        others = (int(name) for name in os.listdir("/proc") if name.isdigit()) if self._inits else ()
        for pid in others:
            init = self._inits.get(_link(pid, "pid"))
            if init is not None and pid not in self._statuses and not self._is_offspring(pid):
                self.problems.append((init, f"process {pid} lives in its PID namespace, and is not moved along"))

    def _is_offspring(self, pid: int) -> bool:
        """Whether a process has been born in the tree, since this was looked at, or is gone."""
        while pid > 1 and pid not in self._statuses:
            try:
                pid = int(procfs.status(pid)["PPid"])
            except OSError:
                return True
        return pid in self._statuses

    def _mounts(self) -> dict[int, list[int]]:
        """The processes with a mount namespace of their own, by the init of the namespace that its ``/proc`` tells of.

        The root's counts as one only then: otherwise its mounts are those of the host.
        """
        found: dict[int, list[int]] = defaultdict(list)
        kinds: dict[str, int] = {}
        root = _link(self._faces[self._root], "mnt")
        for pid in self._statuses:
            link = _link(self._faces[pid], "mnt")
            if pid in self._zombies:
                # It has none any more, and will be made with that of its maker.
                link = _link(self._statuses[pid]["PPid"], "mnt")
            if not link or (link == root and not self._parents):
                continue
            if link not in kinds:
                told_of = self._told_of(pid)
                if link != root and (told_of in (COMMON, *kinds.values()) or not self._same_mounts(pid)):
                    told_of = _NOT_MOVED
                kinds[link] = told_of
            if kinds[link] == _NOT_MOVED:
                self.problems.append((pid, _foreign("mnt")))
            elif kinds[link]:
                found[kinds[link]].append(pid)
        return found

    def _same_mounts(self, pid: int) -> bool:
        return namespaces.mounts(str(self._faces[pid])) == namespaces.mounts(str(self._faces[self._root]))

    def _told_of(self, pid: int) -> int:
        """The init of the namespace of the tree that the ``/proc`` of a process tells of; `COMMON` for others."""
        return self._inits.get(_link(f"{self._faces[pid]}/root/proc/1", "pid"), COMMON)


def for_each_problem(looking: Looking, pid: int) -> Iterator[str]:
    """What of one process cannot be moved."""
    return (text for one, text in looking.problems if one == pid)


def _foreign(kind: str) -> str:
    return f"it lives in another {kind} namespace than the root of the tree, which cannot be moved yet"


def _link(who: int | str, kind: str) -> str:
    """A namespace; empty where it cannot be told."""
    try:
        return os.readlink(f"/proc/{who}/ns/{kind}")
    except OSError:
        return ""


def _parent_of(pid: int) -> str:
    """The PID namespace around that of a process, as its link would name it."""
    try:
        own = os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        try:
            around = fcntl.ioctl(own, _NS_GET_PARENT)
        finally:
            os.close(own)
        try:
            return f"pid:[{os.fstat(around).st_ino}]"
        finally:
            os.close(around)
    except OSError:
        return ""


def _has_ended(pid: int) -> bool:
    try:
        return procfs.stat(pid)[3] in "ZX"
    except OSError:
        return True
