"""What goes wrong on the way to a checkpoint directory and from it.

Until the directory is whole, the program runs on as if nothing had happened, and there is no directory. What cannot be
restored is refused before there is a process; what is found out later ends the program before it sees a wrong byte.
"""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from postcopy.checkpoint.reader import Checkpoint
from postcopy.kernel.page import PAGE_SIZE
from tests.hosts import Process, wait_until
from tests.sides import SECONDS, Side
from tests.stage import Patient, Stage, Witness, Work, untouched

USAGE, DUMP_FAILED, RESTORE_FAILED, GONE, LOST, CANNOT_RUN, BAD_CHECKPOINT, INTERRUPTED = 2, 3, 4, 7, 8, 9, 12, 130


def dumped(stage: Stage, kind: type[Work]) -> tuple[Work, Process]:
    """A program that is in the directory."""
    work, program = stage.begin(kind)
    stage.dump(program).ends_well()
    return work, program


# -- the dump fails ----------------------------------------------------------------------------------------------------


def test_program_runs_on_when_the_disk_is_full(stage: Stage) -> None:
    small = stage.directory / "small"
    small.mkdir()
    stage.hosts.a.run(["mount", "-t", "tmpfs", "-o", "size=6m", "small", str(small)], check=True)
    try:
        work, program = stage.begin(Witness)
        stage.checkpoint = small / "checkpoint"
        dump = stage.dump(program)
        dump.ends(DUMP_FAILED)
        assert "ENOSPC" in dump.text
        assert "/pages-0" in dump.text
        assert stage.hosts.a.run(["ls", "-A", str(small)], check=True).stdout == b""
        stage.nothing_is_left(program)
        untouched(work, program)
    finally:
        stage.hosts.a.run(["umount", str(small)])


@pytest.mark.parametrize("step", ["frozen", "collected", "written"])
def test_program_runs_on_when_dump_is_killed(stage: Stage, step: str) -> None:
    work, program = stage.begin(Witness)
    dump = stage.dump(program, pause=step)
    dump.await_pause(step)
    copy = stage.copy(work.directory)
    dump.process.kill()
    dump.process.wait(SECONDS)
    if step == "written":
        Checkpoint.open(stage.checkpoint).close()
        restore = stage.restore(files=(copy, work.directory))
        restore.await_event("running")
        work.finish(restore.process, copy)
    else:
        assert not stage.checkpoint.exists()
        for left in stage.directory.glob(".checkpoint.partial-*"):
            refused = stage.restore(directory=left)
            refused.ends(BAD_CHECKPOINT)
    untouched(work, program)


@pytest.mark.parametrize(
    ("step", "number"), [("frozen", signal.SIGINT), ("collected", signal.SIGTERM), ("written", signal.SIGTERM)]
)
def test_program_runs_on_without_a_directory_when_dump_is_told_to_end(
    stage: Stage, step: str, number: signal.Signals
) -> None:
    work, program = stage.begin(Witness)
    dump = stage.dump(program, pause=step)
    dump.await_pause(step)
    dump.process.send_signal(number)
    dump.process.send_signal(signal.SIGCONT)
    dump.ends(INTERRUPTED)
    assert not stage.checkpoint.exists()
    stage.nothing_is_left(program)
    untouched(work, program)


def test_directory_stays_when_dump_is_told_to_end_after_the_program(stage: Stage) -> None:
    work, program = stage.begin(Witness)
    dump = stage.dump(program, pause="killed")
    dump.await_pause("killed")
    dump.process.terminate()
    dump.process.send_signal(signal.SIGCONT)
    # It has done all that it was asked to.
    dump.ends_well()
    restore = stage.restore()
    restore.await_event("running")
    work.finish(restore.process)


# -- the dump that serves the pages ------------------------------------------------------------------------------------


def test_program_runs_on_without_a_directory_when_a_waiting_dump_is_told_to_end(stage: Stage) -> None:
    work, program = stage.begin(Witness)
    dump = stage.lazy_dump(program)
    assert stage.checkpoint.exists()
    dump.process.terminate()
    dump.ends(INTERRUPTED)
    assert not stage.checkpoint.exists()
    stage.nothing_is_left(program)
    untouched(work, program)


def test_program_runs_on_when_a_waiting_dump_is_killed(stage: Stage) -> None:
    work, program = stage.begin(Witness)
    dump = stage.lazy_dump(program)
    dump.process.kill()
    dump.process.wait(SECONDS)
    # What it has left behind is of no use to anybody.
    restore = stage.restore("--lazy-pages", *stage.source, "--wait", "0")
    restore.ends(GONE)
    stage.nothing_is_left(program)
    untouched(work, program)


def kill(restore: Side) -> None:
    """The restore that has stopped itself dies."""
    restore.process.kill()
    restore.process.wait(SECONDS)


