"""Every way to and from a checkpoint directory, with real programs in the middle of their work."""

import signal
from pathlib import Path
from typing import cast

import pytest

from tests.hosts import Host, Pair, Process, wait_until
from tests.programs.patient import A_FEW
from tests.sides import SECONDS, Side
from tests.stage import DictChurn, Patient, SqliteBank, Stage, Work, Xz

KINDS: list[type[Work]] = [Xz, DictChurn, SqliteBank]
DEFAULT_IDLE_DELAY = 5.0
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def dumped(stage: Stage, kind: type[Work], *options: str) -> Work:
    """A program at work that is then in the directory, and has ended."""
    work, program = stage.begin(kind)
    stage.dump(program, *options).ends_well()
    assert program.poll() == -signal.SIGKILL
    stage.nothing_is_left()
    return work


# -- each line of the table --------------------------------------------------------------------------------------------


@every_kind
def test_dump_to_a_directory_and_eager_restore(stage: Stage, kind: type[Work]) -> None:
    work = dumped(stage, kind)
    restore = stage.restore()
    restore.await_event("running")
    # Not one page is missing any more.
    assert restore.last("running")["lazy_pages"] == 0
    work.finish(restore.process)
    stage.nothing_is_left()


@every_kind
def test_lazy_restore_from_a_directory(stage: Stage, kind: type[Work]) -> None:
    work = dumped(stage, kind)
    restore = stage.restore("--lazy-pages")
    restore.await_event("running")
    assert restore.last("running")["lazy_pages"] > 1000
    work.finish(restore.process)
    assert restore.last("drained")
    stage.nothing_is_left()


def test_directory_is_copied_and_the_pages_are_served_from_the_frozen_process(stage: Stage) -> None:
    work, program = stage.begin(SqliteBank)
    dump = stage.lazy_dump(program)
    assert (stage.checkpoint / "pages-0").stat().st_size < 2 << 20
    restore = stage.restore("--lazy-pages", *stage.source, directory=stage.copy(stage.checkpoint))
    restore.await_event("running")
    assert restore.last("running")["lazy_pages"] > 1000
    work.finish(restore.process)
    dump.ends_well()
    assert program.poll() == -signal.SIGKILL
    stage.nothing_is_left()


def test_restore_from_a_served_directory_without_a_copy(stage: Stage) -> None:
    work = dumped(stage, Xz)
    serve = stage.serve()
    restore = stage.remote_restore()
    restore.await_event("running")
    work.finish(restore.process)
    wait_until(lambda: serve.last("drained"), SECONDS, "serve hears of the last page")
    serve.process.terminate()
    serve.ends_well()
    stage.nothing_is_left()


def test_one_served_directory_gives_several_programs_at_once_and_again(stage: Stage) -> None:
    work = dumped(stage, DictChurn)
    serve = stage.serve()

    def restores(count: int) -> list[tuple[Side, Path]]:
        copies = [stage.copy(work.directory) for _ in range(count)]
        return [(stage.remote_restore("--new-pid-namespace", files=(copy, work.directory)), copy) for copy in copies]

    results = []
    for count in (3, 1):
        started = restores(count)
        for restore, _ in started:
            restore.await_event("running")
        for restore, copy in started:
            work.finish(restore.process, copy)
            results.append((copy / "result").read_text())
    # They were one program up to the dump, and several from there on.
    assert len(results) == 4
    stage.nothing_is_left(serve.process)
    serve.process.terminate()
    serve.ends_well()
    stage.nothing_is_left()


def test_one_directory_is_restored_again_and_again(stage: Stage) -> None:
    work = dumped(stage, DictChurn)
    for option in ((), ("--lazy-pages",), ("--lazy-pages",)):
        copy = stage.copy(work.directory)
        restore = stage.restore(*option, files=(copy, work.directory))
        restore.await_event("running")
        work.finish(restore.process, copy)
        stage.nothing_is_left()


# -- what becomes of the program that was dumped -----------------------------------------------------------------------


def test_program_left_running_and_the_restored_one_are_both_right(stage: Stage) -> None:
    work, program = stage.begin(SqliteBank)
    dump = stage.dump(program, "--leave-running", pause="written")
    dump.await_pause("written")
    copy = stage.copy(work.directory)
    dump.process.send_signal(signal.SIGCONT)
    dump.ends_well()
    restore = stage.restore(files=(copy, work.directory))
    restore.await_event("running")
    work.goes_on(program)
    work.finish(restore.process, copy)
    work.finish(program)
    stage.nothing_is_left()


