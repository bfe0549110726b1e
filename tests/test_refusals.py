"""What cannot be moved yet: one error lists all of it, with what to do, before anything is frozen."""

import os
import signal
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec import structs

from postcopy.dump_side import filesystem, lineage
from postcopy.dump_side.survey import survey
from postcopy.kernel import procfs
from postcopy.restore_side import manifest as manifests
from postcopy.state import FileIdentity, Manifest
from tests.hosts import Host, Pair, Process, postcopy_command, wait_until
from tests.migrate import start_dump, start_restore
from tests.programs import immovable, witness

PID = 8000
PORT = 27400
SECONDS = 20


def dump(host: Host, pid: int, *options: str) -> subprocess.CompletedProcess[bytes]:
    """Run dump to its end; what it says goes to standard output too."""
    argv = [*postcopy_command(), "dump", "--lazy-pages", "--json", "-t", str(pid), *options]
    result = host.run(argv, timeout=SECONDS)
    assert b"Traceback" not in result.stderr, result.stderr.decode()
    assert b"frozen" not in result.stdout
    assert host.proc_state(pid) not in ("t", "T")
    return result


def start_witness(host: Host, pid: int, log: Path) -> Process:
    """A program that would notice."""
    command = [sys.executable, "-m", "tests.programs.witness", "--alone", "--log", str(log)]
    program = host.popen(command, pid=pid)
    wait_until(lambda: witness.records(log), SECONDS, "the program ticks")
    return program


def runs_on(log: Path) -> None:
    """The program goes on and has noticed nothing."""
    before = len(witness.records(log))
    wait_until(lambda: len(witness.records(log)) > before + 5, SECONDS, "the program goes on")
    found = witness.records(log)
    assert not [record.wrong for record in found if record.wrong]
    assert [record.number for record in found] == list(range(1, len(found) + 1))


# -- what the survey finds ---------------------------------------------------------------------------------------------


@dataclass
class Refusal:
    """The program that has everything, and what dump says of it."""

    made: list[str]
    code: int
    said: list[str]


