"""Programs on terminals of their own move with what keeps these: the next key works, the window can change its size."""

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hosts import Host, Pair, wait_until
from tests.migrate import move

PID = 6400
SECONDS = 20


@pytest.fixture
def hosts_with_terminals(hosts: Pair) -> Iterator[Pair]:
    """The numbers of terminals are kept, so each host has its own."""
    for host in hosts:
        host.run(["mount", "-t", "devpts", "-o", "newinstance,ptmxmode=0666", "none", "/dev/pts"], check=True)
    yield hosts


@dataclass
class Tmux:
    """A tmux server with a shell in it."""

    socket: Path
    host: Host

    def __post_init__(self) -> None:
        for name, package in (("tmux", "tmux"), ("top", "procps")):
            if shutil.which(name) is None:
                pytest.skip(f"{name} is not installed (Debian package {package})")
        self._command = ["tmux", "-S", str(self.socket), "-f", "/dev/null"]
        self._environment = {**os.environ, "TERM": "screen", "HISTFILE": "", "SHELL": "/bin/bash"}
        self.host.popen([*self._command, "-D"], pid=PID, env=self._environment)
        wait_until(self.socket.exists, SECONDS, "tmux listens")
        self.tell("new-session", "-d", "-x", "80", "-y", "24", "bash --norc --noprofile -i")

    def tell(self, *words: str) -> str:
        """Give the server a command; its answer."""
        return self.host.run([*self._command, *words], env=self._environment, check=True).stdout.decode()

    def press(self, *keys: str) -> None:
        """Type something."""
        self.tell("send-keys", *keys)

    def shows(self, *texts: str) -> None:
        """Wait until all of it is on the screen."""
        screen = ""

        def is_there() -> bool:
            nonlocal screen
            screen = self.tell("capture-pane", "-p")
            return all(text in screen for text in texts)

        try:
            wait_until(is_there, SECONDS)
        except TimeoutError:
            pytest.fail(f"no {texts} on the screen:\n{screen}")

    def changes(self) -> None:
        """Wait until the screen is another."""
        before = self.tell("capture-pane", "-p")
        wait_until(lambda: self.tell("capture-pane", "-p") != before, SECONDS, "the screen changes")


def test_shell_in_tmux_moves_with_top(hosts_with_terminals: Pair, tmp_path: Path) -> None:
    source, destination = hosts_with_terminals
    tmux = Tmux(tmp_path / "tmux", source)
    tmux.press("top -d 0.2", "Enter")
    tmux.shows("load average", "tmux: s")
    for target in (destination, source):
        migration = move(tmux.host, target, PID)
        migration.wait_drained()
        tmux.host = target
        tmux.changes()
        tmux.press("h")
        tmux.shows("Help for Interactive Commands")
        tmux.press("Escape")
        tmux.shows("load average")
    tmux.tell("resize-window", "-x", "100", "-y", "33")
    tmux.shows("COMMAND")
    tmux.press("q")
    tmux.press("stty size; jobs; echo $((6 * 7))", "Enter")
    tmux.shows("33 100", "42")
    source.kill(PID, signal.SIGTERM)
    wait_until(lambda: not source.alive(PID), SECONDS, "the server ends")


def test_shell_in_tmux_moves_with_an_editor(hosts_with_terminals: Pair, tmp_path: Path) -> None:
    if shutil.which("vi") is None:
        pytest.skip("vi is not installed (Debian package vim-tiny)")
    source, destination = hosts_with_terminals
    tmux = Tmux(tmp_path / "tmux", source)
    text = tmp_path / "text"
    tmux.press(f"cd {tmp_path}; vi -u NONE -n text", "Enter")
    tmux.shows("~\n~\n")
    tmux.press("ione line")
    tmux.shows("one line")
    migration = move(source, destination, PID)
    migration.wait_drained()
    tmux.host = destination
    tmux.press("Enter", "another", "Escape")
    tmux.tell("resize-window", "-x", "100", "-y", "33")
    tmux.press(":wq", "Enter")
    wait_until(text.exists, SECONDS, "the text is written")
    tmux.press("echo $((6 * 7))", "Enter")
    tmux.shows("42")
    assert text.read_text() == "one line\nanother\n"
