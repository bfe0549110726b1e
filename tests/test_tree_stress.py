"""A tree of processes with memory of every kind, which change it at random, moved to and fro between two hosts."""

import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import Host, Pair, Process, wait_until
from tests.migrate import UNLUCKY, MigrationFailed, move_restless
from tests.sides import Side
from tests.stress_options import DEFAULT_SECONDS
from tests.test_layout_stress import waiting_threads

PID = 5500
HANG_SECONDS = 40
SECONDS = 60


def command(directory: Path, seed: int, *options: str) -> list[str]:
    """The program."""
    files = [part for name in ("result", "ready", "stop") for part in (f"--{name}", str(directory / name))]
    program = [sys.executable, "-m", "tests.programs.tree_stress", "--seed", str(seed), *files]
    return [*program, "--hang-seconds", str(HANG_SECONDS), *options]


def read_result(directory: Path) -> dict[str, Any]:
    """What the root has published."""
    with contextlib.suppress(FileNotFoundError):
        result: dict[str, Any] = json.loads((directory / "result").read_text())
        return result
    reports = [json.loads(report.read_text()) for report in directory.glob("result.failure-*")]
    return {"ok": False, "what": "no result", "reports": reports, "stderr": (directory / "stderr").read_text()[-5000:]}


def run_here(directory: Path, seed: int, seconds: float, *options: str) -> tuple[int, dict[str, Any]]:
    """Run the program without a move: its exit status and result."""
    with open(directory / "stderr", "wb") as stderr:
        program = subprocess.Popen(command(directory, seed, *options), stdin=subprocess.DEVNULL, stderr=stderr)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(seconds)
        (directory / "stop").touch()
        return program.wait(SECONDS), read_result(directory)
    finally:
        program.kill()
        program.wait()


class Way:
    """How the pages of one move come; all of it follows from the seed."""

    def __init__(self, chance: random.Random) -> None:
        self.rate, self.by_directory, self.options = chance.choice(
            [
                (None, False, ()),
                (f"{chance.randrange(100, 300)}mbit", False, ()),
                ("200mbit", False, ("--background", "idle", "--idle-delay", "0.01")),
                (None, True, ()),
                (None, True, ("--lazy-pages",)),
            ]
        )
        self.pause = chance.choice((0, 0, 0.3, 1.0))

    def __repr__(self) -> str:
        way = "by a directory" if self.by_directory else self.rate or "no limit"
        return f"<{' '.join((way, *self.options))}, then {self.pause} s>"


@pytest.fixture
def tree_seed(request: pytest.FixtureRequest) -> int:
    """The one that was asked for, or another one each time."""
    seeds: Sequence[int] = request.config.getoption("--stress-seed", None) or ()
    return seeds[0] if seeds else random.randrange(1 << 31)


def all_waiting(host: Host) -> str:
    """What every thread in a host waits for."""
    return "\n".join(f"{pid}: {waiting_threads(pid)}" for pid in host.remnants())


def test_every_byte_of_a_tree_is_right_while_it_moves_to_and_fro(
    hosts: Pair, tmp_path: Path, tree_seed: int, request: pytest.FixtureRequest
) -> None:
    stress(hosts, tmp_path, tree_seed, request)


def stress(hosts: Pair, tmp_path: Path, tree_seed: int, request: pytest.FixtureRequest, *options: str) -> None:
    """Move it to and fro; ``options``: of the program."""
    seconds = float(request.config.getoption("--stress-seconds", DEFAULT_SECONDS))
    chance = random.Random(tree_seed)
    without = request.config.getoption("--stress-without", "")
    with open(tmp_path / "stderr", "wb") as stderr:
        argv = command(tmp_path, tree_seed, *options, *(("--without", without) if without else ()))
        program: Process = hosts.a.popen(argv, pid=PID, stderr=stderr)
    ready = tmp_path / "ready"
    wait_until(lambda: ready.exists() or program.poll() is not None, SECONDS, "all workers are at work")
    assert program.poll() is None, f"seed {tree_seed}: {read_result(tmp_path)}"
    try:
        root, moves = to_and_fro(hosts, tmp_path, program, chance, seconds)
    except (AssertionError, pytest.fail.Exception) as failure:
        raise MigrationFailed(f"replay with --stress-seed {tree_seed}: {read_result(tmp_path)} {failure}") from None
    (tmp_path / "stop").touch()
    status: int | str
    try:
        status = root.wait(2 * HANG_SECONDS)
    except subprocess.TimeoutExpired:
        status = f"it does not end: {all_waiting(root.host)}"
    result = read_result(tmp_path)
    assert (status, result["ok"]) == (0, True), (
        f"replay with --stress-seed {tree_seed} ({moves}): exit status {status}, {json.dumps(result, indent=1)}"
    )
    assert min(result["counts"][name] for name in ("descendants", "messages", "lives", "shared pages checked")) > 0
    print(f"seed {tree_seed}, {moves}: {result}")


def to_and_fro(
    hosts: Pair, directory: Path, program: Process, chance: random.Random, seconds: float
) -> tuple[Process, list[Way]]:
    """Two moves and as many more as there is time for: the process whose end is the root's, and how it was moved."""
    until = time.monotonic() + seconds
    places = [hosts.a, hosts.b]
    ways: list[Way] = []
    root = program
    while len(ways) < 2 or time.monotonic() < until:
        way = Way(chance)
        ways.append(way)
        if way.by_directory:
            root = by_directory(places[0], places[1], directory / str(len(ways)), way.options)
        else:
            hosts.set_rate(way.rate)
            migration = move_restless(places[0], places[1], PID, way.options)
            migration.wait_drained(SECONDS)
            hosts.set_rate(None)
            assert migration.restore is not None
            root = migration.restore
        places.reverse()
        pause = time.monotonic() + way.pause
        wait_until(lambda: time.monotonic() > pause or (directory / "result").exists(), SECONDS)  # noqa: B023
        assert root.poll() is None, f"the tree has ended by itself after {ways}"
    return root, ways


def by_directory(source: Host, destination: Host, files: Path, options: Sequence[str]) -> Process:
    """Write the tree to a directory and restore it from there: the process whose end is the root's."""
    files.mkdir()
    checkpoint = str(files / "checkpoint")
    dump = Side.start(source, files / "dump.err", ["dump", "-t", str(PID), "-D", checkpoint])
    if dump.process.wait(SECONDS) and UNLUCKY in dump.text:
        dump = Side.start(source, files / "dump.err", ["dump", "-t", str(PID), "-D", checkpoint])
    dump.ends_well()
    restore = Side.start(destination, files / "restore.err", ["restore", *options, "-D", checkpoint])
    restore.await_event("drained" if options else "running")
    return restore.process


def test_no_false_alarm_without_a_move(tmp_path: Path) -> None:
    status, result = run_here(tmp_path, 3, 3)
    assert (status, result["ok"]) == (0, True), result
    assert result["counts"]["steps"] > 500


@pytest.mark.parametrize("sabotage", ["lost", "revived", "exchanged", "byte"])
def test_wrong_page_is_noticed(tmp_path: Path, sabotage: str) -> None:
    status, result = run_here(tmp_path, 1, 20, "--sabotage", sabotage)
    assert (status, result["ok"]) == (1, False), result
