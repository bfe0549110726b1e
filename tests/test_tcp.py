"""TCP services move with their clients connected: these check every byte, and see a pause and nothing else."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from postcopy.errors import RestoreError
from postcopy.kernel import procfs
from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import syscall
from postcopy.network_lock import NetworkLock, Traffic
from postcopy.restore_side import network
from tests.hosts import DEVICE, Host, Process, Trio, postcopy_command, wait_until
from tests.migrate import Migration, move, start_dump, start_restore

PID = 6100
SECONDS = 40
ESTABLISHED = ["--tcp-established"]
CLONE_NEWNET = 0x40000000


@dataclass
class Service:
    """An echo server on ``a``, and a client on ``c`` that keeps it busy."""

    hosts: Trio
    directory: Path
    server: Process
    client: Process

    @property
    def progress(self) -> int:
        """Bytes that have come back on the slowest connection."""
        return int((self.directory / "progress").read_text())

    def goes_on(self, beyond: int = 1_000_000) -> None:
        """Every connection that is left brings more than what can be on its way."""
        before = self.progress
        try:
            wait_until(lambda: self.progress > before + beyond, SECONDS, "every connection goes on")
        except TimeoutError as late:
            raise AssertionError(f"{late}\n{self._state()}") from None

    def _state(self) -> str:
        """Where the connections are, and where the client's host believes the server to be."""
        commands = (["ss", "-Htnoi"], ["ip", "neighbour"], ["ip", "-brief", "address"], ["ip", "-brief", "link"])
        return "\n".join(f"{host.name}: {host.run(c).stdout.decode()}" for host in self.hosts for c in commands)

    def report(self) -> dict[str, Any]:
        """Let the client come to an end; what it has seen."""
        (self.directory / "stop").touch()
        assert self.client.wait(2 * SECONDS) == 0
        found: dict[str, Any] = json.loads((self.directory / "report.json").read_text())
        return found

    def errors(self) -> list[str]:
        """What the server's connections ended with."""
        path = self.directory / "errors"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def trio() -> Iterator[Trio]:
    """Two hosts and a client's."""
    with Trio() as hosts:
        yield hosts


def serve(hosts: Trio, directory: Path, count: int = 3, hold: bool = False, ahead: int = 200_000) -> Service:
    """Start both; returns when every connection is busy, or (with ``hold``) waits for a server that does not read.

    ``count``: connections to each of two addresses; ``ahead``: bytes that may be on their way on each.
    """
    hosts.add_service(hosts.a)
    addresses = [hosts.service, hosts.service6]
    command = [sys.executable, "-m", "tests.programs.echo_server", str(directory), *addresses]
    with open(directory / "server.err", "wb") as stderr:
        server = hosts.a.popen(command, pid=PID, stderr=stderr)
    wait_until(lambda: (directory / "ready").exists() or server.poll() is not None, SECONDS, "the server listens")
    command = [sys.executable, "-m", "tests.programs.echo_client", str(directory), str(count), *addresses]
    with open(directory / "client.err", "wb") as stderr:
        client = hosts.c.popen(command, stderr=stderr, env={**os.environ, "ECHO_AHEAD": str(ahead)})
    service = Service(hosts, directory, server, client)
    wait_until(lambda: (directory / "progress").exists() and service.progress > 0, SECONDS, "the client is connected")
    service.goes_on(5 * ahead)
    if hold:
        (directory / "hold").touch()
        wait_until(lambda: (directory / "holding").exists(), SECONDS, "the server does not read")
    return service


def locks(host: Host) -> str:
    """The rules that drop packets on a host."""
    if shutil.which("nft", path="/usr/sbin:/usr/bin") is None:
        pytest.skip("nft(8) is not installed")
    return host.run(["nft", "list", "ruleset"], check=True).stdout.decode()


def event(migration: Migration, name: str) -> bool:
    """Whether dump has told of it."""
    return any(each["event"] == name for each in migration.dump_events)


def move_service(trio: Trio) -> Migration:
    """Move the server, and its address with it."""
    trio.add_service(trio.b)
    migration = move(trio.a, trio.b, PID, dump_options=ESTABLISHED)
    trio.remove_service(trio.a)
    migration.wait_drained()
    return migration


