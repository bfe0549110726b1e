"""Parents, sessions and process groups; and what ties threads and processes together otherwise."""

import contextlib
import os
import signal
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cmp_to_key, partial
from itertools import pairwise
from types import MappingProxyType

from postcopy.dump_side import namespaces, pid_namespaces
from postcopy.dump_side.freeze import Frozen
from postcopy.kernel import kcmp, procfs
from postcopy.kernel.batch import Answers, Batch
from postcopy.kernel.calls import call
from postcopy.kernel.ptrace import SIGINFO_SIZE, WALL
from postcopy.kinship import Unrelated, check_sharing, plan
from postcopy.nesting import Nesting
from postcopy.state import Lineage, Zombie

_P_PID = 1
_LOOK_FOR_STOP = os.WSTOPPED | os.WNOHANG | os.WNOWAIT | WALL
_PF_EXITING = 0x00000004  # include/linux/sched.h


def problems(pid: int, frozen: bool = False) -> list[str]:
    """What single threads of a process have for themselves, and its namespaces.

    ``frozen``: all of it has been asked before; what nearly nobody does in between, and takes long, is left out.
    """
    others = [tid for tid in procfs.tids(pid) if tid != pid]
    found = [problem for tid in others for problem in _of_thread(pid, tid)]
    if not frozen:
        found += namespaces.problems(pid)
        found += [problem for tid in others for problem in namespaces.problems_of_thread(pid, tid)]
    return found


def _of_thread(pid: int, tid: int) -> Iterator[str]:
    """What a thread does not share with its process."""
    try:
        if not kcmp.same_table(pid, tid) and not is_ending(pid, tid):
            yield f"thread {tid} has a descriptor table of its own (unshare), which cannot be moved yet"
    except OSError:
        return  # it has ended while we looked


def with_places_of_their_own(pid: int, tids: Iterable[int], problems: list[str]) -> list[int]:
    """The threads that do not share directories and umask with their process; of those that do with one another no
    more can be moved, which is added to ``problems``."""
    found: list[int] = []
    for tid in tids:
        with contextlib.suppress(OSError):
            if tid != pid and not kcmp.same_places(pid, tid) and not is_ending(pid, tid):
                if any(kcmp.same_places(other, tid) for other in found):
                    problems.append(f"thread {tid} shares a working directory with some threads, which cannot be moved")
                found.append(tid)
    return found


def is_ending(pid: int, tid: int) -> bool:
    """Whether a thread is in exit(2), where it first gives up what it shares and only then is seen to be gone."""
    try:
        return bool(int(procfs.stat(pid, tid)[9]) & _PF_EXITING)
    except OSError:
        return True


class Sharing:
    """What processes of a tree share, although they are no threads of one another.

    ``tables``, ``places``: for each that has its descriptor table, or its directories, from another, the first such.
    ``orders``: how the kernel orders them, by what they may share.
    """

    def __init__(self, faces: Mapping[int, int], before: Mapping[int, Sequence[int]] = MappingProxyType({})) -> None:
        """``faces``: of all of them, see `procfs.face`; ``before``: the `orders` of an earlier look, which mostly hold.

        Raises OSError: one is gone.
        """
        self.orders: dict[int, list[int]] = {}
        self._before = before
        self._pids = {face: pid for pid, face in faces.items()}
        self.problems: list[str] = []
        for kind in (kcmp.MEMORY, kcmp.SIGNAL_ACTIONS):
            for pid, other in self._shared(kind).items():
                text = f"processes {min(pid, other)} and {max(pid, other)} share their {kcmp.SHAREABLE[kind]}"
                self.problems.append(f"{text}, which cannot be moved yet")
        self.tables = self._shared(kcmp.TABLE)
        self.places = self._shared(kcmp.PLACES)

    def _shared(self, kind: int) -> dict[int, int]:
        # By sorting, in which those that share come to stand side by side.
        earlier = [face for face in self._before.get(kind, ()) if face in self._pids]
        # What is in order already takes one comparison each.
        begun = dict.fromkeys((*earlier, *self._pids))
        in_order = self.orders[kind] = sorted(begun, key=cmp_to_key(partial(kcmp.order, kind)))
        groups = [in_order[:1]]
        for one, other in pairwise(in_order):
            if kcmp.order(kind, one, other) == 0:
                groups[-1].append(other)
            else:
                groups.append([other])
        place = {face: number for number, face in enumerate(self._pids)}
        found: dict[int, int] = {}
        for group in groups:
            first, *others = sorted(group, key=place.__getitem__)
            found.update((self._pids[face], self._pids[first]) for face in others)
        return found


