"""Wrong PIDs, too few privileges, wrong addresses, and whoever else may talk to the listening port.

Each gives a clear line and an exit code. The target never notices, and the listener goes on listening.
"""

import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec.structs import replace

from postcopy.state import encode
from postcopy.transport import GREETING_SECONDS
from postcopy.wire import control
from postcopy.wire.control import HEADER, MAGIC, PROTOCOL_VERSION, Hello, Kind
from tests.hosts import Host, Pair, Process, postcopy_command, wait_until
from tests.migrate import Migration, start_dump, start_restore
from tests.programs import witness
from tests.tamper import socket_in

PID = 7000
PORT = 27300
SECONDS = 20
PR_CAPBSET_DROP = 24
CAPABILITIES = {
    "CAP_DAC_OVERRIDE": 1,
    "CAP_KILL": 5,
    "CAP_SETUID": 7,
    "CAP_SETPCAP": 8,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_NICE": 23,
    "CAP_SYS_RESOURCE": 24,
    "CAP_CHECKPOINT_RESTORE": 40,
}


@dataclass
class Target:
    """A program on the first host that must not notice anything."""

    host: Host
    program: Process
    log: Path

    def runs_on(self) -> None:
        """It is alive and has seen nothing wrong."""
        before = len(witness.records(self.log))
        wait_until(lambda: len(witness.records(self.log)) > before + 5, SECONDS, "the target goes on")
        found = witness.records(self.log)
        assert not [record.wrong for record in found if record.wrong]
        assert [record.number for record in found] == list(range(1, len(found) + 1))


