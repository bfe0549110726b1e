"""The test hosts themselves: what every other test stands on."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hosts import Host, Pair, wait_until

LISTENER = """
import socket, sys
with socket.create_server((sys.argv[1], 27027)) as server:
    print("listening", flush=True)
    connection, _ = server.accept()
    with connection:
        while block := connection.recv(1 << 20):
            connection.sendall(len(block).to_bytes(8, "little"))
"""

SENDER = """
import socket, sys, time
size = int(sys.argv[2])
begin = time.monotonic()
with socket.create_connection((sys.argv[1], 27027)) as connection:
    connection.sendall(bytes(size))
    left = size
    while left:
        left -= int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "little")
print(time.monotonic() - begin)
"""


def send_across(hosts: Pair, size: int) -> float:
    """Seconds that ``size`` bytes need from ``b`` to ``a``."""
    listener = hosts.a.popen([sys.executable, "-c", LISTENER, hosts.a.address], stdout=subprocess.PIPE)
    assert listener.stdout is not None
    assert listener.stdout.readline() == b"listening\n"
    sender = hosts.b.run([sys.executable, "-c", SENDER, hosts.a.address, str(size)], check=True)
    assert listener.wait(10) == 0
    return float(sender.stdout)


def test_hosts_reach_each_other_over_tcp(hosts: Pair) -> None:
    assert send_across(hosts, 1000) < 5


def test_link_keeps_to_its_rate(hosts: Pair) -> None:
    hosts.set_rate("80mbit")
    # 10 MB/s, less headers; the burst and the receiver's last answer blur it a little.
    assert 0.35 < send_across(hosts, 4_000_000) < 2
    hosts.set_rate(None)
    assert send_across(hosts, 4_000_000) < 0.3


def test_pulled_cable_stops_the_link(hosts: Pair) -> None:
    probe = [sys.executable, "-c", f"import socket; socket.create_connection(({hosts.a.address!r}, 1), timeout=0.2)"]
    assert b"ConnectionRefusedError" in hosts.b.run(probe).stderr
    hosts.set_link(False)
    assert b"ConnectionRefusedError" not in hosts.b.run(probe).stderr
    hosts.set_link(True)
    assert b"ConnectionRefusedError" in hosts.b.run(probe).stderr


def test_hosts_have_names_pids_and_networks_of_their_own(hosts: Pair) -> None:
    program = [sys.executable, "-c", "import os; print(os.uname().nodename, os.getpid(), os.readlink('/proc/self'))"]
    assert hosts.a.run(program, pid=500).stdout == b"alpha 500 500\n"
    assert hosts.b.run(program, pid=500).stdout == b"beta 500 500\n"
    namespaces = [sys.executable, "-c", "import os; print(*(os.readlink(f'/proc/self/ns/{k}') for k in ('net','mnt')))"]
    here = " ".join(os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "mnt")).encode() + b"\n"
    assert len({hosts.a.run(namespaces).stdout, hosts.b.run(namespaces).stdout, here}) == 3


def test_pids_that_nobody_chose_never_collide(hosts: Pair) -> None:
    threads = "import threading; t = threading.Thread(); t.start(); print(t.native_id)"
    own = [int(host.run([sys.executable, "-c", threads], pid=500).stdout) for host in hosts]
    assert own[0] // 10_000 == 1 and own[1] // 10_000 == 2, own


def test_pairs_coexist() -> None:
    with Pair() as one, Pair() as other:
        assert one.a.address != other.a.address
        assert send_across(one, 1000) < 5
        assert send_across(other, 1000) < 5


def test_exit_status_and_killing_signal_reach_the_test(host: Host) -> None:
    assert host.popen(["sh", "-c", "exit 7"]).wait(10) == 7
    sleeper = host.popen(["sleep", "1000"])
    assert sleeper.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        sleeper.wait(0.01)
    sleeper.kill()
    assert sleeper.wait(10) == -signal.SIGKILL
    assert sleeper.poll() == -signal.SIGKILL


def test_pid_can_be_chosen_once(host: Host) -> None:
    first = host.popen(["sleep", "1000"], pid=4321)
    assert first.pid == 4321
    assert host.outer_pid(4321) == first.outer_pid
    with pytest.raises(OSError) as refusal:
        host.popen(["sleep", "1000"], pid=4321)
    assert refusal.value.errno == errno.EEXIST
    first.kill()
    first.wait(10)
    assert host.popen(["sleep", "1000"], pid=4321).pid == 4321


def test_missing_program_is_an_error_of_popen(host: Host) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        host.popen(["/no-such-program"])
    assert host.run(["true"]).returncode == 0


def test_program_gets_its_streams_and_no_other_descriptor(host: Host) -> None:
    program = (
        "import os; print({int(fd): os.readlink(f'/proc/self/fd/{fd}') for fd in '012'}, os.listdir('/proc/self/fd'))"
    )
    process = host.popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    words = process.stdout.read().decode()
    # 3 is the descriptor of the listing itself.
    assert "0: '/dev/null'" in words and "2: '/dev/null'" in words and words.endswith("['0', '1', '2', '3']\n"), words


def test_passed_descriptors_keep_their_numbers(host: Host) -> None:
    read, write = os.pipe()
    spare = os.dup2(write, 77, inheritable=False)
    program = "import os; os.write(77, b'through 77'); print(sorted(os.listdir('/proc/self/fd'), key=int))"
    result = host.popen([sys.executable, "-c", program], stdout=subprocess.PIPE, pass_fds=[spare])
    os.close(write)
    os.close(spare)
    assert os.read(read, 100) == b"through 77"
    assert os.read(read, 100) == b""
    os.close(read)
    assert result.stdout is not None and result.stdout.read() == b"['0', '1', '2', '3', '77']\n"


def test_streams_can_be_crossed_with_the_standard_ones(host: Host, tmp_path: Path) -> None:
    with open(tmp_path / "both", "wb") as both:
        host.popen(["sh", "-c", "echo out; echo err >&2"], stdout=both, stderr=subprocess.STDOUT).wait(10)
    assert (tmp_path / "both").read_text() == "out\nerr\n"
    assert host.run(["cat"], input=b"in").stdout == b"in"


def test_program_leads_its_session_with_default_signals(host: Host) -> None:
    program = """
