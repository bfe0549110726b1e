"""Whole process trees: what processes are to one another, before a move, after one, and after the way there and back.

The program sets all of it up and verifies it by itself (`tests/programs/cases/trees.py`); each case is a test here.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from postcopy.dump_side.frozen_tree import FrozenTree
from postcopy.kernel import procfs
from postcopy.reporting import PAUSE_AT
from tests.hosts import FOREIGN, Host, Pair, postcopy_command, wait_until
from tests.migrate import move
from tests.programs.clan import records
from tests.programs.states import TREE_CASES, UNSUPPORTED
from tests.sides import Side
from tests.test_failures import STEPS, blocked_signals, die_after, other_ends
from tests.test_states import Report, run_program

PID = 4500
SECONDS = 30


@dataclass
class Outcome:
    """What the program says of itself after the moves, or why it says nothing."""

    report: Report
    failure: BaseException | None = None


WAYS: dict[str, tuple[int, Sequence[str]]] = {
    "unmoved": (0, ()),
    "moved": (1, ()),
    "there-and-back": (2, ()),
    "new-namespace": (1, ("--new-pid-namespace",)),
}


@pytest.fixture(scope="module", params=list(WAYS))
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The program after so many moves."""
    moves, options = WAYS[request.param]
    with Pair() as hosts:
        try:
            directory = tmp_path_factory.mktemp("trees")
            return Outcome(run_program(hosts, directory, moves, "--tree", restore_options=options))
        # Kept for one test to raise, with the logs that it holds: each case would repeat them.
        except (Exception, pytest.fail.Exception) as failure:
            return Outcome({}, failure)


def test_tree_reports_after_its_moves(outcome: Outcome) -> None:
    if outcome.failure:
        raise outcome.failure
    assert set(outcome.report) == {case.name() for case in TREE_CASES}


@pytest.mark.parametrize("case", [case.name() for case in TREE_CASES])
def test_tree_is_kept(outcome: Outcome, case: str) -> None:
    if outcome.failure:
        pytest.fail("no report: see test_tree_reports_after_its_moves", pytrace=False)
    problem = outcome.report[case]
    if problem and problem.startswith(UNSUPPORTED):
        pytest.skip(problem)
    assert problem is None


# -- counting trees ----------------------------------------------------------------------------------------------------


class Clan:
    """A running tree of counting processes (`tests/programs/clan.py`) on a host, and its log."""

    def __init__(
        self,
        host: Host,
        directory: Path,
        processes: int,
        *options: str,
        pid: int | None = PID,
        under: Sequence[str] = (),
    ) -> None:
        """``under``: the command that starts it."""
        self.log = directory / "clan.log"
        self.size = processes
        self._errors = directory / "clan.err"
        command = [sys.executable, "-m", "tests.programs.clan", "--log", str(self.log), "--processes", str(processes)]
        with open(self._errors, "wb") as errors:
            self.program = host.popen([*under, *command, *options], pid=pid, stderr=errors)
        self.host = host
        self.pid = self.program.pid
        self.all_count("the clan counts")

    def counts(self) -> dict[int, int]:
        """How many records each member has written."""
        return Counter(record.member for record in records(self.log))

    def all_count(self, what: str, host: str | None = None) -> None:
        """Wait until every member has written more records, and on that host."""
        seen = len(records(self.log))

        def everybody() -> bool:
            return len({r.member for r in records(self.log)[seen:] if host in (None, r.host)}) == self.size

        wait_until(everybody, SECONDS, what + f" {self._errors.read_text()}")

    def members(self) -> list[int]:
        """The PIDs of root and descendants on its host."""
        return [self.pid, *descendants(self.host, self.pid)]

    def nothing_is_wrong(self) -> None:
        """No member has found anything wrong, and each has counted every number once."""
        numbers: dict[int, list[int]] = defaultdict(list)
        for record in records(self.log):
            assert record.wrong == "-", record
            numbers[record.member].append(record.number)
        for member, counted in numbers.items():
            assert counted == list(range(1, len(counted) + 1)), f"member {member}"

    def goes_on(self) -> None:
        """All of it runs on where it was, and nobody traces it."""
        self.all_count("the clan goes on", self.host.name)
        for pid in self.members():
            with contextlib.suppress(FileNotFoundError):
                status = (self.host.proc / str(pid) / "status").read_text()
                assert "\nTracerPid:\t0\n" in status, status
                assert "\nState:\tT" not in status, status
        self.nothing_is_wrong()


