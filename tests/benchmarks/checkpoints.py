"""What dumps to a directory and restores from one cost, beside plain writes and reads of as many bytes.

The directories are on a tmpfs: what is measured is the tool, not a disk.
"""

import contextlib
import json
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.moves import PROGRAMS, SETTLED, clear, wait
from tests.benchmarks.report import MIB
from tests.hosts import Host, Pair, Process
from tests.migrate import PORT, MigrationFailed
from tests.sides import Side

PID = 1000
MEMORY = Path("/dev/shm")
PIECE = MIB
AT_ONCE = 10
# Seconds between two looks at the memory of our processes; each takes some 20 ms of a processor.
SAMPLE_EVERY = 0.2
MOST_SECONDS = 300


class _Scene:
    """A ticking program on the first host, and commands; all of it ends with the scope."""

    def __init__(self, hosts: Pair, directory: Path, mib: int) -> None:
        self.hosts = hosts
        self.directory = directory
        self.checkpoint = directory / "checkpoint"
        self.result = directory / "result"
        self._commands = 0
        ready = directory / "ready"
        argv = [sys.executable, "-I", "-S", str(PROGRAMS / "ticking.py"), str(mib), str(ready), str(self.result)]
        self.program = hosts.a.popen(argv, pid=PID)
        wait("the program is prepared", lambda: ready.exists() or self.program.poll() is not None)
        time.sleep(SETTLED)

    def command(self, host: Host, *arguments: str) -> tuple[Side, float]:
        """Start a command; when that was."""
        self._commands += 1
        began = time.monotonic()
        return Side.start(host, self.directory / f"{arguments[0]}{self._commands}.err", arguments), began

    def dump(self, *options: str) -> tuple[Side, float]:
        """Dump the program to its end; seconds of the whole command."""
        side, began = self.command(self.hosts.a, "dump", "-t", str(PID), "-D", str(self.checkpoint), *options)
        return side, self.end(side, began)

    def end(self, side: Side, began: float) -> float:
        """Wait until a command ends well; seconds since it began."""
        status = side.process.wait(MOST_SECONDS)
        seconds = time.monotonic() - began
        if status:
            raise MigrationFailed(f"{side.process} ended with {status}: {side.text}")
        return seconds

    def restore(self, *options: str) -> tuple[Side, float]:
        """Restore from the directory, until the program runs; seconds of the whole command so far."""
        side, began = self.command(self.hosts.b, "restore", "-D", str(self.checkpoint), *options)
        return side, self.runs(side, began)

    def runs(self, side: Side, began: float) -> float:
        """Wait until the program runs; seconds since the command began."""
        wait("the program runs", lambda: bool(side.last("running")) or side.process.poll() is not None, every=0.001)
        if side.process.poll() is not None:
            raise MigrationFailed(f"{side.process} ended with {side.process.poll()}: {side.text}")
        return time.monotonic() - began

    def finish(self, process: Process) -> None:
        """Tell a program, or the restore that is its parent, to end: it checks its memory."""
        process.terminate()
        if status := process.wait(MOST_SECONDS):
            raise MigrationFailed(f"{process}: the program ended with {status}: it has other memory than before")