import os, signal
print(os.getsid(0) == os.getpgid(0) == os.getpid())
print([line for line in open('/proc/self/status') if line.startswith(('SigBlk', 'SigPnd'))])
"""
    lines = host.run([sys.executable, "-c", program]).stdout.decode()
    assert lines.startswith("True\n") and lines.count("0000000000000000") == 2, lines
    # A shell keeps a SIGPIPE that was ignored before it started ignored: then this loop would end with an error.
    pipe = host.run(["bash", "-c", "yes | head -1 >/dev/null; echo ${PIPESTATUS[0]}"])
    assert pipe.stdout == b"141\n"


def test_states_of_processes(host: Host) -> None:
    sleeper = host.popen(["sleep", "1000"])
    host.wait_until(lambda: host.proc_state(sleeper.pid) == "S")
    assert host.alive(sleeper.pid) and sleeper.pid in host.pids()
    host.kill(sleeper.pid, signal.SIGSTOP)
    host.wait_until(lambda: host.proc_state(sleeper.pid) == "T")
    sleeper.kill()
    assert sleeper.wait(10) == -signal.SIGKILL
    assert host.proc_state(sleeper.pid) is None and not host.alive(sleeper.pid)
    with pytest.raises(ProcessLookupError):
        host.kill(sleeper.pid)
    with pytest.raises(ProcessLookupError):
        host.outer_pid(sleeper.pid)


def test_orphans_are_adopted_and_reaped(host: Host) -> None:
    parent = host.run(["sh", "-c", "(read line </proc/1/comm; exec sh -c 'kill -TERM $$') & echo $!"])
    orphan = int(parent.stdout)
    assert wait_until(lambda: host.orphan_status(orphan), what="the orphan is reaped") == -signal.SIGTERM
    assert host.pids() == [1]


def test_closing_a_host_leaves_nothing(tmp_path: Path) -> None:
    with Pair() as hosts:
        stubborn = "trap '' TERM INT HUP; sh -c 'setsid sleep 1000' & echo > $0; wait"
        processes = [host.popen(["sh", "-c", stubborn, str(tmp_path / host.name)]) for host in hosts]
        for host in hosts:
            wait_until((tmp_path / host.name).exists)
        wait_until(lambda: all(len(host.remnants()) >= 4 for host in hosts))
    assert [host.remnants() for host in hosts] == [[], []]
    assert all(not Path(f"/proc/{process.outer_pid}").exists() for process in processes)


def test_host_dies_with_the_test_process(tmp_path: Path) -> None:
    program = """
import os, signal
from tests.hosts import Host
(host,) = Host.start("doomed")
print(host.popen(["sleep", "1000"]).outer_pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    result = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, timeout=30)
    sleeper = Path(f"/proc/{int(result.stdout)}")
    wait_until(lambda: not sleeper.exists(), what="the sleeper of the dead test is gone")


def test_wait_until_has_a_deadline() -> None:
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match="pigs fly"):
        wait_until(lambda: False, 0.05, "pigs fly")
    assert time.monotonic() - begin < 5
    assert wait_until(lambda: socket.AF_UNIX) == socket.AF_UNIX
