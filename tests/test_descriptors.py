"""Descriptors that are moved only if asked for, or only where the destination has a filesystem of its own."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from postcopy.dump_side import ghosts, pipes
from postcopy.dump_side.opened import Opened, Table
from postcopy.dump_side.shared_memory import SharedObjects
from tests.hosts import Host, Pair, postcopy_command
from tests.migrate import MigrationFailed, move, start_dump, start_restore
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


PIPED = """
import os, sys
for line in sys.stdin:
    if line == "close\\n":
        os.close(1)
    else:
        os.write(1, b"got " + line.encode())
"""


def read_line(fd: int) -> bytes:
    """A line from a pipe, or what comes before its end."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(fd, 1)):
        line += byte
    return line


def test_pipes_to_the_outside_are_replaced_by_those_that_restore_is_given(hosts: Pair) -> None:
    program = hosts.a.popen([sys.executable, "-u", "-c", PIPED], pid=PID, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert program.stdin is not None and program.stdout is not None
    program.stdin.write(b"one\n")
    program.stdin.flush()
    assert program.stdout.readline() == b"got one\n"
    outside = [os.readlink(hosts.a.proc / str(PID) / "fd" / str(fd)) for fd in (0, 1)]
    options = [word for resource in outside for word in ("--external", resource)]
    migration = start_dump(hosts.a, hosts.b, PID, options=options)
    (our_input, its_output), (its_input, our_output) = os.pipe(), os.pipe()
    inherit = ["--inherit-fd", f"fd[{its_input}]:{outside[0]}", "--inherit-fd", f"fd[{its_output}]:{outside[1]}"]
    restore = start_restore(migration, options=inherit, pass_fds=[its_input, its_output])
    os.close(its_input)
    os.close(its_output)
    migration.wait_drained()
    os.write(our_output, b"two\n")
    assert read_line(our_input) == b"got two\n"
    # Nobody else holds its ends: closing them is noticed on the other side, at once and both ways.
    os.write(our_output, b"close\n")
    assert os.read(our_input, 1) == b""
    os.close(our_output)
    assert restore.wait(20) == 0
    os.close(our_input)


def test_external_resource_for_which_nothing_is_given_is_refused(hosts: Pair) -> None:
    program = hosts.a.popen([sys.executable, "-c", PIPED], pid=PID, stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    resource, other = (os.readlink(hosts.a.proc / str(PID) / "fd" / str(fd)) for fd in (1, 0))
    options = ["--external", resource, "--external", other]
    migration = start_dump(hosts.a, hosts.b, PID, options=options)
    restore = start_restore(migration, options=["--inherit-fd", f"fd[1]:{other}"], wait=False)
    assert (migration.dump.wait(20), restore.wait(20)) == (5, 5)
    said = dict(migration.logs())
    assert f"nothing is given here for {resource}: --inherit-fd 'fd[N]:{resource}'" in said["dump on alpha, stderr"]
    assert "frozen" not in said["dump on alpha, stdout"]
    assert program.poll() is None


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("pipe:[1]", "is not of the form fd[N]:RESOURCE"),
        ("fd[77]:pipe:[1]", "77 is not an open descriptor"),
        ("fd[99999999999999999999]:pipe:[1]", "is not an open descriptor"),
    ],
)
def test_inherit_fd_that_cannot_be(host: Host, option: str, complaint: str) -> None:
    command = [*postcopy_command(), "restore", "--lazy-pages", "--inherit-fd", option]
    result = host.run(command, timeout=20)
    assert result.returncode == 2
    assert complaint in result.stderr.decode()
    assert b"Traceback" not in result.stderr


LOSES_TERMINAL = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
os.write(1, b"ready\\n")
signal.sigwait({signal.SIGUSR1})
os.write(1, b"again\\n")
assert os.read(0, 10) == b"typed\\n"
assert os.ttyname(2)
"""


@pytest.mark.parametrize("naming", ["link", "device"])
def test_lost_terminal_is_replaced_by_one_that_restore_is_given(hosts: Pair, naming: str) -> None:
    master, slave = os.openpty()
    hosts.a.popen([sys.executable, "-c", LOSES_TERMINAL], pid=PID, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    read_until(master, b"ready")
    os.close(master)
    found = os.stat(hosts.a.proc / str(PID) / "fd" / "0")
    link = os.readlink(hosts.a.proc / str(PID) / "fd" / "0")
    name = link if naming == "link" else f"tty[{found.st_rdev:x}:{found.st_dev:x}]"
    refusal = hosts.a.run([*postcopy_command(), "dump", "--lazy-pages", "-t", str(PID)], timeout=20)
    assert refusal.returncode == 5
    assert f"--external '{link}'" in refusal.stderr.decode()
    migration = start_dump(hosts.a, hosts.b, PID, options=["--external", name])
    master, slave = os.openpty()
    restore = start_restore(migration, options=["--inherit-fd", f"fd[{slave}]:{name}"], pass_fds=[slave])
    os.close(slave)
    migration.wait_drained()
    hosts.b.kill(PID, signal.SIGUSR1)
    read_until(master, b"again")
    os.write(master, b"typed\n")
    assert restore.wait(20) == 0
    os.close(master)


@pytest.mark.parametrize("moves", [0, 1, 2], ids=["unmoved", "moved", "there-and-back"])
def test_terminals_move_with_their_sessions(hosts: Pair, tmp_path: Path, moves: int) -> None:
    # The numbers of terminals are kept, so each host needs its own.
    for host in hosts:
        host.run(["mount", "-t", "devpts", "-o", "newinstance,ptmxmode=0666", "none", "/dev/pts"], check=True)
    report = run_program(hosts, tmp_path, moves, "--only", "terminal_of_child")
    assert report == {"terminal_of_child": None}


CLOSED_SLAVE = """
import errno, os, select, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
master, slave = os.openpty()
name = os.ttyname(slave)
os.close(slave)
never_opened = os.open("/dev/ptmx", os.O_RDWR)
signal.sigwait({signal.SIGTERM})
try:
    os.read(master, 1)
    os._exit(1)
