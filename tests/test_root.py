"""``restore --root``: a directory takes the place of / for the program."""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.hosts import Host, Pair, postcopy_command
from tests.migrate import Migration, MigrationFailed, move, start_dump, start_restore

PID = 7700

PROGRAM = """
import ctypes, os, signal, socket, sys
place = sys.argv[1]
os.chdir(place)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
opened = os.open(place + "/data", os.O_RDONLY)
assert os.read(opened, 4) == b"some"
deleted = os.open(place + "/deleted", os.O_RDWR | os.O_CREAT)
os.write(deleted, b"content")
os.unlink(place + "/deleted")
listener = socket.socket(socket.AF_UNIX)
listener.bind(place + "/socket")
listener.listen()
read_end, write_end = os.pipe()
os.write(write_end, b"in the pipe")
master, slave = os.openpty()
os.write(slave, b"shown")
child = os.fork()
if not child:
    signal.sigwait({signal.SIGTERM})
    os._exit(len(os.listdir(place)))
os.set_blocking(0, True)
signal.sigwait({signal.SIGTERM})
assert os.pread(opened, 100, 0) == b"some data", "data"
assert open("data").read() == open(place + "/data").read() == "some data", "data by name"
assert open("/etc/where").read() == "inside", "where"
assert os.path.samefile(".", place), os.getcwd()
assert os.pread(deleted, 100, 0) == b"content", "deleted"
assert os.read(read_end, 100) == b"in the pipe", "pipe"
assert os.read(master, 100) == b"shown", "terminal"
client = socket.socket(socket.AF_UNIX)
client.connect(place + "/socket")
assert listener.accept()
os.kill(child, signal.SIGTERM)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
os._exit(0)
"""

# A root with the system's programs, files of its own, and a place that is elsewhere in it.
MAKE = """
set -e
root=$1 place=$2
mount -t tmpfs none $root
cd $root
for each in usr bin lib lib64 dev; do
    [ -L /$each ] && ln -s $(readlink /$each) $each || { mkdir $each; mount --bind /$each $each; }
done
for each in $3; do
    mkdir -p ./$each; mount --bind $each ./$each
done
mkdir -p etc proc sys tmp run srv/place
cp -a /etc/ld.so.cache /etc/passwd etc/
echo -n inside > etc/where
ln -s /srv ./$(dirname $place)
echo -n "some data" > srv/place/data
mount -t devpts -o newinstance,ptmxmode=0666 none dev/pts
"""


@pytest.fixture
def place(hosts: Pair) -> Path:
    """A directory that is only at the source."""
    found = Path(f"/run/postcopy-test-{os.getpid()}/place")
    for host in hosts:
        for own in ("/run", "/srv"):
            host.run(["mount", "-t", "tmpfs", "none", own], check=True)
        host.run(["mount", "-t", "devpts", "-o", "newinstance,ptmxmode=0666", "none", "/dev/pts"], check=True)
    hosts.a.run(["mkdir", "-p", str(found)], check=True)
    hosts.a.run(["sh", "-c", f"echo -n 'some data' > {found}/data"], check=True)
    hosts.a.popen([sys.executable, "-c", PROGRAM, str(found)], pid=PID)
    table = hosts.a.proc / str(PID) / "fd"
    hosts.a.wait_until(lambda: len(os.listdir(table)) >= 10, what="all is open")
    return found


def make_root(host: Host, directory: Path, place: Path) -> None:
    """Make the directory that is to be the root."""
    ours = " ".join({sys.prefix, sys.base_prefix} - {"/usr"})
    host.run(["sh", "-c", MAKE, "sh", str(directory), str(place), ours], check=True)


def goes_on(hosts: Pair, migration: Migration) -> None:
    """The program finds all of it, and is inside."""
    migration.wait_drained()
    assert migration.restore is not None
    hosts.b.kill(PID, signal.SIGTERM)
    assert migration.restore.wait(20) == 0


def test_program_goes_on_in_another_root(hosts: Pair, tmp_path: Path, place: Path) -> None:
    make_root(hosts.b, tmp_path, place)
    hosts.b.run(["mount", "-t", "proc", "proc", str(tmp_path / "proc")], check=True)
    migration = move(hosts.a, hosts.b, PID, restore_options=["--root", str(tmp_path)])
    goes_on(hosts, migration)
    assert hosts.b.run(["ls", "-A", str(tmp_path / "srv/place")]).stdout.split() == [b"data", b"socket"]


