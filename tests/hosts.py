"""Two hosts on one machine.

A `Host` is a set of network, PID, mount, UTS and IPC namespaces with a `/proc` of its own and an init (`host_init.py`)
that starts programs, reaps them and adopts orphans. A `Pair` is two of them joined by a veth pair. Both share the
machine's file systems, which is what a migration asks of two hosts. Closing a host kills everything in it.
"""

import contextlib
import itertools
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

T = TypeVar("T")
Stream = int | IO[Any] | None

HOST_INIT = Path(__file__).with_name("host_init.py")
DEVICE = "eth0"
# What reading a link of /proc says of a process that has just ended, or that has more capabilities than the test: none
# of a host's processes has.
FOREIGN = (FileNotFoundError, ProcessLookupError, PermissionError)
_pair_numbers = itertools.count(1)


def postcopy_command() -> list[str]:
    """The argv that starts the tool of this checkout."""
    return [sys.executable, "-m", "postcopy"]


def wait_until(condition: Callable[[], T], timeout: float = 10, what: str = "") -> T:
    """Ask ``condition`` until its answer is true; returns the answer.

    Raises TimeoutError after ``timeout`` seconds, with ``what`` (or the name of the condition) in its text.
    """
    deadline = time.monotonic() + timeout
    while not (answer := condition()):
        if time.monotonic() > deadline:
            name = what or getattr(condition, "__qualname__", str(condition))
            raise TimeoutError(f"not within {timeout} s: {name}")
        time.sleep(0.002)
    return answer


