"""Bring the root's descendants into being: each born by its own parent, in its session and process group.

A child is a copy of its maker, which holds nothing but the tiny program: that takes no execve. It arrives stopped,
traced by us, and dies with us (PTRACE_O_TRACEFORK, ptrace(2)).
"""

import errno
import os
import signal
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from postcopy.errors import RestoreError
from postcopy.kernel import clone3, ptrace, tiny_elf
from postcopy.kernel.batch import Batch
from postcopy.kernel.calls import call
from postcopy.kernel.executor import CODE_SIZE, Executor, lone_syscall, signal_bit, stop_signal
from postcopy.kernel.page import page_up
from postcopy.kernel.prctl import PR_SET_DUMPABLE, PR_SET_NAME
from postcopy.kinship import Making, Unrelated, joining, plan
from postcopy.nesting import Nesting, PidNamespace
from postcopy.open_kinds import Pty
from postcopy.restore_side import core_dumps, pid_namespace, ptys
from postcopy.restore_side.birth import Newborn
from postcopy.restore_side.root import HERE
from postcopy.state import Draft, Lineage, Tree, Zombie

_PROT_RWX, _MAP_PRIVATE_ANONYMOUS = 7, 0x22
_ALL = 0xFFFF_FFFF_FFFF_FFFF
_FIXED_ROOM, _PER_BIRTH = 4096, 256
_SIG_DFL, _SIG_IGN = bytes(32), struct.pack("<Q24x", 1)
_KILLED_BY, _DUMPED = 0x7F, 0x80


class Family(Struct, frozen=True):
    """All that matters for how the processes of a tree are born: two trees in which that is equal begin alike.

    ``relatives``: parents before their children, zombies last; ``tables``, ``places``: who has from whom what they
    share; ``stopped``: who is in a job-control stop, and whether that has been told.
    """

    relatives: dict[int, Lineage]
    tables: dict[int, int]
    places: dict[int, int]
    zombies: Sequence[Zombie] = ()
    stopped: Mapping[int, bool] = {}
    namespaces: Sequence[PidNamespace] = ()
    ptys: Sequence[Pty] = ()

    @classmethod
    def of(cls, tree: Tree | Draft) -> "Family":
        """That of a tree, or of what it is seen to be."""
        processes = tree.processes
        relatives = {each.pid: each.lineage for each in processes}
        tables = {each.pid: each.table_of for each in processes if each.table_of}
        places = {each.pid: each.places_of for each in processes if each.places_of}
        if isinstance(tree, Draft):
            return cls(relatives, tables, places)
        relatives.update((zombie.pid, zombie.lineage) for zombie in tree.zombies)
        stopped = {each.pid: each.stop_told for each in tree.processes if each.stopped_by}
        namespaces, ptys = tree.pid_namespaces, tree.descriptors.ptys
        return cls(relatives, tables, places, tuple(tree.zombies), stopped, tuple(namespaces), tuple(ptys))


def bring_up(family: Family, root: Newborn, newborns: dict[int, Newborn]) -> None:
    """Make the other processes of the tree; ``newborns`` takes them in, by PID as they see it, as soon as they are.

    Ends with every zombie dead. Raises RestoreError: a PID is taken, or the tree cannot be.
    """
    newborns[root.number] = root
    try:
        makings = plan(lineage.relative(pid) for pid, lineage in family.relatives.items())
        Nesting(family.namespaces).check(makings)
    except Unrelated as reason:
        raise RestoreError(f"the state is of a tree that cannot be: {reason}") from None
    try:
        _Nursery(makings, newborns, family).run(family)
    except OSError as error:
        raise RestoreError(f"making the processes of the tree: {error.strerror}") from None