def test_program_goes_on_in_another_root_with_a_pid_namespace(hosts: Pair, tmp_path: Path, place: Path) -> None:
    make_root(hosts.b, tmp_path, place)
    migration = move(hosts.a, hosts.b, PID, restore_options=["-r", str(tmp_path), "--new-pid-namespace"])
    migration.wait_drained()
    assert migration.restore is not None
    migration.restore.send_signal(signal.SIGTERM)
    assert migration.restore.wait(20) == 0


def test_what_is_missing_in_the_root_is_found_before_the_freeze(hosts: Pair, tmp_path: Path, place: Path) -> None:
    make_root(hosts.b, tmp_path, place)
    # The file is where the link leads outside of the root.
    hosts.b.run(["sh", "-c", f"mkdir -p /srv/place; mv {tmp_path}/srv/place/data /srv/place"])
    with pytest.raises(MigrationFailed) as failure:
        move(hosts.a, hosts.b, PID, restore_options=["--root", str(tmp_path)])
    said = str(failure.value)
    assert f"{tmp_path}/proc is not mounted: mount -t proc proc {tmp_path}/proc" in said
    assert f"file {place}/data is missing here" in said
    assert "frozen" not in said
    assert hosts.a.alive(PID)


def test_root_that_is_no_directory_is_refused(hosts: Pair, place: Path) -> None:
    migration = start_dump(hosts.a, hosts.b, PID)
    restore = start_restore(migration, options=["--root", "/etc/passwd"], wait=False)
    assert restore.wait(20) == 2
    assert "--root /etc/passwd is no directory" in dict(migration.logs())["restore on beta, stderr"]


IN_A_CHROOT = """
import ctypes, os, select, signal, socket, sys
libc = ctypes.CDLL(None)
os.chroot(sys.argv[1])
os.chdir("/sub")
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
opened = os.open("/sub/data", os.O_RDWR | os.O_APPEND | os.O_CREAT)
os.write(opened, b"before ")
deleted = os.open("deleted", os.O_RDWR | os.O_CREAT)
os.write(deleted, b"content")
os.unlink("deleted")
listener = socket.socket(socket.AF_UNIX)
listener.bind("/sub/socket")
listener.listen()
directory = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
watching = libc.inotify_init1(os.O_NONBLOCK)
assert libc.inotify_add_watch(watching, b"/sub/data", 2) == 1
signal.sigwait({signal.SIGTERM})
os.write(opened, b"after")
assert int.from_bytes(os.read(watching, 100)[:4], "little") == 1
assert open("data").read() == "before after", "data"
assert os.getcwd() == "/sub", os.getcwd()
assert os.listdir("/") == ["sub"], os.listdir("/")
assert os.path.samestat(os.stat("/.."), os.fstat(directory))
assert os.pread(deleted, 100, 0) == b"content", "deleted"
client = socket.socket(socket.AF_UNIX)
client.connect("/sub/socket")
assert listener.accept()
os._exit(0)
"""


@pytest.fixture
def chroot(hosts: Pair, tmp_path: Path) -> Path:
    """The root directory of a program that is ready."""
    found = tmp_path / "chroot"
    (found / "sub").mkdir(parents=True)
    hosts.a.popen([sys.executable, "-c", IN_A_CHROOT, str(found)], pid=PID)
    table = hosts.a.proc / str(PID) / "fd"
    hosts.a.wait_until(lambda: len(os.listdir(table)) >= 8, what="all is open")
    return found


@pytest.fixture
def same(hosts: Pair, tmp_path: Path) -> Path:
    """Another root with the same in it."""
    found = tmp_path / "root"
    found.mkdir()
    hosts.b.run(["mount", "--rbind", "/", str(found)], check=True)
    return found


def test_program_in_a_chroot_moves(hosts: Pair, chroot: Path) -> None:
    goes_on(hosts, move(hosts.a, hosts.b, PID))


def test_program_in_a_chroot_moves_into_another_root(hosts: Pair, chroot: Path, same: Path) -> None:
    goes_on(hosts, move(hosts.a, hosts.b, PID, restore_options=["--root", str(same)]))


def test_checkpoint_is_restored_in_another_root(hosts: Pair, tmp_path: Path, chroot: Path, same: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    hosts.a.run([*postcopy_command(), "dump", "-t", str(PID), "-D", str(checkpoint)], check=True)
    pidfile = tmp_path / "pid"
    command = [*postcopy_command(), "restore", "-D", str(checkpoint), "--root", str(same), "--pidfile", str(pidfile)]
    restored = hosts.b.popen(command)
    hosts.b.wait_until(pidfile.exists, what="the program runs")
    assert os.readlink(hosts.b.proc / str(PID) / "root") == f"{same}{chroot}"
    hosts.b.kill(PID, signal.SIGTERM)
    assert restored.wait(20) == 0
