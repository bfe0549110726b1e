"""What was typed or written at a terminal and not read moves with it, and stays when nothing moves."""

import contextlib
import fcntl
import os
import select
import signal
import struct
import termios
from pathlib import Path

import pytest

from postcopy import pty_queues, roles
from postcopy.dump_side import ptys
from postcopy.dump_side.opened import Refused
from postcopy.kernel import pty
from postcopy.open_kinds import PtyContent
from tests.hosts import Pair, postcopy_command, wait_until
from tests.migrate import move
from tests.programs.cases.terminals import CASES
from tests.test_states import PID, Report, run_program

NAMES = [case.name() for case in CASES]


@pytest.fixture(scope="module", params=[0, 1, 2], ids=["unmoved", "moved", "there-and-back"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """What the program says after so many moves."""
    with Pair() as hosts:
        own_terminals(hosts)
        return run_program(hosts, tmp_path_factory.mktemp("terminals"), request.param, "--only", *NAMES)


def own_terminals(hosts: Pair) -> None:
    """The numbers of terminals are kept, so each host needs its own."""
    for host in hosts:
        host.run(["mount", "-t", "devpts", "-o", "newinstance,ptmxmode=0666", "none", "/dev/pts"], check=True)


@pytest.mark.parametrize("case", NAMES)
def test_content_of_a_terminal_is_kept(report: Report, case: str) -> None:
    assert report[case] is None


def test_terminals_are_as_they_were_when_the_program_stays(hosts: Pair, tmp_path: Path) -> None:
    own_terminals(hosts)
    command = [*postcopy_command(), "dump", "-t", str(PID), "-D", str(tmp_path / "checkpoint"), "-R"]

    def write_down() -> None:
        hosts.a.run(command, check=True)

    found = run_program(hosts, tmp_path, 0, "--only", *NAMES, before_verifying=write_down)
    assert found == dict.fromkeys(NAMES)


def test_what_was_taken_out_is_put_in_again_when_dump_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    os.set_blocking(slave, False)
    os.write(slave, b"shown\n")
    os.write(master, b"a line\nhalf")
    take = pty_queues.take

    def take_and_lose_the_parent(master: int, slave: int, settings: bytes) -> PtyContent:
        content = take(master, slave, settings)
        os.kill(os.getppid(), signal.SIGKILL)
        while os.getppid() == dump:
            pass
        return content

    monkeypatch.setattr(pty_queues, "take", take_and_lose_the_parent)
    ended, at_end = os.pipe()
    dump = os.fork()
    if not dump:
        dump = os.getpid()
        # Kept open by whom it starts, too.
        monkeypatch.setattr(roles, "close_all_but", lambda _: None)
        ptys.peek(master, "a terminal")
        os._exit(1)
    os.close(at_end)
    assert os.waitstatus_to_exitcode(os.waitpid(dump, 0)[1]) == -signal.SIGKILL
    assert os.read(ended, 1) == b""
    os.close(ended)
    assert os.read(slave, 100) == b"a line\n"
    os.write(master, b"\n")
    assert select.select([slave], [], [], 10)[0]
    assert os.read(slave, 100) == b"half\n"
    assert os.read(master, 100) == b"shown\r\na line\r\nhalf\r\n"
    os.close(master)
    os.close(slave)


def test_lock_of_a_terminal_is_as_it_was() -> None:
    master, slave = os.openpty()
    os.set_blocking(slave, False)
    os.write(master, b"half")
    pty.set_number(master, pty.TIOCSPTLCK, 1)
    content = ptys.peek(master, "a terminal")
    assert content is not None and content.typed == b"half"
    assert pty.number(master, pty.TIOCGPTLCK)
    os.close(master)
    os.close(slave)


def test_news_of_packet_mode_that_is_unread_is_refused_and_stays() -> None:
    master, slave = os.openpty()
    fcntl.ioctl(master, pty.TIOCPKT, struct.pack("i", 1))
    termios.tcflush(slave, termios.TCIFLUSH)
    os.write(slave, b"shown")
    with pytest.raises(Refused, match="has yet to read what has changed"):
        ptys.peek(master, "a terminal")
    flushed = os.read(master, 100)
    assert flushed[0] & 0x01, "TIOCPKT_FLUSHREAD"
    assert os.read(master, 100) == b"\0shown"
    os.close(master)
    os.close(slave)


@pytest.mark.parametrize(("collects_lines", "text"), [(True, b"a line\n" * 400), (False, b"keys" * 2000)])
def test_more_than_can_be_typed_again_is_refused_and_stays(collects_lines: bool, text: bytes) -> None:
    master, slave = os.openpty()
    settings = termios.tcgetattr(slave)
    settings[3] = termios.ICANON if collects_lines else 0
    termios.tcsetattr(slave, termios.TCSANOW, settings)
    os.set_blocking(slave, False)
    os.write(master, text)
    select.select([slave], [], [], 10)
    with pytest.raises(Refused, match="typed bytes are unread"):
        ptys.peek(master, "a terminal")
    found = b""
    with contextlib.suppress(BlockingIOError):
        while True:
            found += os.read(slave, 65536)
    assert found == text
    os.close(master)
    os.close(slave)


COUNT = "i=0; until [ -e {stop} ]; do i=$((i+1)); echo $i; done"


def test_every_line_of_a_program_that_writes_all_the_time_is_logged_once(hosts: Pair, tmp_path: Path) -> None:
    own_terminals(hosts)
    log, stop = tmp_path / "typescript", tmp_path / "stop"
    command = ["script", "-q", "-f", "-c", COUNT.format(stop=stop), str(log)]
    hosts.a.popen(command, pid=PID)

    def goes_on() -> None:
        before = log.stat().st_size if log.exists() else 0
        wait_until(lambda: log.exists() and log.stat().st_size > before + 10_000, 20, "it writes")

    goes_on()
    for source, destination in (tuple(hosts), tuple(hosts)[::-1]):
        migration = move(source, destination, PID)
        migration.wait_drained()
        goes_on()
    stop.touch()
    assert migration.restore is not None
    assert migration.restore.wait(20) == 0
    # The first line is script's own.
    lines = [line for line in log.read_bytes().partition(b"\n")[2].split(b"\r\n") if line.isdigit()]
    assert lines == [b"%d" % number for number in range(1, len(lines) + 1)]