@contextlib.contextmanager
def _scene(hosts: Pair, mib: int) -> Iterator[_Scene]:
    with (
        tempfile.TemporaryDirectory(prefix="postcopy-bench-", dir=MEMORY) as directory,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(clear, hosts)
        yield _Scene(hosts, Path(directory), mib)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _memory(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _plain(source: Path) -> dict[str, float]:
    """Seconds to read a file into fresh memory, and to write that to a new file."""
    size = source.stat().st_size
    memory = _memory(size)
    view = memoryview(memory)
    target = source.with_name("plain")

    def read() -> None:
        with open(source, "rb", buffering=0) as stream:
            for at in range(0, size, PIECE):
                stream.readinto(view[at : at + PIECE])

    def write() -> None:
        with open(target, "wb", buffering=0) as stream:
            for at in range(0, size, PIECE):
                stream.write(view[at : at + PIECE])
            os.fsync(stream.fileno())

    try:
        return {"plain_read_seconds": _seconds(read), "plain_write_seconds": _seconds(write)}
    finally:
        target.unlink(missing_ok=True)
        view.release()
        memory.close()


def whole(hosts: Pair, mib: int) -> dict[str, Any]:
    """Dump all of a program and restore it at once; plain writes and reads of its pages."""
    with _scene(hosts, mib) as scene:
        dump, dump_command = scene.dump()
        plain = _plain(scene.checkpoint / "pages-0")
        restore, restore_command = scene.restore()
        scene.finish(restore.process)
        return {
            **plain,
            "dump_seconds": dump.last("killed")["elapsed_s"],
            "dump_still_seconds": dump.last("written")["elapsed_s"] - dump.last("frozen")["elapsed_s"],
            "dump_command_seconds": dump_command,
            "restore_seconds": restore.last("running")["elapsed_s"],
            "restore_command_seconds": restore_command,
            "events": {"dump": dump.events, "restore": restore.events},
        }


def left_running(hosts: Pair, mib: int) -> dict[str, Any]:
    """How long a program stands still that is dumped and runs on."""
    with _scene(hosts, mib) as scene:
        scene.dump("--leave-running")
        time.sleep(SETTLED)
        scene.finish(scene.program)
        gaps = sorted(gap for gap, _ in json.loads(scene.result.read_text())["gaps"])
        return {"seen_seconds": gaps[-1] / 1e9}


def lazy(hosts: Pair, mib: int) -> dict[str, Any]:
    """How soon a program runs whose pages stay in the directory."""
    with _scene(hosts, mib) as scene:
        scene.dump()
        # What the dump has left to the kernel to do is no part of the restore.
        time.sleep(SETTLED)
        restore, command = scene.restore("--lazy-pages")
        running = restore.last("running")
        scene.finish(restore.process)
        return {"seconds": running["elapsed_s"], "command_seconds": command, "events": restore.events}


def many(hosts: Pair, mib: int) -> dict[str, Any]:
    """The memory of all our processes while several restores are served at once from one directory."""
    with _scene(hosts, mib) as scene:
        scene.dump()
        address = ("--address", hosts.a.address, "--port", str(PORT))
        serve, _ = scene.command(hosts.a, "serve", "-D", str(scene.checkpoint), *address)
        wait("it serves", lambda: bool(serve.last("serving")))
        began = time.monotonic()
        options = ("--lazy-pages", "--new-pid-namespace", *address)
        restores = [scene.command(hosts.b, "restore", *options)[0] for _ in range(AT_ONCE)]
        peak, processes = 0, 0

        def sample() -> None:
            nonlocal peak, processes
            found = [_proportional(host, pid) for host in hosts for pid in host.pids()]
            if sum(found) > peak:
                peak, processes = sum(found), sum(map(bool, found))

        def ended() -> bool:
            return all(side.last("drained") or side.process.poll() is not None for side in restores)

        wait("every page is in", ended, sample, every=SAMPLE_EVERY)
        seconds = time.monotonic() - began
        for side in restores:
            if side.process.poll() is not None:
                raise MigrationFailed(f"{side.process} ended with {side.process.poll()}: {side.text}")
        for side in restores:
            scene.finish(side.process)
        return {"peak_bytes_together": peak, "processes": processes, "seconds": seconds}


def _proportional(host: Host, pid: int) -> int:
    """The memory of a process of ours in bytes, what it shares divided among those that share it; else 0."""
    with contextlib.suppress(OSError, StopIteration):
        directory = host.proc / str(pid)
        # Roles have the command line of the process that forked them; the moved programs have another.
        if b"-m\0postcopy\0" in (directory / "cmdline").read_bytes():
            lines = (directory / "smaps_rollup").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) << 10
    return 0
