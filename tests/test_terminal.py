"""Jobs of a shell go on at the terminal of ``restore``, and as jobs of its shell."""

import fcntl
import os
import pty
import select
import shutil
import signal
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, Self, cast

import pytest

from postcopy.kernel import procfs
from postcopy.restore_side.build import Built
from postcopy.restore_side.job import ShellJob
from tests.hosts import postcopy_command, wait_until

PORT = "27127"
COMMAND = " ".join(postcopy_command())


class Shell:
    """An interactive shell with job control on a terminal of its own."""

    def __init__(self, main: Callable[[], NoReturn] | None = None) -> None:
        """``main``: what it does instead."""
        self._shown = ""
        self.pid, self.terminal = pty.fork()
        if not self.pid:
            os.closerange(3, 4096)
            # A shell that was told to ignore these has its jobs ignore them.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGQUIT, signal.SIG_DFL)
            if main:
                main()
            os.execvpe("bash", ["bash", "--norc", "-i"], {**os.environ, "PS1": "$ ", "TERM": "ansi"})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """End it, and its jobs with it."""
        os.kill(self.pid, signal.SIGHUP)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.terminal)

    def type(self, line: str) -> None:
        """Type a line."""
        self.press(line + "\n")

    def press(self, keys: str) -> None:
        """Type something."""
        os.write(self.terminal, keys.encode())

    def resize(self, rows: int, columns: int) -> None:
        """Change the size of the terminal's window."""
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    @property
    def settings(self) -> list[Any]:
        """Those of its terminal (termios(3))."""
        return termios.tcgetattr(self.terminal)

    @property
    def foreground(self) -> int:
        """The process group in the foreground of its terminal."""
        return os.tcgetpgrp(self.terminal)

    def _processes(self) -> str:
        columns = "pid,ppid,pgid,tpgid,stat,wchan:20,args"
        return subprocess.run(["ps", "-o", columns, "-s", str(self.pid)], capture_output=True, text=True).stdout

    def read_until(self, wanted: str, timeout: float = 20) -> str:
        """What is shown up to ``wanted``, from the end of what was read before."""
        end = time.monotonic() + timeout
        while wanted not in self._shown:
            left = end - time.monotonic()
            there = left > 0 and select.select([self.terminal], [], [], left)[0]
            assert there, f"no {wanted!r} in {self._shown!r}\n{self._processes()}"
            self._shown += os.read(self.terminal, 4096).decode(errors="replace")
        before, found, self._shown = self._shown.partition(wanted)
        return before + found


def child_named(parent: int, name: str) -> int:
    """The PID of the child with this name; 0 for none."""
    with open(f"/proc/{parent}/task/{parent}/children") as stream:
        for pid in map(int, stream.read().split()):
            with open(f"/proc/{pid}/comm") as comm:
                if comm.read().strip().startswith(name):
                    return pid
    return 0


def switches(pid: int) -> int:
    """How often a process has waited."""
    return int(procfs.status(pid)["voluntary_ctxt_switches"])


def state(pid: int) -> str:
    """The state of a process: R, S, T."""
    return procfs.stat(pid)[3]


def move_job(pid: int, dumper: Shell, destination: Shell, options: str = "-j") -> None:
    """Move a job to another shell."""
    dumper.type(f"{COMMAND} dump --lazy-pages {options} -t {pid} --port {PORT}; echo dump=$?")
    destination.type(f"{COMMAND} restore --lazy-pages {options} --new-pid-namespace --port {PORT}; echo restore=$?")
    dumper.read_until("dump=0")


def move_cat(source: Shell, dumper: Shell, destination: Shell) -> None:
    """Move a job that reads and writes."""
    source.type("cat")
    pid = wait_until(lambda: child_named(source.pid, "cat"), 10, "cat runs")
    source.type("before")
    source.read_until("before\r\nbefore\r\n")
    move_job(pid, dumper, destination)


def test_job_of_a_shell_reads_on_from_the_terminal_of_restore() -> None:
    with Shell() as source, Shell() as dumper, Shell() as destination:
        move_cat(source, dumper, destination)
        destination.type("after")
        destination.read_until("after\r\nafter\r\n")
        destination.press("\x04")
        # The program's exit status, and the terminal is the shell's again.
        destination.read_until("restore=0")


def test_job_that_is_stopped_gives_the_terminal_to_the_shell() -> None:
    with Shell() as source, Shell() as dumper, Shell() as destination:
        move_cat(source, dumper, destination)
        destination.press("\x1a")
        destination.read_until("Stopped")
        assert wait_until(lambda: destination.foreground == destination.pid, 10, "the shell has its terminal")
        destination.type("echo $((6 * 7))")
        destination.read_until("42")
        restore = child_named(destination.pid, "python")
        cat = child_named(restore, "cat")

        def has_terminal() -> bool:
            # Until then it may be as the shell has it while it reads a command: nothing is echoed.
            return destination.foreground == os.getpgid(cat)

        destination.type("fg")
        destination.read_until(f"{PORT}\r\n")
        wait_until(has_terminal, 10, "the program has the terminal")
        destination.type("once more")
        destination.read_until("once more\r\nonce more\r\n")
        # In the background it cannot read; in front again it can.
        destination.press("\x1a")
        destination.read_until("Stopped")
        before = switches(cat)
        destination.type("bg")
        destination.read_until(f"{PORT} &\r\n")
        wait_until(lambda: switches(cat) > before and {state(cat), state(restore)} == {"T"}, 10, "both are stopped")
        destination.type("fg")
        destination.read_until(f"{PORT}\r\n")
        wait_until(has_terminal, 10, "the program has the terminal")
        destination.type("at last")
        destination.read_until("at last\r\nat last\r\n")
        destination.press("\x03")
        destination.read_until("$ ")


