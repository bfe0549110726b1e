"""Collect the state of a frozen tree: one batch of calls for each thread, the rest from ``/proc``."""

import contextlib
from collections.abc import Callable, Generator

from msgspec.structs import replace

from postcopy.dump_side import (
    attributes,
    clocks,
    descriptors,
    edges,
    epoll,
    inet_sockets,
    inotify,
    ipc,
    limits,
    lineage,
    memory,
    seccomp,
    signals,
    socket_changes,
    socket_looks,
    threads,
    timers,
    unix_peers,
)
from postcopy.dump_side.arena import Arena, accepted
from postcopy.dump_side.choices import Choices
from postcopy.dump_side.freeze import Frozen
from postcopy.dump_side.frozen_tree import FrozenTree
from postcopy.dump_side.looks import Look, Looker
from postcopy.dump_side.opened import Silence, Table, Trusted
from postcopy.dump_side.shared_memory import SharedObjects
from postcopy.dump_side.sleepers import Observation
from postcopy.dump_side.smaps import SmapsReader
from postcopy.errors import PostcopyError, ProblemsError
from postcopy.state import FileIdentity, Process, Tree
from postcopy.turns import by_turns

Sleepers = dict[int, Observation]

# Processes that make calls for us while others are looked at.
_AT_ONCE = 4


def collect(
    frozen: FrozenTree,
    smaps: SmapsReader,
    looker: Looker,
    trusted: Trusted,
    sleepers: Sleepers,
    shared: SharedObjects,
    choices: Choices | None = None,
    numbered: ipc.IpcObjects | None = None,
    silence: Silence | None = None,
    known: socket_looks.Known | None = None,
    collected: Callable[[Process], None] = lambda _: None,
) -> Tree:
    """The state of the tree; process number N has address space N. ``collected`` is told of each process at once.

    ``smaps`` reads meanwhile, and is to verify in the end; ``looker`` looks at each process; ``sleepers`` were observed
    before the freeze. The memory that its processes may share is added to ``shared``, which must stay open as long as
    its content is needed; what they share by number, to ``numbered``. Each TCP socket is made silent by ``silence``
    before it is looked at. ``known``: what ``looker`` has been told of sockets.

    Raises ProblemsError for what has come since the survey and cannot be moved, DumpError where a call is refused.
    """
    members = frozenset([*frozen.faces, *frozen.zombies])
    table = Table(members, shared, trusted.pipes, choices or Choices(), frozen=True, ranks=trusted.ranks)
    table.silence, table.remembered = silence, trusted.remembered
    with contextlib.closing(table):
        known = known or socket_looks.Known()
        numbered = numbered or ipc.IpcObjects()
        return _collect(frozen, smaps, looker, trusted, sleepers, shared, numbered, table, known, collected)


def _collect(
    frozen: FrozenTree,
    smaps: SmapsReader,
    looker: Looker,
    trusted: Trusted,
    sleepers: Sleepers,
    shared: SharedObjects,
    numbered: ipc.IpcObjects,
    table: Table,
    known: socket_looks.Known,
    collected: Callable[[Process], None],
) -> Tree:
    stopped_at = clocks.now(frozen.root.pid)
    problems: list[str] = []
    statuses = {each.pid: each.threads[0].status for each in frozen.processes}
    tids = {each.pid: [thread.status["NSpid"] for thread in each.threads] for each in frozen.processes}
    faces = {**dict(zip(frozen.pids, frozen.faces, strict=True)), **{pid: pid for pid in frozen.zombies}}
    kin = lineage.Kin(faces, statuses, frozen.zombies, tids)
    table.level = kin.level
    sharing = lineage.Sharing(dict(zip(frozen.pids, frozen.faces, strict=True)), trusted.orders)
    problems += [*sharing.problems, *kin.problems(sharing)]
    zombies = [kin.zombie(pid, problems) for pid in frozen.zombies]
    table.theirs = known.inodes
    owners = [each for each in frozen.processes if each.pid not in sharing.tables]
    for each in owners:
        if each.face in known.sockets:
            table.asked[each.face] = looker.ask_for_sockets(each.face)
    looker.ask(frozen.faces, frozen.root.face)
    for each in owners:
        table.slots[each.face] = descriptors.collect(table, each.face, problems)
        table.asked_no_more(each.face)
    inet_sockets.check_loops(table, problems)
    descriptors.collect_in_flight(table, problems)
    epoll.complete(table, problems)
    inotify.complete(table, problems)
    unix_peers.check(table, problems)
    numbered.find(frozen.pids, frozen.zombies, table.choices, problems, lambda: ipc.waiting_frozen(frozen.processes))
    if problems:
        raise ProblemsError(problems, f"process {frozen.root.pid} cannot be moved any more")
    processes: list[Process] = []
    needed: dict[str, FileIdentity] = {}
    checked: memory.Checked = {}
    stops = lineage.Stops(kin, frozen.processes)

    def collect_one(space: int, each: Frozen) -> Generator[None, None, None]:
        look = looker.result()
        collecting = _process(each, look, space, smaps, numbered, table, kin, sharing, stops, sleepers, checked)
        state, layout = yield from collecting
        _check_death_signals(state, frozen.parent_threads.get(each.pid), each)
        processes.append(state)
        # Not earlier: who reads smaps holds the lock that mapping the executors' memory waits for.
        smaps.begin_foreseen(each.face)
        collected(state)
        needed.update((file.path, file) for file in memory.identities(layout, needed))

    # In their order: each has as many steps as the others.
    works = [collect_one(space, each) for space, each in enumerate(frozen.processes)]
    try:
        by_turns(works, _AT_ONCE)
    except BaseException:
        for work in works:
            with contextlib.suppress(PostcopyError, OSError):
                work.close()
        raise
    problems += shared.problems(set(frozen.faces), trusted.memory)
    if problems:
        raise ProblemsError(problems, f"process {frozen.root.pid} cannot be moved any more")
    files = list(dict.fromkeys((*needed.values(), *table.needed)))
    found = table.descriptors
    sets, queues = numbered.collect(kin.common)
    return Tree(
        processes,
        zombies,
        found,
        files,
        shared_memory=shared.collect(),
        clocks=stopped_at,
        pid_namespaces=kin.pid_namespaces,
        semaphores=sets,
        message_queues=queues,
    )


