"""Descriptors that are moved only if asked for, or only where the destination has a filesystem of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import Host, Pair
from tests.migrate import MigrationFailed
from tests.test_states import PID, run_program


@pytest.fixture
def apart(hosts: Pair, tmp_path: Path) -> Iterator[Path]:
    """A directory in which each host has its own ``files``; the rest of it is shared."""
    for host in hosts:
        (tmp_path / "files").mkdir(exist_ok=True)
        host.run(["mount", "-t", "tmpfs", "none", str(tmp_path / "files")], check=True)
    yield tmp_path / "files"
    for host in hosts:
        host.run(["umount", "-l", str(tmp_path / "files")])


def inside(host: Host, path: Path) -> Path:
    """A path of a host as the test reaches it."""
    return host.proc.parent / str(path).lstrip("/")


def refused(migration_failed: pytest.ExceptionInfo[MigrationFailed], *texts: str) -> None:
    """Both sides gave up before the freeze, with these reasons."""
    said = str(migration_failed.value)
    assert "frozen" not in said
    for text in texts:
        assert text in said


@pytest.mark.parametrize("moves", [1, 2], ids=["moved", "there-and-back"])
def test_fifos_move_with_their_content(hosts: Pair, tmp_path: Path, apart: Path, moves: int) -> None:
    for number in range(3):
        os.mkfifo(inside(hosts.b, apart) / f"fifo {number}")
    report = run_program(hosts, tmp_path, moves, "--files", str(apart), "--only", "named_fifos")
    assert report == {"named_fifos": None}


def test_fifo_that_is_not_there_or_in_use_is_refused(hosts: Pair, tmp_path: Path, apart: Path) -> None:
    os.mkfifo(inside(hosts.b, apart) / "fifo 0")
    (inside(hosts.b, apart) / "fifo 1").touch()
    holder = os.open(inside(hosts.b, apart) / "fifo 0", os.O_RDWR)
    with pytest.raises(MigrationFailed) as failure:
        run_program(hosts, tmp_path, 1, "--files", str(apart), "--only", "named_fifos")
    os.close(holder)
    refused(failure, "fifo 0 is open here", "fifo 1 is no FIFO here: make it with mkfifo", "fifo 2 is missing here")


@pytest.mark.parametrize("moves", [1, 2], ids=["moved", "there-and-back"])
def test_file_locks_move_if_asked_for(hosts: Pair, tmp_path: Path, apart: Path, moves: int) -> None:
    for name in ("posix", "ofd", "flock", "lease"):
        (inside(hosts.b, apart) / f"locked {name}").write_bytes(bytes(100))
    options = ["--files", str(apart), "--only", "file_locks"]
    report = run_program(hosts, tmp_path, moves, *options, dump_options=["--file-locks"])
    assert report == {"file_locks": None}


def test_locks_of_a_shared_file_are_refused_before_the_freeze(hosts: Pair, tmp_path: Path) -> None:
    with pytest.raises(MigrationFailed) as failure:
        run_program(hosts, tmp_path, 1, "--only", "file_locks", dump_options=["-l"])
    refused(failure, "locked flock is locked here; where that is the program's own lock at the source")


def hold(host: Host, code: str, *, pid: int = PID) -> None:
    """Start a program that runs ``code``, then waits for a byte."""
    program = host.popen(
        [sys.executable, "-c", f"import os, sys\n{code}\nprint('ready', flush=True)\nsys.stdin.readline()\n"],
        pid=pid,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert program.stdout is not None
    assert program.stdout.readline() == b"ready\n"
