"""Collect the state of a frozen process: one batch of calls for each thread, the rest from ``/proc``."""

from postcopy.dump_side import (
    attributes,
    descriptors,
    edges,
    filesystem,
    limits,
    lineage,
    memory,
    signals,
    threads,
    timers,
)
from postcopy.dump_side.choices import Choices
from postcopy.dump_side.freeze import Frozen
from postcopy.dump_side.sleepers import Observation
from postcopy.errors import DumpError, ProblemsError
from postcopy.kernel import procfs
from postcopy.kernel.executor import Answers
from postcopy.state import FileIdentity, Process

Sleepers = dict[int, Observation]


def collect(
    frozen: Frozen,
    space: int,
    smaps: memory.SmapsReader,
    trusted_pipes: frozenset[int],
    sleepers: Sleepers,
    choices: Choices | None = None,
) -> tuple[Process, memory.Pages, list[FileIdentity]]:
    """The state of the process, its pages, and the files it needs. ``smaps`` is being read meanwhile;
    ``sleepers`` were observed before the freeze.

    Raises ProblemsError for what has come since the survey and cannot be moved, DumpError where a call is refused.
    """
    pid = frozen.pid
    problems = [*lineage.problems(pid, frozen=True), *timers.problems(pid), *threads.problems(frozen.threads)]
    table, found = descriptors.collect(pid, problems, trusted_pipes, choices, frozen=True)
    places = filesystem.collect(pid, problems)
    lines = list(procfs.for_each_vma(pid))
    boot_set = [a for thread in frozen.threads for a in threads.boot_set(thread)]
    pages = memory.scan(pid, lines, boot_set)
    vdso_range = next((range(line.start, line.end) for line in lines if line.name == "[vdso]"), range(0))
    vdso = frozen.memory.read(vdso_range.start, len(vdso_range))
    # Before the executors have memory of their own in the process, which is not to be found in the layout.
    layout = memory.layout(pid, smaps.result())
    problems += layout.problems
    if problems:
        raise ProblemsError(problems, f"process {pid} cannot be moved any more")
    pages = memory.keep_together(pages, layout)
    with frozen.executors(vdso_range) as executors:
        asked = [(executor, executor.batch()) for executor in executors]
        leaders = asked[0][1]
        about_memory = memory.Question.ask(leaders)
        about_signals = signals.Question.ask(leaders)
        about_timers = timers.Question.ask(leaders)
        about_limits = limits.Question.ask(leaders)
        about_attributes = attributes.Question.ask(leaders)
        about_threads = [threads.Question.ask(batch) for _, batch in asked]
        for executor, batch in asked:
            executor.start(batch)
        answers = [_checked(pid, executor.finish()) for executor, _ in asked]
        edges.find(table, executors[0])
    leader = answers[0]
    state = Process(
        pid=int(frozen.threads[0].status["NSpid"].split()[-1]),
        space=space,
        threads=[
            question.answered(answer, pid, thread, sleepers.get(thread.tid), frozen.memory)
            for question, answer, thread in zip(about_threads, answers, frozen.threads, strict=True)
        ],
        memory=memory.collect(pid, layout, pages, about_memory.answered(leader), vdso),
        signals=about_signals.answered(leader, pid),
        timers=about_timers.answered(leader),
        limits=about_limits.answered(leader),
        filesystem=places,
        attributes=about_attributes.answered(leader, pid),
        lineage=lineage.collect(pid),
        descriptors=table,
        stopped_by=frozen.stopped_by,
    )
    return state, pages, [*memory.identities(layout), *found.needed]


def _checked(pid: int, answers: Answers) -> Answers:
    for made, purpose, number in answers.refusals():
        raise DumpError(f"process {pid}: {purpose}: {made} was refused with errno {number}")
    return answers