@pytest.fixture(scope="module")
def refusal(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Refusal:
    """Ask dump once."""
    directory = tmp_path_factory.mktemp("immovable")
    ready = directory / "ready"
    program = pair.a.popen([sys.executable, "-m", "tests.programs.immovable", str(directory), str(ready)], pid=PID)
    wait_until(lambda: ready.exists() or program.poll() is not None, SECONDS, "the program is ready")
    result = dump(pair.a, PID)
    assert pair.a.alive(PID)
    program.kill()
    return Refusal(ready.read_text().split(), result.returncode, result.stderr.decode().splitlines())


def test_one_error_lists_everything(refusal: Refusal) -> None:
    assert refusal.code == 5
    head, *problems = refusal.said
    assert f"process {PID} (python) cannot be moved:" in head
    assert all(" ERROR   - " in problem for problem in problems), refusal.said
    assert len(problems) >= len(refusal.made)


@pytest.mark.parametrize("kind", immovable.KINDS, ids=lambda kind: kind.__name__)
def test_kind_is_refused(refusal: Refusal, kind: object) -> None:
    name = getattr(kind, "__name__", "")
    if name not in refusal.made:
        pytest.skip("this kernel has none")
    expected = immovable.KINDS[kind]  # type: ignore[index]
    assert [line for line in refusal.said if expected in line], refusal.said


def test_process_outside_of_the_tree_in_its_pid_namespace(pair: Pair) -> None:
    program = pair.a.popen(["unshare", "--pid", "--fork", "--mount-proc", "sleep", "1000"])
    children = pair.a.proc / f"{program.pid}/task/{program.pid}/children"
    wait_until(lambda: children.read_text(), SECONDS, "the init is there")
    init = int(children.read_text())
    wait_until(lambda: (pair.a.proc / f"{init}/comm").read_text() == "sleep\n", SECONDS, "it sleeps")
    stranger = pair.a.popen(["nsenter", "--target", str(init), "--pid", "sleep", "1000"])
    children = pair.a.proc / f"{stranger.pid}/task/{stranger.pid}/children"
    wait_until(lambda: children.read_text(), SECONDS, "somebody has entered")
    result = dump(pair.a, program.pid)
    assert result.returncode == 5, result.stderr
    assert f"process {children.read_text().strip()} lives in its PID namespace".encode() in result.stderr
    for each in (stranger, program):
        each.kill()


def test_unix_connection_to_a_process_that_is_not_moved(pair: Pair, tmp_path: Path) -> None:
    path, ready = str(tmp_path / "listening"), tmp_path / "connected"
    serve = f"import socket; s = socket.socket(1); s.bind({path!r}); s.listen(); c = s.accept(); print(flush=True)"
    server = pair.a.popen([sys.executable, "-c", f"{serve}; s.accept()"], stdout=subprocess.PIPE)
    wait_until(lambda: os.path.exists(path), SECONDS, "the server listens")
    use = f"import os, socket, time; s = socket.socket(1); s.connect({path!r}); os.mkdir({str(ready)!r})"
    client = pair.a.popen([sys.executable, "-c", f"{use}; time.sleep(1000)"])
    assert server.stdout is not None
    server.stdout.readline()
    wait_until(ready.exists, SECONDS, "the client is connected")
    for pid, other in ((client.pid, server.pid), (server.pid, client.pid)):
        result = dump(pair.a, pid)
        assert result.returncode == 5, result.stderr
        said = result.stderr.decode()
        assert "a Unix stream socket connected to socket:[" in said
        assert f"of process {other}, which is not moved along" in said
    for program in (client, server):
        program.kill()


def test_program_of_32_bits(pair: Pair, tmp_path: Path) -> None:
    # mov eax, 29 (pause); int 0x80; jmp to the beginning
    code = bytes.fromhex("b81d000000 cd80 ebf7")
    header = (
        b"\x7fELF\x01\x01\x01"
        + bytes(9)
        + struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, 0x8048054, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    )
    segment = struct.pack("<8I", 1, 0, 0x8048000, 0x8048000, 84 + len(code), 84 + len(code), 5, 4096)
    path = tmp_path / "small"
    path.write_bytes(header + segment + code)
    path.chmod(0o755)
    try:
        program = pair.a.popen([str(path)])
    except OSError as error:
        pytest.skip(f"this kernel runs no 32-bit programs: {error.strerror}")
    wait_until(lambda: pair.a.proc_state(program.pid) == "S", SECONDS, "the program waits")
    result = dump(pair.a, program.pid)
    assert result.returncode == 5, result.stderr
    assert b"it is a 32-bit program" in result.stderr
    program.kill()


def test_program_in_another_user_namespace(pair: Pair) -> None:
    unshare = "from postcopy.kernel.libc import syscall; syscall('unshare', 272, 0x10000000)"
    command = f"import time; {unshare}; print(flush=True); time.sleep(1000)"
    program = pair.a.popen([sys.executable, "-c", command], stdout=subprocess.PIPE)
    assert program.stdout is not None
    program.stdout.readline()
    result = dump(pair.a, program.pid)
    assert result.returncode == 5, result.stderr
    assert b"it lives in another user namespace" in result.stderr
    program.kill()


def test_what_comes_after_the_survey_is_found_before_the_freeze(pair: Pair, tmp_path: Path) -> None:
    log = tmp_path / "log"
    start_witness(pair.a, PID + 20, log)
    migration = start_dump(pair.a, pair.b, PID + 20, port=PORT)
    # A lock counts as the process's, whoever has taken it by the shared description.
    take = f"import fcntl, os, time; from postcopy.kernel import pidfd; fd = pidfd.getfd(os.pidfd_open({PID + 20}), 3)"
    path = next(iter((pair.a.proc / str(PID + 20) / "fd").glob("3")))
    assert path.exists()
    locker = pair.a.popen(
        [sys.executable, "-c", f"{take}; fcntl.flock(fd, fcntl.LOCK_EX); print(flush=True); time.sleep(1000)"],
        stdout=subprocess.PIPE,
    )
    assert locker.stdout is not None
    locker.stdout.readline()
    restore = start_restore(migration, port=PORT, wait=False)
    assert (migration.dump.wait(SECONDS), restore.wait(SECONDS)) == (5, 10)
    logs = dict(migration.logs())
    assert "it has file locks or leases" in logs["dump on alpha, stderr"]
    assert "gave up" in logs["restore on beta, stderr"]
    assert "frozen" not in logs["dump on alpha, stdout"]
    locker.kill()
    runs_on(log)
    pair.a.kill(PID + 20)


# -- what the destination finds ----------------------------------------------------------------------------------------


def test_destination_lists_everything_and_both_sides_say_so(pair: Pair, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    log, pid = tmp_path / "log", PID + 40
    for name in ("missing", "shorter"):
        (own / name).write_bytes(bytes(5000))
    files = f"open({str(own / 'missing')!r}), mmap.mmap(os.open({str(own / 'shorter')!r}, 0), 0, access=1)"
    module = "sys.argv = sys.argv[1:]; runpy.run_module('tests.programs.witness', run_name='__main__', alter_sys=True)"
    command = f"import mmap, os, runpy, sys; kept = [{files}]; {module}"
    program = pair.a.popen([sys.executable, "-c", command, "x", "--alone", "--log", str(log)], pid=pid)
    wait_until(lambda: witness.records(log), SECONDS, "the program ticks")
    tids = sorted(int(entry.name) for entry in (pair.a.proc / str(pid) / "task").iterdir())
    takers = [pair.b.popen(["sleep", "1000"], pid=tid) for tid in tids[:2]]
    pair.b.run(["mount", "-t", "tmpfs", "none", str(own)], check=True)
    (pair.b.proc.parent / str(own).lstrip("/") / "shorter").write_bytes(bytes(100))
    try:
        before = set(pair.b.pids())
        migration = start_dump(pair.a, pair.b, pid, port=PORT + 1)
        restore = start_restore(migration, port=PORT + 1, wait=False)
        assert (migration.dump.wait(SECONDS), restore.wait(SECONDS)) == (5, 5), migration.logs()
        logs = dict(migration.logs())
        for text in (logs["dump on alpha, stderr"], logs["restore on beta, stderr"]):
            assert f"PID {pid} is taken here: end that process, or restore with --new-pid-namespace" in text
            assert f"TID {tids[1]} is taken here" in text
            assert f"file {own}/missing is missing here" in text
            assert f"file {own}/shorter has 100 bytes here and 5000 at the source: copy it" in text
            assert "Traceback" not in text
        assert "the destination cannot take it" in logs["dump on alpha, stderr"]
        assert f"process {pid} (python) cannot be restored here" in logs["restore on beta, stderr"]
        assert "frozen" not in logs["dump on alpha, stdout"]
        assert set(pair.b.pids()) <= before
    finally:
        pair.b.run(["umount", str(own)])
        for taker in takers:
            taker.kill()
            taker.wait()
    runs_on(log)
    program.kill()


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    """The manifest of a process here, that this very host can take but for its PID."""
    null = subprocess.DEVNULL
    with subprocess.Popen(["sleep", "1000"], stdin=null, stdout=null, stderr=null) as process:
        try:
            wait_until(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n", SECONDS, "sleep runs")
            return survey(process.pid)[0]
        finally:
            process.send_signal(signal.SIGKILL)


def test_thread_that_is_just_ending_is_no_reason_to_refuse() -> None:
    churn = """
import threading
print(flush=True)
while True:
    threads = [threading.Thread(target=int) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""
    with subprocess.Popen([sys.executable, "-c", churn], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            found = [problem for _ in range(2000) for problem in lineage.problems(process.pid)]
        finally:
            process.kill()
    assert found == []


def test_manifest_of_the_same_host_has_no_problems(manifest: Manifest) -> None:
    assert manifests.problems(manifest, new_pid_namespace=True) == []


def test_another_vdso(manifest: Manifest) -> None:
    vdso = bytearray(manifest.vdso)
    vdso[0x600] ^= 1
    (problem,) = manifests.problems(structs.replace(manifest, vdso=bytes(vdso)), new_pid_namespace=True)
    assert problem == "this kernel's vdso differs from the source's: use the same kernel on both hosts"


def test_tail_of_the_vdso_means_nothing(manifest: Manifest) -> None:
    # A dump that was killed may have left the executor's stub there.
    vdso = manifest.vdso[:-16] + b"\xcc" * 16
    assert manifests.problems(structs.replace(manifest, vdso=vdso), new_pid_namespace=True) == []


def test_another_register_state(manifest: Manifest) -> None:
    other = structs.replace(manifest, xsave_size=manifest.xsave_size + 64)
    (problem,) = manifests.problems(other, new_pid_namespace=True)
    assert "the CPU's register state" in problem


def test_file_of_another_build(manifest: Manifest) -> None:
    program = os.path.realpath("/bin/sleep")
    size = os.stat(program).st_size
    other = structs.replace(manifest, files=[FileIdentity(program, size, b"another", changing=False)])
    (problem,) = manifests.problems(other, new_pid_namespace=True)
    assert problem == f"file {program} is of another build here: install the same package version"


def test_pid_above_the_limit(manifest: Manifest) -> None:
    most = int(Path("/proc/sys/kernel/pid_max").read_text())
    other = structs.replace(manifest, pid=most, tids=[most])
    (problem,) = manifests.problems(other, new_pid_namespace=False)
    assert problem == f"PID {most} is above this host's pid_max of {most}: raise kernel.pid_max"


def test_process_that_ends_while_its_directories_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    status = procfs.status
    monkeypatch.setattr(procfs, "status", lambda pid: {k: v for k, v in status(pid).items() if k != "Umask"})
    with pytest.raises(ProcessLookupError):
        filesystem.collect(os.getpid(), [])
