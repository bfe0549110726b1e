"""What is left of a migration in which somebody dies, is told to end, or loses the network.

Before commit: the program runs on at the source, untouched, and nothing stays at the destination. After commit: the
program ends at the destination before it can see a wrong byte, and the source keeps it stopped. Never do two copies
run: the witness's numbers would stand twice in its log.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from postcopy.dump_side import freeze, sleepers
from postcopy.dump_side.collect import collect
from postcopy.dump_side.frozen_tree import FrozenTree
from postcopy.dump_side.guard import Guard
from postcopy.dump_side.looks import Looker
from postcopy.dump_side.opened import Trusted
from postcopy.dump_side.shared_memory import SharedObjects
from postcopy.dump_side.smaps import SmapsReader
from postcopy.kernel import procfs, ptrace
from postcopy.kernel.process_memory import ProcessMemory
from tests.hosts import Host, Pair, wait_until
from tests.programs import witness
from tests.sides import SECONDS, Side

PID = 6000
PORT = 27100
LOST_LINK_SECONDS = 30
ROUNDS = int(os.environ.get("POSTCOPY_TEST_KILL_ROUNDS", "12"))
SEED = 20

DUMP_STEPS = ["listening", "connected", "surveyed", "prepared", "frozen", "collected", "state", "ready", "stopped"]
RESTORE_STEPS = ["connected", "checked", "born", "received", "built"]
STEPS = [("dump", step) for step in DUMP_STEPS] + [("restore", step) for step in RESTORE_STEPS]
every_step = pytest.mark.parametrize(("victim", "step"), STEPS, ids=lambda value: str(value))


class Watched:
    """A witness on the first host, and the commands that try to move it."""

    def __init__(self, hosts: Pair, directory: Path, pid: int, port: int, *options: str) -> None:
        self.hosts = hosts
        self.pid = pid
        self._directory = directory
        self.port = port
        self._count = 0
        self.log = directory / "witness.log"
        command = [sys.executable, "-m", "tests.programs.witness", "--log", str(self.log), *options]
        with open(directory / "witness.err", "wb") as errors:
            self.program = hosts.a.popen(command, pid=pid, stderr=errors)
        wait_until(lambda: self.ticks() > 10, SECONDS, "the witness ticks")
        self._mappings = self.mappings()

    def ticks(self) -> int:
        """How many records there are."""
        return len(witness.records(self.log))

    def _command(self, host: Host, name: str, pause: str | None, options: tuple[str, ...]) -> Side:
        self._count += 1
        errors = self._directory / f"{name}{self._count}.err"
        address = ["--address", self.hosts.a.address, "--port", str(self.port)]
        return Side.start(host, errors, [name, "--lazy-pages", *address, *options], pause=pause)

    def dump(self, *options: str, pause: str | None = None) -> Side:
        """Start dump on the first host; with ``pause`` it stops itself at this event."""
        return self._command(self.hosts.a, "dump", pause, ("-t", str(self.pid), *options))

    def restore(self, *options: str, pause: str | None = None) -> Side:
        """Start restore on the second host."""
        return self._command(self.hosts.b, "restore", pause, options)

    def start_both(self, victim: str, step: str, *options: str) -> tuple[Side, Side]:
        """Start both commands, ``victim`` with a pause at ``step``: the victim and the other."""
        source = self.dump(*options, pause=step if victim == "dump" else None)
        if step == "listening":
            source.await_pause(step)
        destination = self.restore(*options, pause=step if victim == "restore" else None)
        return (source, destination) if victim == "dump" else (destination, source)

    def both(self, victim: str, step: str, *options: str) -> tuple[Side, Side]:
        """Start both commands and wait until ``victim`` pauses at ``step``: the victim and the other."""
        sides = self.start_both(victim, step, *options)
        sides[0].await_pause(step)
        return sides

    def mappings(self) -> list[str]:
        """The layout of the program's memory."""
        content = (self.hosts.a.proc / str(self.pid) / "maps").read_text()
        return [line.split()[0] + line.split()[1] for line in content.splitlines() if "[heap]" not in line]

    def goes_on(self, *, same_mappings: bool = True) -> None:
        """The program is at the source as if nothing had happened."""
        host, pid = self.hosts.a, self.pid
        before = self.ticks()
        wait_until(lambda: self.ticks() > before + 10 or not host.alive(pid), SECONDS, "the program goes on")
        assert host.alive(pid), self.explain()
        threads = (host.proc / str(pid) / "task").iterdir()
        for status in [(thread / "status").read_text() for thread in threads]:
            assert "\nTracerPid:\t0\n" in status
            assert "\nState:\tT" not in status
            assert "\nState:\tt" not in status
        assert {record.host for record in witness.records(self.log)} == {"alpha"}
        self.ran_once()
        if same_mappings:
            assert self.mappings() == self._mappings

    def stays_stopped(self) -> None:
        """The program is at the source, stopped, and nobody traces it."""
        wait_until(lambda: self.hosts.a.proc_state(self.pid) == "T", SECONDS, "the source is stopped")
        status = (self.hosts.a.proc / str(self.pid) / "status").read_text()
        assert "\nTracerPid:\t0\n" in status

    def ran_once(self) -> None:
        """The program never found anything wrong, and every number is in its log once."""
        found = witness.records(self.log)
        assert not [record for record in found if record.wrong], self.explain()
        assert [record.number for record in found] == list(range(1, len(found) + 1))

    def explain(self) -> str:
        """What the witness says."""
        wrong = [record.wrong for record in witness.records(self.log) if record.wrong]
        return f"{self.program.poll()}, {wrong}, {(self._directory / 'witness.err').read_text()}"

    def finish(self) -> None:
        """End the program: it checks everything for the last time."""
        self.program.terminate()
        assert self.program.wait(SECONDS) == 0, self.explain()


