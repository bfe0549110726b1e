"""Real programs with real work, moved in the middle of it, and there and back again."""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hosts import Host, Pair, Process, wait_until
from tests.migrate import Migration, move

PROGRAMS = Path(__file__).with_name("programs")
PID = 4200
XZ_INPUT_BYTES = int(os.environ.get("POSTCOPY_TEST_XZ_MEGABYTES", "32")) * 1_000_000
#: xz gives each thread a block; the default of -9 is larger than the input, which would leave one thread idle.
XZ = ["xz", "-9", "-T2", "--block-size=4MiB", "--stdout"]
XZ_TIMEOUT = 120 + XZ_INPUT_BYTES / 300_000

there = pytest.mark.parametrize("moves", [2], ids=["there-and-back"])


def travel(hosts: Pair, pid: int, moves: int, before_each: Callable[[Host], object]) -> Migration:
    """Move ``pid`` from a to b, from b to a, and so on; returns the last move, drained.

    ``before_each`` is called with the host that the program is about to leave.
    """
    assert moves
    source, destination = hosts
    for _ in range(moves):
        before_each(source)
        migration = move(source, destination, pid)
        assert destination.alive(pid)
        migration.wait_drained()
        source, destination = destination, source
    return migration


def end_of(migration: Migration, timeout: float = 60) -> int:
    """The exit status of the moved program, which restore ends with."""
    assert migration.restore is not None
    return migration.restore.wait(timeout)


def start(host: Host, command: list[str], stderr: Path) -> Process:
    """Start a program of ours with its complaints in a file."""
    with open(stderr, "wb") as errors:
        return host.popen([sys.executable, *command], pid=PID, stderr=errors)


def grows_by(path: Path, lines: int, host: Host, timeout: float = 60) -> None:
    """Wait until ``path`` has so many lines more than now. Fails at once when the program on ``host`` is gone."""

    def count() -> int:
        return path.read_bytes().count(b"\n") if path.exists() else 0

    wanted = count() + lines
    wait_until(lambda: count() >= wanted or not host.alive(PID), timeout, f"{path.name} has {wanted} lines")
    assert count() >= wanted, f"the program is gone, with {count()} lines in {path.name}"


@dataclasses.dataclass
class Compression:
    """Real input for xz, and what xz makes of it where it is."""

    source: Path
    compressed: bytes


def real_files() -> Iterator[Path]:
    """Files that every Debian with a Python has, always in the same order."""
    for root in (Path(os.__file__).parent, Path("/usr/lib"), Path("/usr/share")):
        for directory, subdirectories, names in os.walk(root):
            subdirectories.sort()
            for name in sorted(names):
                path = Path(directory, name)
                if path.is_file() and not path.is_symlink():
                    yield path


@pytest.fixture(scope="module")
def compression(tmp_path_factory: pytest.TempPathFactory) -> Compression:
    """The input, with the output of an xz that is not moved."""
    directory = tmp_path_factory.mktemp("xz")
    source = directory / "input"
    with open(source, "wb") as target:
        for path in real_files():
            target.write(path.read_bytes()[: XZ_INPUT_BYTES - target.tell()])
            if target.tell() >= XZ_INPUT_BYTES:
                break
    (host,) = Host.start("reference")
    with host, open(source, "rb") as stdin, open(directory / "output", "wb") as stdout:
        assert host.popen(XZ, stdin=stdin, stdout=stdout).wait(XZ_TIMEOUT) == 0
    return Compression(source, (directory / "output").read_bytes())


@there
@pytest.mark.timeout(300 + XZ_TIMEOUT)
def test_xz_compresses_to_the_same_bytes(hosts: Pair, tmp_path: Path, compression: Compression, moves: int) -> None:
    output = tmp_path / "output"
    with (
        open(compression.source, "rb") as stdin,
        open(output, "wb") as stdout,
        open(tmp_path / "stderr", "wb") as stderr,
    ):
        program = hosts.a.popen(XZ, pid=PID, stdin=stdin, stdout=stdout, stderr=stderr)
    shares = iter([0.15, 0.5])

    def compress_some(_: Host) -> None:
        wanted = next(shares) * len(compression.compressed)
        wait_until(lambda: output.stat().st_size >= wanted, XZ_TIMEOUT, f"xz has written {wanted} bytes")

    last = travel(hosts, PID, moves, compress_some)
    assert output.stat().st_size < len(compression.compressed), "xz was done before the move was: nothing was tried"
    assert end_of(last, XZ_TIMEOUT) == 0, (tmp_path / "stderr").read_text()
    assert program.poll() == -signal.SIGKILL
    assert output.read_bytes() == compression.compressed


@there
def test_dict_that_four_threads_change_keeps_its_checksum(hosts: Pair, tmp_path: Path, moves: int) -> None:
    progress, result = tmp_path / "progress", tmp_path / "result"
    command = [str(PROGRAMS / "dict_churn.py"), "--progress", str(progress), "--result", str(result)]
    start(hosts.a, command, tmp_path / "stderr")
    last = travel(hosts, PID, moves, lambda host: grows_by(progress, 10, host))
    grows_by(progress, 20, last.destination)
    last.destination.kill(PID, signal.SIGTERM)
    status = end_of(last)
    assert result.exists(), f"ended with {status}: {(tmp_path / 'stderr').read_text()}"
    assert (status, result.read_text()[:3]) == (0, "OK "), result.read_text()
    counts = [int(line) for line in progress.read_text().split()]
    assert counts == sorted(set(counts)), "the count of operations went back"


@there
def test_sqlite_loses_no_transaction_and_makes_none_twice(hosts: Pair, tmp_path: Path, moves: int) -> None:
    log, result = tmp_path / "log", tmp_path / "result"
    start(hosts.a, [str(PROGRAMS / "sqlite_bank.py"), "--log", str(log), "--result", str(result)], tmp_path / "stderr")
    last = travel(hosts, PID, moves, lambda host: grows_by(log, 5000, host))
    grows_by(log, 10_000, last.destination)
    last.destination.kill(PID, signal.SIGTERM)
    status = end_of(last)
    assert result.exists(), f"ended with {status}: {(tmp_path / 'stderr').read_text()}"
    assert (status, result.read_text()[:3]) == (0, "OK "), result.read_text()
    assert [int(line.split()[0]) for line in log.read_text().splitlines()] == list(range(1, count_lines(log) + 1))


def count_lines(path: Path) -> int:
    """Lines in a file."""
    return path.read_bytes().count(b"\n")
