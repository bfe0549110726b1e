"""hugetlb memory moves, lazily, where the destination has the pages for it, and is refused where it has not."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import Host, Pair, Process, postcopy_command, wait_until
from tests.migrate import Migration, MigrationFailed, move
from tests.programs import huge_arena
from tests.programs.cases.shared_memory import HugeFiles, HugePages
from tests.test_states import run_program
from tests.test_tree_stress import stress, tree_seed  # noqa: F401 (a fixture)

NUMBER = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")

PID = 4850


@contextlib.contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """So many hugetlb pages on this machine, and so on both hosts together."""
    if not NUMBER.exists():
        pytest.skip("this kernel has no hugetlb pages of 2 MiB")
    before = NUMBER.read_text()
    try:
        NUMBER.write_text(str(count))
        if int(NUMBER.read_text()) < count:
            pytest.skip(f"the kernel gives only {NUMBER.read_text().strip()} of {count} hugetlb pages")
        yield
    finally:
        NUMBER.write_text(before)


def test_huge_pages_move_there_and_back(hosts: Pair, tmp_path: Path) -> None:
    with huge_pages(4 * HugePages.PAGES):
        assert run_program(hosts, tmp_path, 2, "--only", HugePages.name()) == {HugePages.name(): None}


def test_files_of_huge_pages_move_there_and_back(hosts: Pair, tmp_path: Path) -> None:
    with huge_pages(2 * HugeFiles.PAGES + 2):
        assert run_program(hosts, tmp_path, 2, "--only", HugeFiles.name()) == {HugeFiles.name(): None}


def test_too_few_huge_pages_are_refused_before_the_freeze(hosts: Pair, tmp_path: Path) -> None:
    with huge_pages(4 * HugePages.PAGES - 2), pytest.raises(MigrationFailed) as refusal:
        run_program(hosts, tmp_path, 1, "--only", HugePages.name())
    assert "6 hugetlb pages of 2048 KiB are needed here, 2 more than are free: raise /sys/kernel" in str(refusal.value)
    assert '"frozen"' not in str(refusal.value)


@dataclass
class Arena:
    """`tests.programs.huge_arena` on a host."""

    directory: Path
    program: Process

    @classmethod
    def start(cls, host: Host, directory: Path, step: str, *options: str) -> "Arena":
        """Start it, and wait until its memory is written."""
        arguments = ["--directory", str(directory), "--step", step, *options]
        command = [sys.executable, "-m", "tests.programs.huge_arena", *arguments]
        with open(directory / "stderr", "wb") as errors:
            arena = cls(directory, host.popen(command, pid=PID, stderr=errors))
        wait_until(lambda: (directory / "ready").exists() or arena.said(), 30, "the program is ready")
        assert not arena.said()
        return arena

    def said(self) -> str:
        """What it has found."""
        path = self.directory / "result"
        return path.read_text() if path.exists() else ""

    def does_it(self, end: Process) -> None:
        """Let it do its step, and see that all is right; ``end``: what ends when it does."""
        (self.directory / "go").touch()
        wait_until(lambda: self.said() or end.poll() is not None, 60, "the program has done it")
        assert self.said() == "right", self.said() + (self.directory / "stderr").read_text()

    def stop(self, end: Process) -> None:
        """It ends well."""
        (self.directory / "stop").touch()
        assert end.wait(60) == 0


def statistics(migration: Migration) -> dict[str, Any]:
    """What restore tells in the end."""
    return next(event for event in migration.restore_events if event["event"] == "statistics")


@pytest.mark.parametrize(
    "step", [each for each in huge_arena.STEPS if each not in ("poor_fork", "family", "look_twice")]
)
def test_program_runs_before_its_huge_pages_have_come(hosts: Pair, tmp_path: Path, step: str) -> None:
    # Room for the copies of children, too.
    with huge_pages(6 * huge_arena.PAGES):
        arena = Arena.start(hosts.a, tmp_path, step)
        migration = move(hosts.a, hosts.b, PID, restore_options=("--background", "off"))
        assert migration.restore is not None
        arena.does_it(migration.restore)
        arena.stop(migration.restore)
        migration.wait_drained()
        if step == "touch":
            # Two of each kind were wanted that the source had.
            figures = statistics(migration)
            assert 4 * huge_arena.SIZE <= figures["bytes_demand"] < 10 * huge_arena.SIZE
            assert figures["bytes_zero"] >= 2 * huge_arena.SIZE


def test_huge_pages_follow_while_the_program_uses_them(hosts: Pair, tmp_path: Path) -> None:
    with huge_pages(4 * huge_arena.PAGES):
        arena = Arena.start(hosts.a, tmp_path, "touch_all")
        hosts.set_rate("400mbit")
        migration = move(hosts.a, hosts.b, PID)
        assert migration.restore is not None
        arena.does_it(migration.restore)
        migration.wait_drained()
        arena.stop(migration.restore)


@pytest.mark.parametrize("background", ["eager", "off"])
def test_huge_pages_that_processes_share_since_a_fork_come_to_each(
    hosts: Pair, tmp_path: Path, background: str
) -> None:
    with huge_pages(5 * huge_arena.PAGES):
        arena = Arena.start(hosts.a, tmp_path, "family")
        migration = move(hosts.a, hosts.b, PID, restore_options=("--background", background))
        assert migration.restore is not None
        arena.does_it(migration.restore)
        arena.stop(migration.restore)
        migration.wait_drained()


def test_huge_pages_without_a_reserve_are_there_before_the_program_runs(hosts: Pair, tmp_path: Path) -> None:
    with huge_pages(4 * huge_arena.PAGES):
        arena = Arena.start(hosts.a, tmp_path, "touch_all", "--no-reserve")
        migration = move(hosts.a, hosts.b, PID, restore_options=("--background", "off"))
        assert migration.restore is not None
        arena.does_it(migration.restore)
        arena.stop(migration.restore)
        migration.wait_drained()
        written = huge_arena.PAGES * 3 // 4 * huge_arena.SIZE
        assert next(each for each in migration.dump_events if each["event"] == "state")["boot_bytes"] > written
        assert next(each for each in migration.restore_events if each["event"] == "filled")["pages"] == written >> 12


def test_huge_pages_of_an_idle_program_follow(hosts: Pair, tmp_path: Path) -> None:
    with huge_pages(4 * huge_arena.PAGES):
        arena = Arena.start(hosts.a, tmp_path, "touch_all")
        migration = move(hosts.a, hosts.b, PID)
        migration.wait_drained()
        figures = statistics(migration)
        assert figures["bytes_bulk"] >= 2 * (huge_arena.PAGES * 3 // 4) * huge_arena.SIZE
        assert migration.restore is not None
        arena.does_it(migration.restore)
        arena.stop(migration.restore)


def test_child_that_no_huge_page_is_left_for_ends_alone(hosts: Pair, tmp_path: Path) -> None:
    with huge_pages(4 * huge_arena.PAGES):
        arena = Arena.start(hosts.a, tmp_path, "poor_fork")
        migration = move(hosts.a, hosts.b, PID, restore_options=("--background", "off"))
        assert migration.restore is not None
        arena.does_it(migration.restore)
        arena.stop(migration.restore)
        migration.wait_drained()


def test_program_ends_before_it_reads_zeros_in_huge_pages(hosts: Pair, tmp_path: Path) -> None:
    with huge_pages(4 * huge_arena.PAGES):
        arena = Arena.start(hosts.a, tmp_path, "look_twice")
        migration = move(hosts.a, hosts.b, PID, restore_options=("--background", "off"))
        assert migration.restore is not None
        (tmp_path / "go").touch()
        wait_until(lambda: (tmp_path / "looked").exists(), 60, "the program has looked")
        # A huge page takes minutes.
        hosts.set_rate("64kbit")
        (tmp_path / "again").touch()
        wait_until(lambda: (tmp_path / "looks").exists(), 60, "the program looks again")
        wait_until(lambda: arena.said() or waits_for_a_page(hosts.b), 60, "it waits")
        assert not arena.said()
        migration.dump.kill()
        assert migration.restore.wait(30) == 8
        wait_until(lambda: not hosts.b.alive(PID), 10, "the program has ended")
        assert not arena.said()


def waits_for_a_page(host: Host) -> bool:
    """Whether the program does."""
    return (host.proc / str(PID) / "wchan").read_text() == "handle_userfault"


@pytest.mark.parametrize("lazily", [True, False])
def test_huge_pages_are_kept_in_a_checkpoint(hosts: Pair, tmp_path: Path, lazily: bool) -> None:
    with huge_pages(4 * huge_arena.PAGES):
        arena = Arena.start(hosts.a, tmp_path, "touch_all")
        written = hosts.a.run([*postcopy_command(), "dump", "-t", str(PID), "-D", str(tmp_path / "checkpoint")])
        assert written.returncode == 0, written.stderr
        lazy = ["--lazy-pages"] if lazily else []
        restore = hosts.b.popen([*postcopy_command(), "restore", *lazy, "-D", str(tmp_path / "checkpoint")])
        arena.does_it(restore)
        arena.stop(restore)


def test_every_byte_of_a_tree_with_huge_pages_is_right_while_it_moves_to_and_fro(
    hosts: Pair,
    tmp_path: Path,
    tree_seed: int,  # noqa: F811
    request: pytest.FixtureRequest,
) -> None:
    # Here, since who else sets the number of huge pages must not do so meanwhile.
    with huge_pages(128):
        stress(hosts, tmp_path, tree_seed, request, "--huge")