def test_options_that_change_all_the_time_arrive_as_they_were_set_last(trio: Trio, tmp_path: Path) -> None:
    (tmp_path / "restless").touch()
    service = serve(trio, tmp_path, count=10)
    move_service(trio)
    service.goes_on()
    report = service.report()
    assert (report["errors"], report["missing"], service.errors()) == ([], 0, [])


def test_clients_see_a_pause_and_nothing_else(trio: Trio, tmp_path: Path) -> None:
    service = serve(trio, tmp_path, count=5)
    trio.add_service(trio.b)
    migration = move(trio.a, trio.b, PID, dump_options=ESTABLISHED)
    trio.check_announced(trio.b)
    trio.remove_service(trio.a)
    migration.wait_drained()
    service.goes_on()
    # And back, to a host that has forgotten it.
    trio.add_service(trio.a)
    again = move(trio.b, trio.a, PID, dump_options=ESTABLISHED)
    trio.remove_service(trio.b)
    again.wait_drained()
    service.goes_on()
    report = service.report()
    assert (report["errors"], report["missing"], service.errors()) == ([], 0, [])
    wait_until(lambda: not any(locks(host) for host in trio), SECONDS, "the network is unlocked")
    print(f"the longest pause of a connection: {report['longest']:.3f} s")


def test_lock_ends_with_an_address_that_comes_back_at_once(trio: Trio, tmp_path: Path) -> None:
    serve(trio, tmp_path)
    trio.add_service(trio.b)
    move(trio.a, trio.b, PID, dump_options=ESTABLISHED).wait_drained()
    assert locks(trio.a)
    for address in (f"{trio.service}/32", f"{trio.service6}/128"):
        commands = f"addr del {address} dev {DEVICE}\naddr add {address} dev {DEVICE}\n"
        trio.a.run(["ip", "-batch", "-"], input=commands.encode(), check=True)
    wait_until(lambda: not locks(trio.a), 10, "the network is unlocked")