class Scene:
    """Two hosts, with a watched program on the first."""

    def __init__(self, hosts: Pair, directory: Path) -> None:
        self.hosts = hosts
        self._directory = directory
        self._count = 0
        self._pids = [set(host.pids()) for host in hosts]
        self.watched: list[Watched] = []

    def watch(self, *options: str) -> Watched:
        """A new program."""
        self._count += 1
        directory = self._directory / str(self._count)
        directory.mkdir()
        new = Watched(self.hosts, directory, PID + 20 * self._count, PORT + self._count, *options)
        self.watched.append(new)
        return new

    def nothing_is_left(self) -> None:
        """No process of ours is on either host, nor a program at the destination."""
        own = {watched.pid for watched in self.watched}
        for host, before, more in zip(self.hosts, self._pids, (own, set()), strict=True):
            name = f"nothing is left on {host.name}"
            wait_until(lambda host=host, all=before | more: set(host.pids()) <= all, SECONDS, name)  # type: ignore[misc]

    def end(self, watched: Watched) -> None:
        """The program has been moved, or is lost, or must simply go."""
        watched.program.kill()
        watched.program.wait(SECONDS)
        self.watched.remove(watched)

    def clear(self) -> None:
        """Kill everything."""
        for host, before in zip(self.hosts, self._pids, strict=True):
            for pid in set(host.pids()) - before:
                with contextlib.suppress(ProcessLookupError):
                    host.kill(pid)
        self.watched = []
        self.nothing_is_left()


@pytest.fixture(scope="module")
def scene_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """The two hosts."""
    with Pair() as pair:
        yield Scene(pair, tmp_path_factory.mktemp("failures"))


