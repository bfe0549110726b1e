"""Every piece of process state, before a move, after one, and after the way there and back.

The program sets all of it up and verifies it by itself (`tests/programs/states.py`); each case is a test here.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hosts import Pair
from tests.migrate import move
from tests.programs.cases.memory import ScatteredFile
from tests.programs.states import CASES, UNSUPPORTED

PID = 4100
NOBODY = 65534
#: Seconds that timed system calls last. The moves must be over before, or the cases say that nothing was tried.
HOLD = {0: 1.0, 1: 12.0, 2: 24.0}
Report = dict[str, str | None]


@dataclass
class Outcome:
    """What the program says of itself after the moves, or why it says nothing."""

    report: Report
    failure: BaseException | None = None


@pytest.fixture(scope="module", params=[0, 1, 2], ids=["unmoved", "moved", "there-and-back"])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The program after so many moves."""
    with Pair() as hosts:
        try:
            directory = tmp_path_factory.mktemp("states")
            return Outcome(run_program(hosts, directory, request.param, dump_options=["--tcp-established"]))
        # Kept for one test to raise, with the logs that it holds: each case would repeat them.
        except (Exception, pytest.fail.Exception) as failure:
            return Outcome({}, failure)


def run_program(
    hosts: Pair,
    directory: Path,
    moves: int,
    *options: str,
    dump_options: Sequence[str] = (),
    restore_options: Sequence[str] = (),
    before_verifying: Callable[[], object] = lambda: None,
) -> Report:
    """Start the program, move it, let it verify; returns its report."""
    command = [sys.executable, "-m", "tests.programs.states", "--directory", str(directory), "--hold", str(HOLD[moves])]
    command += options
    with open(directory / "stderr", "wb") as stderr:
        program = hosts.a.popen(command, pid=PID, stderr=stderr)
    hosts.a.wait_until(lambda: (directory / "ready").exists() or program.poll() is not None, 30, "the program is ready")
    end = program
    source, destination = hosts.a, hosts.b
    for _ in range(moves):
        migration = move(source, destination, PID, dump_options=dump_options, restore_options=restore_options)
        migration.wait_drained()
        assert migration.restore is not None
        end = migration.restore
        if not restore_options and not destination.alive(PID):
            complaints = (directory / "stderr").read_text()
            migration.fail(
                f"the program is gone, restore ended with {end.wait(10)}; its standard error: {complaints!r}"
            )
        source, destination = destination, source
    before_verifying()
    (directory / "go.new").write_text(str(time.monotonic()) if moves else "")
    (directory / "go.new").rename(directory / "go")
    status = end.wait(90)
    if not (directory / "report.json").exists():
        pytest.fail(f"the program ended with {status} and no report: {(directory / 'stderr').read_text()}")
    found: Report = json.loads((directory / "report.json").read_text())
    wrong = any(problem and not problem.startswith(UNSUPPORTED) for problem in found.values())
    assert status == int(wrong), f"exit status {status} is not that of the report"
    return found


@pytest.mark.parametrize("moves", [0, 1], ids=["unmoved", "moved"])
def test_program_without_privileges_keeps_its_state_and_gains_none(hosts: Pair, moves: int) -> None:
    # pytest's own directories are closed to other users.
    with tempfile.TemporaryDirectory() as directory:
        os.chown(directory, NOBODY, NOBODY)
        report = run_program(hosts, Path(directory), moves, "--user", str(NOBODY))
    problems = [f"{case}: {problem}" for case, problem in report.items() if problem]
    assert not problems, "\n".join(problems)
    assert "unprivileged" in report


def test_more_runs_of_pages_than_a_process_reads_itself(hosts: Pair, tmp_path: Path) -> None:
    assert run_program(hosts, tmp_path, 1, "--only", ScatteredFile.name()) == {ScatteredFile.name(): None}


def test_program_reports_after_its_moves(outcome: Outcome) -> None:
    if outcome.failure:
        raise outcome.failure
    assert set(outcome.report) == {case.name() for case in CASES}


@pytest.mark.parametrize("case", [case.name() for case in CASES])
def test_state_is_kept(outcome: Outcome, case: str) -> None:
    if outcome.failure:
        pytest.fail("no report: see test_program_reports_after_its_moves", pytrace=False)
    problem = outcome.report[case]
    if problem and problem.startswith(UNSUPPORTED):
        pytest.skip(problem)
    assert problem is None