def tell(restore: Side) -> None:
    """The restore that has stopped itself is told to end."""
    restore.process.terminate()
    restore.process.send_signal(signal.SIGCONT)
    restore.ends(INTERRUPTED)


@pytest.mark.parametrize(
    ("step", "end"),
    [("connected", tell), ("checked", kill), ("born", tell), ("received", kill), ("built", tell), ("built", kill)],
)
def test_next_restore_is_served_after_one_that_fails_before_commit(
    stage: Stage, step: str, end: Callable[[Side], None]
) -> None:
    work, program = stage.begin(Witness)
    dump = stage.lazy_dump(program)
    failed = stage.restore("--lazy-pages", *stage.source, pause=step)
    failed.await_pause(step)
    end(failed)
    stage.nothing_is_left(program, dump.process, *roles_of(stage, dump))
    assert dump.process.poll() is None
    restore = stage.restore("--lazy-pages", *stage.source)
    restore.await_event("running")
    work.finish(restore.process)
    dump.ends_well()
    stage.nothing_is_left()


def roles_of(stage: Stage, side: Side) -> list[Process]:
    """Stand-ins for the processes that a command has beside itself."""
    host = stage.hosts.a
    children = (host.proc / str(side.process.pid) / "task" / str(side.process.pid) / "children").read_text().split()
    return [cast(Process, Child(int(pid))) for pid in children]


class Child:
    """Only a PID."""

    def __init__(self, pid: int) -> None:
        self.pid = pid


@pytest.mark.parametrize("next_comes", [True, False])
def test_next_restore_is_served_after_one_that_dies_just_before_commit(stage: Stage, next_comes: bool) -> None:
    work, program = stage.begin(Witness)
    dump = stage.dump(program, "--lazy-pages", *stage.source, pause="stopped")
    dump.await_event("listening")
    failed = stage.restore("--lazy-pages", *stage.source)
    dump.await_pause("stopped")
    kill(failed)
    # Its daemon, which has the connection too, ends after it.
    wait_until(lambda: stage.hosts.b.pids() == [1], SECONDS, "nothing is left of it")
    dump.process.send_signal(signal.SIGCONT)
    wait_until(lambda: "next destination" in dump.text, SECONDS, "dump notices")
    if not next_comes:
        dump.process.terminate()
        assert dump.process.wait(SECONDS) == INTERRUPTED
        stage.nothing_is_left(program)
        untouched(work, program)
        return
    restore = stage.restore("--lazy-pages", *stage.source)
    # The same step again.
    dump.await_pause("stopped")
    dump.process.send_signal(signal.SIGCONT)
    restore.await_event("running")
    work.finish(restore.process)
    dump.ends_well()
    stage.nothing_is_left()


def test_restore_that_cannot_be_here_leaves_the_dump_to_the_next(stage: Stage) -> None:
    work, program = stage.begin(Witness)
    dump = stage.lazy_dump(program)
    taken = stage.hosts.b.popen(["sleep", "1000"], pid=program.pid)
    refused = stage.restore("--lazy-pages", *stage.source)
    assert refused.process.wait(SECONDS) == 5
    assert f"PID {program.pid} is taken" in refused.text
    taken.kill()
    taken.wait(SECONDS)
    restore = stage.restore("--lazy-pages", *stage.source)
    restore.await_event("running")
    work.finish(restore.process)
    dump.ends_well()


def test_directory_of_another_checkpoint_is_refused_by_the_dump_that_serves(stage: Stage) -> None:
    work, program = stage.begin(Witness)
    dump = stage.lazy_dump(program)
    mine, stage.checkpoint = stage.checkpoint, stage.directory / "other"
    port, stage.port = stage.port, stage.port + 1
    other_work, other = stage.begin(Witness)
    other_dump = stage.lazy_dump(other)
    stage.port = port
    refused = stage.restore("--lazy-pages", *stage.source)
    refused.ends(RESTORE_FAILED)
    assert "does not serve the pages of this checkpoint" in refused.text
    restore = stage.restore("--lazy-pages", *stage.source, directory=mine)
    restore.await_event("running")
    work.finish(restore.process)
    dump.ends_well()
    other_dump.process.terminate()
    other_dump.ends(INTERRUPTED)
    untouched(other_work, other)


# -- the directory is damaged ------------------------------------------------------------------------------------------


def names_place(text: str, path: Path, place: int) -> bool:
    """Whether an error names this file, and bytes of it among which ``place`` is."""
    found = re.search(rf"{re.escape(str(path))}: bytes (\d+) to (\d+)", text)
    return found is not None and int(found[1]) <= place <= int(found[2])


def flip(directory: Path, place: int) -> None:
    """One bit in the pages."""
    with open(directory / "pages-0", "r+b") as stream:
        stream.seek(place)
        (byte,) = stream.read(1)
        stream.seek(place)
        stream.write(bytes([byte ^ 4]))