@pytest.fixture
def scene(scene_of_module: Scene, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """The two hosts, empty again after a test that failed."""
    failed = request.session.testsfailed
    yield scene_of_module
    if request.session.testsfailed > failed:
        scene_of_module.hosts.set_link(True)
        scene_of_module.clear()


@pytest.fixture
def watched(scene: Scene) -> Watched:
    """The program that all tests share after which it is as it was before."""
    return scene.watched[0] if scene.watched else scene.watch()


def handles_sigterm(host: Host, pid: int) -> bool:
    """Whether the process has installed its handler yet."""
    status = (host.proc / str(pid) / "status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> signal.SIGTERM - 1 & 1)


def other_ends(other: Side, victim: str, step: str, *codes: int) -> int:
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
def test_source_runs_on_when_a_side_is_killed_before_commit(
    scene: Scene, watched: Watched, victim: str, step: str
) -> None:
    killed, other = watched.both(victim, step)
    killed.process.kill()
    other_ends(other, victim, step, 4, 7)
    assert killed.process.wait(SECONDS) == -signal.SIGKILL
    scene.nothing_is_left()
    watched.goes_on()


@every_step
def test_source_runs_on_when_a_side_is_told_to_end_before_commit(
    scene: Scene, watched: Watched, victim: str, step: str
) -> None:
    told, other = watched.both(victim, step)
    told.process.send_signal(signal.SIGINT if step in ("connected", "frozen", "built") else signal.SIGTERM)
    told.process.send_signal(signal.SIGCONT)
    told.ends(130)
    # Let go, the program writes on: its log may be longer already when restore looks at it.
    other_ends(other, victim, step, 4, 7, 10)
    scene.nothing_is_left()
    watched.goes_on()


MAY_HAVE_SENT_GO = [("dump", "state"), ("dump", "ready"), ("dump", "stopped")]


# Several at once, since each takes as long as --timeout says.
@pytest.mark.parametrize("steps", [STEPS[1:5], STEPS[5:9], STEPS[9:]], ids=["early", "late", "destination"])
def test_source_runs_on_when_the_link_is_cut_before_commit(scene: Scene, steps: list[tuple[str, str]]) -> None:
    programs = [scene.watch("--alone") for _ in steps]
    sides = [program.start_both(*step, "--timeout", "2") for program, step in zip(programs, steps, strict=True)]
    for (paused, _), (_, step) in zip(sides, steps, strict=True):
        paused.await_pause(step)
    scene.hosts.set_link(False)
    try:
        for paused, _ in sides:
            paused.process.send_signal(signal.SIGCONT)
        for (paused, other), program, at in zip(sides, programs, steps, strict=True):
            # 8: it has sent GO, and nobody can know whether it arrived, so the program must not run here.
            # 10 and 4: the other side had not waited any longer, and said so; and the program's files went on changing.
            code = paused.ends(4, 7, 10, 11, *[8] * (at in MAY_HAVE_SENT_GO))
            other.ends(7, 10, 11)
            if code == 8:
                program.stays_stopped()
                program.program.send_signal(signal.SIGCONT)
    finally:
        scene.hosts.set_link(True)
    scene.nothing_is_left()
    for program in programs:
        program.goes_on()
        program.finish()
        scene.watched.remove(program)


# -- between two events: killed at each single step of the freeze -----------------------------------------------------


class Steps:
    """Counts what is done to the target, and dies before a given step; only in a process made for that."""

    def __init__(self, last: int) -> None:
        self._left = last

    def count(self, owner: object, name: str) -> None:
        """Let a function be a step."""
        function = getattr(owner, name)

        def counted(*arguments: object) -> object:
            if not self._left:
                signal.raise_signal(signal.SIGKILL)
            self._left -= 1
            return function(*arguments)

        setattr(owner, name, counted)


def freeze_and_die(pid: int, steps: int) -> None:
    """All that dump does to a process before commit, but for so many steps; then it is given back."""
    counter = Steps(steps)
    for owner, name in ((ptrace, "_ptrace"), (ptrace, "wait"), (ProcessMemory, "write"), (freeze, "syscall")):
        counter.count(owner, name)
    frozen = FrozenTree(pid)
    guard = Guard()
    smaps, looker = SmapsReader({}), Looker({})
    sleeping = sleepers.observe(pid)
    frozen.freeze()
    collect(frozen, smaps, looker, Trusted(), sleeping, SharedObjects())
    guard.stopping(frozen.pidfds_to_wake)
    frozen.stop_durably()
    frozen.thaw()
    smaps.close()
    looker.close()
    guard.dismiss()


def die_after(pid: int, steps: int) -> bool:
    """Do so in a process of its own; whether it came to the end."""
    child = os.fork()
    if not child:
        try:
            freeze_and_die(pid, steps)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"after {steps} steps: {status}"
    return status == 0


def blocked_signals(pid: int) -> set[str]:
    """The signal masks of all threads."""
    return {procfs.status(pid, tid)["SigBlk"] for tid in procfs.tids(pid)}


def test_program_runs_on_untouched_after_dump_is_killed_at_any_step(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "tests.programs.witness", "--megabytes", "1", "--few", "--log", str(log)]
    null = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=null, stdout=null, stderr=null) as program:
        try:
            wait_until(lambda: len(witness.records(log)) > 10, SECONDS, "the witness ticks")
            masks = blocked_signals(program.pid)
            steps = 0
            done = False
            while not done:
                done = die_after(program.pid, steps)
                after = f"after {steps} steps"
                # The guard may still have to wake it.
                wait_until(lambda: procfs.status(program.pid)["State"][0] in "SR", SECONDS, f"it runs {after}")
                # A thread that is still on its way out of the executor has its mask back when it ticks.
                before = log.stat().st_size
                wait_until(lambda: log.stat().st_size > before or program.poll(), SECONDS, f"ticks {after}")  # noqa: B023
                wait_until(lambda: blocked_signals(program.pid) == masks, SECONDS, f"its masks are as before {after}")
                assert procfs.status(program.pid)["TracerPid"] == "0"
                assert program.poll() is None, f"{after}: {witness.records(log)[-1]}"
                steps += 1
            assert steps > 50
            program.terminate()
            assert program.wait(SECONDS) == 0, witness.records(log)[-1]
            found = witness.records(log)
            assert [record.number for record in found] == list(range(1, len(found) + 1))
        finally:
            program.kill()


def test_program_survives_kills_at_random_moments_and_can_be_moved_afterwards(scene: Scene) -> None:
    choose = random.Random(SEED)
    program = scene.watch()
    survived = 0
    for _ in range(ROUNDS):
        source, destination = program.dump(), program.restore()
        source.await_event("prepared")
        # The one wait by the clock: the moment is what is random.
        time.sleep(choose.uniform(0, 0.03))
        source.process.kill()
        source.process.wait(SECONDS)
        if '"event": "stopped"' in source.errors.with_suffix(".out").read_text():
            # Too late: GO may have been sent, and what happens then is for other tests.
            destination.process.kill()
            scene.clear()
            program = scene.watch()
            continue
        # The program writes on: its log may be longer already when restore looks at it.
        destination.ends(4, 7)
        scene.nothing_is_left()
        program.goes_on(same_mappings=False)
        survived += 1
    # How many kills come in time depends on the machine; none at all would have tried nothing.
    assert survived
    source, destination = program.dump(), program.restore()
    assert source.process.wait(SECONDS) == 0, source.text
    destination.await_event("running")
    scene.hosts.b.kill(program.pid, signal.SIGTERM)
    assert destination.process.wait(SECONDS) == 0, program.explain()
    program.ran_once()
    scene.watched.remove(program)


@pytest.mark.parametrize("role", ["postcopy-faults", "postcopy-receive", "postcopy-watch"])
def test_source_runs_on_when_the_daemon_dies_before_commit(scene: Scene, watched: Watched, role: str) -> None:
    destination, source = watched.both("restore", "built")
    watchdog = of_role(scene.hosts.b, "postcopy-watch")
    scene.hosts.b.kill(of_role(scene.hosts.b, role))
    wait_until(lambda: scene.hosts.b.proc_state(watchdog) == "Z", SECONDS, "it ends")
    destination.process.send_signal(signal.SIGCONT)
    destination.process.wait(SECONDS)
    source.process.wait(SECONDS)
    assert "Traceback" not in destination.text + source.text
    assert destination.process.returncode == 4, destination.text
    assert source.process.returncode == 10, source.text
    scene.nothing_is_left()
    watched.goes_on()


@pytest.mark.parametrize("step", ["frozen", "collected", "ready", "stopped"])
def test_both_sides_are_told_when_somebody_ends_the_frozen_program(scene: Scene, watched: Watched, step: str) -> None:
    source, destination = watched.both("dump", step)
    watched.program.kill()
    wait_until(lambda: watched.hosts.a.proc_state(watched.pid) in (None, "Z", "X"), SECONDS, "it has ended")
    source.process.send_signal(signal.SIGCONT)
    source.ends(3)
    destination.ends(10)
    assert f"process {watched.pid} was ended by somebody while it was frozen" in source.text
    scene.clear()


# -- after commit ------------------------------------------------------------------------------------------------------


def of_role(host: Host, name: str) -> int:
    """The PID of a process of ours, as soon as it has its name."""

    def found() -> int:
        for pid in host.pids():
            with contextlib.suppress(OSError):
                if (host.proc / str(pid) / "comm").read_text().strip() == name[:15]:
                    return pid
        return 0

    return host.wait_until(found, SECONDS, f"a process called {name} is there")


def resumed(scene: Scene, *options: str) -> tuple[Watched, Side, Side]:
    """A program that runs at the destination, with most of its pages still at the source."""
    program = scene.watch()
    source = program.dump("--timeout", "2")
    destination = program.restore("--timeout", "2", *options)
    destination.await_event("running")
    before = program.ticks()
    wait_until(
        lambda: program.ticks() > before + 5 or not scene.hosts.b.alive(program.pid), SECONDS, "the program runs there"
    )
    program.ran_once()
    return program, source, destination


def ended_there(scene: Scene, program: Watched, source: Side) -> None:
    """The program ends at the destination; the source keeps it stopped and says so, and it is whole."""
    source.ends(8)
    assert "stays stopped" in source.text
    wait_until(lambda: not scene.hosts.b.alive(program.pid), SECONDS, "the program has ended at the destination")
    scene.nothing_is_left()
    program.stays_stopped()
    program.ran_once()
    # A user who has made sure lets it run on from where it left.
    log = witness.records(program.log)
    assert {record.host for record in log} == {"alpha", "beta"}
    program.program.send_signal(signal.SIGCONT)
    wait_until(lambda: program.ticks() > len(log) + 20, SECONDS, "the program goes on at the source")
    program.program.terminate()
    assert program.program.wait(SECONDS) == 0, program.explain()
    handed_over = sum(record.host == "alpha" for record in log)
    assert witness.records(program.log)[len(log)].number == handed_over + 1
    scene.watched.remove(program)


def test_program_that_somebody_ends_at_the_source_is_not_said_to_be_there(scene: Scene) -> None:
    program, source, destination = resumed(scene, "--background", "off")
    program.program.kill()
    source.ends_with_error(8)
    destination.ends_with_error(8)
    assert f"process {program.pid} was ended by somebody" in source.text
    assert "stays stopped" not in source.text
    scene.clear()


@pytest.mark.parametrize("role", ["postcopy-demand", "postcopy-bulk"])
def test_program_ends_before_it_reads_zeros_when_a_server_dies(scene: Scene, role: str) -> None:
    program, source, destination = resumed(scene, "--background", "off")
    scene.hosts.a.kill(of_role(scene.hosts.a, role))
    ended_there(scene, program, source)
    destination.ends(8)


def test_program_ends_before_it_reads_zeros_when_dump_dies(scene: Scene) -> None:
    program, source, destination = resumed(scene, "--background", "off")
    source.process.kill()
    destination.ends(8)
    scene.nothing_is_left()
    program.stays_stopped()
    program.ran_once()
    scene.end(program)


@pytest.mark.parametrize("role", ["postcopy-faults", "postcopy-receive", "postcopy-watch"])
def test_program_ends_before_it_reads_zeros_when_a_process_of_restore_dies(scene: Scene, role: str) -> None:
    program, source, destination = resumed(scene, "--background", "off")
    scene.hosts.b.kill(of_role(scene.hosts.b, role))
    ended_there(scene, program, source)
    destination.ends(8)


@pytest.mark.parametrize("background", ["eager", "off"])
def test_program_ends_before_it_reads_zeros_when_the_link_is_cut(scene: Scene, background: str) -> None:
    scene.hosts.set_rate("20mbit")
    try:
        program, source, destination = resumed(scene, "--background", background)
        # Before the rest of its memory can come at once.
        scene.hosts.set_link(False)
    finally:
        scene.hosts.set_rate(None)
    try:
        destination.ends(8)
        ended_there(scene, program, source)
    finally:
        scene.hosts.set_link(True)


def test_source_stays_stopped_when_dump_is_told_to_end_after_commit(scene: Scene) -> None:
    program, source, destination = resumed(scene, "--background", "off")
    source.process.terminate()
    ended_there(scene, program, source)
    destination.ends(8)


def test_program_lives_on_when_restore_itself_is_killed_after_commit(scene: Scene) -> None:
    program, source, destination = resumed(scene, "--background", "idle", "--idle-delay", "0.5")
    destination.process.kill()
    assert source.process.wait(SECONDS) == 0, source.text
    assert scene.hosts.b.alive(program.pid)
    before = program.ticks()
    wait_until(lambda: program.ticks() > before + 20, SECONDS, "the program goes on at the destination")
    scene.hosts.b.kill(program.pid, signal.SIGTERM)
    wait_until(lambda: scene.hosts.b.orphan_status(program.pid) == 0, SECONDS, "the program ends well")
    program.ran_once()
    scene.watched.remove(program)
    scene.nothing_is_left()


NAMES = """
import ctypes, os, socket, sys, time
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
segment = libc.shmget(0, 8192, 0o600)
address = libc.shmat(segment, None, 0)
ctypes.memmove(ctypes.c_void_p(address), b"content", 7)
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
open(sys.argv[2], "w").close()
time.sleep(1000)
"""


def test_names_are_gone_when_restore_is_killed_before_commit(hosts: Pair, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    place = tmp_path / "sockets"
    place.mkdir()
    program = hosts.a.popen([sys.executable, "-c", NAMES, str(place / "socket"), str(ready)], pid=PID)
    wait_until(ready.exists, SECONDS, "the program is ready")
    address = ["--address", hosts.a.address, "--port", str(PORT)]
    source = Side.start(hosts.a, tmp_path / "dump.err", ["dump", "--lazy-pages", "-t", str(PID), *address])
    source.await_event("listening")
    destination = Side.start(hosts.b, tmp_path / "restore.err", ["restore", "--lazy-pages", *address], pause="built")
    destination.await_pause("built")
    assert segments(hosts.b) == segments(hosts.a) == 1
    assert len(list(place.iterdir())) == 2
    destination.process.kill()
    source.ends(7)
    wait_until(lambda: not segments(hosts.b), SECONDS, "the segment is gone")
    wait_until(lambda: [each.name for each in place.iterdir()] == ["socket"], SECONDS, "the directory is gone")
    assert segments(hosts.a) == 1
    assert program.poll() is None


def segments(host: Host) -> int:
    """How many System V segments a host has."""
    return len(host.run(["cat", "/proc/sysvipc/shm"], check=True).stdout.splitlines()) - 1


ORPHAN = """
import mmap, os, sys, time
PAGES = 4096
memory = mmap.mmap(-1, PAGES * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(PAGES):
    memory[page * 4096] = 1 + page % 255
home = os.stat("/proc/self/ns/net").st_ino
open(sys.argv[1] + "/ready", "w").close()
while os.stat("/proc/self/ns/net").st_ino == home:
    time.sleep(0.001)
if os.fork() or os.fork():
    os._exit(0)
for page in range(PAGES):
    if page == 64:
        open(sys.argv[1] + "/orphan", "w").write(str(os.getpid()))
        while not os.path.exists(sys.argv[1] + "/go"):
            time.sleep(0.001)
    if memory[page * 4096] != 1 + page % 255:
        open(sys.argv[1] + "/wrong", "w").close()
open(sys.argv[1] + "/all", "w").close()
"""


def test_orphans_that_nobody_knows_end_before_they_read_zeros(hosts: Pair, tmp_path: Path) -> None:
    hosts.a.popen([sys.executable, "-c", ORPHAN, str(tmp_path)], pid=PID)
    wait_until((tmp_path / "ready").exists, SECONDS, "the program is ready")
    address = ["--address", hosts.a.address, "--port", str(PORT)]
    source = Side.start(hosts.a, tmp_path / "dump.err", ["dump", "--lazy-pages", "-t", str(PID), *address])
    source.await_event("listening")
    options = ["restore", "--lazy-pages", *address, "--background", "off", "-d"]
    destination = Side.start(hosts.b, tmp_path / "restore.err", options)
    destination.ends_well()
    wait_until((tmp_path / "orphan").exists, SECONDS, "there is an orphan")
    wait_until(lambda: (tmp_path / "orphan").read_text(), SECONDS, "it has a PID")
    orphan = int((tmp_path / "orphan").read_text())
    wait_until(lambda: not hosts.b.alive(PID), SECONDS, "the root has ended")
    assert hosts.b.alive(orphan)
    source.process.kill()
    (tmp_path / "go").touch()
    wait_until(lambda: not hosts.b.alive(orphan), SECONDS, "the orphan is killed")
    assert not (tmp_path / "wrong").exists()
    assert not (tmp_path / "all").exists()
