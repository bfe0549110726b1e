"""A program that reads from a terminal goes on at the terminal of ``restore``."""

import contextlib
import os
import pty
import select
import signal
import time
from collections.abc import Iterator

from tests.hosts import postcopy_command, wait_until


class Shell:
    """An interactive shell with job control on a terminal of its own."""

    def __init__(self) -> None:
        self.pid, self.terminal = pty.fork()
        if not self.pid:
            os.closerange(3, 4096)
            os.execvpe("bash", ["bash", "--norc", "-i"], {**os.environ, "PS1": "$ ", "TERM": "dumb"})

    def type(self, line: str) -> None:
        """Type a line."""
        os.write(self.terminal, line.encode() + b"\n")

    def read_until(self, wanted: str, timeout: float = 20) -> str:
        """What is shown up to ``wanted``."""
        shown, end = "", time.monotonic() + timeout
        while wanted not in shown:
            left = end - time.monotonic()
            assert left > 0 and select.select([self.terminal], [], [], left)[0], f"no {wanted!r} in {shown!r}"
            shown += os.read(self.terminal, 4096).decode(errors="replace")
        return shown


@contextlib.contextmanager
def shell() -> Iterator[Shell]:
    """A shell that ends with the scope, and its jobs with it."""
    found = Shell()
    try:
        yield found
    finally:
        os.kill(found.pid, signal.SIGHUP)
        os.kill(found.pid, signal.SIGKILL)
        os.waitpid(found.pid, 0)
        os.close(found.terminal)


def child_named(parent: int, name: str) -> int | None:
    """The PID of the child with this name."""
    with open(f"/proc/{parent}/task/{parent}/children") as stream:
        for pid in map(int, stream.read().split()):
            with open(f"/proc/{pid}/comm") as comm:
                if comm.read().strip() == name:
                    return pid
    return None


def test_job_of_a_shell_reads_on_from_the_terminal_of_restore() -> None:
    command = " ".join(postcopy_command())
    with shell() as source, shell() as dumper, shell() as destination:
        source.type("cat")
        pid = wait_until(lambda: child_named(source.pid, "cat"), 10, "cat runs")
        source.type("before")
        source.read_until("before\r\nbefore\r\n")
        dumper.type(f"{command} dump --lazy-pages -t {pid} --port 27127; echo dump=$?")
        destination.type(f"{command} restore --lazy-pages --new-pid-namespace --port 27127; echo restore=$?")
        dumper.read_until("dump=0")
        destination.read_until("bytes, zero")
        destination.type("after")
        destination.read_until("after\r\nafter\r\n")
        os.write(destination.terminal, b"\x04")
        # The program's exit status, and the terminal is the shell's again.
        destination.read_until("restore=0")
