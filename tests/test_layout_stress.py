"""Random changes of layout and contents by several threads and forks, while the pages are still on their way."""

import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import Pair, wait_until
from tests.migrate import move_restless
from tests.stress_options import DEFAULT_SECONDS

PROGRAM = Path(__file__).parent / "programs" / "layout_stress.py"
PID = 5000
HANG_SECONDS = 40.0
# One for each way for the pages to come; three of them while the program is busy.
SUITE_SEEDS = (4, 5, 6, 7)


@dataclass(frozen=True)
class Plan:
    """One run; everything in it follows from the seed."""

    seed: int
    threads: int
    size: int  # MiB
    before: str
    rate: str | None
    restore_options: tuple[str, ...]

    @classmethod
    def of(cls, seed: int) -> "Plan":
        """Four seeds in a row have four ways for the pages to come."""
        chance = random.Random(seed)
        rate, restore_options = [
            (None, ()),
            # Slow enough that most pages are missing for some seconds.
            (f"{chance.randrange(150, 400)}mbit", ()),
            (None, ("--background", "off")),
            ("200mbit", ("--background", "idle", "--idle-delay", "0.2")),
        ][seed % 4]
        return cls(
            seed=seed,
            threads=chance.randint(2, 6),
            size=chance.randrange(24, 128),
            before=chance.choice(("idle", "busy")),
            rate=rate,
            restore_options=tuple(restore_options),
        )


def command(directory: Path, seed: int, *options: str) -> list[str]:
    files = ["--result", str(directory / "result"), "--ready", str(directory / "ready")]
    return [sys.executable, str(PROGRAM), "--seed", str(seed), *files, *options]


def read_result(directory: Path) -> dict[str, Any]:
    """What the program published; when it could not, the stacks of its threads."""
    with contextlib.suppress(FileNotFoundError):
        result: dict[str, Any] = json.loads((directory / "result").read_text())
        return result
    stacks = directory / "result.hang"
    return {"ok": False, "what": "no result", "stacks": stacks.read_text() if stacks.exists() else "none"}


def run_here(directory: Path, seed: int, *options: str, timeout: float = 100) -> tuple[int, dict[str, Any]]:
    """Run the program in one place; returns its exit status and result."""
    status = subprocess.run(
        command(directory, seed, *options), timeout=timeout, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ).returncode
    return status, read_result(directory)


def waiting_threads(pid: int) -> str:
    """For each thread of a process, what it waits for in the kernel, and its system call with arguments."""
    threads = []
    for task in sorted(Path(f"/proc/{pid}/task").iterdir()):
        with contextlib.suppress(OSError):
            threads.append(f"{task.name}: {(task / 'wchan').read_text()} {(task / 'syscall').read_text().strip()}")
    return "; ".join(threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "stress_seed" in metafunc.fixturenames:
        metafunc.parametrize("stress_seed", metafunc.config.getoption("--stress-seed", None) or SUITE_SEEDS)


@pytest.fixture
def stress_seconds(request: pytest.FixtureRequest) -> float:
    """How long each run lasts after the move."""
    return float(request.config.getoption("--stress-seconds", DEFAULT_SECONDS))


def test_every_byte_is_right_while_the_layout_changes(
    hosts: Pair, tmp_path: Path, stress_seed: int, stress_seconds: float, request: pytest.FixtureRequest
) -> None:
    plan = Plan.of(stress_seed)
    options: Sequence[str] = (
        *("--threads", str(plan.threads), "--size", str(plan.size), "--before", plan.before),
        *(("--without", without) if (without := request.config.getoption("--stress-without", "")) else ()),
        *("--go", "moved", "--seconds", str(stress_seconds), "--hang-seconds", str(HANG_SECONDS)),
    )
    with open(tmp_path / "stderr", "wb") as stderr:
        program = hosts.a.popen(command(tmp_path, plan.seed, *options), pid=PID, stderr=stderr)
    ready = tmp_path / "ready"
    wait_until(lambda: ready.exists() or program.poll() is not None, 60, "the program has filled its memory")
    assert program.poll() is None, read_result(tmp_path)
    if plan.rate:
        hosts.set_rate(plan.rate)
    migration = move_restless(hosts.a, hosts.b, PID, plan.restore_options)
    assert migration.restore is not None
    status: int | str
    try:
        status = migration.restore.wait(stress_seconds + 3 * HANG_SECONDS)
    except subprocess.TimeoutExpired:
        # With an interpreter that waits for a page of its own the program cannot say where it hangs: the kernel can.
        status = f"still running, {waiting_threads(hosts.b.outer_pid(PID))}"
    result = read_result(tmp_path)
    if status != 0 or not result["ok"]:
        migration.fail(f"{plan}: exit status {status}, {json.dumps(result, indent=1)}")
    migration.wait_drained(30)
    assert result["counts"]["descendants"] > 0
    print(f"{plan}: {result}")


def test_no_false_alarm_without_a_move(tmp_path: Path) -> None:
    status, result = run_here(tmp_path, 7, "--seconds", "3", "--before", "busy")
    assert (status, result["ok"]) == (0, True), result
    assert result["operations"] > 1000


@pytest.mark.parametrize("sabotage", ["lost", "revived", "exchanged", "byte"])
def test_wrong_page_is_noticed(tmp_path: Path, sabotage: str) -> None:
    status, result = run_here(tmp_path, 1, "--seconds", "3", "--sabotage", sabotage)
    assert (status, result["ok"]) == (1, False), result
    assert any("sabotage" in line for line in result["log"]) or "child" in json.dumps(result)


def test_hanging_thread_is_noticed(tmp_path: Path) -> None:
    status, result = run_here(tmp_path, 1, "--seconds", "1", "--sabotage", "hang", "--hang-seconds", "2")
    assert (status, result["ok"]) == (3, False), result
    assert "hangs" in result["what"]


def test_bytes_changed_from_outside_are_noticed(tmp_path: Path) -> None:
    go = tmp_path / "go"
    # Without a move and before the go signal nothing but the test touches the regions.
    process = subprocess.Popen(
        command(tmp_path, 3, "--seconds", "3", "--threads", "2", "--size", "16", "--go", str(go)),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: (tmp_path / "ready").exists(), 60, "the program has filled its memory")
        regions = json.loads((tmp_path / "ready").read_text())["regions"]
        broken = [
            region["address"] + page * 4096 for region in regions if region["thread"] == 1 for page in region["filled"]
        ][::10]
        with open(f"/proc/{process.pid}/mem", "r+b", buffering=0) as memory:
            for address in broken:
                memory.seek(address + 1000)
                byte = memory.read(1)[0]
                memory.seek(address + 1000)
                memory.write(bytes([byte ^ 1]))
        go.touch()
        assert process.wait(60) == 1
    finally:
        process.kill()
        process.wait()
    result = read_result(tmp_path)
    assert not result["ok"]
    assert result["thread"] == 1