class Process:
    """A program started in a host; the child of that host's init."""

    def __init__(self, host: "Host", argv: Sequence[str], pid: int, pidfd: int, status_fd: int) -> None:
        self.host = host
        self.args = list(argv)
        self.pid = pid
        self.outer_pid = _pid_of(pidfd)
        self.pidfd = pidfd
        self.returncode: int | None = None
        self.stdin: IO[bytes] | None = None
        self.stdout: IO[bytes] | None = None
        self.stderr: IO[bytes] | None = None
        self._status_fd = status_fd

    def __repr__(self) -> str:
        return f"<{self.host.name}: PID {self.pid}, {' '.join(self.args)[:80]}>"

    def poll(self) -> int | None:
        """The exit status (negative: the signal that killed it), or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = 60) -> int:
        """Wait for the end; returns the exit status. Raises `subprocess.TimeoutExpired`."""
        if self.returncode is None:
            poller = select.poll()
            poller.register(self._status_fd, select.POLLIN)
            if not poller.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            status = os.read(self._status_fd, 4)
            # No status: the init died, and took everything in the host with it.
            self.returncode = struct.unpack("=i", status)[0] if status else -signal.SIGKILL
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal; ProcessLookupError when the process is gone."""
        signal.pidfd_send_signal(self.pidfd, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL, unless the process is gone already."""
        with contextlib.suppress(ProcessLookupError):
            self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Give back the descriptors that the test holds; the process lives on."""
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        for fd in (self.pidfd, self._status_fd):
            os.close(fd)


class Host:
    """One host. ``address`` is set once it is part of a `Pair`; ``proc`` is its `/proc` as the test can read it.

    PIDs and TIDs that nobody asks for begin at ``first_pid``.
    """

    def __init__(self, name: str, first_pid: int) -> None:
        self.name = name
        self.address = "127.0.0.1"
        self._processes: list[Process] = []
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        with theirs:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", str(HOST_INIT), str(theirs.fileno()), name, str(first_pid)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._init_pidfd = -1

    def _await_init(self) -> None:
        _, (self._init_pidfd,) = self._receive()
        self.init_pid = _pid_of(self._init_pidfd)
        self.proc = Path(f"/proc/{self.init_pid}/root/proc")
        paths = [f"/proc/{self.init_pid}/ns/{kind}" for kind in ("pid", "net", "mnt")]
        self._namespaces = set(map(os.readlink, paths))
        # As long as these are open, nobody else's namespaces get their numbers.
        self._numbers = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths]

    @classmethod
    def start(cls, *names: str) -> "list[Host]":
        """Start hosts side by side and wait until each can run programs. PermissionError without root.

        Each counts its PIDs from another multiple of 10000 on: so the threads of a moved program find their TIDs free,
        and so does what a test places at a lower PID.
        """
        if os.geteuid() != 0:
            raise PermissionError("test hosts are made of namespaces: run the tests as root")
        hosts = [cls(name, 10_000 * number) for number, name in enumerate(names, 1)]
        for host in hosts:
            host._await_init()
            host.run(["ip", "link", "set", "lo", "up"], check=True)
        return hosts

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<host {self.name}>"

    def popen(
        self,
        argv: Sequence[str],
        *,
        pid: int | None = None,
        stdin: Stream = None,
        stdout: Stream = None,
        stderr: Stream = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        new_session: bool = True,
        pass_fds: Sequence[int] = (),
    ) -> Process:
        """Start a program in this host.

        ``pid`` asks for that PID in the host's namespace (OSError with EEXIST when it is taken). A stream is /dev/null
        (None), a descriptor, a file, `subprocess.PIPE` or, for stderr, `subprocess.STDOUT`. The program gets 0, 1, 2
        and ``pass_fds`` (below 512, under their own numbers) and no other descriptor; its signals are all at default.
        Raises OSError when it cannot be started.
        """
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            ends = [_open_stream(stream, number, ours, theirs) for number, stream in enumerate((stdin, stdout, stderr))]
            if stderr == subprocess.STDOUT:
                ends[2] = (ends[1][0], None)
            status_read, status_write = os.pipe()
            theirs.callback(os.close, status_write)
            ours.callback(os.close, status_read)
            request = {
                "op": "spawn",
                "argv": list(argv),
                "env": dict(os.environ if env is None else env),
                "cwd": os.fspath(cwd or os.getcwd()),
                "pid": pid,
                "new_session": new_session,
                "targets": [0, 1, 2, *pass_fds],
            }
            answer, (pidfd,) = self._ask(request, [status_write, *(end for end, _ in ends), *pass_fds])
            process = Process(self, argv, answer["pid"], pidfd, status_read)
            process.stdin, process.stdout, process.stderr = (file for _, file in ends)
            ours.pop_all()
        self._processes.append(process)
        return process

    def run(
        self,
        argv: Sequence[str],
        *,
        input: bytes = b"",
        timeout: float = 60,
        check: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        pid: int | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a program in this host to its end, with its output captured; like `subprocess.run`."""
        with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            stdin.write(input)
            stdin.seek(0)
            process = self.popen(argv, pid=pid, stdin=stdin, stdout=stdout, stderr=stderr, env=env, cwd=cwd)
            try:
                code = process.wait(timeout)
            except BaseException:
                process.kill()
                raise
            stdout.seek(0)
            stderr.seek(0)
            result = subprocess.CompletedProcess(list(argv), code, stdout.read(), stderr.read())
        self._processes.remove(process)
        process.close()
        if check and result.returncode:
            raise AssertionError(f"{self.name}: {argv} ended with {code}: {result.stderr.decode(errors='replace')}")
        return result

    def pids(self) -> list[int]:
        """Every PID of this host, its init (1) and zombies among them."""
        return sorted(int(entry) for entry in os.listdir(self.proc) if entry.isdigit())

    def proc_state(self, pid: int) -> str | None:
        """The state letter of proc(5) ('R', 'S', 'T', 't', 'Z', …), None when there is no such process."""
        try:
            stat = (self.proc / str(pid) / "stat").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return stat.rpartition(b")")[2].split()[0].decode()

    def alive(self, pid: int) -> bool:
        """Whether ``pid`` exists and is no zombie."""
        return self.proc_state(pid) not in (None, "Z", "X")

    def outer_pid(self, pid: int) -> int:
        """The PID that process ``pid`` of this host has outside; ProcessLookupError when there is none."""
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(*FOREIGN):
                if os.readlink(f"/proc/{entry}/ns/pid") in self._namespaces and _inner_pid(int(entry)) == pid:
                    return int(entry)
        raise ProcessLookupError(f"{self.name} has no process {pid}")

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to any PID of this host, from its init; ProcessLookupError when there is none."""
        self._ask({"op": "kill", "pid": pid, "signal": int(number)})

    def orphan_status(self, pid: int) -> int | None:
        """The exit status of a process that this host adopted and reaped (not one of `popen`), None until then."""
        orphans: dict[str, int] = self._ask({"op": "orphans"})[0]["orphans"]
        return orphans.get(str(pid))

    def wait_until(self, condition: Callable[[], T], timeout: float = 10, what: str = "") -> T:
        """`wait_until` with the name of this host in the error."""
        return wait_until(condition, timeout, f"{self.name}: {what or getattr(condition, '__qualname__', condition)}")

    def remnants(self) -> list[int]:
        """Outer PIDs of every process that is in one of this host's namespaces."""
        left = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            for kind in ("pid", "net", "mnt"):
                with contextlib.suppress(*FOREIGN):
                    if os.readlink(f"/proc/{entry}/ns/{kind}") in self._namespaces:
                        left.append(int(entry))
                        break
        return left

    def close(self) -> None:
        """Kill everything in the host and wait until it is gone; AssertionError if something is left."""
        if self._init_pidfd == -1:
            self._supervisor.kill()
            self._supervisor.wait()
            self._control.close()
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._init_pidfd, signal.SIGKILL)
        # The init's end is seen only after the kernel has reaped the whole PID namespace (pid_namespaces(7)).
        self._supervisor.wait(30)
        for process in self._processes:
            process.close()
        self._control.close()
        os.close(self._init_pidfd)
        self._init_pidfd = -1
        left = self.remnants()
        for fd in self._numbers:
            os.close(fd)
        assert not left, f"processes {left} outlived host {self.name}"

    def _ask(self, request: dict[str, Any], fds: Sequence[int] = ()) -> tuple[dict[str, Any], list[int]]:
        socket.send_fds(self._control, [json.dumps(request).encode()], fds)
        answer, answer_fds = self._receive()
        if "errno" in answer:
            for fd in answer_fds:
                os.close(fd)
            raise OSError(answer["errno"], f"{self.name}: {answer['what']}")
        return answer, answer_fds

    def _receive(self) -> tuple[dict[str, Any], list[int]]:
        self._control.settimeout(30)
        message, fds, _, _ = socket.recv_fds(self._control, 1 << 20, 2, socket.MSG_CMSG_CLOEXEC)
        if not message:
            raise RuntimeError(f"the init of host {self.name} is gone")
        return json.loads(message), fds


