"""The PID namespaces that a tree has made itself: who is called what in which, and who can be made by whom.

Pure data. Everywhere else a process, thread, session or group goes by its number in the *common* PID namespace: that of
the root, or the one around it where the root is an init itself.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

from msgspec import Struct

from postcopy.integers import Pid, Unsigned
from postcopy.kinship import Making, Unrelated

COMMON = 0


class PidNamespace(Struct, frozen=True):
    """One of them, named after its init; ``parent``: the init of the one around it, or `COMMON`.

    ``names``: of every task, session and group in it, or in one within it, the common number and the one here.
    ``awaited_by``: processes that are not in it, whose next child will be. ``mounted_for``: those that have a mount
    namespace of their own, in which ``/proc`` is of this PID namespace.
    """

    init: Pid
    parent: Unsigned
    names: list[tuple[Pid, Pid]]
    awaited_by: list[Pid]
    mounted_for: list[Pid]


class Nesting:
    """All that a tree has made; none, for most trees."""

    def __init__(self, namespaces: Sequence[PidNamespace] = ()) -> None:
        self.namespaces = list(namespaces)
        self._names: dict[int, Mapping[int, int]] = {each.init: dict(each.names) for each in namespaces}
        self._parents = {each.init: each.parent for each in namespaces}
        self._awaited = {pid: each.init for each in namespaces for pid in each.awaited_by}
        self._mounted = {pid: each.init for each in namespaces for pid in each.mounted_for}

    def of(self, pid: int) -> int:
        """The innermost one that a task is in, by its init; `COMMON` where the tree has not made it."""
        found = [init for init, names in self._names.items() if pid in names]
        return max(found, key=lambda init: len(self._around(init)), default=COMMON)

    def _around(self, init: int) -> list[int]:
        """A namespace and those around it, from the inside."""
        found: list[int] = []
        while init in self._parents and init not in found:
            found.append(init)
            init = self._parents[init]
        return found

    def numbers(self, pid: int) -> list[int]:
        """What a task is called, from the innermost namespace to the common one: as clone3(2) takes ``set_tid``."""
        return [*(self._names[init][pid] for init in self._around(self.of(pid))), pid]

    def own(self, pid: int) -> int:
        """What a task calls itself."""
        return self.numbers(pid)[0]

    def seen(self, pid: int, observer: int) -> int:
        """What task ``observer`` calls task, session or group ``pid``; 0 where it cannot see it."""
        where = self.of(observer)
        return pid if where == COMMON else self._names[where].get(pid, 0)

    def is_init(self, pid: int) -> bool:
        """Whether the namespace of a process begins with it."""
        return pid in self._parents

    def awaited_by(self, pid: int) -> int:
        """The namespace that the next child of a process will be born in; `COMMON` where that is its own."""
        return self._awaited.get(pid, COMMON)

    def mounted_for(self, pid: int) -> int:
        """Whose ``/proc`` a process has, in a mount namespace of the tree's own; `COMMON` where in none."""
        return self._mounted.get(pid, COMMON)

    def makes_mounts(self, pid: int) -> bool:
        """Whether a process is the one with which a mount namespace begins."""
        return any(each.mounted_for[:1] == [pid] for each in self.namespaces)

    def mounts(self, pid: int) -> bool:
        """Whether a process is the one that mounts its ``/proc``: the first that has it and lives in the namespace."""
        init = self.mounted_for(pid)
        return init != COMMON and pid == self._mounter(init)

    def _mounter(self, init: int) -> int | None:
        members = next(each.mounted_for for each in self.namespaces if each.init == init)
        return next((pid for pid in members if self.of(pid) == init), None)

    def check(self, makings: Mapping[int, Making]) -> None:
        """Raises Unrelated where processes cannot be made so that all are where they were."""
        for pid, making in makings.items():
            for child in making.births:
                self._check_birth(pid, child, child in making.siblings, makings[child].lasting)
            group = making.relative.group
            if making.joins_group and not self.seen(group, pid):
                raise Unrelated(f"process {pid} is in a process group of another PID namespace")
        for each in self.namespaces:
            if each.mounted_for and self._mounter(each.init) is None:
                raise Unrelated(f"nobody in the PID namespace of process {each.init} has its /proc")

    def _check_birth(self, maker: int, child: int, as_sibling: bool, lasting: bool) -> None:
        inside, around = self.of(child), self.of(maker)
        if inside != around and not (self.is_init(child) and self._parents[child] == around and not as_sibling):
            raise Unrelated(f"process {child} is in another PID namespace than its parent, and not its init")
        theirs, own = self.mounted_for(maker), self.mounted_for(child)
        if lasting and theirs != own and not (theirs == COMMON and self.makes_mounts(child)):
            raise Unrelated(f"process {child} is in another mount namespace than process {maker}, and has not made it")

    def problems(self, processes: Collection[int]) -> Iterator[str]:
        """What contradicts itself; ``processes``: those of the tree, zombies too."""
        for place, each in enumerate(self.namespaces):
            where = f"pid_namespaces[{place}]"
            if each.init not in processes or each.init in [other.init for other in self.namespaces[:place]]:
                yield f"{where}.init: {each.init} is no process, or has another one"
                return
            if each.parent not in (COMMON, *(other.init for other in self.namespaces[:place])):
                yield f"{where}.parent: {each.parent} is the init of none before it"
                return
            names = self._names[each.init]
            if len(names) != len(each.names) or len(set(names.values())) != len(names):
                yield f"{where}.names: a number occurs twice"
            if names.get(each.init) != 1:
                yield f"{where}.names: the init {each.init} is not called 1"
            if each.parent and not names.keys() <= self._names[each.parent].keys():
                yield f"{where}.names: somebody in it has no name in the one around it"
            for kind, pids in (("awaited_by", each.awaited_by), ("mounted_for", each.mounted_for)):
                for pid in pids:
                    if pid not in processes or pids.count(pid) > 1:
                        yield f"{where}.{kind}: {pid} is no process, or occurs twice"
        for kind, owners in (("awaited_by", self._awaited), ("mounted_for", self._mounted)):
            if len(owners) != sum(len(getattr(each, kind)) for each in self.namespaces):
                yield f"pid_namespaces: a process occurs in the {kind} of two of them"
        for pid, init in self._awaited.items():
            if self._parents[init] != self.of(pid):
                yield f"pid_namespaces: process {pid} awaits children in a namespace that is not right within its own"