def test_many_connections(trio: Trio, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    count = request.config.getoption("--connections")
    service = serve(trio, tmp_path, count=count // 2, ahead=1000)
    migration = move_service(trio)
    service.goes_on(5000)
    report = service.report()
    assert (report["errors"], report["missing"], service.errors()) == ([], 0, [])
    standstill = next(event["standstill_ns"] for event in migration.dump_events if event["event"] == "resumed")
    print(f"{count} connections: stand-still {standstill / 1e6:.0f} ms, longest pause {report['longest']:.3f} s")


# To each of two addresses; many are looked at by two processes.
MANY = pytest.mark.parametrize("count", [3, 20])


@MANY
def test_server_that_does_not_read_moves_with_full_buffers(trio: Trio, tmp_path: Path, count: int) -> None:
    service = serve(trio, tmp_path, count=count, hold=True)
    move_service(trio)
    (tmp_path / "hold").unlink()
    service.goes_on()
    report = service.report()
    assert (report["errors"], report["missing"], service.errors()) == ([], 0, [])


@MANY
def test_connections_that_their_peers_have_closed_half(trio: Trio, tmp_path: Path, count: int) -> None:
    service = serve(trio, tmp_path, count=count, hold=True)
    (tmp_path / "finish").touch()
    wait_until(lambda: (tmp_path / "finished").exists(), SECONDS, "the client writes no more")
    closed = ["ss", "-Htn", "state", "close-wait"]
    wait_until(lambda: len(trio.a.run(closed).stdout.splitlines()) == 2 * count, SECONDS, "the server's kernel knows")
    move_service(trio)
    assert len(trio.b.run(closed).stdout.splitlines()) == 2 * count
    (tmp_path / "hold").unlink()
    report = service.report()
    assert (report["errors"], report["missing"], service.errors()) == ([], 0, [])


#: Accepts a connection every now and then, and sends its host's name to it.
SLOW = """
import os, socket, sys, time
listener = socket.create_server((sys.argv[1], 7000), backlog=5)
os.mkdir(sys.argv[2])
while True:
    accepted = listener.accept()[0]
    accepted.sendall(os.uname().nodename.encode())
    accepted.close()
    time.sleep(0.02)
"""
#: Four at a time make one connection after the other, and write down what comes on each.
EAGER = """
import os, socket, sys, threading
def work():
    with open(sys.argv[2], "a", buffering=1) as heard:
        while True:
            try:
                with socket.create_connection((sys.argv[1], 7000), timeout=20) as connection:
                    heard.write(connection.recv(100).decode() + "\\n")
            except OSError as error:
                heard.write(f"{type(error).__name__}\\n")
for _ in range(4):
    threading.Thread(target=work).start()
"""


def test_connections_that_wait_to_be_accepted_are_accepted_before_the_freeze(trio: Trio, tmp_path: Path) -> None:
    trio.add_service(trio.a)
    ready, heard = tmp_path / "ready", tmp_path / "heard"
    trio.a.popen([sys.executable, "-c", SLOW, trio.service, str(ready)], pid=PID)
    wait_until(ready.exists, SECONDS, "the server listens")
    trio.c.popen([sys.executable, "-c", EAGER, trio.service, str(heard)])
    wait_until(lambda: heard.exists() and heard.read_text().count("alpha") > 10, SECONDS, "the server accepts")
    trio.add_service(trio.b)
    migration = move(trio.a, trio.b, PID, dump_options=ESTABLISHED)
    trio.remove_service(trio.a)
    # Both have had it for a moment: the client may have learned the old place again.
    trio.c.run(["ip", "neigh", "flush", "all"], check=True)
    migration.wait_drained()
    wait_until(lambda: heard.read_text().count("beta") > 10, SECONDS, "the server accepts there")
    assert set(heard.read_text().split()) == {"alpha", "beta"}


#: Says something, shuts down when it is told to, and writes down the answer that comes then.
POLITE = """
import os, socket, sys, time
listener = socket.create_server((sys.argv[1], 7000))
os.mkdir(sys.argv[2] + "/ready")
accepted = listener.accept()[0]
accepted.sendall(b"said")
while not os.path.exists(sys.argv[2] + "/go"):
    time.sleep(0.01)
accepted.shutdown(socket.SHUT_WR)
answer = accepted.recv(100)
open(sys.argv[2] + "/answer", "wb").write(answer)
time.sleep(1000)
"""
#: Listens to the end before it answers.
PATIENT = """
import os, socket, sys
connection = socket.create_connection((sys.argv[1], 7000))
heard = connection.recv(100)
os.mkdir(sys.argv[2] + "/heard")
while piece := connection.recv(100):
    heard += piece
connection.sendall(heard + b", understood")
"""


def test_end_that_was_sent_and_got_lost_is_sent_again(trio: Trio, tmp_path: Path) -> None:
    assert locks(trio.c) == ""
    trio.add_service(trio.a)
    server = trio.a.popen([sys.executable, "-c", POLITE, trio.service, str(tmp_path)], pid=PID)
    wait_until(lambda: (tmp_path / "ready").exists() or server.poll() is not None, SECONDS, "the server listens")
    trio.c.popen([sys.executable, "-c", PATIENT, trio.service, str(tmp_path)])
    wait_until((tmp_path / "heard").exists, SECONDS, "the client is connected")
    rules = "add table inet lossy\nadd chain inet lossy in { type filter hook input priority 0; }\n"
    rules += "add rule inet lossy in tcp sport 7000 tcp flags fin drop\n"
    trio.c.run(["nft", "-f", "-"], input=rules.encode(), check=True)
    (tmp_path / "go").touch()
    closing = ["ss", "-Htn", "state", "fin-wait-1"]
    wait_until(lambda: len(trio.a.run(closing).stdout.splitlines()) == 1, SECONDS, "the server has closed its end")
    move_service(trio)
    assert len(trio.b.run(closing).stdout.splitlines()) == 1
    trio.c.run(["nft", "delete", "table", "inet", "lossy"], check=True)
    wait_until(lambda: (tmp_path / "answer").exists() and (tmp_path / "answer").read_bytes(), SECONDS, "an answer")
    assert (tmp_path / "answer").read_bytes() == b"said, understood"


def test_peer_that_resets_during_the_standstill(trio: Trio, tmp_path: Path) -> None:
    service = serve(trio, tmp_path)
    trio.add_service(trio.b)
    migration = start_dump(trio.a, trio.b, PID, options=ESTABLISHED)
    restore = start_restore(migration, wait=False)
    wait_until(lambda: event(migration, "frozen"), SECONDS, "the server stands still")
    (tmp_path / "reset").touch()
    wait_until(lambda: (tmp_path / "was_reset").exists(), SECONDS, "the client has reset a connection")
    wait_until(lambda: event(migration, "resumed"), SECONDS, "the server runs again")
    trio.remove_service(trio.a)
    migration.wait_drained()
    service.goes_on()
    wait_until(service.errors, SECONDS, "the server hears of the reset")
    report = service.report()
    assert (report["errors"], report["missing"]) == (["reset by us"], 0)
    assert restore.poll() is None


LISTENER = """
import pathlib, socket, sys
connection, _ = socket.create_server((sys.argv[1], 7000)).accept()
files = pathlib.Path(sys.argv[2])
(files / "accepted").touch()
try:
    heard = connection.recv(1).hex()
except OSError as error:
    heard = error.strerror
(files / "heard.new").write_text(heard)
(files / "heard.new").rename(files / "heard")
"""
RESETTER = """
import pathlib, socket, struct, sys, time
connection = socket.create_connection((sys.argv[1], 7000))
files = pathlib.Path(sys.argv[2])
while not (files / "reset").exists():
    time.sleep(0.001)
connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
connection.close()
(files / "was_reset").touch()
"""


def test_program_that_only_listens_hears_of_a_reset_during_the_standstill(trio: Trio, tmp_path: Path) -> None:
    trio.add_service(trio.a)
    trio.a.popen([sys.executable, "-c", LISTENER, trio.service, str(tmp_path)], pid=PID)
    wait_until(lambda: trio.a.run(["ss", "-Htln"]).stdout, SECONDS, "the server listens")
    trio.c.popen([sys.executable, "-c", RESETTER, trio.service, str(tmp_path)])
    wait_until((tmp_path / "accepted").exists, SECONDS, "the client is connected")
    trio.add_service(trio.b)
    migration = start_dump(trio.a, trio.b, PID, options=ESTABLISHED)
    start_restore(migration, wait=False)
    wait_until(lambda: event(migration, "frozen"), SECONDS, "the server stands still")
    (tmp_path / "reset").touch()
    wait_until((tmp_path / "was_reset").exists, SECONDS, "the client has reset the connection")
    wait_until(lambda: event(migration, "resumed"), SECONDS, "the server runs again")
    trio.remove_service(trio.a)
    wait_until((tmp_path / "heard").exists, 10, "the server hears of the reset")
    assert (tmp_path / "heard").read_text() == os.strerror(errno.ECONNRESET)


def test_destination_without_the_address_is_told_so_and_nobody_notices(trio: Trio, tmp_path: Path) -> None:
    service = serve(trio, tmp_path)
    migration = start_dump(trio.a, trio.b, PID, options=ESTABLISHED)
    restore = start_restore(migration, wait=False)
    assert (restore.wait(SECONDS), migration.dump.wait(SECONDS)) == (4, 10), migration.logs()
    said = dict(migration.logs())["restore on beta, stderr"]
    assert f"binding a TCP socket to {trio.service}:7000, which must be an address of this host" in said
    assert "EADDRNOTAVAIL" in said
    service.goes_on()
    wait_until(lambda: not any(locks(host) for host in trio), SECONDS, "the network is unlocked")
    report = service.report()
    assert (report["errors"], report["missing"], service.errors()) == ([], 0, [])


@MANY
@pytest.mark.parametrize("moment", ["frozen", "collected", "state"])
def test_connections_go_on_when_dump_is_killed_before_commit(
    trio: Trio, tmp_path: Path, moment: str, count: int
) -> None:
    service = serve(trio, tmp_path, count=count)
    trio.add_service(trio.b)
    migration = start_dump(trio.a, trio.b, PID, options=ESTABLISHED)
    restore = start_restore(migration, wait=False)
    wait_until(lambda: event(migration, moment), SECONDS, moment)
    migration.dump.kill()
    if restore.wait(SECONDS) == 0:
        pytest.skip("killed too late")
    service.goes_on()
    wait_until(lambda: not locks(trio.a) and not locks(trio.b), SECONDS, "the network is unlocked")
    report, errors = service.report(), service.errors()
    # The one that was under repair at that moment, if any: "The source's sockets are unharmed" in docs/architecture.md.
    assert errors in ([], ["PermissionError"])
    assert (len(report["errors"]) <= len(errors), report["missing"]) == (True, 0)


def test_connections_go_on_when_restore_is_killed_before_commit(trio: Trio, tmp_path: Path) -> None:
    service = serve(trio, tmp_path)
    trio.add_service(trio.b)
    migration = start_dump(trio.a, trio.b, PID, options=ESTABLISHED)
    restore = start_restore(migration, wait=False)
    wait_until(lambda: event(migration, "frozen"), SECONDS, "the server stands still")
    restore.kill()
    assert migration.dump.wait(SECONDS) == 7, migration.logs()
    service.goes_on()
    wait_until(lambda: not locks(trio.a) and not locks(trio.b), SECONDS, "the network is unlocked")
    report = service.report()
    assert (report["errors"], report["missing"], service.errors()) == ([], 0, [])


@pytest.mark.parametrize("then", [signal.SIGCONT, signal.SIGKILL])
def test_network_stays_locked_as_long_as_the_source_is_left_stopped(trio: Trio, tmp_path: Path, then: int) -> None:
    serve(trio, tmp_path, hold=True)
    trio.add_service(trio.b)
    options = ["--background", "off"]
    migration = move(trio.a, trio.b, PID, dump_options=ESTABLISHED, restore_options=options)
    migration.dump.kill()
    wait_until(lambda: not trio.b.alive(PID), SECONDS, "the program is killed at the destination")
    assert trio.a.proc_state(PID) == "T"
    assert "drop" in locks(trio.a)
    trio.a.kill(PID, then)
    wait_until(lambda: not locks(trio.a), SECONDS, "the network is unlocked")
    guards = [pid for pid in trio.a.pids() if _name(trio.a, pid).startswith("postcopy")]
    wait_until(lambda: not any(trio.a.alive(pid) for pid in guards), SECONDS, "nobody is left")


def _name(host: Host, pid: int) -> str:
    try:
        return (host.proc / str(pid) / "comm").read_text()
    except OSError:
        return ""


def test_connections_are_closed_on_demand(trio: Trio, tmp_path: Path) -> None:
    service = serve(trio, tmp_path)
    trio.add_service(trio.b)
    migration = move(trio.a, trio.b, PID, dump_options=["--tcp-close"])
    migration.wait_drained()
    trio.remove_service(trio.a)
    wait_until(lambda: len(service.errors()) == 6, SECONDS, "the server finds its connections aborted")
    assert set(service.errors()) == {"ConnectionAbortedError"}
    assert len(service.report()["errors"]) == 6


def test_network_is_locked_by_iptables(trio: Trio, tmp_path: Path) -> None:
    if shutil.which("iptables-restore", path="/usr/sbin:/usr/bin") is None:
        pytest.skip("iptables(8) is not installed")
    service = serve(trio, tmp_path)
    trio.add_service(trio.b)
    options = ["--network-lock", "iptables"]
    migration = move(trio.a, trio.b, PID, dump_options=[*ESTABLISHED, *options], restore_options=options)
    trio.remove_service(trio.a)
    migration.wait_drained()
    service.goes_on()
    wait_until(lambda: all("postcopy" not in locks(host) for host in trio), what="no host is locked")
    report = service.report()
    assert (report["errors"], report["missing"], service.errors()) == ([], 0, [])


TALKS = """
import socket, sys
local, remote, port = sys.argv[1:]
own = socket.create_connection((remote, int(port)), source_address=(local, 0))
while (line := own.recv(100)):
    own.sendall(line)
"""


def test_peer_that_cannot_be_reached_from_the_destination_notices_nothing(trio: Trio, tmp_path: Path) -> None:
    trio.add_service(trio.a)
    peer = "10.99.0.1"
    trio.c.run(["ip", "address", "add", f"{peer}/32", "dev", "lo"], check=True)
    trio.a.run(["ip", "route", "add", f"{peer}/32", "via", trio.c.address], check=True)
    server = "import socket, sys; listener = socket.create_server((sys.argv[1], 7001)); peer, _ = listener.accept()\n"
    server += (
        "for line in sys.stdin:\n    peer.sendall(line.encode()); print(peer.recv(100).decode(), end='', flush=True)"
    )
    pipe = subprocess.PIPE
    there = trio.c.popen([sys.executable, "-c", server, peer], stdin=pipe, stdout=pipe)
    listens = ["ss", "-Hltn", "sport = :7001"]
    wait_until(lambda: trio.c.run(listens).stdout, SECONDS, "the peer listens")
    trio.a.popen([sys.executable, "-c", TALKS, trio.service, peer, "7001"], pid=PID)

    def answers(text: bytes) -> bool:
        assert there.stdin is not None and there.stdout is not None
        there.stdin.write(text)
        there.stdin.flush()
        line: bytes = there.stdout.readline()
        return line == text

    assert answers(b"before\n")
    trio.add_service(trio.b)
    migration = start_dump(trio.a, trio.b, PID, options=ESTABLISHED)
    restore = start_restore(migration, wait=False)
    assert (restore.wait(SECONDS), migration.dump.wait(SECONDS)) == (4, 10), migration.logs()
    said = dict(migration.logs())["restore on beta, stderr"]
    assert f"to {peer}:7001" in said and "ENETUNREACH" in said
    assert answers(b"after\n")


def test_connection_to_a_local_process_that_is_not_moved_is_refused(trio: Trio) -> None:
    server = "import socket; kept = socket.create_server(('127.0.0.1', 7002)).accept()[0].recv(1)"
    trio.a.popen([sys.executable, "-c", server])
    wait_until(lambda: trio.a.run(["ss", "-Hltn", "sport = :7002"]).stdout, SECONDS, "the peer listens")
    trio.a.popen([sys.executable, "-c", TALKS, "127.0.0.1", "127.0.0.1", "7002"], pid=PID)
    connected = ["ss", "-Htn", "dport = :7002"]
    wait_until(lambda: b"ESTAB" in trio.a.run(connected).stdout, SECONDS, "they are connected")
    result = trio.a.run([*postcopy_command(), "dump", "--lazy-pages", "-t", str(PID), *ESTABLISHED], timeout=20)
    assert result.returncode == 5
    assert "to 127.0.0.1:7002, whose other end is a process of this host that is not moved" in result.stderr.decode()


def _passes(one: socket.socket, other: socket.socket) -> bool:
    """Whether a byte gets from one end of a connection to the other at once."""
    one.sendall(b"x")
    other.settimeout(0.1)
    try:
        return other.recv(1) == b"x"
    except TimeoutError:
        return False


@pytest.mark.parametrize("foreseen", ["nothing", "it", "another"])
def test_lock_lets_all_pass_before_it_is_taken_away(foreseen: str) -> None:
    pid = os.fork()
    if not pid:
        try:
            syscall("unshare", NUMBERS["unshare"], CLONE_NEWNET)
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            with socket.create_server(("127.0.0.1", 7000)) as listener:
                one = socket.create_connection(("127.0.0.1", 7000))
                other, _ = listener.accept()
                lock = NetworkLock("nftables", "postcopy-test")
                here, there = ((socket.inet_aton(host), port) for host, port in (one.getsockname(), one.getpeername()))
                if foreseen != "nothing":
                    lock.foresee([(here, there if foreseen == "it" else (there[0], 1))])
                assert _passes(one, other)
                lock.lock(Traffic([(here, there)], []))
                assert not _passes(one, other)
                lock.let_pass()
                assert lock.is_locked
                # Of this connection, what was dropped is sent again first.
                other.settimeout(SECONDS)
                assert other.recv(1) == b"x"
                assert _passes(one, other)
                lock.close()
                assert _passes(one, other)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def test_restore_makes_sure_before_commit_that_it_can_hold_all_connections() -> None:
    network.reserve(100)
    most = procfs.most_descriptors()
    with pytest.raises(RestoreError, match=r"to hold the connections of the program") as refused:
        network.reserve(most)
    assert "ulimit -Hn" in refused.value.hint