class _Nursery:
    def __init__(self, makings: dict[int, Making], newborns: dict[int, Newborn], family: Family) -> None:
        self._family = family
        self._nesting = Nesting(family.namespaces)
        files, places = clone3.CLONE_FILES, clone3.CLONE_FS
        self._shares = {
            pid: (files if pid in family.tables else 0) | (places if pid in family.places else 0) for pid in makings
        }
        self._makings = makings
        self._newborns = newborns
        self._stop = stop_signal(0, 0)
        most = max(len(making.births) for making in makings.values())
        self._room = page_up(CODE_SIZE + _FIXED_ROOM + _PER_BIRTH * most)
        self._base = 0
        self._executors: dict[int, Executor] = {}
        self._to_forget: dict[int, set[int]] = defaultdict(set)
        self._ended: dict[int, list[int]] = defaultdict(list)

    def run(self, family: Family) -> None:
        """All of it."""
        if len(self._makings) == 1 and not self._acts(*self._makings.values()) and not family.stopped:
            return
        root = next(iter(self._newborns.values()))
        self._base = lone_syscall(
            root.pid, tiny_elf.SYSCALL_AT, call("mmap", 0, self._room, _PROT_RWX, _MAP_PRIVATE_ANONYMOUS, _ALL, 0)
        )
        if self._base < 0:
            raise RestoreError(f"mapping the executor: {_name(-self._base)}")
        for pid, making in self._makings.items():
            self._make(pid, making)
        for making in joining(self._makings):
            pid, group = making.relative.pid, making.relative.group
            batch = self._executor(pid).batch()
            batch.add(call("setpgid", 0, self._nesting.seen(group, pid)), f"joining process group {group}")
            self._run(pid, batch)
        self._end_those_for_a_while()
        for zombie in family.zombies:
            self._become(zombie)
        for pid, told in family.stopped.items():
            self._stop_job(pid, told)
        self._forget()

    def _acts(self, making: Making) -> bool:
        mounts = self._nesting.makes_mounts(making.relative.pid)
        return bool(making.births or making.makes_session or making.makes_group or mounts)

    def _make(self, pid: int, making: Making) -> None:
        """Have a process make others, its session and its process group."""
        if not self._acts(making):
            return
        executor = self._executor(pid)
        batch = executor.batch()
        if self._nesting.makes_mounts(pid):
            pid_namespace.part_mounts(batch)
        self._add_births(batch, making.early)
        if making.makes_session:
            batch.add(call("setsid"), "making its session")
            for terminal in self._family.ptys:
                if terminal.session == pid:
                    ptys.take_control(terminal, batch)
        self._add_births(batch, making.middle)
        if making.makes_group:
            batch.add(call("setpgid", 0, 0), "making its process group")
        self._add_births(batch, making.late)
        self._add_births(batch, making.siblings, clone3.CLONE_PARENT)
        already = len(executor.born)
        self._run(pid, batch)
        for number, child in zip(making.births, executor.born[already:], strict=True):
            self._newborns[number] = Newborn(child, number)
            while (stop := ptrace.wait(child)).event != ptrace.PTRACE_EVENT_STOP:
                if stop.ended is not None:
                    raise RestoreError(f"the new process {number} ended before it could be built")
                ptrace.cont(child)

    def _add_births(self, batch: Batch, pids: Iterable[int], flags: int = 0) -> None:
        for pid in pids:
            # With CLONE_PARENT the child gets the exit signal of its maker, and none may be named.
            exit_signal = 0 if flags else self._makings[pid].relative.exit_signal
            numbers = self._nesting.numbers(pid)
            kind = clone3.CLONE_NEWPID if self._nesting.is_init(pid) else 0
            kind |= self._shares.get(pid, 0)
            wanted = batch.place(clone3.set_tid(numbers))
            arguments = batch.place(clone3.arguments(flags | kind, exit_signal, wanted, len(numbers)))
            batch.add(call("clone3", arguments, clone3.SIZE), f"making process {pid}")

    def _executor(self, pid: int) -> Executor:
        """The executor of a process, in the memory that it has from the root."""
        if pid not in self._executors:
            newborn = self._newborns[pid]
            tid = newborn.pid
            own = self._nesting.own(pid)
            executor = Executor(tid, newborn.memory, self._base, self._room, self._stop, (own, own))
            executor.install(0, ptrace.get_registers(tid))
            ptrace.set_signal_mask(tid, _ALL & ~signal_bit(self._stop))
            self._executors[pid] = executor
        return self._executors[pid]

    def _run(self, pid: int, batch: Batch) -> None:
        answers = self._executor(pid).run(batch)
        for made, purpose, number in answers.refusals():
            hint = "end the process that has it, or restore with --new-pid-namespace" if number == errno.EEXIST else ""
            what = "the PID is taken" if number == errno.EEXIST else f"{made.name} was refused with {_name(number)}"
            raise RestoreError(f"process {pid}: {purpose}: {what}", hint)

    # -- those who end before the tree begins -------------------------------------------------------------------------

    def _end_those_for_a_while(self) -> None:
        """End the leaders that were made for a while, and have their parents wait for them."""
        for pid, making in self._makings.items():
            if not making.lasting:
                executor = self._executor(pid)
                batch = executor.batch()
                batch.add(call("exit_group", 0))
                executor.start(batch)
                self._await_end(pid)
                self._ended[making.relative.parent].append(pid)
                del self._newborns[pid]
        for parent, ended in self._ended.items():
            batch = self._executor(parent).batch()
            for pid in ended:
                batch.add(
                    call("wait4", self._nesting.seen(pid, parent), 0, ptrace.WALL, 0), f"waiting for process {pid}"
                )
            self._run(parent, batch)

    def _become(self, zombie: Zombie) -> None:
        if not zombie.status & _DUMPED:
            self._end(zombie)
            return
        if problem := next(core_dumps.problems(wanted=True, root=HERE), None):
            raise RestoreError(problem)
        try:
            with core_dumps.place(self._newborns[zombie.pid].pid, zombie.uid) as directory:
                self._end(zombie, directory)
        except OSError as error:
            raise RestoreError(f"making zombie {zombie.pid}, which has left a core dump: {error}") from None

    def _end(self, zombie: Zombie, directory: str = "") -> None:
        """Let a process end as the zombie ended that it is to be; ``directory``: it is to leave a core dump there."""
        tid, number = self._newborns[zombie.pid].pid, zombie.status & _KILLED_BY
        executor = self._executor(zombie.pid)
        batch = executor.batch()
        batch.add(call("prctl", PR_SET_NAME, batch.text(zombie.name)), "setting its name")
        batch.add(call("setresuid", zombie.uid, zombie.uid, zombie.uid), "setting its user id")
        if directory:
            batch.add(call("chdir", batch.text(directory)), f"entering {directory}")
        batch.add(call("prctl", PR_SET_DUMPABLE, int(bool(directory))), "setting the dumpable attribute")
        self._run(zombie.pid, batch)
        if not number:
            batch = executor.batch()
            batch.add(call("exit_group", zombie.status >> 8))
            executor.start(batch)
        else:
            ptrace.set_signal_mask(tid, _ALL & ~signal_bit(number))
            os.kill(tid, number)
            if number != signal.SIGKILL:
                ptrace.cont(tid)
                stop = ptrace.wait(tid)
                if stop.signal != number or stop.event:
                    raise RestoreError(f"process {zombie.pid}, which is to die of signal {number}, met {stop}")
                ptrace.cont(tid, number)
        status = self._await_end(zombie.pid)
        if status & 0xFF != zombie.status & 0xFF:
            raise RestoreError(f"process {zombie.pid} has ended with status {status:#x}, not {zombie.status:#x}")
        del self._newborns[zombie.pid]

    def _await_end(self, pid: int) -> int:
        newborn = self._newborns[pid]
        while (ended := ptrace.wait(newborn.pid).ended) is None:
            ptrace.cont(newborn.pid)
        relative = self._makings[pid].relative
        self._to_forget[relative.parent].add(relative.exit_signal)
        newborn.close()
        return ended

    def _stop_job(self, pid: int, told: bool) -> None:
        """Put a process into the job-control stop that it was in; what is made of it later does not end that.

        By SIGSTOP, whatever signal it was: the others do nothing in an orphaned group. Only after all those have ended
        who were to end: an end that orphans a group continues its stopped members (setpgid(2)).
        """
        tid, parent = self._newborns[pid].pid, self._family.relatives[pid].parent
        ptrace.set_signal_mask(tid, _ALL)
        os.kill(tid, signal.SIGSTOP)
        ptrace.cont(tid)
        while (stop := ptrace.wait(tid)).signal != signal.SIGSTOP or stop.event:
            ptrace.cont(tid)
        ptrace.cont(tid, signal.SIGSTOP)
        stop = ptrace.wait(tid)
        if stop.signal != signal.SIGSTOP or stop.event != ptrace.PTRACE_EVENT_STOP:
            raise RestoreError(f"process {pid}, which is to be stopped, met {stop}")
        if parent:
            self._to_forget[parent].add(signal.SIGCHLD)
            if told:
                batch = self._executor(parent).batch()
                number = self._nesting.seen(pid, parent)
                made = call("wait4", number, 0, os.WUNTRACED | os.WNOHANG | ptrace.WALL, 0)
                batch.add(made, f"waiting for the stop of process {pid}")
                self._run(parent, batch)

    def _forget(self) -> None:
        """Take back the signals by which the kernel told parents of ends and stops: what was due is in the state."""
        for parent, numbers in self._to_forget.items():
            if parent not in self._newborns:
                continue  # it is outside of the tree, or has ended too
            batch = self._executor(parent).batch()
            for number in filter(None, numbers):
                # Ignoring a signal takes it from the queue (sigaction(2)).
                for action in (_SIG_IGN, _SIG_DFL):
                    batch.add(call("rt_sigaction", number, batch.place(action), 0, 8), f"forgetting signal {number}")
            self._run(parent, batch)


def _name(number: int) -> str:
    return errno.errorcode.get(number, str(number))