except OSError as error:
    if error.errno != errno.EIO:
        os._exit(2)
poll = select.poll()
poll.register(never_opened, select.POLLIN)
if poll.poll(0):
    os._exit(3)
slave = os.open(name, os.O_RDWR | os.O_NOCTTY)
os.write(slave, b"again")
os._exit(0 if os.read(master, 10) == b"again" else 4)
"""


def test_terminal_whose_other_side_was_closed_moves(hosts: Pair) -> None:
    for host in hosts:
        host.run(["mount", "-t", "devpts", "-o", "newinstance,ptmxmode=0666", "none", "/dev/pts"], check=True)
    hosts.a.popen([sys.executable, "-c", CLOSED_SLAVE], pid=PID)
    table = hosts.a.proc / str(PID) / "fd"
    hosts.a.wait_until(lambda: sorted(os.listdir(table))[3:] == ["3", "4"], what="both masters are open, alone")
    migration = move(hosts.a, hosts.b, PID)
    migration.wait_drained()
    hosts.b.kill(PID, signal.SIGTERM)
    assert migration.restore is not None
    assert migration.restore.wait(20) == 0


def test_terminal_whose_number_is_taken_is_refused(hosts: Pair, tmp_path: Path) -> None:
    with pytest.raises(MigrationFailed) as failure:
        run_program(hosts, tmp_path, 1, "--only", "terminal_of_child")
    refused(failure, "is taken here: end who has it, or restore where there is another /dev/pts")


LARGE = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.unlink(sys.argv[1])
content = os.urandom(3 << 20)
os.write(fd, content)
os.pwrite(fd, content, 1 << 30)
print("ready", flush=True)
sys.stdin.readline()
assert os.pread(fd, 3 << 20, 0) == content == os.pread(fd, 4 << 20, 1 << 30)
assert os.fstat(fd).st_blocks * 512 < 16 << 20, "the hole is none any more"
"""