def _check_death_signals(state: Process, parent_thread: int | None, frozen: Frozen) -> None:
    """The signal at the end of its parent comes at the end of the thread whose child a process is (prctl(2))."""
    if parent_thread is None or parent_thread == int(frozen.threads[0].status["PPid"]):
        return
    if any(thread.parent_death_signal for thread in state.threads):
        text = f"process {frozen.pid} is to get a signal when thread {parent_thread} of its parent ends"
        raise ProblemsError([f"{text}, which cannot be moved yet"], f"process {frozen.pid} cannot be moved any more")


def _process(
    frozen: Frozen,
    look: Look,
    space: int,
    smaps: SmapsReader,
    numbered: ipc.IpcObjects,
    table: Table,
    kin: lineage.Kin,
    sharing: lineage.Sharing,
    stops: lineage.Stops,
    sleepers: Sleepers,
    checked: memory.Checked,
) -> Generator[None, None, tuple[Process, memory.Layout]]:
    """The state of one process, and its layout; in steps, after each of which the process is busy on its own."""
    pid = frozen.face
    problems = [*look.problems, *seccomp.problems_of_frozen(frozen.threads)]
    # It may have been born since the survey.
    problems += kin.problems_of(frozen.pid)
    known = smaps.foresee(pid) if not look.maps else None
    if known is None:
        # Before the executors have memory of their own in the process, which is not to be found in the layout.
        smaps.begin(pid)
    lines = smaps.result(pid) if known is None else known.lines
    vdso_range = next((range(line.start, line.end) for line in lines if line.name == "[vdso]"), range(0))
    vdso = frozen.memory.read(vdso_range.start, len(vdso_range))
    if known is not None and not known.layout.has_objects:
        layout = known.layout
    else:
        layout = memory.layout(pid, table.shared, lines, checked)
    problems += layout.problems
    if problems:
        raise ProblemsError(problems, f"process {pid} cannot be moved any more")
    boot_set = [address for thread in frozen.threads for address in threads.boot_set(thread)]
    table.shared.add_boot_set(layout.vmas, boot_set)
    pages = memory.keep_together(memory.with_boot_set(look.pages, boot_set), layout)
    with Arena(frozen, vdso_range) as arena:
        yield
        executors = arena.arrive()
        asked = [(executor, executor.batch()) for executor in executors]
        leaders = asked[0][1]
        about_memory = memory.Question.ask(leaders)
        about_signals = signals.Question.ask(leaders)
        about_timers = timers.Question.ask(leaders, pid)
        about_limits = limits.Question.ask(leaders)
        about_attributes = attributes.Question.ask(leaders)
        stops.ask(frozen.pid, leaders)
        about_threads = [threads.Question.ask(batch) for _, batch in asked]
        for executor, batch in asked:
            executor.start(batch)
        yield
        answers = [accepted(f"process {pid}", executor.finish()) for executor, _ in asked]
        if pid in table.slots:
            edges.find(table, pid, executors[0])
            socket_changes.read_close_on_exec(table, pid, executors[0])
        numbered.read_adjustments(executors[0], frozen.pid, kin.common(frozen.pid), table.choices)
        locks = memory.future_locks(frozen, arena.range)
        arena.leave()
        yield
    leader = answers[0]
    stops.answered(frozen.pid, leader)
    found_threads = [
        question.answered(
            answer,
            look.threads[thread.tid],
            thread,
            sleepers.get(thread.tid),
            frozen.memory,
            kin.number(thread.status["NSpid"]),
        )
        for question, answer, thread in zip(about_threads, answers, frozen.threads, strict=True)
    ]
    found_signals = about_signals.answered(leader, pid)
    inner = {thread.tid: state.tid for thread, state in zip(frozen.threads, found_threads, strict=True)}
    queued = [*found_signals.pending, *(siginfo for thread in found_threads for siginfo in thread.pending)]
    found_timers = about_timers.answered(leader, inner, queued)
    ended = threads.ended_leader(frozen, found_threads[0], kin.common(frozen.pid)) if pid != frozen.pid else None
    state = Process(
        pid=kin.common(frozen.pid),
        space=space,
        threads=[
            *filter(None, [ended]),
            *(
                replace(t, pending=timers.without_raised(t.pending, found_timers), filesystem=look.apart.get(own.tid))
                for t, own in zip(found_threads, frozen.threads, strict=True)
            ),
        ],
        memory=memory.collect(look.memory, layout, pages, about_memory.answered(leader), vdso, locks),
        signals=replace(found_signals, pending=timers.without_raised(found_signals.pending, found_timers)),
        timers=found_timers,
        limits=about_limits.answered(leader),
        filesystem=look.places,
        attributes=about_attributes.answered(leader, look.attributes),
        lineage=kin.lineage(frozen.pid),
        slots=table.slots.get(pid, []),
        stopped_by=frozen.stopped_by,
        stop_told=stops.told(frozen.pid),
        table_of=kin.common(sharing.tables[frozen.pid]) if frozen.pid in sharing.tables else 0,
        places_of=kin.common(sharing.places[frozen.pid]) if frozen.pid in sharing.places else 0,
        leader_ended=threads.end_of_leader(frozen.pid) if ended else None,
    )
    return state, layout