@pytest.fixture(scope="module")
def target(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """The target of all tests."""
    log = tmp_path_factory.mktemp("bad-input") / "witness.log"
    command = [sys.executable, "-m", "tests.programs.witness", "--alone", "--log", str(log)]
    program = pair.a.popen(command, pid=PID)
    wait_until(lambda: witness.records(log), SECONDS, "the target ticks")
    return Target(pair.a, program, log)


def refused(result: subprocess.CompletedProcess[bytes], code: int, *texts: str) -> None:
    """It ended with this code and one error that holds these texts, without a traceback."""
    said = result.stderr.decode()
    assert result.returncode == code, said
    assert "Traceback" not in said, said
    for text in texts:
        assert text in said, said
    assert len([line for line in said.splitlines() if "what to do" not in line]) == 1, said


def dump(host: Host, pid: int, *options: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[bytes]:
    """Run dump to its end."""
    return host.run([*before, *postcopy_command(), "dump", "--lazy-pages", "-t", str(pid), *options], timeout=SECONDS)


# -- PIDs --------------------------------------------------------------------------------------------------------------


def test_pid_that_does_not_exist(pair: Pair) -> None:
    refused(dump(pair.a, 3999), 3, "there is no process 3999", "what to do")


def test_kernel_thread() -> None:
    kernel_threads = (int(name) for name in os.listdir("/proc") if name.isdigit() and is_kernel_thread(int(name)))
    pid = next(kernel_threads, None)
    if pid is None:
        pytest.skip("this PID namespace has no kernel threads")
    argv = [*postcopy_command(), "dump", "--lazy-pages", "-t", str(pid)]
    refused(subprocess.run(argv, capture_output=True, timeout=SECONDS), 3, f"{pid} (", "is a kernel thread")


def is_kernel_thread(pid: int) -> bool:
    """Whether the kernel says PF_KTHREAD."""
    try:
        return bool(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[6]) & 0x00200000)
    except OSError:
        return False


def test_zombie(pair: Pair) -> None:
    command = "import os, time; print(os.spawnv(os.P_NOWAIT, '/bin/true', ['true']), flush=True); time.sleep(60)"
    parent = pair.a.popen([sys.executable, "-c", command], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    wait_until(lambda: pair.a.proc_state(pid) == "Z", SECONDS, "the child is a zombie")
    refused(dump(pair.a, pid), 3, f"process {pid} (true) is a zombie")
    parent.kill()


def test_postcopy_itself_and_its_parent(pair: Pair) -> None:
    own = pair.a.run([*postcopy_command(), "dump", "--lazy-pages", "-t", "7100"], pid=7100, timeout=SECONDS)
    refused(own, 3, "process 7100", "is this postcopy itself")
    command = f"import subprocess, sys; sys.exit(subprocess.run({postcopy_command()} + sys.argv[1:]).returncode)"
    argv = [sys.executable, "-c", command, "dump", "--lazy-pages", "-t", "7101"]
    refused(pair.a.run(argv, pid=7101, timeout=SECONDS), 3, "process 7101", "one of its parents")


def test_process_that_a_debugger_holds(pair: Pair, target: Target) -> None:
    command = f"import sys; from postcopy.kernel import ptrace; ptrace.seize({PID}, 0); print(flush=True); input()"
    debugger = pair.a.popen([sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert debugger.stdout is not None
    debugger.stdout.readline()
    said = f"is traced by process {debugger.pid} "
    refused(dump(pair.a, PID), 3, said, "what to do: detach it")
    debugger.kill()
    debugger.wait()
    target.runs_on()


def test_thread_is_not_a_process(pair: Pair, target: Target) -> None:
    tid = next(int(entry.name) for entry in (pair.a.proc / str(PID) / "task").iterdir() if entry.name != str(PID))
    refused(dump(pair.a, tid), 3, f"{tid} is a thread of process {PID}", f"-t {PID}")


# -- privileges --------------------------------------------------------------------------------------------------------


def without(*capabilities: str) -> tuple[str, ...]:
    """The beginning of a command that runs without these capabilities."""
    bits = [CAPABILITIES[name] for name in capabilities]
    drop = f"[ctypes.CDLL(None).prctl({PR_CAPBSET_DROP}, bit, 0, 0, 0) for bit in {bits}]"
    return (sys.executable, "-c", f"import ctypes, os, sys; {drop}; os.execv(sys.argv[1], sys.argv[1:])")


RESTORE = [*postcopy_command(), "restore", "--lazy-pages", "--wait", "0"]


# Who is not root can still read this interpreter's files, wherever they are.
READING = "-all,+dac_read_search"
AS_NOBODY = [
    "setpriv",
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
    "--inh-caps",
    READING,
    "--ambient-caps",
    READING,
]


def test_not_root(pair: Pair, target: Target) -> None:
    lacking = "CAP_SYS_ADMIN and CAP_SYS_PTRACE missing"
    refused(dump(pair.a, PID, before=tuple(AS_NOBODY)), 9, lacking, "run it as root")
    refused(pair.b.run([*AS_NOBODY, *RESTORE]), 9, lacking, "run it as root")


@pytest.mark.parametrize("capability", ["CAP_SYS_ADMIN", "CAP_SYS_PTRACE"])
def test_missing_capability_is_named(pair: Pair, target: Target, capability: str) -> None:
    refused(dump(pair.a, PID, before=without(capability)), 9, f"{capability} missing")
    refused(pair.b.run([*without(capability), *RESTORE]), 9, f"{capability} missing")


# -- addresses ---------------------------------------------------------------------------------------------------------


def test_port_in_use(pair: Pair, target: Target) -> None:
    with socket_in(pair.a) as taken:
        taken.bind((pair.a.address, PORT))
        taken.listen()
        result = dump(pair.a, PID, "--address", pair.a.address, "--port", str(PORT))
    refused(result, 9, f"cannot listen at {pair.a.address}:{PORT}: Address already in use", "what to do", "--port")


@pytest.mark.parametrize("address", ["198.51.100.1", "no.such.host.invalid"])
def test_address_that_cannot_be_listened_at(pair: Pair, target: Target, address: str) -> None:
    refused(dump(pair.a, PID, "--address", address), 9, f"cannot listen at {address}:27027")


def test_nobody_at_the_address(pair: Pair) -> None:
    argv = [*postcopy_command(), "restore", "--lazy-pages", "--address", pair.a.address, "--port", "1", "--wait", "0.3"]
    refused(pair.b.run(argv, timeout=SECONDS), 7, f"nobody answers at {pair.a.address}:1", "start postcopy dump there")


def test_address_that_has_no_name(pair: Pair) -> None:
    argv = [*postcopy_command(), "restore", "--lazy-pages", "--address", "no.such.host.invalid", "--wait", "1"]
    refused(pair.b.run(argv, timeout=SECONDS), 7, "nobody answers at no.such.host.invalid:27027")


# -- the listening port ------------------------------------------------------------------------------------------------


@dataclass
class Listening:
    """A dump that listens, for all tests that talk to its port."""

    migration: Migration
    target: Target
    address: tuple[str, int]

    def call(self) -> socket.socket:
        """Connect to it."""
        caller = socket_in(self.migration.destination)
        caller.settimeout(SECONDS)
        caller.connect(self.address)
        return caller

    @property
    def log(self) -> str:
        """What it has logged."""
        return (self.migration.directory / "dump.err").read_text()

    def says(self, text: str, count: int = 1) -> None:
        """It logs this, so often, and listens on; the target has not noticed."""
        wait_until(lambda: self.log.count(text) >= count, SECONDS, f"dump logs {text!r}: {self.log}")
        assert "Traceback" not in self.log
        assert self.migration.dump.poll() is None, self.log
        assert self.migration.source.proc_state(PID) not in ("t", "T")

    def hangs_up(self, caller: socket.socket) -> bytes:
        """It closes the connection; what it has said before."""
        said = b""
        while True:
            try:
                more = caller.recv(65536)
            except ConnectionResetError:
                return said
            if not more:
                return said
            said += more


@pytest.fixture(scope="module")
def listening(pair: Pair, target: Target) -> Iterator[Listening]:
    """The dump; at the end a proper restore succeeds."""
    migration = start_dump(pair.a, pair.b, PID, port=PORT)
    yield Listening(migration, target, (pair.a.address, PORT))
    target.runs_on()
    start_restore(migration, port=PORT, timeout=SECONDS)
    migration.wait_drained(SECONDS)
    target.runs_on()
    assert {record.host for record in witness.records(target.log)} == {"alpha", "beta"}


def hello(body: bytes | Hello = b"", *, version: int = PROTOCOL_VERSION, length: int | None = None) -> bytes:
    """A HELLO frame, right or wrong."""
    content = encode(body) if isinstance(body, Hello) else body
    size = len(content) if length is None else length
    return HEADER.pack(MAGIC, version, Kind.HELLO, size) + content


CONTROL = Hello("control", b"")
WRONG = {
    "http": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "does not speak the postcopy protocol"),
    "tls": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), "does not speak the postcopy protocol"),
    "random": (random.Random(1).randbytes(4096), "does not speak the postcopy protocol"),
    "one-byte": (b"\0", "does not speak the postcopy protocol"),
    "another-version": (hello(CONTROL, version=9), f"speaks protocol version 9, this side {PROTOCOL_VERSION}"),
    "oversized": (hello(b"", length=(1 << 32) - 1), "a HELLO message of 4294967295 bytes"),
    "another-message": (HEADER.pack(MAGIC, PROTOCOL_VERSION, Kind.GO, 0), "it began with GO instead of HELLO"),
    "unknown-message": (HEADER.pack(MAGIC, PROTOCOL_VERSION, 999, 0), "unknown message 999"),
    "too-much": (hello(CONTROL) + b"more", "it said more than HELLO"),
    "random-body": (hello(random.Random(2).randbytes(200)), "dropped the connection"),
    "empty-body": (hello(b""), "dropped the connection"),
    "nested-body": (hello(b"\x91" * 60_000), "dropped the connection"),
    "unknown-channel": (hello(replace(CONTROL, channel="x")), "it asked for an unknown channel 'x'"),
    "another-session": (hello(Hello("bulk", bytes(16))), "it named a session that is not one of ours"),
    "architecture": (hello(replace(CONTROL, architecture="m68k")), "the destination's m68k"),
    "page-size": (hello(replace(CONTROL, page_size=65536)), "the destination's 65536"),
    "cpu": (hello(replace(CONTROL, cpu_features=[])), "the destination's CPU lacks features"),
}


@pytest.mark.parametrize("name", WRONG)
def test_listener_drops_who_says_something_wrong_and_goes_on(listening: Listening, name: str) -> None:
    content, expected = WRONG[name]
    already = listening.log.count(expected)
    with listening.call() as caller:
        caller.sendall(content)
        listening.hangs_up(caller)
    listening.says(expected, already + 1)


def test_peer_of_another_version_is_told_why(listening: Listening) -> None:
    with listening.call() as caller:
        caller.sendall(hello(CONTROL, version=7))
        said = listening.hangs_up(caller)
    kind, length = control.parse_header(said[: HEADER.size])
    assert (kind, length) == (Kind.FAILED, len(said) - HEADER.size)
    failed = control.parse_body(control.Failed, said[HEADER.size :])
    assert "version 7" in failed.message
    assert failed.hint


@pytest.mark.parametrize("length", [0, 3, 15, 30], ids=["nothing", "magic", "header", "body"])
def test_truncated_hello(listening: Listening, length: int) -> None:
    text = "it closed the connection before it had said hello"
    already = listening.log.count(text)
    with listening.call() as caller:
        caller.sendall(hello(CONTROL)[:length])
    listening.says(text, already + 1)


def test_connection_that_is_reset(listening: Listening) -> None:
    already = listening.log.count("dropped the connection")
    with listening.call() as caller:
        caller.sendall(MAGIC)
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    listening.says("dropped the connection", already + 1)


def test_silent_and_slow_clients_are_dropped_and_keep_nobody_waiting(listening: Listening) -> None:
    text = "it said nothing, or not enough, for too long"
    with listening.call() as silent, listening.call() as slow:
        slow.sendall(hello(CONTROL)[:10])
        with listening.call() as other:
            other.sendall(hello(CONTROL))
            assert other.recv(8) == MAGIC
        assert text not in listening.log
        silent.settimeout(GREETING_SECONDS * 3)
        slow.settimeout(GREETING_SECONDS * 3)
        listening.hangs_up(silent)
        listening.hangs_up(slow)
    listening.says(text, 2)
    listening.says("left before all its channels were there")


def test_hundred_connections_at_once(listening: Listening) -> None:
    callers = [listening.call() for _ in range(100)]
    try:
        with listening.call() as other:
            other.sendall(hello(CONTROL))
            assert other.recv(8) == MAGIC
        already = listening.log.count("dropped the connection")
        for caller in callers:
            caller.sendall(b"nonsense")
        listening.says("dropped the connection", already + 100)
    finally:
        for caller in callers:
            caller.close()


def test_second_destination_finds_nobody_once_one_is_connected(pair: Pair, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.programs.witness", "--alone", "--log", str(tmp_path / "log")]
    pair.a.popen(command, pid=PID + 20)
    wait_until(lambda: witness.records(tmp_path / "log"), SECONDS, "the program ticks")
    os.environ["POSTCOPY_PAUSE_AT"] = "prepared"
    try:
        migration = start_dump(pair.a, pair.b, PID + 20, port=PORT + 1)
    finally:
        del os.environ["POSTCOPY_PAUSE_AT"]
    first = start_restore(migration, port=PORT + 1, wait=False)
    wait_until(lambda: pair.a.proc_state(migration.dump.pid) == "T", SECONDS, "dump pauses")
    argv = [*postcopy_command(), "restore", "--lazy-pages", "--address", pair.a.address, "--port", str(PORT + 1)]
    refused(pair.b.run([*argv, "--wait", "0"], timeout=SECONDS), 7, "nobody answers")
    migration.dump.send_signal(18)
    migration.wait_drained(SECONDS)
    pair.b.kill(PID + 20, 15)
    assert first.wait(SECONDS) == 0