def put_in_front_while_it_stops() -> NoReturn:
    """A shell, its job and the job's program, which reads the terminal from behind: the job is about to follow it into
    the stop, and whenever it has looked at the terminal, or does something to it, the shell puts it in front.
    """
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    shells_end, jobs_end = socket.socketpair()
    if job_pid := os.fork():
        jobs_end.close()
        while shells_end.recv(1):
            os.tcsetpgrp(0, job_pid)
            shells_end.send(b"x")
        os.write(1, f"job: {os.waitpid(job_pid, 0)[1]}\n".encode())
        os._exit(0)
    shells_end.close()
    os.setpgid(0, 0)
    if not (pid := os.fork()):
        jobs_end.close()
        os.setpgid(0, 0)
        os.write(1, b"read: " + os.read(0, 100))
        os._exit(0)

    def put_in_front() -> None:
        jobs_end.send(b"x")
        jobs_end.recv(1)

    look, change = os.tcgetpgrp, os.tcsetpgrp

    def look_before(fd: int) -> int:
        found = look(fd)
        put_in_front()
        return found

    def change_after(fd: int, group: int) -> None:
        put_in_front()
        change(fd, group)

    os.tcgetpgrp, os.tcsetpgrp = look_before, change_after
    lineage = SimpleNamespace(foreground=True, process_group=pid, session=0)
    root = SimpleNamespace(pid=pid, state=SimpleNamespace(pid=pid, lineage=lineage))
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    ShellJob(cast(Built, root), b"").follow()
    os.waitpid(pid, 0)
    os._exit(0)


def test_job_that_is_put_in_front_while_it_stops_goes_on() -> None:
    with Shell(put_in_front_while_it_stops) as here:
        here.type("a line")
        assert "read: a line" in here.read_until("job: 0")


def test_editor_goes_on_with_the_next_key(tmp_path: Path) -> None:
    if shutil.which("vi") is None:
        pytest.skip("vi is not installed (Debian package vim-tiny)")
    text = tmp_path / "text"
    with Shell() as source, Shell() as dumper, Shell() as destination:
        destination.resize(33, 77)
        source.type(f"vi -u NONE -n {text}")
        pid = wait_until(lambda: child_named(source.pid, "vi"), 10, "vi runs")
        wait_until(lambda: not source.settings[3] & termios.ICANON, 10, "vi reads key by key")
        source.press("ifirst line")
        source.read_until("first line")
        raw = source.settings
        move_job(pid, dumper, destination)
        # It has seen that the window is another, and has drawn all of it.
        destination.read_until("first line")
        assert destination.settings == raw
        destination.press("\rsecond line\x1b:set columns?\r")
        destination.read_until("columns=77")
        destination.resize(22, 66)
        destination.read_until("second line")
        destination.press(":set columns?\r")
        destination.read_until("columns=66")
        destination.press(":wq\r")
        destination.read_until("restore=0")
        assert text.read_text() == "first line\nsecond line\n"
        wait_until(lambda: destination.settings != raw, 10, "the terminal is the shell's")


@pytest.mark.parametrize("lacking", ["dump", "restore"])
def test_shell_job_is_refused_where_nobody_asks_for_it(lacking: str) -> None:
    with Shell() as source, Shell() as dumper, Shell() as destination:
        source.type("cat")
        pid = wait_until(lambda: child_named(source.pid, "cat"), 10, "cat runs")
        option = "" if lacking == "dump" else "-j"
        dumper.type(f"{COMMAND} dump --lazy-pages {option} -t {pid} --port {PORT}; echo dump=$?")
        if lacking == "restore":
            destination.type(f"{COMMAND} restore --lazy-pages --new-pid-namespace --port {PORT}; echo restore=$?")
            shown = destination.read_until("restore=5")
            assert "it is to have the terminal that restore is run at: add --shell-job (-j)" in shown
        shown = dumper.read_until("dump=5")
        assert "--shell-job" in shown
        source.type("goes on")
        source.read_until("goes on\r\ngoes on\r\n")


def test_shell_job_is_refused_where_restore_has_no_terminal() -> None:
    with Shell() as source, Shell() as dumper, Shell() as destination:
        source.type("cat")
        pid = wait_until(lambda: child_named(source.pid, "cat"), 10, "cat runs")
        dumper.type(f"{COMMAND} dump --lazy-pages -j -t {pid} --port {PORT}; echo dump=$?")
        redirected = "</dev/null 2>&1 | cat"
        destination.type(f"{COMMAND} restore --lazy-pages -j --new-pid-namespace --port {PORT} {redirected}")
        destination.read_until("there is none among the standard streams here")
        dumper.read_until("dump=5")
        source.type("goes on")
        source.read_until("goes on\r\ngoes on\r\n")
