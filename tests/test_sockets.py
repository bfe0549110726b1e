"""What a destination may have against the names and addresses of sockets, and what a move that fails leaves."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.hosts import Host, Pair, Process, postcopy_command, wait_until
from tests.migrate import move, start_dump, start_restore
from tests.test_states import run_program

PID = 6200
SECONDS = 30
#: Listens at the Unix name and the TCP address it is told, and echoes; then makes a directory.
SERVER = """
import os, select, socket, sys
name, host, ready = sys.argv[1:]
unix, tcp = socket.socket(socket.AF_UNIX), socket.socket()
unix.bind(name.replace("@", chr(0))); unix.listen()
tcp.bind((host, 7100)); tcp.listen()
os.mkdir(ready)
while True:
    for listener in select.select([unix, tcp], [], [])[0]:
        client = listener.accept()[0]
        client.sendall(client.recv(100))
        client.close()
"""
CLIENT = """
import socket, sys
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[1].replace("@", chr(0)))
client.sendall(b"echo")
print(client.recv(100).decode(), end="")
"""


def serve(hosts: Pair, directory: Path, name: str, host: str = "127.0.0.1") -> Process:
    """Start the server on ``a``."""
    ready = directory / "ready"
    program = hosts.a.popen([sys.executable, "-c", SERVER, name, host, str(ready)], pid=PID)
    wait_until(lambda: ready.exists() or program.poll() is not None, SECONDS, "the server listens")
    return program


def echoes(hosts: Pair, name: str, here: bool) -> bool:
    """Whether the server answers on ``a`` (``here``) or on ``b``."""
    host = hosts.a if here else hosts.b
    return host.run([sys.executable, "-c", CLIENT, name]).stdout == b"echo"


def refusal(hosts: Pair) -> str:
    """What restore says; both commands end with the exit code of problems."""
    migration = start_dump(hosts.a, hosts.b, PID)
    restore = start_restore(migration, wait=False)
    assert (migration.dump.wait(SECONDS), restore.wait(SECONDS)) == (5, 5), migration.logs()
    assert not any(event["event"] == "frozen" for event in migration.dump_events)
    return dict(migration.logs())[f"restore on {hosts.b.name}, stderr"]


def own_directory(hosts: Pair, path: Path) -> None:
    """Give ``b`` a filesystem of its own there."""
    hosts.b.run(["mount", "-t", "tmpfs", "none", str(path)], check=True)


def test_unix_name_is_made_on_a_filesystem_of_the_destination(hosts: Pair, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    name = str(own / "socket")
    serve(hosts, tmp_path, name)
    own_directory(hosts, own)
    move(hosts.a, hosts.b, PID).wait_drained()
    assert echoes(hosts, name, here=False)
    assert hosts.b.run(["ls", "-A", str(own)], check=True).stdout == b"socket\n"


def test_unix_name_on_a_shared_filesystem_leads_to_the_destination(hosts: Pair, tmp_path: Path) -> None:
    name = str(tmp_path / "socket")
    serve(hosts, tmp_path, name)
    move(hosts.a, hosts.b, PID).wait_drained()
    assert echoes(hosts, name, here=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ready", "socket"]


def test_unix_name_that_is_taken(hosts: Pair, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    name = str(own / "socket")
    serve(hosts, tmp_path, name)
    own_directory(hosts, own)
    taken = "import socket, time; s = socket.socket(1); s.bind({!r}); s.listen(); print(flush=True); time.sleep(1000)"
    taker = hosts.b.popen([sys.executable, "-c", taken.format(name)])
    there = hosts.b.proc.parent / name.lstrip("/")
    wait_until(there.exists, SECONDS, "the name is taken")
    assert f"the name {name} of a Unix socket is taken here: end the program that has it" in refusal(hosts)
    taker.kill()
    taker.wait()
    # What is left is no socket of anybody, but a file could be of use to somebody.
    there.unlink()
    there.write_text("precious")
    assert f"the name {name} of a Unix socket is taken here by a file that is none: move it away" in refusal(hosts)
    assert there.read_text() == "precious"
    hosts.b.run(["umount", str(own)], check=True)
    assert echoes(hosts, name, here=True)


def test_abstract_unix_name_that_is_taken(hosts: Pair, tmp_path: Path) -> None:
    name = f"@postcopy {tmp_path}"[:100]
    serve(hosts, tmp_path, name)
    ready = tmp_path / "taken"
    taken = f"import os, socket, time; s = socket.socket(1); s.bind(chr(0) + {name[1:]!r}); os.mkdir({str(ready)!r})"
    hosts.b.popen([sys.executable, "-c", f"{taken}; time.sleep(1000)"])
    wait_until(ready.exists, SECONDS, "the name is taken")
    assert f"the name {name} of a Unix socket is taken here: end the program that has it" in refusal(hosts)
    assert echoes(hosts, name, here=True)


def test_directory_of_a_unix_name_that_is_missing(hosts: Pair, tmp_path: Path) -> None:
    own = tmp_path / "own"
    (own / "inner").mkdir(parents=True)
    name = str(own / "inner" / "socket")
    serve(hosts, tmp_path, name)
    own_directory(hosts, own)
    assert f"directory {own}/inner, for a Unix socket, is missing here: make it" in refusal(hosts)


def test_move_that_fails_leaves_the_unix_name_alone(hosts: Pair, tmp_path: Path) -> None:
    name = str(tmp_path / "socket")
    serve(hosts, tmp_path, name, host=hosts.a.address)
    migration = start_dump(hosts.a, hosts.b, PID)
    restore = start_restore(migration, wait=False)
    assert (migration.dump.wait(SECONDS), restore.wait(SECONDS)) == (10, 4), migration.logs()
    said = dict(migration.logs())["restore on beta, stderr"]
    where = f"{hosts.a.address}:7100"
    assert f"binding a TCP socket to {where}, which must be an address of this host, with a free port" in said
    assert echoes(hosts, name, here=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ready", "socket"]


#: A parent that listens, and children that accept, each with a Unix pair of its own and one that all of them have.
PREFORKED = """
import os, socket, sys
listener = socket.socket()
listener.bind(("127.0.0.1", 7200)); listener.listen()
ours = socket.socketpair()
for _ in range(2):
    if not os.fork():
        own = socket.socketpair()
        own[0].send(b"mine")
        ours[1].close()
        while True:
            client = listener.accept()[0]
            ours[0].send(b"+")
            client.sendall(b"%d %s" % (os.getpid(), own[1].recv(100, socket.MSG_PEEK)))
            client.close()