def descendants(host: Host, pid: int) -> list[int]:
    """The descendants of a process, as the host sees them."""
    children: dict[int, list[int]] = defaultdict(list)
    for each in host.pids():
        with contextlib.suppress(*FOREIGN):
            fields = (host.proc / str(each) / "stat").read_text().rpartition(")")[2].split()
            children[int(fields[1])].append(each)
    found = [pid]
    for each in found:
        found += children[each]
    return found[1:]


def test_storm_of_forks_is_frozen_whole(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "tests.programs.clan", "--log", str(log), "--storm", "--processes", "5"]
    with subprocess.Popen([*command, "--interval", "0"], stdin=subprocess.DEVNULL) as program:
        try:
            wait_until(lambda: len(records(log)) > 50, SECONDS, "the storm is there")
            most = 0
            for _ in range(60):
                tree = FrozenTree(program.pid)
                tree.freeze()
                try:
                    # Nobody in it runs, and nobody comes any more.
                    below = procfs.descendants(program.pid)
                    assert {program.pid, *below} == {*tree.pids, *tree.zombies}
                    assert len(tree.pids) == len(set(tree.pids))
                    for frozen in tree.processes:
                        for tid in procfs.tids(frozen.pid):
                            status = procfs.status(frozen.pid, tid)
                            assert (status["State"][0], status["TracerPid"]) == ("t", str(os.getpid()))
                    assert all(procfs.stat(pid)[3] == "Z" for pid in tree.zombies)
                    most = max(most, len(below))
                finally:
                    tree.thaw()
                    tree.close()
                seen = len(records(log))
                wait_until(lambda: len(records(log)) > seen, SECONDS, "it goes on")  # noqa: B023
            assert most > 4
            assert {record.wrong for record in records(log)} == {"-"}
        finally:
            program.kill()


def test_storm_of_forks_moves(hosts: Pair, tmp_path: Path) -> None:
    clan = Clan(hosts.a, tmp_path, 5, "--storm")
    migration = move(hosts.a, hosts.b, clan.pid)
    migration.wait_drained()
    clan.all_count("the clan counts on", hosts.b.name)
    clan.nothing_is_wrong()


