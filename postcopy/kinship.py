"""Who is whose child, in which session and process group: and in which order processes must be made to be so again.

Pure data. Sessions and process groups can only be entered by being born into them, made by their leader, or (groups)
joined by a member of the session: setsid(2), setpgid(2). So each process is made by its parent at the right moment,
or by a brother of its own in the right session (CLONE_PARENT, clone(2)); a leader that is gone is made for a while.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from msgspec import Struct

OUTSIDE = 0
_SIGCHLD = 17


class Unrelated(Exception):
    """These processes cannot be made in any order known here; the text says which and why."""


class Relative(Struct, frozen=True):
    """A process: ``parent`` is `OUTSIDE` for the root, ``session`` and ``group`` for those that the root came from."""

    pid: int
    parent: int
    session: int
    group: int
    exit_signal: int


class Making(Struct):
    """What one process does while the tree is made, in this order; ``births``: pids.

    ``early`` are born before setsid and before the process makes its own group, ``middle`` after setsid, ``late`` after
    the group; ``siblings`` are born last, as children of its own parent. When all have done this, those with
    ``joins_group`` join theirs, and last those of them who lead a group themselves.
    """

    relative: Relative
    lasting: bool = True
    early: list[int] = []
    makes_session: bool = False
    middle: list[int] = []
    makes_group: bool = False
    late: list[int] = []
    siblings: list[int] = []
    joins_group: bool = False

    @property
    def births(self) -> list[int]:
        """All that it makes, in order."""
        return [*self.early, *self.middle, *self.late, *self.siblings]


def joining(makings: dict[int, Making]) -> list[Making]:
    """Those who join a group, in the order in which they must."""
    return sorted((making for making in makings.values() if making.joins_group), key=lambda each: each.makes_group)


def plan(relatives: Iterable[Relative]) -> dict[int, Making]:
    """What each process does, by its PID, those who make others before these. Raises Unrelated."""
    return _Planner(relatives).plan()


def check_sharing(makings: Mapping[int, Making], owners: Mapping[int, int], what: str) -> None:
    """Raises Unrelated where somebody has ``what`` from another process than who makes it; ``owners``: of those who
    have it from others, the first that has it."""
    for pid, making in makings.items():
        for child in making.births:
            if child in owners and owners[child] != owners.get(pid, pid):
                raise Unrelated(f"process {child} shares its {what} with {owners[child]}, and not with its parent")


class _Planner:
    def __init__(self, relatives: Iterable[Relative]) -> None:
        self._makings = {each.pid: Making(each) for each in relatives}
        self._children: dict[int, list[int]] = defaultdict(list)
        for making in self._makings.values():
            self._children[making.relative.parent].append(making.relative.pid)
        self._used_groups = {making.relative.group for making in self._makings.values()}
        self._born_into: dict[int, int] = {}
        self._groups: dict[int, int] = {}
        self._order: list[int] = []
        self._wanted: dict[int, int | None] = {}
        self._from_outside: set[int] = set()

    def plan(self) -> dict[int, Making]:
        roots = self._children[OUTSIDE]
        if len(roots) != 1:
            raise Unrelated(f"there are {len(roots)} processes without a parent in the tree")
        self._find_wanted(roots[0])
        self._born_into[roots[0]] = OUTSIDE
        pending = [roots[0]]
        while pending:
            pid = pending.pop(0)
            self._order.append(pid)
            self._make_family(pid)
            pending += self._children[pid]
        if strangers := self._makings.keys() - self._born_into.keys():
            raise Unrelated(f"process {min(strangers)} is not a descendant of the root")
        self._make_gone_group_leaders()
        return self._in_order(roots[0])

    def _find_wanted(self, root: int) -> None:
        """For each process the session to be born into; None: any will do, since it makes its own.

        And whether somebody from it on is in the process group from outside, which can only be inherited.
        """
        below = [root]
        for pid in below:
            below += self._children[pid]
        for pid in reversed(below):
            relative = self._makings[pid].relative
            if relative.group == OUTSIDE or self._from_outside.intersection(self._children[pid]):
                self._from_outside.add(pid)
            if relative.session != pid:
                self._wanted[pid] = relative.session
                continue
            foreign = (self._wanted[child] for child in self._children[pid])
            # Who was born before the leader made its session is still in that of its youth.
            self._wanted[pid] = next((s for s in foreign if s is not None and s != pid), None)

    def _make_family(self, pid: int) -> None:
        """Decide who makes the children of ``pid``, and when."""
        making = self._makings[pid]
        own, born_into = making.relative.session, self._born_into[pid]
        making.makes_session = own == pid
        making.makes_group = pid in self._used_groups and not making.makes_session
        left = []
        for child in self._children[pid]:
            relative = self._makings[child].relative
            wanted = self._wanted[child]
            if wanted == own or wanted is None:
                self._born_into[child] = own
                before_group = relative.group != pid or child in self._from_outside
                (making.middle if before_group else making.late).append(child)
            elif wanted == born_into:
                self._born_into[child] = born_into
                making.early.append(child)
            else:
                left.append(child)
        while left:
            left = self._make_by_siblings(pid, left)

    def _make_by_siblings(self, pid: int, left: list[int]) -> list[int]:
        """Have some of these children of ``pid`` made by others of its children; those still left."""
        still = []
        for child in left:
            relative, wanted = self._makings[child].relative, self._wanted[child]
            for sibling in self._children[pid]:
                midwife = self._makings[sibling].relative
                known = sibling in self._born_into and midwife.session == wanted
                if known and midwife.exit_signal == relative.exit_signal:
                    self._makings[sibling].siblings.append(child)
                    self._born_into[child] = midwife.session
                    break
            else:
                still.append(child)
        if len(still) < len(left):
            return still
        child, wanted = left[0], self._wanted[left[0]]
        if wanted is None or wanted == OUTSIDE or wanted in self._makings:
            raise Unrelated(f"process {child} is in session {wanted}, in which neither its parent nor a brother was")
        self._make_for_a_while(Relative(wanted, pid, wanted, wanted, self._makings[child].relative.exit_signal))
        return left

    def _make_for_a_while(self, leader: Relative) -> None:
        parent = self._makings[leader.parent]
        self._makings[leader.pid] = Making(leader, lasting=False, makes_session=leader.session == leader.pid)
        self._makings[leader.pid].makes_group = leader.session != leader.pid
        self._wanted[leader.pid] = None
        self._born_into[leader.pid] = parent.relative.session
        parent.late.append(leader.pid)
        self._children[leader.parent].append(leader.pid)

    def _make_gone_group_leaders(self) -> None:
        for pid, making in list(self._makings.items()):
            relative = making.relative
            if relative.group != OUTSIDE and relative.group not in self._makings:
                self._make_for_a_while(Relative(relative.group, pid, relative.session, relative.group, _SIGCHLD))
        for making in self._makings.values():
            relative = making.relative
            leader = self._makings.get(relative.group)
            if leader is not None and leader.relative.session != relative.session:
                raise Unrelated(f"process {relative.pid} is in a process group of another session")

    def _in_order(self, root: int) -> dict[int, Making]:
        """Makers before those they make; and who has to join a group that it is not born into."""
        self._groups[root] = OUTSIDE
        ordered: dict[int, Making] = {}
        pending = [root]
        while pending:
            pid = pending.pop(0)
            making = ordered[pid] = self._makings[pid]
            group = self._groups[pid]
            for born, inherited in (
                (making.early, group),
                (making.middle, pid if making.makes_session else group),
                ([*making.late, *making.siblings], pid if making.makes_session or making.makes_group else group),
            ):
                for child in born:
                    self._groups[child] = inherited
            pending += making.births
            if making.relative.group == pid:
                continue
            making.joins_group = making.makes_group or making.relative.group != group
            if making.joins_group and making.relative.group == OUTSIDE:
                raise Unrelated(f"process {pid} is in a process group from outside, into which it was not born")
        self._check_those_who_leave(ordered)
        return ordered

    def _check_those_who_leave(self, ordered: dict[int, Making]) -> None:
        """Who has left the group that it leads must find another with members, when all others have joined theirs."""
        leavers = [making for making in ordered.values() if making.joins_group and making.makes_group]
        members = Counter(m.relative.group for m in ordered.values() if not (m.joins_group and m.makes_group))
        members.update(making.relative.pid for making in leavers)
        for making in leavers:
            if not members[making.relative.group]:
                raise Unrelated(f"process {making.relative.pid} is in a process group that all others have left")
            members[making.relative.pid] -= 1
            members[making.relative.group] += 1
