"""`make demo`: a program with 256 MiB of memory moves from one host to another while it runs.

Both hosts are on this machine (see `tests.hosts`), joined by a link of 1 Gbit/s. What is run in them is what a user
types. Ends by itself, with 0 if everything went as it should.
"""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.hosts import Host, Pair, Process, postcopy_command

PROGRAM = Path(__file__).with_name("programs") / "counting.py"
PID = 1000
RATE = "1gbit"
DEADLINE = 30.0


class DemoFailed(Exception):
    """Something did not go as it should; the text says what."""


@dataclass
class Output:
    """What a program writes to its file, shown line by line as it comes."""

    label: str
    path: Path
    lines: list[str] = field(default_factory=list)
    shown: int = 0

    def show(self) -> None:
        """Print the complete lines that are new."""
        text = self.path.read_bytes()[self.shown :]
        complete = text[: text.rfind(b"\n") + 1]
        self.shown += len(complete)
        for line in complete.decode(errors="replace").splitlines():
            self.lines.append(line)
            print(f"{self.label:>8} | {line}", flush=True)


class Demo:
    """The hosts, what runs in them, and what it has printed."""

    def __init__(self, hosts: Pair, directory: Path) -> None:
        self.hosts = hosts
        self.directory = directory
        self.outputs: list[Output] = []
        self.end = time.monotonic() + DEADLINE

    def start(self, host: Host, label: str, argv: list[str], pid: int | None = None) -> tuple[Process, Output]:
        """Start a program with its output in a file, which can be moved with it (a pipe to us could not)."""
        output = Output(label, self.directory / label)
        with open(output.path, "ab") as file:
            process = host.popen(argv, pid=pid, stdout=file, stderr=file)
        self.outputs.append(output)
        return process, output

    def until(self, what: str, condition: Callable[[], bool]) -> None:
        """Show output until ``condition`` holds. Raises DemoFailed at the deadline."""
        while True:
            reached = condition()
            for output in self.outputs:
                output.show()
            if reached:
                return
            if time.monotonic() > self.end:
                raise DemoFailed(f"not within {DEADLINE:.0f} s: {what}")
            time.sleep(0.01)


def say(text: str) -> None:
    """A line of the demo itself."""
    print(f"\n*** {text}", flush=True)


def typed(host: Host, arguments: list[str]) -> None:
    """A command as the user types it."""
    print(f"\n{host.name}# postcopy {' '.join(arguments)}\n", flush=True)


def expect(condition: bool, what: str) -> None:
    """DemoFailed unless ``condition``."""
    if not condition:
        raise DemoFailed(what)


def run(hosts: Pair, directory: Path) -> None:
    """Start, move, watch, end. Raises DemoFailed."""
    source, destination = hosts
    hosts.set_rate(RATE)
    demo = Demo(hosts, directory)

    say(f"Two hosts, {source.name} ({source.address}) and {destination.name} ({destination.address}), {RATE} between.")
    say(f"A Python program with 256 MiB of memory runs as PID {PID} on {source.name}:")
    program, printed = demo.start(source, "program", [sys.executable, str(PROGRAM)], PID)
    demo.until("the program prints", lambda: len(printed.lines) >= 5 or program.poll() is not None)
    expect(program.poll() is None, f"the program ended with {program.poll()}")

    say("Now it moves. One command on each host:")
    where = ["--address", source.address, "--port", "27027"]
    dump_arguments = ["dump", "--lazy-pages", "-t", str(PID), *where, "--display-stats"]
    restore_arguments = ["restore", "--lazy-pages", *where]
    typed(source, dump_arguments)
    dump, dumped = demo.start(source, "dump", [*postcopy_command(), *dump_arguments])
    typed(destination, restore_arguments)
    restore, _ = demo.start(destination, "restore", [*postcopy_command(), *restore_arguments])

    def runs_on() -> bool:
        return sum(f" on {destination.name}:" in line for line in printed.lines) >= 8 and dump.poll() is not None

    demo.until(
        f"the program runs on {destination.name} and dump is done",
        lambda: runs_on() or restore.poll() is not None or dump.poll() not in (None, 0),
    )
    expect(dump.poll() == 0, f"dump ended with {dump.poll()}")
    expect(restore.poll() is None, f"restore ended with {restore.poll()}, before the program did")
    expect(program.poll() == -signal.SIGKILL, f"the program is still on {source.name}")

    say(f"{source.name} is empty. {destination.name} has every page; the program is told to check them and to end:")
    destination.kill(PID, signal.SIGTERM)
    demo.until("restore ends with the program", lambda: restore.poll() is not None)
    expect(restore.poll() == 0, f"restore ended with {restore.poll()}")
    expect(" 0 wrong" in printed.lines[-1], printed.lines[-1])
    for figure in ("stand-still", "until the last page"):
        expect(any(figure in line for line in dumped.lines), f"dump did not print its figure '{figure}'")
    demo.until("nothing of the move is left", lambda: source.pids() == destination.pids() == [1])


def main() -> int:
    """Run the demo; 0 if it went well."""
    if os.geteuid() != 0:
        print("make demo: root is needed, to make the two hosts and to move a process", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="postcopy-demo-") as directory, Pair() as hosts:
        try:
            run(hosts, Path(directory))
        except DemoFailed as failure:
            print(f"\nmake demo failed: {failure}", file=sys.stderr)
            return 1
    say("Done: the program has moved, with all of its memory.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
