"""What is left of a migration in which somebody dies, is told to end, or loses the network.

Before commit: the program runs on at the source, untouched, and nothing stays at the destination. After commit: the
program ends at the destination before it can see a wrong byte, and the source keeps it stopped. Never do two copies
run: the witness's numbers would stand twice in its log.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from postcopy.reporting import PAUSE_AT
from tests.hosts import Host, Pair, Process, postcopy_command, wait_until
from tests.programs import witness

PID = 6000
SECONDS = 20
LOST_LINK_SECONDS = 30
ROUNDS = int(os.environ.get("POSTCOPY_TEST_KILL_ROUNDS", "12"))
SEED = 20

DUMP_STEPS = ["listening", "connected", "surveyed", "prepared", "frozen", "collected", "state", "ready", "stopped"]
RESTORE_STEPS = ["connected", "checked", "born", "received", "built"]
STEPS = [("dump", step) for step in DUMP_STEPS] + [("restore", step) for step in RESTORE_STEPS]
every_step = pytest.mark.parametrize(("victim", "step"), STEPS, ids=lambda value: str(value))


@dataclasses.dataclass
class Side:
    """One command at work, and what it says."""

    process: Process
    errors: Path

    @property
    def text(self) -> str:
        """What it has logged."""
        return self.errors.read_text()

    def await_event(self, name: str) -> None:
        """Wait until it tells of an event."""
        out = self.errors.with_suffix(".out")
        wait_until(
            lambda: f'"event": "{name}"' in out.read_text() or self.process.poll() is not None, SECONDS, f"event {name}"
        )
        assert f'"event": "{name}"' in out.read_text(), f"ended with {self.process.poll()}: {self.text}"

    def await_pause(self, step: str) -> None:
        """Wait until it has stopped itself at the step it was told."""
        host, pid = self.process.host, self.process.pid
        wait_until(
            lambda: host.proc_state(pid) == "T" or self.process.poll() is not None, SECONDS, f"the pause at {step}"
        )
        assert self.process.poll() is None, f"ended before {step} with {self.process.returncode}: {self.text}"

    def ends(self, *codes: int, seconds: float = SECONDS) -> None:
        """It ends in time, with one of these exit codes and one error in its log, and no traceback."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.process} does not end: {self.text}")
        assert code in codes, f"{code}: {self.text}"
        assert "Traceback" not in self.text, self.text
        assert "bug" not in self.text, self.text
        said = [line for line in self.text.splitlines() if f"[{self.process.pid}] ERROR" in line]
        errors = [line for line in said if "what to do" not in line]
        assert len(errors) == 1, self.text


class Scene:
    """Two hosts, a witness on the first, and the commands that try to move it."""

    def __init__(self, hosts: Pair, directory: Path) -> None:
        self.hosts = hosts
        self.directory = directory
        self._count = 0
        self.start_witness()

    def start_witness(self, pid: int = PID) -> None:
        """A new witness with a new log."""
        self._count += 1
        self.pid = pid
        self.log = self.directory / f"witness{self._count}.log"
        command = [sys.executable, "-m", "tests.programs.witness", "--log", str(self.log)]
        with open(self.log.with_suffix(".err"), "wb") as errors:
            self.program = self.hosts.a.popen(command, pid=pid, stderr=errors)
        wait_until(lambda: self.ticks() > 50, SECONDS, "the witness ticks")
        self.pids = (set(self.hosts.a.pids()), set(self.hosts.b.pids()))
        self.mappings = self._mappings()

    def ticks(self) -> int:
        """How many records there are."""
        return len(witness.records(self.log))

    def command(self, host: Host, name: str, pause: str | None, options: tuple[str, ...]) -> Side:
        """Start a command of ours; with ``pause`` it stops itself at this event."""
        self._count += 1
        errors = self.directory / f"{name}{self._count}.err"
        environment = {**os.environ, PAUSE_AT: pause} if pause else None
        with open(errors, "wb") as stderr, open(errors.with_suffix(".out"), "wb") as stdout:
            address = ["--address", self.hosts.a.address, "--json"]
            argv = [*postcopy_command(), name, "--lazy-pages", *address, *options]
            return Side(host.popen(argv, stdout=stdout, stderr=stderr, env=environment), errors)

    def dump(self, *options: str, pause: str | None = None) -> Side:
        """Start dump on the first host."""
        return self.command(self.hosts.a, "dump", pause, ("-t", str(self.pid), *options))

    def restore(self, *options: str, pause: str | None = None) -> Side:
        """Start restore on the second host."""
        return self.command(self.hosts.b, "restore", pause, options)

    def both(self, victim: str, step: str, *options: str) -> tuple[Side, Side]:
        """Start both commands and wait until ``victim`` pauses at ``step``: the victim and the other."""
        source = self.dump(*options, pause=step if victim == "dump" else None)
        if step == "listening":
            source.await_pause(step)
        destination = self.restore(*options, pause=step if victim == "restore" else None)
        sides = (source, destination) if victim == "dump" else (destination, source)
        sides[0].await_pause(step)
        return sides

    def _mappings(self) -> list[str]:
        content = (self.hosts.a.proc / str(self.pid) / "maps").read_text()
        return [line.split()[0] + line.split()[1] for line in content.splitlines() if "[heap]" not in line]

    def runs_on(self, *, same_mappings: bool = True) -> None:
        """The program is at the source as if nothing had happened, and nothing of ours is left anywhere."""
        host, pid = self.hosts.a, self.pid
        wait_until(lambda: set(self.hosts.b.pids()) <= self.pids[1], SECONDS, "nothing is left at the destination")
        wait_until(lambda: set(host.pids()) <= self.pids[0], SECONDS, "nothing of ours is left at the source")
        before = self.ticks()
        wait_until(lambda: self.ticks() > before + 10 or not host.alive(pid), SECONDS, "the program goes on")
        assert host.alive(pid), self.explain()
        threads = (host.proc / str(pid) / "task").iterdir()
        for status in [(thread / "status").read_text() for thread in threads]:
            assert "\nTracerPid:\t0\n" in status and "\nState:\tT" not in status and "\nState:\tt" not in status
        assert {record.host for record in witness.records(self.log)} == {"alpha"}
        self.ran_once()
        if same_mappings:
            assert self._mappings() == self.mappings

    def ran_once(self) -> None:
        """The program never found anything wrong, and every number is in its log once."""
        found = witness.records(self.log)
        assert not [record for record in found if record.wrong], self.explain()
        assert [record.number for record in found] == list(range(1, len(found) + 1))

    def explain(self) -> str:
        """What the witness says."""
        wrong = [record.wrong for record in witness.records(self.log) if record.wrong]
        return f"{self.program.poll()}, {wrong}, {self.log.with_suffix('.err').read_text()}"

    def finish(self) -> None:
        """End the program: it checks everything for the last time."""
        self.program.terminate()
        assert self.program.wait(SECONDS) == 0, self.explain()
        self.ran_once()


