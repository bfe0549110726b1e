"""Build a process, stopped, out of its state: one batch of calls for the memory, one for everything else, one a thread.

The order is the kernel's: the new process is emptied, laid out and filled; then it opens its files and makes its
threads; userfaultfd is armed as soon as the memory is laid out; what takes privileges away comes last.
"""

import contextlib
import errno
import os
import struct
from collections.abc import Callable, Generator, Iterator, Mapping
from itertools import accumulate

from msgspec import Struct

from postcopy.errors import RestoreError
from postcopy.kernel import clone3, pidfd, ptrace, userfaultfd, vdso
from postcopy.kernel.batch import RECORD_SIZE, Answers, Batch
from postcopy.kernel.calls import call
from postcopy.kernel.executor import CODE_SIZE, Executor, last_syscall, signal_bit, stop_signal
from postcopy.kernel.page import page_up
from postcopy.nesting import Nesting
from postcopy.restore_side import (
    attributes,
    birth,
    descriptors,
    filesystem,
    limits,
    memory,
    pid_namespace,
    scheduling,
    seccomp,
    signals,
    threads,
    timers,
)
from postcopy.restore_side.groundwork import LENDER_AT, Groundwork, check, raise_limit
from postcopy.restore_side.own import own_credentials
from postcopy.restore_side.shared_descriptors import Shared
from postcopy.restore_side.shared_memory import SharedObjects
from postcopy.sent_pages import SentPages
from postcopy.state import Process

_ALL = 0xFFFF_FFFF_FFFF_FFFF
# Bytes for the leader's calls, beside what grows with the state.
_ESTIMATE = 1024 * 1024 + memory.MOST_READS * RECORD_SIZE
_PER_VMA, _PER_THREAD = 768, 512
_UFFD_FEATURES = (
    userfaultfd.UFFD_FEATURE_EVENT_FORK
    | userfaultfd.UFFD_FEATURE_EVENT_REMAP
    | userfaultfd.UFFD_FEATURE_EVENT_REMOVE
    | userfaultfd.UFFD_FEATURE_EVENT_UNMAP
)


class Built(Struct):
    """A process that is ready to go on; it dies with us until it is detached.

    ``tids``: as we see them, leader first.
    """

    newborn: birth.Newborn
    state: Process
    uffd: int
    tids: list[int] = []

    @property
    def pid(self) -> int:
        """The PID as we see it."""
        return self.newborn.pid


class Building:
    """A process on the way to being `Built`: first every process of a tree is begun, in its order; when all of the tree
    is known, each joins it; then the files of each are opened and connected, then each is finished. Before and after
    the files are opened, sockets connect to each other.

    All raise RestoreError with what was refused and why; the new process is then to be killed.
    """

    def __init__(
        self,
        state: Process,
        newborn: birth.Newborn,
        groundwork: Groundwork,
        nesting: Nesting,
        parent_stays: bool,
        room: int = 0,
    ) -> None:
        """``groundwork``: of the new process; ``nesting``: the PID namespaces of the tree; ``room``: `room_to_join`, if
        that is known."""
        self.built = Built(newborn, state, -1, [newborn.pid])
        self._room = room
        self._groundwork = groundwork
        self._nesting = nesting
        self._parent_stays = parent_stays

    def begin(self, pages: SentPages, objects: SharedObjects) -> Iterator[None]:
        """Lay out and fill its memory, make its threads; ``pages`` is the content that came with it, ``objects`` have
        what it shares with others.

        In steps: after each the process is busy on its own for a while.
        """
        with _errors_named(self.built.state):
            self._builder = _Builder(self.built, self._groundwork, self._nesting, self._parent_stays, self._room)
            yield from self._builder.begin(pages, objects)

    def give_up(self) -> None:
        """The process is to be killed."""
        if self.built.uffd >= 0:
            os.close(self.built.uffd)
            self.built.uffd = -1

    def join(self, shared: Shared) -> None:
        """Get ready for its files; ``shared``: the same for all processes of the tree."""
        with _errors_named(self.built.state):
            self._builder.join(shared)

    def open(self) -> Iterator[None]:
        """Open its files; those that share a table have all begun. In steps, like `begin`."""
        with _errors_named(self.built.state):
            yield from self._builder.open()

    def act(self, do: Callable[[descriptors.Plan], None], has_table: bool) -> None:
        """Make calls that have to do with the files of others (`descriptors.act`)."""
        with _errors_named(self.built.state):
            self._builder.act(do, has_table)

    def connect(self) -> None:
        """Connect what refers to the files of others."""
        with _errors_named(self.built.state):
            self._builder.connect()

    def finish(self) -> Iterator[None]:
        """Arm private anonymous memory for missing pages, and all that comes last. In steps, like `begin`."""
        with _errors_named(self.built.state):
            yield from self._builder.finish()