def test_program_left_stopped_stays_so_until_it_is_told_to_go_on(stage: Stage) -> None:
    work, program = stage.begin(DictChurn)
    stage.dump(program, "--leave-stopped").ends_well()
    assert stage.hosts.a.proc_state(program.pid) == "T"
    stage.nothing_is_left(program)
    copy = stage.copy(work.directory)
    restore = stage.restore(files=(copy, work.directory))
    restore.await_event("running")
    work.finish(restore.process, copy)
    assert stage.hosts.a.proc_state(program.pid) == "T"
    assert "\nTracerPid:\t0\n" in (stage.hosts.a.proc / str(program.pid) / "status").read_text()
    program.send_signal(signal.SIGCONT)
    work.finish(program)


# -- when pages come ---------------------------------------------------------------------------------------------------


def handed_over(stage: Stage, program: Process, *options: str) -> Side:
    """Live, without a directory."""
    stage.command(stage.hosts.a, "dump", "--lazy-pages", "-t", program.pid, *stage.source)
    return stage.remote_restore(*options)


def from_the_directory(stage: Stage, program: Process, *options: str) -> Side:
    """The directory has all the pages."""
    stage.dump(program).ends_well()
    return stage.restore("--lazy-pages", *options)


def from_the_frozen_process(stage: Stage, program: Process, *options: str) -> Side:
    """The directory has been copied, the pages have not."""
    stage.lazy_dump(program)
    return stage.restore("--lazy-pages", *stage.source, *options, directory=stage.copy(stage.checkpoint))


def from_a_server(stage: Stage, program: Process, *options: str) -> Side:
    """State and pages come from a directory of the other host."""
    stage.dump(program).ends_well()
    stage.serve()
    return stage.remote_restore(*options)


WAYS = [handed_over, from_the_directory, from_the_frozen_process, from_a_server]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


class Moved:
    """The program that does as it is told, on the second host with most of its pages missing."""

    def __init__(self, stage: Stage, way: object, *options: str) -> None:
        work, program = stage.begin(Patient)
        self.host: Host = stage.hosts.b
        self.pid = program.pid
        self.work = cast(Patient, work)
        assert callable(way)
        self.restore: Side = way(stage, program, *options)
        self.restore.await_event("running")

    def checks_a_few(self) -> None:
        """The pages that it looks at come; others do not."""
        before = self.work.resident(self.host, self.pid)
        assert self.work.ask(self.host, self.pid, signal.SIGUSR1) == f"checked {A_FEW}, wrong []"
        # Pages of its area that the interpreter itself has there, of which it touches some more, are no concern here.
        assert A_FEW <= self.work.resident(self.host, self.pid) - before <= 2 * A_FEW

    def ends(self) -> None:
        """It is told to."""
        self.restore.process.terminate()
        assert self.restore.process.wait(SECONDS) == 0, self.restore.text


@every_way
def test_without_a_background_only_what_is_touched_comes(stage: Stage, way: object) -> None:
    moved = Moved(stage, way, "--background", "off")
    assert moved.work.resident(moved.host, moved.pid) < 4 * A_FEW
    moved.checks_a_few()
    moved.checks_a_few()
    assert moved.work.ask(moved.host, moved.pid, signal.SIGUSR2) == f"checked {Patient.pages}, wrong []"
    moved.ends()
    statistics = moved.restore.last("statistics")
    assert statistics["bytes_bulk"] == 0
    assert Patient.pages * 4096 <= statistics["bytes_demand"] <= Patient.pages * 4096 * 2


def test_the_rest_comes_after_five_seconds_without_a_fault(pair: Pair, tmp_path: Path) -> None:
    # All ways at once, since each takes as long.
    stages = []
    for number, way in enumerate(WAYS):
        (tmp_path / way.__name__).mkdir()
        stages.append(Stage(pair, tmp_path / way.__name__, number))
    try:
        moved = []
        for stage, way in zip(stages, WAYS, strict=True):
            moved.append(Moved(stage, way, "--background", "idle"))
            moved[-1].checks_a_few()
        for each in moved:
            each.restore.await_event("drained")
            assert each.work.resident(each.host, each.pid) >= Patient.pages
            still = [event for event in each.restore.events if event["event"] == "progress" and not event["bytes_bulk"]]
            faulting = [event["elapsed_s"] for event in still if event["faults"] < still[-1]["faults"]]
            # The last progress before the pause tells of faults that are no older than the one before it.
            assert each.restore.last("drained")["elapsed_s"] - faulting[-1] > DEFAULT_IDLE_DELAY
            assert each.restore.last("statistics")["bytes_bulk"] > Patient.pages * 4096 * 3 // 4
            each.ends()
            each.work.check(each.work.directory)
    finally:
        for stage in stages:
            stage.clear()