class Pair:
    """Two hosts, ``a`` and ``b``, on one link; ``10.77.N.1`` and ``10.77.N.2``, with another N for each pair."""

    def __init__(self, names: tuple[str, str] = ("alpha", "beta")) -> None:
        self.a, self.b = Host.start(*names)
        number = next(_pair_numbers) % 256
        try:
            link = ["name", DEVICE, "netns", str(self.a.init_pid), "type", "veth", "peer", "name", DEVICE]
            subprocess.run(["ip", "link", "add", *link, "netns", str(self.b.init_pid)], check=True)
            for last, host in enumerate(self, 1):
                host.address = f"10.77.{number}.{last}"
                commands = f"addr add {host.address}/24 dev {DEVICE}\nlink set {DEVICE} up\n"
                host.run(["ip", "-batch", "-"], input=commands.encode(), check=True)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[Host]:
        return iter((self.a, self.b))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def set_rate(self, rate: str | None, *, burst: str = "128kb", latency: str = "50ms") -> None:
        """Give the link a rate in both directions (tc-tbf(8): ``1gbit``, ``200mbit``); None takes the limit away.

        ``latency`` is the longest a packet may wait in the queue: queue and rate together are what a fault waits
        behind. The limit counts from the next packet on, for connections that exist too.
        """
        for host in self:
            if rate is None:
                # Fails when there is no limit, which is what is wanted.
                host.run(["tc", "qdisc", "del", "dev", DEVICE, "root"])
                continue
            limit = ["tbf", "rate", rate, "burst", burst, "latency", latency]
            host.run(["tc", "qdisc", "replace", "dev", DEVICE, "root", *limit], check=True)

    def set_link(self, up: bool) -> None:
        """Plug the cable in or pull it: the device of ``a`` up or down, its address kept."""
        self.a.run(["ip", "link", "set", DEVICE, "up" if up else "down"], check=True)

    def close(self) -> None:
        """Close both hosts; AssertionError if something is left of either."""
        with contextlib.ExitStack() as stack:
            for host in self:
                stack.callback(host.close)


