"""Two hosts with programs and commands on them, for the tests of checkpoint directories.

A restored program goes on with its files as they were at the dump. So where it has run on, or several are restored,
each gets a copy of them: at the same paths, in a mount namespace of its own.
"""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.hosts import Host, Pair, Process, wait_until
from tests.programs import patient, witness
from tests.sides import SECONDS, Side

# The first argument hides the second; the rest is the command.
_IN_PLACE_OF = ["unshare", "-m", "sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"']


class Work:
    """A program at work on files in a directory of its own; each method may be given a copy of that."""

    command: Sequence[str] = ()
    stdin: str | None = None
    stdout: str | None = None

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()

    def start(self, host: Host, pid: int) -> Process:
        """Start it and wait until it has done some of its work."""
        self.prepare()
        paths = {name: self.directory / name for name in (self.stdin, self.stdout) if name}
        with contextlib.ExitStack() as stack:
            stdin = stack.enter_context(open(paths[self.stdin], "rb")) if self.stdin else None
            stdout = stack.enter_context(open(paths[self.stdout], "wb")) if self.stdout else None
            stderr = stack.enter_context(open(self.directory / "stderr", "wb"))
            command = [part.format(directory=self.directory) for part in self.command]
            program = host.popen(command, pid=pid, stdin=stdin, stdout=stdout, stderr=stderr)
        wait_until(lambda: self.done(self.directory) or program.poll() is not None, SECONDS, "the program is at work")
        assert program.poll() is None, self.complaints(self.directory)
        return program

    def prepare(self) -> None:
        """Make the files that it needs."""

    def done(self, directory: Path) -> int:
        """How much it has done."""
        raise NotImplementedError

    def check(self, directory: Path) -> None:
        """All of its work, once it has ended with 0, is right and was done once."""
        raise NotImplementedError

    def complaints(self, directory: Path) -> str:
        """What it has printed."""
        return (directory / "stderr").read_text()

    def goes_on(self, program: Process, directory: Path | None = None) -> None:
        """Wait until it has done more than now; ``program`` is it, or the restore that is its parent."""
        files = directory or self.directory
        before = self.done(files)
        wait_until(lambda: self.done(files) > before or program.poll() is not None, SECONDS, "the program goes on")
        assert self.done(files) > before, f"ended with {program.poll()}: {self.complaints(files)}"

    def finish(self, program: Process, directory: Path | None = None) -> None:
        """Wait until it has done more than now, tell it to end, and see that all is right."""
        self.goes_on(program, directory)
        program.terminate()
        self.ended(program, directory)

    def ended(self, program: Process, directory: Path | None = None) -> None:
        """It comes to its end, and all is right."""
        files = directory or self.directory
        end = program.wait(4 * SECONDS)
        assert end == 0, f"ended with {end}: {self.complaints(files)}"
        self.check(files)


class DictChurn(Work):
    """Four threads that keep changing a dict, under a checksum."""

    command = (
        sys.executable,
        *("-m", "tests.programs.dict_churn", "--entries", "60000"),
        *("--progress", "{directory}/progress", "--result", "{directory}/result"),
    )

    def done(self, directory: Path) -> int:
        path = directory / "progress"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def check(self, directory: Path) -> None:
        assert (directory / "result").read_text().startswith("OK "), (directory / "result").read_text()
        counts = [int(line) for line in (directory / "progress").read_text().split()]
        assert counts == sorted(set(counts)), "the count of operations went back"


class SqliteBank(Work):
    """Transfers in a database in memory, each of them logged."""

    command = (
        sys.executable,
        *("-m", "tests.programs.sqlite_bank", "--megabytes", "24"),
        *("--log", "{directory}/log", "--result", "{directory}/result"),
    )

    def done(self, directory: Path) -> int:
        path = directory / "log"
        return path.read_bytes().count(b"\n") // 100 if path.exists() else 0

    def check(self, directory: Path) -> None:
        # It has compared its log with its tables itself.
        assert (directory / "result").read_text().startswith("OK "), (directory / "result").read_text()


class Xz(Work):
    """xz with two threads; it ends by itself."""

    command = ("xz", "-6", "-T2", "--block-size=512KiB", "--stdout")
    stdin, stdout = "input", "output"
    input_bytes = 5_000_000

    def prepare(self) -> None:
        content = b""
        for path in sorted(Path(os.__file__).parent.rglob("*.py")):
            content += path.read_bytes()
            if len(content) >= self.input_bytes:
                break
        (self.directory / "input").write_bytes(content[: self.input_bytes])

    def done(self, directory: Path) -> int:
        return (directory / "output").stat().st_size

    def finish(self, program: Process, directory: Path | None = None) -> None:
        """It is not told: a stream that is cut off would not be right."""
        self.ended(program, directory)

    def check(self, directory: Path) -> None:
        import lzma

        assert lzma.decompress((directory / "output").read_bytes()) == (directory / "input").read_bytes()


class Witness(Work):
    """The program that notices whatever happens to it."""

    command = (sys.executable, *("-m", "tests.programs.witness", "--megabytes", "16", "--log", "{directory}/log"))

    def done(self, directory: Path) -> int:
        return len(witness.records(directory / "log"))

    def complaints(self, directory: Path) -> str:
        return f"{super().complaints(directory)} {witness.records(directory / 'log')[-1:]}"

    def check(self, directory: Path) -> None:
        found = witness.records(directory / "log")
        assert not [record.wrong for record in found if record.wrong], found[-1]
        assert [record.number for record in found] == list(range(1, len(found) + 1))


class Patient(Work):
    """The program that does nothing unless told; ``pages``: how many it holds."""

    command = (sys.executable, *("-m", "tests.programs.patient", "--log", "{directory}/log"))
    pages = 4096

    def done(self, directory: Path) -> int:
        return len(self.log_lines(directory))

    def check(self, directory: Path) -> None:
        wrong = [line for line in self.log_lines(directory) if "wrong" in line and not line.endswith("[]")]
        assert not wrong

    def log_lines(self, directory: Path | None = None) -> list[str]:
        """What it has said so far."""
        return patient.lines((directory or self.directory) / "log")

    def ask(self, host: Host, pid: int, number: signal.Signals) -> str:
        """Send it a signal; its answer."""
        before = self.done(self.directory)
        host.kill(pid, number)
        wait_until(lambda: self.done(self.directory) > before or not host.alive(pid), SECONDS, "the program answers")
        assert host.alive(pid) or number == signal.SIGTERM, "the program has ended"
        return self.log_lines()[-1]

    def resident(self, host: Host, pid: int) -> int:
        """How many pages of its area are in memory."""
        address = int(self.log_lines()[0])
        content = (host.proc / str(pid) / "smaps").read_text().splitlines()
        # The kernel merges what lies side by side.
        begin = next(
            number
            for number, line in enumerate(content)
            if "-" in line.split()[0] and _within(line.split()[0], address)
        )
        return int(next(line for line in content[begin:] if line.startswith("Rss:")).split()[1]) // 4


def _within(ends: str, address: int) -> bool:
    start, end = (int(part, 16) for part in ends.split("-"))
    return start <= address < end


class Stage:
    """The hosts, and a directory for the files of one test."""

    def __init__(self, hosts: Pair, directory: Path, number: int = 0) -> None:
        """``number``: where several use the same hosts at once, each has PIDs and a port of its own."""
        self.hosts = hosts
        self.directory = directory
        self.checkpoint = directory / "checkpoint"
        self._pid = 3000 + 60 * number
        self.port = 28000 + 10 * number
        self._commands = 0
        self._works = 0
        self._started: list[Process] = []
        self._before = [set(host.pids()) for host in hosts]

    def begin(self, kind: type[Work]) -> tuple[Work, Process]:
        """A program at work on the first host, under a PID of its own."""
        self._works += 1
        work = kind(self.directory / f"{kind.__name__}{self._works}")
        # Its threads have the PIDs behind it.
        program = work.start(self.hosts.a, self._pid + 15 * (self._works - 1))
        self._started.append(program)
        return work, program

    def command(
        self, host: Host, *arguments: str | Path | int, pause: str | None = None, files: tuple[Path, Path] | None = None
    ) -> Side:
        """Start a command. ``files``: a directory that it is to see in place of another."""
        self._commands += 1
        errors = self.directory / f"{arguments[0]}{self._commands}.err"
        wrap = [*_IN_PLACE_OF, *map(str, files)] if files else []
        return Side.start(host, errors, [str(each) for each in arguments], pause=pause, wrap=wrap)

    def dump(self, program: Process, *options: str | Path, pause: str | None = None) -> Side:
        """Dump a program of the first host to the directory."""
        return self.command(self.hosts.a, "dump", "-t", program.pid, "-D", self.checkpoint, *options, pause=pause)

    def lazy_dump(self, program: Process, *options: str | Path, pause: str | None = None) -> Side:
        """The same without its lazy pages, which are served; returns when they are (or at the pause)."""
        side = self.dump(program, "--lazy-pages", *self.source, *options, pause=pause)
        if pause is None:
            side.await_event("listening")
        return side

    def restore(
        self,
        *options: str | Path,
        directory: Path | None = None,
        host: Host | None = None,
        pause: str | None = None,
        files: tuple[Path, Path] | None = None,
    ) -> Side:
        """Restore from the directory, on the second host if nothing else is said."""
        source = ("-D", directory or self.checkpoint)
        return self.command(host or self.hosts.b, "restore", *source, *options, pause=pause, files=files)

    def remote_restore(self, *options: str | Path, files: tuple[Path, Path] | None = None) -> Side:
        """Restore on the second host from what listens on the first."""
        return self.command(self.hosts.b, "restore", "--lazy-pages", *self.source, *options, files=files)

    def serve(self) -> Side:
        """Serve the directory from the first host."""
        side = self.command(self.hosts.a, "serve", "-D", self.checkpoint, *self.source)
        side.await_event("serving")
        return side

    @property
    def source(self) -> tuple[str, ...]:
        """Where the first host listens."""
        return ("--address", self.hosts.a.address, "--port", str(self.port))

    def copy(self, directory: Path) -> Path:
        """A copy of a directory, under another name."""
        self._commands += 1
        return shutil.copytree(directory, directory.with_name(f"{directory.name}-copy{self._commands}"))

    def nothing_is_left(self, *programs: Process) -> None:
        """No process of ours is on either host, nor a program but these of the first; and no half checkpoint."""
        self._no_process_is_left(*programs)
        self.no_partial()

    def _no_process_is_left(self, *programs: Process) -> None:
        for host, before, more in zip(self.hosts, self._before, ({each.pid for each in programs}, set()), strict=True):
            name = f"nothing is left on {host.name}"
            wait_until(lambda host=host, all=before | more: set(host.pids()) <= all, SECONDS, name)  # type: ignore[misc]

    def no_partial(self, directory: Path | None = None) -> None:
        """No dump has left anything half in the directory."""
        assert not [name for name in os.listdir(directory or self.directory) if ".partial-" in name]

    def clear(self) -> None:
        """Kill everything."""
        for host, before in zip(self.hosts, self._before, strict=True):
            for pid in set(host.pids()) - before:
                with contextlib.suppress(ProcessLookupError):
                    host.kill(pid)
        self._no_process_is_left()


def untouched(work: Work, program: Process) -> None:
    """A program of a host runs as if nothing had happened to it, to its right end."""
    work.goes_on(program)
    threads = program.host.proc / str(program.pid) / "task"
    for status in [(thread / "status").read_text() for thread in threads.iterdir()]:
        assert "\nTracerPid:\t0\n" in status
        assert "\nState:\tT" not in status
        assert "\nState:\tt" not in status
    work.finish(program)