def test_large_deleted_file_moves_when_the_limit_is_raised(hosts: Pair, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LARGE, str(tmp_path / "large")]
    program = hosts.a.popen(command, pid=PID, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert program.stdin is not None and program.stdout is not None
    assert program.stdout.readline() == b"ready\n"
    resource = os.readlink(hosts.a.proc / str(PID) / "fd" / "0")
    output = os.readlink(hosts.a.proc / str(PID) / "fd" / "1")
    options = ["--external", resource, "--external", output]
    result = hosts.a.run([*postcopy_command(), "dump", "--lazy-pages", "-t", str(PID), *options], timeout=20)
    assert result.returncode == 5
    assert b"the limit is 1048576, which --ghost-limit 6291456 raises" in result.stderr
    migration = start_dump(hosts.a, hosts.b, PID, options=[*options, "--ghost-limit", "6291456"])
    its_input, our_output = os.pipe()
    inherit = [f"--inherit-fd=fd[{its_input}]:{resource}", f"--inherit-fd=fd[1]:{output}"]
    restore = start_restore(migration, options=inherit, pass_fds=[its_input])
    os.close(its_input)
    migration.wait_drained()
    os.close(our_output)
    assert restore.wait(20) == 0


EDGES = """
import os, select, sys
kept = os.open(sys.argv[1], os.O_RDWR)
told, untold, outer = select.epoll(), select.epoll(), select.epoll()
events = [os.eventfd(1) for _ in range(2)]
for epoll in (told, untold):
    epoll.register(events[0], select.EPOLLIN | select.EPOLLET)
    epoll.register(events[1], select.EPOLLIN | select.EPOLLONESHOT)
assert len(told.poll(0)) == 2
print("ready", flush=True)
sys.stdin.readline()
assert told.poll(0) == [], "told twice"
assert sorted(untold.poll(0)) == [(event, select.EPOLLIN) for event in events], "never told"
assert untold.poll(0) == []
"""


def test_edges_are_as_they_were_when_a_move_has_failed(hosts: Pair, apart: Path) -> None:
    path = apart / "changing"
    for host, size in zip(hosts, (10, 20), strict=True):
        inside(host, path).write_bytes(bytes(size))
    command = [sys.executable, "-c", EDGES, str(path)]
    program = hosts.a.popen(command, pid=PID, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert program.stdin is not None and program.stdout is not None
    assert program.stdout.readline() == b"ready\n"
    options = ["--external", os.readlink(hosts.a.proc / str(PID) / "fd" / "0")]
    options += ["--external", os.readlink(hosts.a.proc / str(PID) / "fd" / "1")]
    migration = start_dump(hosts.a, hosts.b, PID, options=options)
    inherit = [f"fd[{number}]:{resource}" for number, resource in enumerate(options[1::2])]
    restore = start_restore(migration, options=[f"--inherit-fd={each}" for each in inherit], wait=False)
    assert migration.dump.wait(20) and restore.wait(20) == 4
    assert "collected" in [event["event"] for event in migration.dump_events]
    program.stdin.write(b"go on\n")
    program.stdin.flush()
    assert program.wait(20) == 0


def read_until(fd: int, wanted: bytes, timeout: float = 30) -> bytes:
    """What comes out up to ``wanted``."""
    shown, end = b"", time.monotonic() + timeout
    while wanted not in shown:
        left = end - time.monotonic()
        assert left > 0 and select.select([fd], [], [], left)[0], f"no {wanted!r} in {shown!r}"
        piece = os.read(fd, 4096)
        assert piece, f"the end, and no {wanted!r} in {shown!r}"
        shown += piece
    return shown


def test_shell_in_script_goes_on_with_its_terminal_and_its_jobs(hosts: Pair) -> None:
    for host in hosts:
        host.run(["mount", "-t", "devpts", "-o", "newinstance,ptmxmode=0666", "none", "/dev/pts"], check=True)
    command = ["script", "-q", "-c", "bash --norc --noprofile -i", "/dev/null"]
    environment = {**os.environ, "TERM": "dumb", "HISTFILE": ""}
    program = hosts.a.popen(
        command, pid=PID, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )
    assert program.stdin is not None and program.stdout is not None
    program.stdin.write(b"stty rows 40 cols 99; sleep 1000 & cat\n")
    program.stdin.flush()
    read_until(program.stdout.fileno(), b"\n[1] ")
    program.stdin.write(b"typed\n")
    program.stdin.flush()
    read_until(program.stdout.fileno(), b"typed\r\ntyped\r\n")
    outside = [os.readlink(hosts.a.proc / str(PID) / "fd" / str(fd)) for fd in (0, 1)]
    options = [word for resource in outside for word in ("--external", resource)]
    migration = start_dump(hosts.a, hosts.b, PID, options=options)
    (our_input, its_output), (its_input, our_output) = os.pipe(), os.pipe()
    inherit = [f"--inherit-fd=fd[{its_input}]:{outside[0]}", f"--inherit-fd=fd[{its_output}]:{outside[1]}"]
    restore = start_restore(migration, options=inherit, pass_fds=[its_input, its_output])
    os.close(its_input)
    os.close(its_output)
    migration.wait_drained()
    os.write(our_output, b"again\n")
    read_until(our_input, b"again\r\nagain\r\n")
    # Ctrl-C ends what is in the foreground, and the shell takes the terminal back.
    os.write(our_output, b"\x03")
    read_until(our_input, b"# ")
    os.write(our_output, b"stty size; jobs; kill %1; exit 7\n")
    shown = read_until(our_input, b"exit\r\n")
    assert b"40 99" in shown and b"Running" in shown and b"sleep 1000" in shown, shown
    os.close(our_output)
    assert restore.wait(30) in (0, 7)
    os.close(our_input)


LONE_END = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
reading, writing = os.pipe()
os.close(writing)
signal.sigwait({signal.SIGTERM})
os._exit(0 if os.read(reading, 1) == b"" else 1)
"""


def test_reading_end_without_another_as_the_last_descriptor(hosts: Pair) -> None:
    hosts.a.popen([sys.executable, "-c", LONE_END], pid=PID)
    table = hosts.a.proc / str(PID) / "fd"

    def is_ready() -> bool:
        # The interpreter opens and closes its own files before.
        try:
            return os.readlink(table / "3").startswith("pipe:") and sorted(os.listdir(table)) == ["0", "1", "2", "3"]
        except OSError:
            return False

    hosts.a.wait_until(is_ready, what="only the reading end is open")
    migration = move(hosts.a, hosts.b, PID)
    hosts.b.kill(PID, signal.SIGTERM)
    assert migration.restore is not None
    assert migration.restore.wait() == 0


@pytest.mark.parametrize("kind", ["pipe", "ghost"])
def test_what_is_closed_while_it_is_looked_at_gets_no_number(kind: str, tmp_path: Path) -> None:
    table = Table(frozenset({os.getpid()}), SharedObjects())
    if kind == "pipe":
        fd, other = os.pipe()
        os.close(other)
    else:
        fd = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
        (tmp_path / "file").unlink()
    table.pid = os.getpid()
    opened = Opened.look(os.getpid(), fd)
    os.close(fd)
    with pytest.raises(OSError):
        (pipes if kind == "pipe" else ghosts).collect(table, opened)
    assert not table.pipe_numbers and not table.ghost_numbers