class Trio(Pair):
    """A pair and a third host ``c``, ``10.77.N.3``, in which the bridge is that joins them; ``service`` is an address
    that moves from host to host."""

    def __init__(self, names: tuple[str, str, str] = ("alpha", "beta", "gamma")) -> None:
        self.a, self.b, self.c = Host.start(*names)
        number = next(_pair_numbers) % 256
        self.service, self.service6 = f"10.77.{number}.100", f"fd77::{number:x}:100"
        try:
            for last, host in enumerate(self, 1):
                host.address = f"10.77.{number}.{last}"
                if host is self.c:
                    continue
                port = f"port{last}"
                link = ["name", DEVICE, "netns", str(host.init_pid), "type", "veth", "peer", "name", port]
                subprocess.run(["ip", "link", "add", *link, "netns", str(self.c.init_pid)], check=True)
            bridge = (
                f"link add {DEVICE} type bridge\nlink set port1 master {DEVICE} up\nlink set port2 master {DEVICE} up\n"
            )
            self.c.run(["ip", "-batch", "-"], input=bridge.encode(), check=True)
            for last, host in enumerate(self, 1):
                commands = f"addr add {host.address}/24 dev {DEVICE}\nlink set {DEVICE} up\n"
                commands += f"addr add fd77::{number:x}:{last}/64 dev {DEVICE} nodad\n"
                host.run(["ip", "-batch", "-"], input=commands.encode(), check=True)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[Host]:
        return iter((self.a, self.b, self.c))

    def add_service(self, host: Host) -> None:
        """Give ``host`` the addresses; nobody is told."""
        commands = f"addr add {self.service}/32 dev {DEVICE}\naddr add {self.service6}/128 dev {DEVICE} nodad\n"
        host.run(["ip", "-batch", "-"], input=commands.encode(), check=True)

    def check_announced(self, host: Host) -> None:
        """``c`` sends what is for the addresses to ``host``, as far as it has sent anything to them."""
        links = json.loads(host.run(["ip", "-json", "link", "show", DEVICE], check=True).stdout)
        known = json.loads(self.c.run(["ip", "-json", "neighbour", "show"], check=True).stdout)
        found = {each["dst"]: each.get("lladdr") for each in known if each["dst"] in (self.service, self.service6)}
        assert found and set(found.values()) == {links[0]["address"]}, (found, links)

    def remove_service(self, host: Host) -> None:
        """Take the addresses away."""
        commands = f"addr del {self.service}/32 dev {DEVICE}\naddr del {self.service6}/128 dev {DEVICE}\n"
        host.run(["ip", "-batch", "-"], input=commands.encode(), check=True)


def _pid_of(pidfd: int) -> int:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines())
    return int(fields["Pid"])


def _inner_pid(outer_pid: int) -> int:
    for line in Path(f"/proc/{outer_pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    return -1


def _open_stream(
    stream: Stream, number: int, ours: contextlib.ExitStack, theirs: contextlib.ExitStack
) -> tuple[int, IO[bytes] | None]:
    """The program's descriptor for a stream, and the test's end of it when that is a pipe."""
    if stream is None or stream == subprocess.STDOUT:
        fd = os.open(os.devnull, os.O_RDWR)
        theirs.callback(os.close, fd)
        return fd, None
    if stream == subprocess.PIPE:
        read, write = os.pipe()
        program_end, our_end, mode = (read, write, "wb") if number == 0 else (write, read, "rb")
        theirs.callback(os.close, program_end)
        return program_end, ours.enter_context(os.fdopen(our_end, mode))
    return (stream if isinstance(stream, int) else stream.fileno()), None
