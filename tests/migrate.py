"""Moves a process between two test hosts with the two commands, as a user would."""

import contextlib
import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hosts import Host, Process, postcopy_command

PORT = 27027

#: Every migration since the running test began; the report of a failed test shows their logs.
started: "list[Migration]" = []

_output = tempfile.TemporaryDirectory(prefix="postcopy-migrations-")


class MigrationFailed(AssertionError):
    """A command ended before it said that it was ready; the text holds the logs of both."""


@dataclass
class Migration:
    """One move: the two commands, which may still be at work, and what they said."""

    source: Host
    destination: Host
    pid: int
    directory: Path
    dump: Process
    restore: Process | None = None

    @property
    def dump_events(self) -> list[dict[str, Any]]:
        """What dump has printed with ``--json`` so far."""
        return _events(self.directory / "dump.out")

    @property
    def restore_events(self) -> list[dict[str, Any]]:
        """What restore has printed with ``--json`` so far."""
        return _events(self.directory / "restore.out")

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events of dump, then those of restore."""
        return self.dump_events + self.restore_events

    def wait_drained(self, timeout: float = 120) -> None:
        """Wait until the last page is over: dump has ended with 0 and killed the source's process.

        Raises MigrationFailed when dump ends otherwise, or does not end in time.
        """
        try:
            status = self.dump.wait(timeout)
        except subprocess.TimeoutExpired:
            self.fail(f"dump still serves after {timeout} s")
        if status:
            self.fail(f"dump ended with {status}")
        if self.source.alive(self.pid):
            self.fail(f"PID {self.pid} is still there on {self.source.name} ({self.source.proc_state(self.pid)})")

    def logs(self) -> list[tuple[str, str]]:
        """Title and text of everything both commands printed."""
        sections = []
        for side, host in (("dump", self.source), ("restore", self.destination)):
            for stream in ("out", "err"):
                with contextlib.suppress(FileNotFoundError):
                    text = (self.directory / f"{side}.{stream}").read_text(errors="replace")
                    sections.append((f"{side} on {host.name}, std{stream}", text[-20000:]))
        return sections

    def fail(self, reason: str) -> None:
        """Raise MigrationFailed with the logs."""
        logs = "".join(f"\n--- {title}\n{text}" for title, text in self.logs())
        raise MigrationFailed(f"moving {self.pid} from {self.source.name} to {self.destination.name}: {reason}{logs}")


def move(
    source: Host,
    destination: Host,
    pid: int,
    *,
    dump_options: Sequence[str] = (),
    restore_options: Sequence[str] = (),
    port: int = PORT,
    timeout: float = 60,
) -> Migration:
    """Move ``pid`` of ``source`` to the same PID of ``destination``; returns when it runs there, pages still missing.

    Without ``-d`` in ``restore_options`` the process is a child of ``migration.restore``, which ends with its exit
    status. Raises MigrationFailed when either command ends early or nothing happens for ``timeout`` seconds.
    """
    migration = start_dump(source, destination, pid, options=dump_options, port=port, timeout=timeout)
    start_restore(migration, options=restore_options, port=port, timeout=timeout)
    return migration


#: How ``dump`` refuses a program whose last change before the freeze is shown by smaps alone: it is to be tried again.
UNLUCKY = "has changed the flags of its mappings"


def move_restless(source: Host, destination: Host, pid: int, options: Sequence[str] = ()) -> Migration:
    """`move` of a program that changes its memory all the time; ``options``: of ``restore``."""
    for _ in range(3):
        try:
            return move(source, destination, pid, restore_options=options)
        except MigrationFailed as failure:
            if UNLUCKY not in str(failure):
                raise
    raise MigrationFailed(f"each time, process {pid} {UNLUCKY} just before the freeze")


def start_dump(
    source: Host, destination: Host, pid: int, *, options: Sequence[str] = (), port: int = PORT, timeout: float = 60
) -> Migration:
    """The first half of `move`: dump listens, nothing is frozen."""
    directory = Path(tempfile.mkdtemp(dir=_output.name))
    command = ["dump", "--lazy-pages", "-t", str(pid), "--address", source.address, "--port", str(port), *options]
    dump, ready = _start(source, command, directory / "dump")
    migration = Migration(source, destination, pid, directory, dump)
    started.append(migration)
    _await_status(migration, ready, dump, timeout, "dump listens")
    return migration


def start_restore(
    migration: Migration,
    *,
    options: Sequence[str] = (),
    port: int = PORT,
    timeout: float = 60,
    wait: bool = True,
    pass_fds: Sequence[int] = (),
) -> Process:
    """The second half of `move`; without ``wait`` it returns as soon as restore is started."""
    command = ["restore", "--lazy-pages", "--address", migration.source.address, "--port", str(port), *options]
    migration.restore, ready = _start(migration.destination, command, migration.directory / "restore", pass_fds)
    if not wait:
        os.close(ready)
        return migration.restore
    _await_status(migration, ready, migration.restore, timeout, "the tree runs")
    return migration.restore


def _start(host: Host, command: list[str], output: Path, pass_fds: Sequence[int] = ()) -> tuple[Process, int]:
    """Start a command with its output in ``output``.out and .err; returns the read end of its status pipe too."""
    ready, status = os.pipe()
    try:
        with open(f"{output}.out", "wb") as stdout, open(f"{output}.err", "wb") as stderr:
            argv = [*postcopy_command(), *command, "--json", "-vv", "--status-fd", str(status)]
            return host.popen(argv, stdout=stdout, stderr=stderr, pass_fds=[status, *pass_fds]), ready
    except BaseException:
        os.close(ready)
        raise
    finally:
        os.close(status)


def _await_status(migration: Migration, ready: int, process: Process, timeout: float, what: str) -> None:
    """Wait for the byte on the status pipe. Its end without a byte is a failure, and comes at once."""
    try:
        deadline = time.monotonic() + timeout
        poller = select.poll()
        poller.register(ready, select.POLLIN)
        # restore -d leaves the daemon behind, which may keep the pipe: so the process is watched as well.
        poller.register(process.pidfd, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            readable = {fd for fd, _ in poller.poll(left * 1000)}
            if ready in readable:
                if os.read(ready, 1) == b"\0":
                    return
                poller.unregister(ready)
            if process.pidfd in readable:
                migration.fail(f"ended with {process.wait(10)} before '{what}'")
        migration.fail(f"no sign of '{what}' within {timeout} s")
    finally:
        os.close(ready)


def _events(path: Path) -> list[dict[str, Any]]:
    return list(_parse(path)) if path.exists() else []


def _parse(path: Path) -> Iterator[dict[str, Any]]:
    # The last line may be half written.
    for line in path.read_text().split("\n")[:-1]:
        yield json.loads(line)