ours[0].close()
os.mkdir(sys.argv[1])
told = 0
while True:
    told += len(ours[1].recv(100))
    with open(sys.argv[1] + "/told", "w") as file:
        file.write(str(told))
"""
ASK = """
import socket
client = socket.create_connection(("127.0.0.1", 7200))
print(client.recv(100).decode(), end="")
"""


def test_sockets_that_a_tree_shares(hosts: Pair, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    hosts.a.popen([sys.executable, "-c", PREFORKED, str(ready)], pid=PID)
    wait_until(ready.exists, SECONDS, "the children accept")
    assert hosts.a.run([sys.executable, "-c", ASK]).stdout.endswith(b" mine")
    wait_until(lambda: (ready / "told").exists(), SECONDS, "the parent has been told")
    migration = move(hosts.a, hosts.b, PID)
    migration.wait_drained()
    answers = [hosts.b.run([sys.executable, "-c", ASK]).stdout for _ in range(4)]
    children = {pid for pid in hosts.b.pids() if pid > PID}
    assert all(answer.endswith(b" mine") and int(answer.split()[0]) in children for answer in answers)
    wait_until(lambda: (ready / "told").read_text() == "5", SECONDS, "the parent has been told of all")


#: Takes the messages that come to a name, and writes them to a file.
LOGGER = """
import os, socket, sys
name, log = sys.argv[1:]
listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
listener.bind(name.replace("@", chr(0)))
print(flush=True)
while True:
    with open(log, "ab") as stream:
        stream.write(listener.recv(1000))