def place_of(directory: Path, address: int) -> int:
    """Where in the file a page is."""
    checkpoint = Checkpoint.open(directory)
    checkpoint.close()
    return checkpoint.indices[0].held.ordinal(address) * PAGE_SIZE


def test_flipped_bit_is_found_before_an_eager_restore_runs_the_program(stage: Stage) -> None:
    work, _ = dumped(stage, Witness)
    ticks = work.done(work.directory)
    pages = stage.checkpoint / "pages-0"
    for share in (0.01, 0.5, 0.99):
        place = int(pages.stat().st_size * share)
        flip(stage.checkpoint, place)
        restore = stage.restore()
        restore.ends(BAD_CHECKPOINT)
        assert f"{pages}: bytes " in restore.text
        first, last = (int(word) for word in restore.text.split("bytes ")[1].split(" (")[0].split(" to "))
        assert first <= place < last
        assert not restore.last("running")
        assert work.done(work.directory) == ticks
        stage.nothing_is_left()
        flip(stage.checkpoint, place)
    # Only that was wrong with it.
    whole = stage.restore()
    whole.await_event("running")
    work.finish(whole.process)


def lazily_here(stage: Stage) -> Side:
    return stage.restore("--lazy-pages", "--background", "off")


def lazily_served(stage: Stage) -> Side:
    stage.serve()
    return stage.remote_restore("--background", "off")


@pytest.mark.parametrize("way", [lazily_here, lazily_served])
def test_flipped_bit_ends_the_program_before_it_sees_it(stage: Stage, way: Callable[[Stage], Side]) -> None:
    begun, program = dumped(stage, Patient)
    work = cast(Patient, begun)
    place = place_of(stage.checkpoint, int(work.log_lines()[0]) + 2000 * PAGE_SIZE)
    flip(stage.checkpoint, place)
    restore = way(stage)
    restore.await_event("running")
    assert "wrong []" in work.ask(stage.hosts.b, program.pid, signal.SIGUSR1)
    stage.hosts.b.kill(program.pid, signal.SIGUSR2)
    assert restore.process.wait(SECONDS) == LOST, restore.text
    assert names_place(restore.text, stage.checkpoint / "pages-0", place), restore.text
    assert "Traceback" not in restore.text
    assert len(work.log_lines()) == 2, "it has answered"


