"""Shared memory that follows lazily; and in a checkpoint directory, by `tests/programs/cases/shared_memory.py`."""

import json
import mmap
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from postcopy.dump_side.opened import Table
from postcopy.dump_side.shared_memory import SharedObjects
from postcopy.kernel.page import PAGE_SIZE
from tests.hosts import Host, Pair, Process, postcopy_command, wait_until
from tests.migrate import move
from tests.programs.cases import shared_memory

PID = 4800
CASES = (
    shared_memory.SharedAnonymous,
    shared_memory.Memfd,
    shared_memory.SealedMemfds,
    shared_memory.MemfdWithoutDescriptor,
    shared_memory.SysvSegments,
    shared_memory.DeletedFiles,
)


def test_shared_memory_is_kept_in_a_checkpoint(hosts: Pair, tmp_path: Path) -> None:
    names = [case.name() for case in CASES]
    command = [sys.executable, "-m", "tests.programs.states", "--directory", str(tmp_path), "--only", *names]
    program = hosts.a.popen(command, pid=PID)
    hosts.a.wait_until(lambda: (tmp_path / "ready").exists() or program.poll() is not None, 30, "the program is ready")
    written = hosts.a.run([*postcopy_command(), "dump", "-t", str(PID), "-D", str(tmp_path / "checkpoint")])
    assert written.returncode == 0, written.stderr
    restore = hosts.b.popen([*postcopy_command(), "restore", "-D", str(tmp_path / "checkpoint")])
    (tmp_path / "go").touch()
    assert restore.wait(60) == 0
    assert json.loads((tmp_path / "report.json").read_text()) == dict.fromkeys(names)


def test_mapped_files_without_a_name_are_found_beside_processes_that_have_ended(tmp_path: Path) -> None:
    ended = []
    for _ in range(20):
        with subprocess.Popen("true") as program:
            ended.append(program.pid)
    with open(tmp_path / "deleted", "w+b") as stream:
        stream.truncate(PAGE_SIZE)
        os.unlink(stream.name)
        found = os.fstat(stream.fileno())
        with mmap.mmap(stream.fileno(), PAGE_SIZE):
            table = Table(frozenset({os.getpid(), *ended}), SharedObjects())
            assert (found.st_dev, found.st_ino) in table.mapped_without_name()


@dataclass
class Workers:
    """`tests.programs.shared_arena` on the first host."""

    directory: Path
    program: Process

    @classmethod
    def start(cls, host: Host, directory: Path, *options: str) -> "Workers":
        """Start it, and wait until all is under way."""
        files = [f"--{name}={directory / name}" for name in ("stop", "progress", "result")]
        command = [sys.executable, "-m", "tests.programs.shared_arena", *files, *options]
        with open(directory / "stderr", "wb") as errors:
            workers = cls(directory, host.popen(command, pid=PID, stderr=errors))
        workers.go_on(20)
        return workers

    def progress(self) -> int:
        """How many hundreds of operations there have been."""
        path = self.directory / "progress"
        return path.stat().st_size if path.exists() else 0

    def go_on(self, hundreds: int) -> None:
        """Wait for so many more."""
        before = self.progress()
        wait_until(lambda: self.progress() >= before + hundreds or self.said(), 60, "the workers go on")
        assert not self.said()

    def said(self) -> str:
        """What they have said in the end."""
        path = self.directory / "result"
        return path.read_text() if path.exists() else ""

    def stop(self, end: Process) -> None:
        """They have not noticed anything."""
        (self.directory / "stop").touch()
        assert end.wait(60) == 0, self.said() + (self.directory / "stderr").read_text()
        assert [line for line in self.said().splitlines() if line.isdigit()] == self.said().splitlines()
        assert len(self.said().splitlines()) == 5


def test_workers_that_share_memory_do_not_notice(tmp_path: Path) -> None:
    with Host.start("alone")[0] as host:
        workers = Workers.start(host, tmp_path)
        workers.stop(workers.program)


@pytest.mark.parametrize("background", ["eager", "off"])
def test_memory_of_busy_workers_follows_lazily(hosts: Pair, tmp_path: Path, background: str) -> None:
    workers = Workers.start(hosts.a, tmp_path)
    if background == "eager":
        hosts.set_rate("200mbit")
    migration = move(hosts.a, hosts.b, PID, restore_options=("--background", background))
    assert next(event for event in migration.dump_events if event["event"] == "state")["lazy_pages"] > 5000
    workers.go_on(30)
    assert migration.restore is not None
    workers.stop(migration.restore)
    migration.wait_drained()


def test_workers_end_before_they_read_zeros_in_shared_memory(hosts: Pair, tmp_path: Path) -> None:
    workers = Workers.start(hosts.a, tmp_path)
    hosts.set_rate("50mbit")
    migration = move(hosts.a, hosts.b, PID, restore_options=("--background", "off"))
    migration.dump.kill()
    assert migration.restore is not None
    assert migration.restore.wait(30) == 8
    wait_until(lambda: not hosts.b.alive(PID), 10, "the program has ended")
    assert not workers.said()


@pytest.mark.parametrize("lazily", [True, False])
def test_workers_go_on_from_a_checkpoint(hosts: Pair, tmp_path: Path, lazily: bool) -> None:
    workers = Workers.start(hosts.a, tmp_path)
    written = hosts.a.run([*postcopy_command(), "dump", "-t", str(PID), "-D", str(tmp_path / "checkpoint")])
    assert written.returncode == 0, written.stderr
    lazy = ["--lazy-pages"] if lazily else []
    restore = hosts.b.popen([*postcopy_command(), "restore", *lazy, "-D", str(tmp_path / "checkpoint")])
    workers.go_on(20)
    workers.stop(restore)


HOLDER = """
import hashlib, mmap, os, sys, time
from pathlib import Path
directory, size = Path(sys.argv[1]), int(sys.argv[2])
fd = os.memfd_create("large")
os.ftruncate(fd, size)
with mmap.mmap(fd, size) as memory:
    for at in range(0, size, 1 << 20):
        memory[at : at + (1 << 20)] = at.to_bytes(8, "little") * (1 << 17)
    def digest():
        return hashlib.blake2b(memory).hexdigest()
    before = digest()
    (directory / "ready").touch()
    while not (directory / "go").exists():
        time.sleep(0.01)
    read = hashlib.blake2b(os.pread(fd, size, 0)).hexdigest()
    (directory / "result").write_text(f"{before == read} {before == digest()}")
"""


def test_large_memory_with_a_descriptor_is_there_before_the_program_runs(hosts: Pair, tmp_path: Path) -> None:
    size = 272 << 20
    program = hosts.a.popen([sys.executable, "-c", HOLDER, str(tmp_path), str(size)], pid=PID)
    wait_until(lambda: (tmp_path / "ready").exists() or program.poll() is not None, 30, "the program is ready")
    migration = move(hosts.a, hosts.b, PID, restore_options=("--background", "off"))
    assert next(event for event in migration.restore_events if event["event"] == "filled")["pages"] == size // PAGE_SIZE
    (tmp_path / "go").touch()
    assert migration.restore is not None
    assert migration.restore.wait(60) == 0
    assert (tmp_path / "result").read_text() == "True True"