@contextlib.contextmanager
def _errors_named(state: Process) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RestoreError(f"building process {state.pid}: {error.strerror}") from None
    except (struct.error, ValueError, IndexError) as error:
        # What is well-formed may still make no sense.
        raise RestoreError(f"building process {state.pid}: its state cannot be: {error}") from None


class _Builder:
    _shared: Shared

    def __init__(
        self, built: Built, groundwork: Groundwork, nesting: Nesting, parent_stays: bool, room_to_join: int
    ) -> None:
        self._built = built
        self._groundwork = groundwork
        self._nesting = nesting
        self._state = built.state
        self._newborn = built.newborn
        self._parent_stays = parent_stays
        self._executors: list[Executor] = []
        self._asleep: set[int] = set()
        self._current = own_credentials()
        rooms = [CODE_SIZE + threads.room(thread, self._current) for thread in self._state.threads]
        rooms[0] += _estimate(self._state) + room_to_join
        self._rooms = [page_up(room) for room in rooms]
        queued = [*self._state.signals.pending, *(s for thread in self._state.threads for s in thread.pending)]
        pending = sum({signal_bit(int.from_bytes(siginfo[:4], "little")) for siginfo in queued})
        self._stop = stop_signal(0, pending)

    def begin(self, pages: SentPages, objects: SharedObjects) -> Iterator[None]:
        """Up to where a descriptor table is ready for the program's descriptors."""
        size = sum(self._rooms)
        if not self._groundwork.fits(self._state.memory, size):
            yield from self._groundwork.lay_out(self._state.memory, bool(self._state.table_of), size)
        raise_limit(self._newborn.pid, memory.descriptors(self._state.memory) + self._groundwork.first_fd + 8)
        self._install()
        yield from self._run_first(pages, objects)

    def join(self, shared: Shared) -> None:
        """Have room for the calls that make the descriptors, and for these."""
        self._shared = shared
        wanted = CODE_SIZE + _estimate(self._state) + room_to_join(self._state, shared)
        if wanted > self._rooms[0]:
            more = page_up(wanted - self._rooms[0])
            batch = self._executors[0].batch()
            self._groundwork.grow(more, batch)
            self._call(batch)
            self._rooms[0] += more
            self._executors[0].grow(more)
        self._allow_descriptors()

    def act(self, do: Callable[[descriptors.Plan], None], has_table: bool) -> None:
        """What has to do with the files of other processes."""
        leader = self._executors[0]
        descriptors.act(self._state, self._shared, self._most_descriptors, self._call, leader.batch, do, has_table)

    def connect(self) -> None:
        """What may refer to the other processes of the tree."""
        state, leader = self._state, self._executors[0]
        batch = leader.batch()
        self._shared.numbered.adjust(state.pid, batch)
        self._call(batch)
        if not state.table_of:
            descriptors.connect(state, self._shared, self._most_descriptors, self._call, leader.batch)

    def finish(self) -> Iterator[None]:
        """What must come last."""
        pid, state = self._newborn.pid, self._state
        self._await_children()
        yield from self._fall_asleep()
        # What is touched from here on must be present: the boot set is, and the executor's memory is not armed.
        self._arm()
        if seccomp.is_confined(state.threads):
            self._confine()
        yield from self._run_threads()
        for tid, thread in zip(self._built.tids, state.threads, strict=True):
            scheduling.apply(thread.scheduling, tid)
        attributes.write_files(state.attributes, pid)
        yield from self._remove()
        for tid, thread in zip(self._built.tids, state.threads, strict=True):
            threads.finish(tid, thread, tid in self._asleep)
        if state.leader_ended is not None:
            threads.end(pid, self._vdso_syscall(), state.leader_ended)

    def _allow_descriptors(self) -> None:
        """Raise the limit to what building the table takes."""
        wanted = descriptors.highest(self._state, self._shared)
        self._most_descriptors = raise_limit(self._newborn.pid, wanted)
        if self._most_descriptors < wanted and not descriptors.fits(self._state, self._shared, self._most_descriptors):
            raise RestoreError(
                f"building the descriptor table takes numbers up to {wanted}, and the hard limit here is "
                f"{self._most_descriptors}",
                "raise it for restore: ulimit -Hn; at most to fs.nr_open",
            )

    # -- the executor's memory ----------------------------------------------------------------------------------------

    def _install(self) -> None:
        """Make the leader's executor: the arena has those of the other threads first, and the rest is the leader's."""
        arena, others = self._groundwork.arena, self._rooms[1:]
        places = list(accumulate(others, initial=arena.start))
        self._places = [places.pop(), *places]
        self._rooms = [arena.stop - self._places[0], *others]
        self._executors.append(self._executor(0))

    def _executor(self, number: int) -> Executor:
        """The executor of thread ``number``, whose task is stopped."""
        tid, thread = self._built.tids[number], self._state.threads[number]
        base, room = self._places[number], self._rooms[number]
        executor = Executor(tid, self._newborn.memory, base, room, self._stop, self._own(thread.tid))
        registers = ptrace.get_registers(tid)
        executor.install(0, registers)
        ptrace.set_signal_mask(tid, _ALL & ~signal_bit(self._stop))
        return executor

    def _own(self, tid: int) -> tuple[int, int]:
        """PID and TID as the thread itself sees them."""
        return self._nesting.own(self._state.pid), self._nesting.own(tid)

    def _remove(self) -> Iterator[None]:
        """Unmap the executor's memory by the vdso's own ``syscall``; stop the leader where calls are restarted."""
        pid, arena = self._newborn.pid, self._groundwork.arena
        result = yield from last_syscall(pid, self._vdso_syscall(), call("munmap", arena.start, len(arena)))
        if result:
            raise RestoreError(f"unmapping the executor: {errno.errorcode.get(-result, result)}")

    def _vdso_syscall(self) -> int:
        """The address of an instruction ``syscall`` of the program's own."""
        vma = next(v for v in self._state.memory.vmas if v.backing == "vdso")
        return vma.start + vdso.syscall_offset(self._state.memory.vdso)

    # -- the batches --------------------------------------------------------------------------------------------------

    def _run_first(self, pages: SentPages, objects: SharedObjects) -> Iterator[None]:
        """Complete the layout and make the threads."""
        ground, state, leader = self._groundwork, self._state, self._executors[0]
        assert ground.laid_out is not None
        batch = leader.batch()
        ground.clear_table(batch)
        attributes.log_in(state.attributes, batch, ground.first_fd)
        rest, lengths = memory.complete(
            ground.laid_out, state.memory, pages, objects, batch, LENDER_AT, ground.first_fd
        )
        ground.open_gaps(batch)
        attributes.rebuild(state.attributes, batch)
        attributes.register(state.attributes, batch)
        if state.memory.future_locks:
            batch.add(call("mlockall", state.memory.future_locks), "locking mappings to come")
        threads.ask_for(state.threads[1:], self._nesting, batch)
        number = batch.add(call("userfaultfd", os.O_CLOEXEC | os.O_NONBLOCK), "making a userfaultfd")
        answers = yield from self._run(batch)
        memory.check_pages(lengths, answers)
        memory.write_pages(rest, pages, self._newborn.memory)
        self._welcome(leader.born)
        self._built.uffd = pidfd.getfd(self._newborn.pidfd, answers.value(number))
        userfaultfd.api(self._built.uffd, _UFFD_FEATURES)

    def open(self) -> Iterator[None]:
        """Up to where the other processes of the tree may refer to this one's files."""
        state, leader = self._state, self._executors[0]
        for executor, thread in zip(self._executors, state.threads, strict=True):
            if thread.filesystem is not None:
                batch = executor.batch()
                threads.part_places(thread.filesystem, batch)
                self._checked(executor.run(batch))
        batch = leader.batch()
        if self._nesting.mounts(state.pid):
            pid_namespace.mount_proc(batch)
        if not state.table_of:
            batch = descriptors.rebuild(state, self._shared, self._most_descriptors, batch, self._begin_calls)
        signals.rebuild(state.signals, self._nesting.own(state.pid), batch)
        self._end_calls()
        yield from self._run(batch)
        if not state.table_of:
            descriptors.fill(state, self._shared, self._newborn.pidfd)

    def _welcome(self, born: list[int]) -> None:
        """Take in the threads that the leader made: each arrives in a stop of its own."""
        expected = len(self._state.threads) - 1
        if len(born) != expected:
            raise RestoreError(f"{len(born)} of {expected} threads could be made")
        for tid in born:
            self._built.tids.append(tid)
            while ptrace.wait(tid).event != ptrace.PTRACE_EVENT_STOP:
                ptrace.cont(tid)
        self._executors += [self._executor(number) for number in range(1, len(self._state.threads))]

    def _await_children(self) -> None:
        """Not earlier: in a process whose children will live elsewhere, no thread can be made (clone(2), EINVAL)."""
        init = self._nesting.awaited_by(self._state.pid)
        if init:
            leader = self._executors[0]
            batch = leader.batch()
            opened = batch.add(call("pidfd_open", self._nesting.seen(init, self._state.pid), 0), "finding the init")
            fd = self._call(batch).value(opened)
            batch = leader.batch()
            batch.add(call("setns", fd, clone3.CLONE_NEWPID), "entering the PID namespace of its children")
            batch.add(call("close", fd), "closing what is open for a while")
            self._call(batch)

    def _run_threads(self) -> Iterator[None]:
        batches = []
        for executor, thread in zip(self._executors, self._state.threads, strict=True):
            batch = executor.batch()
            if executor is self._executors[0]:
                # Not earlier: what has been opened by its path until now lies in the directories of the host.
                if not self._state.places_of:
                    filesystem.rebuild(self._state.filesystem, batch)
                memory.show_arguments(self._state.memory, batch)
                limits.rebuild(self._state.limits, batch)
                self._shared.numbered.use(self._state.pid, batch)
            threads.rebuild(thread, self._own(thread.tid), self._current, self._parent_stays, batch)
            batches.append(batch)
        alone = len(batches) == 1 and not timers.reads_clocks(self._state.timers)
        if alone:
            self._add_last({}, batches[0])
        for executor, batch in zip(self._executors, batches, strict=True):
            executor.start(batch)
        yield
        for executor in self._executors:
            self._checked(executor.finish())
        if alone:
            return
        # The change of any thread's ids resets what the whole process shares.
        asking = self._executors[0].batch()
        clocks = timers.Clocks(self._state.timers, asking)
        now = clocks.now(self._call(asking))
        last = self._executors[0].batch()
        self._add_last(now, last)
        yield from self._run(last)

    def _add_last(self, now: Mapping[int, int], batch: Batch) -> None:
        """What comes after all ids have changed. ``now``: the clocks of raised timers."""
        attributes.rebuild_last(self._state.attributes, batch)
        timers.rebuild(self._state.timers, self._nesting, now, batch)

    def _confine(self) -> None:
        """Put the threads under seccomp, which does nothing yet as long as they are traced."""
        state = self._state.threads
        for tid in self._built.tids:
            ptrace.set_options(tid, birth.OPTIONS | ptrace.PTRACE_O_SUSPEND_SECCOMP)
        common = seccomp.common(state) if len(state) > 1 else 0
        if common:
            batch = self._executors[0].batch()
            seccomp.rebuild_common(state[0].seccomp.filters[:common], batch)
            answers = self._call(batch)
            if refusing := next(filter(None, answers.results), 0):
                raise RestoreError(f"adding a seccomp filter: thread {refusing} cannot be synchronized")
        for executor, thread in zip(self._executors, state, strict=True):
            batch = executor.batch()
            seccomp.rebuild_own(thread, common, batch)
            if batch:
                self._checked(executor.run(batch))

    def _fall_asleep(self) -> Iterator[None]:
        for executor, thread in zip(self._executors, self._state.threads, strict=True):
            if thread.sleep is not None and thread.sleep.left:
                time = divmod(thread.sleep.left, 1_000_000_000)
                batch = executor.batch()
                place = batch.place(struct.pack("<qq", *time))
                self._newborn.memory.write(place, struct.pack("<qq", *time))
                if (yield from threads.fall_asleep(executor.tid, thread, executor.syscall_at, place)):
                    self._asleep.add(executor.tid)

    def _arm(self) -> None:
        for area in memory.lazy_vmas(self._state.memory, self._shared.memory):
            userfaultfd.register(self._built.uffd, area.start, len(area), userfaultfd.UFFDIO_REGISTER_MODE_MISSING)

    def _run(self, batch: Batch) -> Generator[None, None, Answers]:
        """Let the leader make the calls; after the step they have been made."""
        if not batch:
            return Answers(batch, [], b"")
        leader = self._executors[0]
        leader.start(batch)
        yield
        return self._checked(leader.finish())

    def _begin_calls(self, batch: Batch) -> Batch:
        """Have the leader begin the calls, and end those before; the batch that may follow."""
        leader = self._executors[0]
        self._end_calls()
        leader.start(batch)
        return leader.behind(batch)

    def _end_calls(self) -> None:
        if self._executors[0].is_running:
            self._checked(self._executors[0].finish())

    def _call(self, batch: Batch) -> Answers:
        """Have the leader make the calls now."""
        if not batch:
            return Answers(batch, [], b"")
        return self._checked(self._executors[0].run(batch))

    def _checked(self, answers: Answers) -> Answers:
        return check(self._state.pid, answers)


def room_to_join(state: Process, shared: Shared) -> int:
    """Bytes that the leader's batches need for what is not of its process alone."""
    return descriptors.room(state, shared) + shared.numbered.room(state.pid)


def _estimate(state: Process) -> int:
    """Bytes that the leader's batches may need."""
    paths = sum(len(f.path) for f in state.memory.files)
    return (
        _ESTIMATE
        + _PER_VMA * len(state.memory.vmas)
        + _PER_THREAD * (len(state.threads) + len(state.signals.pending))
        + 4 * paths
        + 64 * len(state.memory.guards)
    )