def test_flipped_bit_ends_the_program_when_the_background_meets_it(stage: Stage) -> None:
    work, _ = dumped(stage, Patient)
    flip(stage.checkpoint, (stage.checkpoint / "pages-0").stat().st_size // 2)
    restore = stage.restore("--lazy-pages")
    assert restore.process.wait(SECONDS) == LOST, restore.text
    assert f"{stage.checkpoint / 'pages-0'}: bytes " in restore.text
    assert "Traceback" not in restore.text
    assert work.done(work.directory) == 1
    stage.nothing_is_left()


# -- whose pages come from a directory ---------------------------------------------------------------------------------


def test_program_ends_before_it_reads_zeros_when_its_server_ends(stage: Stage) -> None:
    begun, program = dumped(stage, Patient)
    work = cast(Patient, begun)
    serve = stage.serve()
    restore = stage.remote_restore("--background", "off")
    restore.await_event("running")
    assert "wrong []" in work.ask(stage.hosts.b, program.pid, signal.SIGUSR1)
    serve.process.terminate()
    serve.ends_well()
    restore.ends(LOST)
    work.check(work.directory)
    stage.nothing_is_left()


def test_detached_restore_from_a_directory_leaves_nothing_after_the_program(stage: Stage) -> None:
    begun, program = dumped(stage, Patient)
    work = cast(Patient, begun)
    restore = stage.restore("--lazy-pages", "--background", "off", "--restore-detached")
    restore.ends_well()
    assert "wrong []" in work.ask(stage.hosts.b, program.pid, signal.SIGUSR1)
    assert "wrong []" in work.ask(stage.hosts.b, program.pid, signal.SIGUSR2)
    stage.hosts.b.kill(program.pid, signal.SIGTERM)
    wait_until(lambda: stage.hosts.b.orphan_status(program.pid) == 0, SECONDS, "the program ends well")
    stage.nothing_is_left()


def test_restore_that_is_told_to_end_as_soon_as_the_program_runs_passes_it_on(stage: Stage) -> None:
    work, _ = dumped(stage, Witness)
    restore = stage.restore(pause="running")
    restore.await_pause("running")
    restore.process.terminate()
    restore.process.send_signal(signal.SIGCONT)
    work.ended(restore.process)
    stage.nothing_is_left()


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_directory_that_cannot_be_written_is_refused_before_the_program_is_touched(stage: Stage) -> None:
    work, program = stage.begin(Witness)
    stage.checkpoint.mkdir()
    exists = stage.dump(program, pause="frozen")
    exists.ends(USAGE)
    assert f"{stage.checkpoint} exists already" in exists.text
    stage.checkpoint = stage.directory / "nowhere" / "checkpoint"
    missing = stage.dump(program, pause="frozen")
    missing.ends(CANNOT_RUN)
    assert "ENOENT" in missing.text
    untouched(work, program)


def test_directory_of_another_user_is_refused(stage: Stage) -> None:
    work, _ = dumped(stage, Witness)
    assert stage.checkpoint.stat().st_mode & 0o777 == 0o700
    assert {each.stat().st_mode & 0o777 for each in stage.checkpoint.iterdir()} == {0o600}
    for path in (stage.checkpoint, stage.checkpoint / "state"):
        os.chown(path, 1000, -1)
        refused = stage.restore()
        refused.ends(BAD_CHECKPOINT)
        assert f"{path} belongs to user 1000" in refused.text
        os.chown(path, 0, -1)
    restore = stage.restore()
    restore.await_event("running")
    work.finish(restore.process)


def test_options_that_do_not_go_with_the_directory_are_refused(stage: Stage) -> None:
    work, program = stage.begin(Witness)
    stage.dump(program, "--leave-running", "--lazy-pages").ends(USAGE)
    stage.dump(program, "--leave-stopped", "--lazy-pages").ends(USAGE)
    stage.dump(program, "--leave-running", "--leave-stopped").ends(USAGE)
    stage.dump(program, *stage.source).ends(USAGE)
    assert not stage.checkpoint.exists()
    dump = stage.lazy_dump(program)
    for options in ([], [*stage.source]):
        refused = stage.restore(*options)
        refused.ends(USAGE)
        assert "--lazy-pages" in refused.text
    refused = stage.command(stage.hosts.a, "serve", "-D", stage.checkpoint)
    refused.ends(USAGE)
    assert "has all but the lazy pages" in refused.text
    dump.process.terminate()
    dump.ends(INTERRUPTED)
    stage.dump(program, "--leave-running").ends_well()
    for options in ([*stage.source], ["--lazy-pages", *stage.source], ["--background", "off"]):
        stage.restore(*options).ends(USAGE)
    stage.nothing_is_left(program)
    untouched(work, program)


# -- signals that come while it is being written -----------------------------------------------------------------------


SENT = {signal.SIGHUP: 1, signal.SIGRTMIN: 3, signal.SIGRTMIN + 1: 2}
COUNTS = " ".join(f"{int(number)}:{count}" for number, count in sorted(SENT.items()))


def send_all(stage: Stage, program: Process) -> None:
    """Each as often as it is to arrive."""
    for number, count in SENT.items():
        for _ in range(count):
            program.send_signal(number)


@pytest.mark.parametrize("options", [(), ("--lazy-pages",)], ids=["eager", "lazy"])
def test_signals_sent_during_the_dump_arrive_once_in_the_restored_program(
    stage: Stage, options: tuple[str, ...]
) -> None:
    begun, program = stage.begin(Patient)
    work = cast(Patient, begun)
    dump = stage.dump(program, "--leave-running", pause="collected")
    dump.await_pause("collected")
    send_all(stage, program)
    dump.process.send_signal(signal.SIGCONT)
    dump.ends_well()
    copy = stage.copy(work.directory)
    program.terminate()
    work.ended(program)
    assert work.log_lines()[-1] == COUNTS, "in the program that has run on"
    restore = stage.restore(*options, files=(copy, work.directory))
    restore.await_event("running")
    restore.process.terminate()
    work.ended(restore.process, copy)
    assert work.log_lines(copy)[-1] == COUNTS


def test_signals_sent_while_a_dump_waits_arrive_once_in_the_restored_program(stage: Stage) -> None:
    begun, program = stage.begin(Patient)
    work = cast(Patient, begun)
    stage.lazy_dump(program)
    send_all(stage, program)
    restore = stage.restore("--lazy-pages", *stage.source)
    restore.await_event("running")
    restore.process.terminate()
    work.ended(restore.process)
    assert work.log_lines()[-1] == COUNTS


def test_signals_sent_when_the_directory_is_written_arrive_in_the_restored_program(stage: Stage) -> None:
    begun, program = stage.begin(Patient)
    work = cast(Patient, begun)
    dump = stage.dump(program, pause="written")
    dump.await_pause("written")
    send_all(stage, program)
    dump.process.send_signal(signal.SIGCONT)
    dump.ends_well()
    assert program.wait(SECONDS) == -signal.SIGKILL
    restore = stage.restore()
    restore.await_event("running")
    restore.process.terminate()
    work.ended(restore.process)
    assert work.log_lines()[-1] == COUNTS