def test_hundred_processes_move(hosts: Pair, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    processes = int(pytestconfig.getoption("--tree-processes"))
    clan = Clan(hosts.a, tmp_path, processes, "--interval", "0.2")
    members = clan.members()
    migration = move(hosts.a, hosts.b, clan.pid, dump_options=["--timeout", "60"])
    migration.wait_drained()
    clan.all_count("the clan counts on", hosts.b.name)
    clan.nothing_is_wrong()
    assert len(members) == processes
    assert sorted([PID, *descendants(hosts.b, PID)]) == sorted(members)


def test_hundreds_of_threads_over_a_tree_move(hosts: Pair, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    processes, threads = 20, int(pytestconfig.getoption("--tree-threads"))
    clan = Clan(hosts.a, tmp_path, processes, "--interval", "0.2", "--threads", str(threads // processes - 1))

    def tids(host: Host) -> list[int]:
        return sorted(
            int(tid) for pid in [PID, *descendants(host, PID)] for tid in os.listdir(host.proc / f"{pid}/task")
        )

    before = tids(hosts.a)
    migration = move(hosts.a, hosts.b, clan.pid, dump_options=["--timeout", "60"])
    migration.wait_drained()
    clan.all_count("the clan counts on", hosts.b.name)
    assert len(before) == threads
    assert tids(hosts.b) == before
    clan.nothing_is_wrong()


def test_tree_moves_while_others_look_at_how_its_processes_were_started(hosts: Pair, tmp_path: Path) -> None:
    """As ps(1) does: the kernel reads arguments and environment in the memory of the process."""
    clan = Clan(hosts.a, tmp_path, 25, "--interval", "0.05")
    seen: Counter[str] = Counter()
    drained = threading.Event()

    def look() -> None:
        while not drained.is_set():
            for pid in hosts.b.pids():
                for name in ("cmdline", "environ"):
                    with contextlib.suppress(OSError):
                        seen[name] += len((hosts.b.proc / str(pid) / name).read_bytes())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        move(hosts.a, hosts.b, clan.pid).wait_drained()
    finally:
        drained.set()
        looking.join()
    assert min(seen.values()) > 0
    clan.all_count("the clan counts on", hosts.b.name)
    clan.nothing_is_wrong()
    started = [(hosts.b.proc / str(pid) / "cmdline").read_bytes() for pid in clan.members()]
    assert all(b"tests.programs.clan" in each for each in started)


def test_root_whose_main_thread_has_ended_moves(hosts: Pair, tmp_path: Path) -> None:
    log = tmp_path / "log"
    count = f"log = open({str(log)!r}, 'a'); [print(n, os.uname().nodename, file=log, flush=True) or time.sleep(0.01)"
    thread = f"def count():\n {count} for n in range(10**9)]"
    end = "threading.Thread(target=count).start(); ctypes.CDLL(None).syscall(60, 0)"
    program = hosts.a.popen([sys.executable, "-c", f"import ctypes, os, threading, time\n{thread}\n{end}"], pid=PID)
    wait_until(lambda: hosts.a.proc_state(PID) == "Z", SECONDS, "the main thread has ended")

    def counts_on() -> None:
        lines = len(log.read_text().splitlines())
        wait_until(lambda: len(log.read_text().splitlines()) > lines + 5, SECONDS, "it counts on")

    # Also when it is let go at the source.
    written = ["dump", "-t", str(PID), "-D", str(tmp_path / "written"), "-R"]
    hosts.a.run([*postcopy_command(), *written], check=True)
    counts_on()
    source, destination = hosts.a, hosts.b
    for _ in range(2):
        migration = move(source, destination, PID)
        migration.wait_drained()
        counts_on()
        assert log.read_text().splitlines()[-1].split()[1] == destination.name
        assert destination.proc_state(PID) == "Z"
        assert migration.restore is not None
        source, destination = destination, source
    assert program.wait(SECONDS) == -signal.SIGKILL
    counted = [int(line.split()[0]) for line in log.read_text().splitlines()]
    assert counted == list(range(len(counted)))
    source.kill(PID, signal.SIGTERM)
    assert migration.restore is not None
    assert migration.restore.wait(SECONDS) == 128 + signal.SIGTERM


def numbers(host: Host, pids: Sequence[int]) -> dict[int, list[str]]:
    """What processes are called in the host and in the PID namespaces within it."""
    outer = len((host.proc / "1" / "status").read_text().partition("\nNSpid:")[2].splitlines()[0].split()) - 1
    found = {}
    for pid in pids:
        text = (host.proc / str(pid) / "status").read_text()
        found[pid] = text.partition("\nNSpid:")[2].splitlines()[0].split()[outer:]
    return found


@pytest.mark.parametrize("options", [(), ("--new-pid-namespace",)], ids=["same-pids", "new-namespace"])
@pytest.mark.parametrize("root", ["unshare", "init"])
def test_program_of_unshare_moves_with_its_pid_namespace(
    hosts: Pair, tmp_path: Path, root: str, options: Sequence[str]
) -> None:
    clan = Clan(hosts.a, tmp_path, 4, under=["unshare", "--pid", "--fork", "--mount-proc"])
    pids = descendants(hosts.a, PID)
    before = numbers(hosts.a, pids)
    assert [names[-1] for names in before.values()] == ["1", "2", "3", "4"]
    target = PID if root == "unshare" else pids[0]
    migration = move(hosts.a, hosts.b, target, restore_options=options)
    migration.wait_drained()
    clan.all_count("the clan counts on", hosts.b.name)
    clan.nothing_is_wrong()
    if not options:
        assert numbers(hosts.b, pids) == before
    (running,) = [event["pid"] for event in migration.restore_events if event["event"] == "running"]
    inside = [running, *descendants(hosts.b, running)][root == "unshare" :]
    assert [names[-1] for names in numbers(hosts.b, inside).values()] == ["1", "2", "3", "4"]
    names = [entry.name for entry in (hosts.b.proc / str(running) / "root" / "proc").iterdir()]
    assert sorted(filter(str.isdigit, names)) == ["1", "2", "3", "4"]
    # The init can be ended from outside of its namespace alone, and takes the others with it.
    hosts.b.kill(inside[0], signal.SIGTERM)
    assert migration.restore is not None
    assert migration.restore.wait(SECONDS) in (0, 128 + signal.SIGTERM)
    assert not any(hosts.b.alive(pid) for pid in inside)


def test_tree_runs_on_untouched_after_dump_is_killed_at_any_step(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [
        sys.executable,
        "-m",
        "tests.programs.clan",
        "--log",
        str(log),
        "--processes",
        "4",
        "--interval",
        "0.002",
    ]
    null = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=null, stdout=null, stderr=null) as program:

        def all_count(when: str) -> None:
            seen = len(records(log))
            wait_until(lambda: len({r.member for r in records(log)[seen:]}) == 4, SECONDS, f"all of it runs {when}")

        try:
            all_count("at first")
            pids = [program.pid, *procfs.descendants(program.pid)]
            masks = [blocked_signals(pid) for pid in pids]
            steps, done = 0, False
            while not done:
                done = die_after(program.pid, steps)
                after = f"after {steps} steps"
                all_count(after)
                wait_until(lambda: [blocked_signals(pid) for pid in pids] == masks, SECONDS, f"masks {after}")
                assert {procfs.status(pid)["TracerPid"] for pid in pids} == {"0"}
                # A prime: each process is met at other steps of its own.
                steps += 3
            assert steps > 150
            assert {record.wrong for record in records(log)} == {"-"}
        finally:
            program.kill()


# -- somebody dies -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clan_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pair, Clan]]:
    """Two hosts, and a clan on the first."""
    with Pair() as pair:
        yield pair, Clan(pair.a, tmp_path_factory.mktemp("clan"), 7)


def paused(hosts: Pair, clan: Clan, directory: Path, victim: str, step: str, port: int) -> tuple[Side, Side]:
    """Both commands, ``victim`` stopped at ``step``: that and the other."""
    sides = {}
    for name, host in (("dump", hosts.a), ("restore", hosts.b)):
        errors = directory / f"{name}.err"
        environment = {**os.environ, PAUSE_AT: step} if name == victim else None
        # So that pages are still missing when dump is killed.
        background = ["--background", "off" if victim == "dump" else "eager"]
        target = ["-t", str(clan.pid)] if name == "dump" else background
        argv = [*postcopy_command(), name, "--lazy-pages", *target, "--address", hosts.a.address, "--port", str(port)]
        with open(errors, "wb") as stderr, open(errors.with_suffix(".out"), "wb") as stdout:
            sides[name] = Side(host.popen([*argv, "--json"], stdout=stdout, stderr=stderr, env=environment), errors)
    sides[victim].await_pause(step)
    return sides.pop(victim), sides.popitem()[1]


@pytest.mark.parametrize(("victim", "step"), STEPS[1:], ids=lambda value: str(value))
def test_tree_runs_on_when_a_side_is_killed_before_commit(
    clan_of_module: tuple[Pair, Clan], tmp_path: Path, victim: str, step: str
) -> None:
    hosts, clan = clan_of_module
    before = set(hosts.b.pids())
    port = 28000 + STEPS.index((victim, step))
    killed, other = paused(hosts, clan, tmp_path, victim, step, port)
    killed.process.kill()
    # 4: the program has gone on writing to its log before the destination looked at that.
    other_ends(other, victim, step, 4, 7)
    assert killed.process.wait(SECONDS) == -signal.SIGKILL
    wait_until(lambda: set(hosts.b.pids()) <= before, SECONDS, "nothing is left at the destination")
    clan.goes_on()


@pytest.mark.parametrize(("victim", "step"), [("dump", "stopped"), ("restore", "built")])
def test_tree_with_a_pid_namespace_runs_on_when_a_side_is_killed_before_commit(
    hosts: Pair, tmp_path: Path, victim: str, step: str
) -> None:
    clan = Clan(hosts.a, tmp_path, 4, under=["unshare", "--pid", "--fork", "--mount-proc"])
    before = set(hosts.b.pids())
    killed, other = paused(hosts, clan, tmp_path, victim, step, 28200)
    killed.process.kill()
    other_ends(other, victim, step, 4, 7)
    wait_until(lambda: set(hosts.b.pids()) <= before, SECONDS, "nothing is left at the destination")
    clan.goes_on()


@pytest.mark.parametrize("victim", ["dump", "restore"])
def test_tree_is_lost_or_moved_but_never_two_when_a_side_is_killed_after_commit(
    hosts: Pair, tmp_path: Path, victim: str
) -> None:
    clan = Clan(hosts.a, tmp_path, 7)
    step = "resumed" if victim == "dump" else "running"
    sides = paused(hosts, clan, tmp_path, victim, step, 28100)
    clan.all_count("it runs at the destination", hosts.b.name)
    sides[0].process.kill()
    sides[0].process.wait(SECONDS)
    if victim == "dump":
        # The source's pages are gone with their server: the tree cannot go on.
        sides[1].ends(8)
        wait_until(lambda: not descendants(hosts.b, clan.pid) and not hosts.b.alive(clan.pid), SECONDS, "it is killed")
        for pid in clan.members():
            assert hosts.a.proc_state(pid) == "T"
    else:
        assert sides[1].process.wait(SECONDS) == 0, sides[1].text
        clan.all_count("it runs on", hosts.b.name)
    clan.nothing_is_wrong()
