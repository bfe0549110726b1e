"""What a program may do with its memory while pages are missing, one small program for each.

Each is moved twice: with the rest of its pages on their way over a slow link, and with nothing coming but what a
fault asks for.
"""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import Pair, wait_until
from tests.migrate import move
from tests.programs.living import PAGE, SCENARIOS

PROGRAM = Path(__file__).parent / "programs" / "living.py"
PID = 5000
# Their pages are given up without a look.
UNCHECKED = {"exit_at_once", "exit_group_with_threads"}


def command(directory: Path, scenario: str, *options: str) -> list[str]:
    files = ["--result", str(directory / "result"), "--ready", str(directory / "ready")]
    return [sys.executable, str(PROGRAM), scenario, *files, *options]


def read_result(directory: Path) -> dict[str, Any]:
    with contextlib.suppress(FileNotFoundError):
        result: dict[str, Any] = json.loads((directory / "result").read_text())
        return result
    return {"ok": False, "what": "no result", "status": 0}


@pytest.mark.parametrize("background", ["eager", "off"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_program_lives_on_while_pages_are_missing(hosts: Pair, tmp_path: Path, scenario: str, background: str) -> None:
    # At this rate the interpreter's own pages and those of the scenario take about a second.
    settle = "0"
    if background == "eager":
        hosts.set_rate("200mbit")
        settle = "0.5"
    with open(tmp_path / "stderr", "wb") as stderr:
        program = hosts.a.popen(
            command(tmp_path, scenario, "--go", "moved", "--settle", settle), pid=PID, stderr=stderr
        )
    ready = tmp_path / "ready"
    wait_until(lambda: ready.exists() or program.poll() is not None, 30, "the scenario is prepared")
    assert program.poll() is None, (tmp_path / "stderr").read_text()
    migration = move(hosts.a, hosts.b, PID, restore_options=("--background", background))
    assert migration.restore is not None
    status: int | str
    try:
        status = migration.restore.wait(100)
    except subprocess.TimeoutExpired:
        status = "still running"
    # A child that outlives the program is the one that publishes.
    with contextlib.suppress(TimeoutError):
        wait_until((tmp_path / "result").exists, 10)
    result = read_result(tmp_path)
    if not result["ok"] or status != result["status"]:
        stderr_text = (tmp_path / "stderr").read_text()
        migration.fail(f"{scenario}, background {background}: exit status {status}, {result}\n{stderr_text}")
    migration.wait_drained(30)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario_holds_without_a_move(tmp_path: Path, scenario: str) -> None:
    status = subprocess.run(command(tmp_path, scenario), stdin=subprocess.DEVNULL, timeout=60).returncode
    with contextlib.suppress(TimeoutError):
        wait_until((tmp_path / "result").exists, 10)
    result = read_result(tmp_path)
    assert result["ok"], result
    assert status == result["status"]


@pytest.mark.parametrize("scenario", sorted(set(SCENARIOS) - UNCHECKED))
def test_scenario_notices_broken_pages(tmp_path: Path, scenario: str) -> None:
    go = tmp_path / "go"
    process = subprocess.Popen(
        command(tmp_path, scenario, "--go", str(go)), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until((tmp_path / "ready").exists, 30, "the scenario is prepared")
        regions = json.loads((tmp_path / "ready").read_text())["regions"]
        with open(f"/proc/{process.pid}/mem", "r+b", buffering=0) as memory:
            for region in regions:
                for page in range(region["pages"]):
                    address = region["address"] + page * PAGE + 200
                    memory.seek(address)
                    byte = memory.read(1)[0]
                    memory.seek(address)
                    memory.write(bytes([byte ^ 1]))
        go.touch()
        process.wait(60)
        with contextlib.suppress(TimeoutError):
            wait_until((tmp_path / "result").exists, 10)
    finally:
        process.kill()
        process.wait()
    assert not read_result(tmp_path)["ok"]