"""
#: Sends a message to the name it is connected to, and when a file is there that name.
TELLER = """
import os, socket, sys, time
name, ready, go = sys.argv[1:]
teller = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
teller.connect(name.replace("@", chr(0)))
teller.send(b"first ")
os.mkdir(ready)
while not os.path.exists(go):
    time.sleep(0.01)
teller.send(teller.getpeername().removeprefix("/").encode() if isinstance(teller.getpeername(), str) else b"abstract")
time.sleep(1000)
"""


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_datagram_socket_is_connected_to_the_name_outside_of_the_tree(
    hosts: Pair, tmp_path: Path, abstract: bool
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    name = f"@{tmp_path}"[:100] if abstract else str(own / "log")
    logs = [tmp_path / "log-a", tmp_path / "log-b"]

    def listen(host: Host, log: Path) -> None:
        logger = host.popen([sys.executable, "-c", LOGGER, name, str(log)], stdout=subprocess.PIPE)
        assert logger.stdout is not None
        logger.stdout.readline()

    listen(hosts.a, logs[0])
    ready, go = tmp_path / "ready", tmp_path / "go"
    hosts.a.popen([sys.executable, "-c", TELLER, name, str(ready), str(go)], pid=PID)
    wait_until(ready.exists, SECONDS, "a first message has been sent")
    result = hosts.a.run([*postcopy_command(), "check", "-t", str(PID)])
    assert "which is not moved along; --ext-unix-sk connects it to that name there" in result.stderr.decode()
    own_directory(hosts, own)
    if not abstract:
        migration = start_dump(hosts.a, hosts.b, PID, options=["--ext-unix-sk"])
        restore = start_restore(migration, wait=False)
        assert (migration.dump.wait(SECONDS), restore.wait(SECONDS)) == (5, 5), migration.logs()
    listen(hosts.b, logs[1])
    move(hosts.a, hosts.b, PID, dump_options=["--ext-unix-sk"]).wait_drained()
    go.touch()
    wait_until(lambda: logs[1].exists() and logs[1].read_bytes() != b"", SECONDS, "a second message has come")
    told = b"abstract" if abstract else name.removeprefix("/").encode()
    assert (logs[0].read_bytes(), logs[1].read_bytes()) == (b"first ", told)


def test_ping_sockets_move_where_they_are_allowed(hosts: Pair, tmp_path: Path) -> None:
    # Of the hosts' own network namespaces.
    allow = ["sh", "-c", "echo 0 2147483647 > /proc/sys/net/ipv4/ping_group_range"]
    for host in hosts:
        host.run(allow, check=True)
    assert run_program(hosts, tmp_path, 1, "--only", "ping_sockets") == {"ping_sockets": None}


#: Sends a timerfd to itself, and closes it.
TIMER_ON_ITS_WAY = """
import ctypes, os, signal, socket, sys
pair = socket.socketpair()
timer = ctypes.CDLL(None).timerfd_create(1, 0)
socket.send_fds(pair[0], [b"!"], [timer])
os.close(timer)
os.mkdir(sys.argv[1])
signal.pause()
"""


def test_timer_that_is_only_on_its_way_is_refused(hosts: Pair, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    program = hosts.a.popen([sys.executable, "-c", TIMER_ON_ITS_WAY, str(ready)], pid=PID)
    wait_until(ready.exists, SECONDS, "the timer is on its way")
    migration = start_dump(hosts.a, hosts.b, PID)
    restore = start_restore(migration, wait=False)
    assert (migration.dump.wait(SECONDS), restore.wait(SECONDS)) == (5, 10), migration.logs()
    assert "[timerfd]: of what nobody has open, this kind" in dict(migration.logs())["dump on alpha, stderr"]
    assert program.poll() is None