@pytest.fixture(scope="module")
def shared_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """The scene of those tests after which the program is as it was before."""
    with Pair() as pair:
        scene = Scene(pair, tmp_path_factory.mktemp("failures"))
        yield scene
        scene.finish()


@pytest.fixture
def scene(shared_scene: Scene) -> Iterator[Scene]:
    """The shared scene; after a failure with another program and an empty stage."""
    yield shared_scene
    with contextlib.suppress(AssertionError, TimeoutError):
        shared_scene.runs_on(same_mappings=False)
        return
    for host in shared_scene.hosts:
        for pid in set(host.pids()) - {1}:
            with contextlib.suppress(ProcessLookupError):
                host.kill(pid)
        wait_until(lambda host=host: host.pids() == [1], SECONDS, "the stage is empty")  # type: ignore[misc]
    shared_scene.start_witness()


# -- before commit -----------------------------------------------------------------------------------------------------


def handles_sigterm(host: Host, pid: int) -> bool:
    """Whether the process has installed its handler yet."""
    status = (host.proc / str(pid) / "status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> signal.SIGTERM - 1 & 1)


def other_ends(other: Side, victim: str, step: str, *codes: int) -> None:
    """The other side ends by itself, but for those that may wait for somebody else to come."""
    if (victim, step) == ("restore", "connected"):
        left = "left before all its channels were there"
        wait_until(lambda: other.process.poll() is not None or left in other.text, SECONDS, "dump notices")
        if other.process.poll() is not None:
            return other.ends(*codes)
    elif (victim, step) != ("dump", "listening"):
        return other.ends(*codes)
    else:
        # It waits for a source, or one was there and went away while it said hello.
        host, pid = other.process.host, other.process.pid
        wait_until(lambda: other.process.poll() is not None or handles_sigterm(host, pid), SECONDS, "restore runs")
        if other.process.poll() is not None:
            return other.ends(*codes)
    other.process.terminate()
    return other.ends(130, *codes)


@every_step
def test_source_runs_on_when_a_side_is_killed_before_commit(scene: Scene, victim: str, step: str) -> None:
    killed, other = scene.both(victim, step)
    killed.process.kill()
    other_ends(other, victim, step, 7)
    assert killed.process.wait(SECONDS) == -signal.SIGKILL
    scene.runs_on()


@every_step
def test_source_runs_on_when_a_side_is_told_to_end_before_commit(scene: Scene, victim: str, step: str) -> None:
    told, other = scene.both(victim, step)
    told.process.send_signal(signal.SIGINT if step in ("connected", "frozen", "built") else signal.SIGTERM)
    told.process.send_signal(signal.SIGCONT)
    told.ends(130)
    other_ends(other, victim, step, 7, 10)
    scene.runs_on()
