"""CLOCK_MONOTONIC and CLOCK_BOOTTIME never run backwards for a program that is moved, nor jump far ahead."""

import itertools
import os
import sys
import time
from pathlib import Path

import pytest

from tests.hosts import Host, Pair, wait_until
from tests.migrate import move

PROGRAM = Path(__file__).parent / "programs" / "clocks.py"
PID = 4700
HOUR = 3600
UPTIME = int(time.monotonic())


def readings(log: Path) -> list[list[int]]:
    return [[int(word) for word in line.split()] for line in log.read_text().split("\n")[:-1]]


def time_namespace(host: Host) -> str:
    return os.readlink(f"/proc/{host.outer_pid(PID)}/ns/time")


def goes_on(log: Path) -> None:
    ticks = len(readings(log))
    wait_until(lambda: len(readings(log)) > ticks + 5, 20, "the program goes on")


def check(log: Path, longest_gap: float) -> None:
    """Each clock goes forward from one reading to the next, and by no more than a move takes."""
    found = readings(log)
    for number, clock in enumerate(zip(*found, strict=True)):
        for before, after in itertools.pairwise(clock):
            assert before <= after <= before + longest_gap * 1e9, f"clock {number} went from {before} to {after}"
    for monotonic, boottime, monotonic_by_call, boottime_by_call in found:
        assert monotonic <= monotonic_by_call
        assert boottime <= boottime_by_call


@pytest.mark.parametrize("offset", [48 * HOUR, -UPTIME // 4], ids=["destination-behind", "destination-ahead"])
def test_clocks_go_on_where_hosts_differ(hosts: Pair, tmp_path: Path, offset: int) -> None:
    log = tmp_path / "log"
    log.touch()
    hosts.a.popen([sys.executable, str(PROGRAM), str(log), str(offset), str(2 * offset)], pid=PID)
    hosts.a.wait_until(lambda: len(readings(log)) > 5, 20, "the program ticks")
    source, destination = hosts.a, hosts.b
    for _ in range(2):
        migration = move(source, destination, PID)
        migration.wait_drained()
        goes_on(log)
        assert time_namespace(destination) != os.readlink("/proc/self/ns/time")
        source, destination = destination, source
    check(log, longest_gap=60)


def test_hosts_with_the_same_clocks_need_no_namespace(hosts: Pair, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    hosts.a.popen([sys.executable, str(PROGRAM), str(log)], pid=PID)
    hosts.a.wait_until(lambda: len(readings(log)) > 5, 20, "the program ticks")
    migration = move(hosts.a, hosts.b, PID)
    migration.wait_drained()
    goes_on(log)
    assert time_namespace(hosts.b) == os.readlink("/proc/self/ns/time")
    check(log, longest_gap=60)