class Kin:
    """The processes and zombies of a tree, by their PIDs as we see them, the root first; and how each sees itself."""

    def __init__(
        self,
        faces: Mapping[int, int],
        statuses: dict[int, dict[str, str]] | None = None,
        zombies: Iterable[int] = (),
        tids: Mapping[int, Iterable[str]] | None = None,
    ) -> None:
        """``faces``: for each, the root first, see `procfs.face`; ``statuses``: those of ``/proc/PID/status`` that have
        been read already; ``tids``: see `Looking.found`.

        Raises OSError: one is gone.
        """
        known = statuses or {}
        self._faces = faces
        self._statuses = {pid: known.get(pid) or procfs.status(face) for pid, face in faces.items()}
        self.root = next(iter(self._statuses))
        self.level = pid_namespaces.level(self._statuses[self.root])
        self._common = {pid: self.number(status["NStgid"]) for pid, status in self._statuses.items()}
        self._looking = pid_namespaces.Looking(self._statuses, faces, zombies)
        self.pid_namespaces = self._looking.found(tids)
        self._nesting = Nesting(self.pid_namespaces)
        ids = {key: self.number(self._statuses[self.root][key]) for key in ("NSsid", "NSpgid")}
        # What the root does not lead it has from outside, and so have those of the same session or group.
        self._outside = {key: value for key, value in ids.items() if value != self._common[self.root]}

    def face(self, pid: int) -> int:
        """See `procfs.face`."""
        return self._faces[pid]

    def number(self, numbers: str) -> int:
        """Of the numbers that a status tells, that in the common PID namespace (`postcopy.nesting`); 0 for none."""
        words = numbers.split()
        return int(words[self.level]) if len(words) > self.level else 0

    def common(self, pid: int) -> int:
        """The PID in the common PID namespace."""
        return self._common[pid]

    def seen(self, pid: int, observer: int) -> int:
        """What process ``observer`` calls ``pid``."""
        return self._nesting.seen(self._common[pid], self._common[observer])

    def lineage(self, pid: int) -> Lineage:
        """The relations of one of them. Raises OSError."""
        status, fields = self._statuses[pid], procfs.stat(pid, pid)
        session, group = (
            0 if value == self._outside.get(key) else value
            for key, value in ((key, self.number(status[key])) for key in ("NSsid", "NSpgid"))
        )
        return Lineage(
            parent=0 if pid == self.root else self._common.get(int(status["PPid"]), 0),
            session=session,
            process_group=group,
            exit_signal=max(int(fields[38]), 0),
            foreground=int(fields[8]) == int(fields[5]),
        )

    def problems(self, sharing: Sharing) -> Iterator[str]:
        """Why the relations cannot be made again."""
        try:
            makings = plan(self.lineage(pid).relative(self._common[pid]) for pid in self._statuses)
        except Unrelated as reason:
            yield str(reason)
            return
        tables, places = (
            {self._common[pid]: self._common[owner] for pid, owner in owners.items()}
            for owners in (sharing.tables, sharing.places)
        )
        for check in (
            partial(self._nesting.check, makings),
            partial(check_sharing, makings, tables, "descriptor table"),
            partial(check_sharing, makings, places, "working directory"),
        ):
            try:
                check()
            except Unrelated as reason:
                yield str(reason)

    def problems_of(self, pid: int) -> Iterator[str]:
        """Namespaces of one of them that cannot be moved."""
        return pid_namespaces.for_each_problem(self._looking, pid)

    def zombie(self, pid: int, problems: list[str]) -> Zombie:
        """How one of them has ended. Raises OSError."""
        status = int(procfs.stat(pid)[52])
        if status & 0x7F not in (0, signal.SIGKILL) and self._nesting.is_init(self._common[pid]):
            problems.append(f"zombie {pid}, an init, has ended by a signal that cannot be sent to one")
        name = os.fsencode(procfs.stat(pid)[2])
        uid = int(self._statuses[pid]["Uid"].split()[0])
        return Zombie(self._common[pid], self.lineage(pid), name, uid, status)


def left_core_dump(pid: int) -> bool:
    """Whether a process is a zombie that has left a core dump."""
    try:
        fields = procfs.stat(pid)
    except OSError:
        return False
    status = int(fields[52])
    return fields[3] == "Z" and os.WIFSIGNALED(status) and os.WCOREDUMP(status)


class Stops:
    """Which parents in the tree have waited for the job-control stops of their children; parents are asked first."""

    def __init__(self, kin: Kin, processes: Iterable[Frozen]) -> None:
        self._kin = kin
        self._stopped: dict[int, list[int]] = defaultdict(list)
        for each in processes:
            if each.stopped_by:
                self._stopped[int(each.threads[0].status["PPid"])].append(each.pid)
        self._rooms: dict[int, int] = {}
        self._told: dict[int, bool] = {}

    def ask(self, parent: int, batch: Batch) -> None:
        """Add the calls to a batch of the parent's leader."""
        for child in self._stopped[parent]:
            room = self._rooms[child] = batch.room(SIGINFO_SIZE)
            made = call("waitid", _P_PID, self._kin.seen(child, parent), room, _LOOK_FOR_STOP, 0)
            batch.add(made, f"looking whether the stop of process {child} has been waited for")

    def answered(self, parent: int, answers: Answers) -> None:
        """Take the answers of such a batch."""
        for child in self._stopped[parent]:
            self._told[child] = not any(answers.read(self._rooms[child], 4))

    def told(self, child: int) -> bool:
        """Whether the parent has been told; parents from outside of the tree have."""
        return self._told.get(child, True)
