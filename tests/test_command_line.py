"""What the options do, what the commands say, and what they end with."""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from postcopy.cli import app
from tests.hosts import DEVICE, Host, Pair, Process, postcopy_command, wait_until
from tests.migrate import Migration, move, start_dump, start_restore
from tests.programs import witness

PID = 9000
PORT = 27500
SECONDS = 20


@pytest.fixture
def empty(pair: Pair) -> Iterator[Pair]:
    """The two hosts, with nothing in them afterwards."""
    yield pair
    for host in pair:
        for pid in set(host.pids()) - {1}:
            with contextlib.suppress(ProcessLookupError):
                host.kill(pid)
        wait_until(lambda host=host: host.pids() == [1], SECONDS, "the host is empty")  # type: ignore[misc]


class Program:
    """A witness on a host, and its log."""

    def __init__(self, host: Host, directory: Path, *, pid: int = PID, exit_status: int | None = None) -> None:
        self.log = directory / "witness.log"
        command = [sys.executable, "-m", "tests.programs.witness", "--alone", "--log", str(self.log)]
        with open(directory / "witness.err", "wb") as errors:
            self.process: Process = host.popen(command, pid=pid, stderr=errors)
        wait_until(lambda: witness.records(self.log), SECONDS, "the program ticks")

    def ticks_on(self, host: str) -> None:
        """It runs on that host, and has found nothing wrong."""
        before = len(witness.records(self.log))
        wait_until(lambda: len(witness.records(self.log)) > before + 5, SECONDS, "the program goes on")
        found = witness.records(self.log)
        assert not [record.wrong for record in found if record.wrong]
        assert [record.number for record in found] == list(range(1, len(found) + 1))
        assert found[-1].host == host


@pytest.fixture
def program(empty: Pair, tmp_path: Path) -> Program:
    """A program on the first host."""
    return Program(empty.a, tmp_path)


def no_traceback(migration: Migration) -> None:
    """Neither command fell over."""
    for title, text in migration.logs():
        assert "Traceback" not in text, f"{title}: {text}"


# -- usage -------------------------------------------------------------------------------------------------------------

WRONG = {
    "no command": ([], "Usage"),
    "unknown command": (["migrate"], "No such command"),
    "no pid": (["dump", "--lazy-pages"], "-t"),
    "pid 0": (["dump", "--lazy-pages", "-t", "0"], "-t"),
    "pid that is no number": (["dump", "--lazy-pages", "-t", "init"], "-t"),
    "unknown option": (["dump", "--lazy-pages", "-t", "1", "--fast"], "--fast"),
    "port too high": (["dump", "--lazy-pages", "-t", "1", "--port", "65536"], "--port"),
    "port that is no number": (["restore", "--lazy-pages", "--port", "http"], "--port"),
    "timeout 0": (["dump", "--lazy-pages", "-t", "1", "--timeout", "0"], "--timeout"),
    "timeout without end": (["dump", "--lazy-pages", "-t", "1", "--timeout", "inf"], "--timeout"),
    "delay without end": (["restore", "--lazy-pages", "--idle-delay", "inf"], "--idle-delay"),
    "address that is no name": (["restore", "--lazy-pages", "--wait", "0", "--address", "a..b"], "a..b"),
    "unknown background": (["restore", "--lazy-pages", "--background", "lazy"], "--background"),
    "negative delay": (["restore", "--lazy-pages", "--idle-delay", "-1"], "--idle-delay"),
    "status-fd that is no number": (["dump", "--lazy-pages", "-t", "1", "--status-fd", "x"], "--status-fd"),
    "status-fd that is not open": (["dump", "--lazy-pages", "-t", "1", "--status-fd", "77"], "--status-fd"),
    "log file in no directory": (["dump", "--lazy-pages", "-t", "1", "-o", "/nowhere/log"], "/nowhere/log"),
    "log file that is a directory": (["restore", "--lazy-pages", "-o", "/tmp"], "/tmp"),
    "pidfile in no directory": (["restore", "--lazy-pages", "--wait", "0", "--pidfile", "/nowhere/pid"], "/nowhere"),
    "surplus argument": (["restore", "--lazy-pages", "extra"], "extra"),
    "dump, nothing lazy": (["dump", "-t", "1"], "--lazy-pages"),
    "restore, nothing lazy": (["restore"], "--lazy-pages"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_usage_is_told_without_a_traceback(name: str) -> None:
    arguments, expected = WRONG[name]
    environment = {**os.environ, "COLUMNS": "200", "TERM": "dumb"}
    result = subprocess.run([*postcopy_command(), *arguments], capture_output=True, timeout=SECONDS, env=environment)
    said = (result.stdout + result.stderr).decode()
    assert "Traceback" not in said, said
    assert result.returncode == 2, said
    assert expected in said, said


@pytest.mark.parametrize("command", [[], ["dump"], ["restore"]], ids=["postcopy", "dump", "restore"])
def test_help(command: list[str]) -> None:
    for option in ("-h", "--help"):
        result = subprocess.run([*postcopy_command(), *command, option], capture_output=True, timeout=SECONDS)
        assert result.returncode == 0
        assert b"Usage" in result.stdout


@pytest.mark.parametrize("column", ["dump", "restore", "serve", "check"])
def test_readme_names_every_option_of_a_command(column: str) -> None:
    lines = (Path(__file__).parent.parent / "README.md").read_text().splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("| option "))
    columns = [name.strip() for name in lines[head].split("|")]
    named: set[str] = set()
    for line in lines[head + 2 : lines.index("", head)]:
        cells = line.replace("\\|", "/").split("|")
        if cells[columns.index(column)].strip():
            named |= set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", "|".join(cells[1:2])))
    command = typer.main.get_command(app).commands[column]  # type: ignore[attr-defined]
    there = {name for parameter in command.params for name in parameter.opts}
    # Named where it is explained what it belongs to.
    assert there - {"--idle-delay"} == named


# -- what is told ------------------------------------------------------------------------------------------------------


def test_events_of_both_sides(empty: Pair, program: Program) -> None:
    migration = move(empty.a, empty.b, PID, port=PORT)
    migration.wait_drained(SECONDS)
    program.ticks_on("beta")
    assert migration.restore is not None
    empty.b.kill(PID, signal.SIGTERM)
    assert migration.restore.wait(SECONDS) == 0
    own, other = migration.dump_events, migration.restore_events
    steps = ["listening", "connected", "surveyed", "prepared", "drafted"]
    steps += ["frozen", "collected", "state", "ready", "stopped"]
    ends = ["resumed", "drained", "killed", "statistics"]
    assert [event["event"] for event in own if event["event"] != "progress"] == steps + ends
    steps = ["connected", "checked", "born", "received", "built", "running", "drained", "statistics", "exited"]
    assert [event["event"] for event in other if event["event"] != "progress"] == steps
    for events in (own, other):
        times = [event["elapsed_s"] for event in events]
        assert times == sorted(times)
    figures = next(event for event in own if event["event"] == "statistics")
    assert 0 < figures["standstill_ns"] < 10e9
    assert figures["drain_ns"] > 0
    assert figures["bytes_boot"] > 0
    left = next(event for event in other if event["event"] == "running")["lazy_pages"]
    assert figures["bytes_demand"] + figures["bytes_bulk"] <= left * 4096
    assert other[-1]["status"] == 0
    no_traceback(migration)


def test_log_file_takes_what_standard_error_would(empty: Pair, program: Program, tmp_path: Path) -> None:
    logs = [tmp_path / "dump.log", tmp_path / "restore.log"]
    migration = move(
        empty.a,
        empty.b,
        PID,
        port=PORT,
        dump_options=("-o", str(logs[0])),
        restore_options=("--log-file", str(logs[1])),
    )
    migration.wait_drained(SECONDS)
    empty.b.kill(PID, signal.SIGTERM)
    assert migration.restore is not None
    assert migration.restore.wait(SECONDS) == 0
    assert {text for title, text in migration.logs() if title.endswith("stderr")} == {""}


def run_pair(pair: Pair, *options: str) -> tuple[str, str, str, str]:
    """Both commands to the end of the program, as a user starts them: what they say on their streams."""
    address = ["--lazy-pages", "--address", pair.a.address, "--port", str(PORT)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    source = pair.a.popen([*postcopy_command(), "dump", *address, "-t", str(PID), *options], **streams)  # type: ignore[arg-type]
    destination = pair.b.popen([*postcopy_command(), "restore", *address, *options], **streams)  # type: ignore[arg-type]
    assert source.wait(SECONDS) == 0
    pair.b.kill(PID, signal.SIGTERM)
    assert destination.wait(SECONDS) == 0
    found = []
    for process in (source, destination):
        assert process.stdout is not None
        assert process.stderr is not None
        found += [process.stdout.read().decode(), process.stderr.read().decode()]
    return found[0], found[1], found[2], found[3]


def test_log_lines_for_people(empty: Pair, program: Program) -> None:
    out, err, other_out, other_err = run_pair(empty)
    assert (out, other_out) == ("", "")
    assert f"listening at {empty.a.address}:{PORT} for a destination of process {PID} (python)" in err
    assert "the program runs at the destination" in err
    assert "stand-still" in err
    assert f"process {PID} runs here now" in other_err
    assert f"process {PID} ended with status 0" in other_err
    assert " INFO " in err
    assert " DEBUG " not in err + other_err


def test_statistics_as_a_table(empty: Pair, program: Program) -> None:
    _, err, _, other_err = run_pair(empty, "--display-stats")
    for text in (err, other_err):
        labels = [line.split("  ")[0] for line in text.splitlines() if not line.startswith("20")]
        wanted = ["until the last page", "faults served", "fault latency", "bytes, boot set", "bytes, demand"]
        assert labels[-len(wanted) - 2 : -2] == wanted, text
    assert "\nstand-still " in err


def test_status_fd_gets_one_nul_byte_and_its_end(empty: Pair, program: Program) -> None:
    address = ["--lazy-pages", "--address", empty.a.address, "--port", str(PORT)]
    said = []
    source, source_ready = with_status(empty.a, ["dump", *address, "-t", str(PID)])
    said.append(os.read(source_ready, 1))
    assert empty.a.proc_state(PID) not in ("t", "T")
    destination, destination_ready = with_status(empty.b, ["restore", *address])
    said.append(os.read(destination_ready, 1))
    program.ticks_on("beta")
    assert source.wait(SECONDS) == 0
    assert said == [b"\0", b"\0"]
    assert os.read(source_ready, 10) == b""
    empty.b.kill(PID)
    assert destination.wait(SECONDS) == 128 + signal.SIGKILL
    assert os.read(destination_ready, 10) == b""


def with_status(host: Host, arguments: list[str]) -> tuple[Process, int]:
    """Start a command with a status descriptor; the read end."""
    read_end, write_end = os.pipe()
    try:
        argv = [*postcopy_command(), *arguments, "--status-fd", str(write_end)]
        return host.popen(argv, pass_fds=[write_end]), read_end
    finally:
        os.close(write_end)


# -- how it ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "status"),
    [("os._exit(3)", 3), ("os.kill(os.getpid(), 6)", 128 + 6), ("os.kill(os.getpid(), 9)", 128 + 9), ("", 0)],
    ids=["exit-3", "abort", "kill", "end"],
)
def test_exit_status_is_passed_on(empty: Pair, tmp_path: Path, ending: str, status: int) -> None:
    go, ready = tmp_path / "go", tmp_path / "ready"
    wait = (
        f"import os, time; open({str(ready)!r}, 'w').close()\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)"
    )
    empty.a.popen([sys.executable, "-c", f"{wait}\n{ending}"], pid=PID)
    wait_until(ready.exists, SECONDS, "the program is ready")
    migration = move(empty.a, empty.b, PID, port=PORT)
    go.touch()
    assert migration.restore is not None
    assert migration.restore.wait(SECONDS) == status
    migration.wait_drained(SECONDS)
    assert migration.restore_events[-1]["event"] == "exited"
    assert migration.restore_events[-1]["status"] == status


def test_signals_to_restore_go_to_the_program(empty: Pair, program: Program) -> None:
    migration = move(empty.a, empty.b, PID, port=PORT)
    migration.wait_drained(SECONDS)
    assert migration.restore is not None
    migration.restore.send_signal(signal.SIGINT)
    program.ticks_on("beta")
    migration.restore.send_signal(signal.SIGTERM)
    assert migration.restore.wait(SECONDS) == 0
    program_ends_with(program, "beta")


def program_ends_with(program: Program, host: str) -> None:
    """Its last record came from there, and nothing was wrong."""
    last = witness.records(program.log)[-1]
    assert (last.host, last.wrong) == (host, "")


def test_detached_restore_ends_while_pages_are_missing(empty: Pair, program: Program, tmp_path: Path) -> None:
    pidfile = tmp_path / "pidfile"
    options = ("-d", "--pidfile", str(pidfile), "--background", "off")
    migration = move(empty.a, empty.b, PID, port=PORT, restore_options=options)
    assert migration.restore is not None
    assert migration.restore.wait(SECONDS) == 0
    assert pidfile.read_text() == f"{PID}\n"
    program.ticks_on("beta")
    assert migration.dump.poll() is None
    daemon = set(empty.b.pids()) - {1, PID}
    assert len(daemon) == 3, daemon
    empty.b.kill(PID, signal.SIGTERM)
    migration.wait_drained(SECONDS)
    wait_until(lambda: empty.b.orphan_status(PID) == 0, SECONDS, "the program ends well")
    wait_until(lambda: empty.b.pids() == [1], SECONDS, "the daemon ends")
    no_traceback(migration)


@pytest.mark.parametrize("options", [(), ("--new-pid-namespace",)], ids=["plain", "namespace"])
def test_who_reads_what_a_detached_restore_says_comes_to_an_end(
    empty: Pair, program: Program, options: tuple[str, ...]
) -> None:
    migration = start_dump(empty.a, empty.b, PID, port=PORT)
    argv = [*postcopy_command(), "restore", "--lazy-pages", "-d", "--background", "off", "--json", *options]
    argv += ["--address", empty.a.address, "--port", str(PORT)]
    restore = empty.b.popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = restore.stdout
    assert said is not None
    os.set_blocking(said.fileno(), False)
    # Pages are missing for ever, so the daemon stays.
    assert restore.wait(SECONDS) == 0
    wait_until(lambda: said.read() == b"", SECONDS, "the end of what it says")
    assert migration.dump.poll() is None
    program.ticks_on(empty.b.name)


def test_daemon_of_a_detached_restore_ends_with_the_last_page(empty: Pair, program: Program) -> None:
    migration = move(empty.a, empty.b, PID, port=PORT, restore_options=("--restore-detached",))
    migration.wait_drained(SECONDS)
    wait_until(lambda: empty.b.pids() == [1, PID], SECONDS, "the daemon ends")
    program.ticks_on("beta")


def test_nothing_but_the_program_and_its_parent_is_left_after_the_last_page(empty: Pair, program: Program) -> None:
    migration = move(empty.a, empty.b, PID, port=PORT)
    migration.wait_drained(SECONDS)
    assert migration.restore is not None
    own = migration.restore.pid
    wait_until(lambda: set(empty.b.pids()) == {1, PID, own}, SECONDS, "the daemon ends")
    assert empty.a.pids() == [1]
    program.ticks_on("beta")


# -- PID namespaces ----------------------------------------------------------------------------------------------------


def test_new_pid_namespace_keeps_a_pid_that_is_taken(empty: Pair, program: Program) -> None:
    empty.b.popen(["sleep", "1000"], pid=PID)
    migration = move(empty.a, empty.b, PID, port=PORT, restore_options=("--new-pid-namespace",))
    migration.wait_drained(SECONDS)
    program.ticks_on("beta")
    in_its_own_namespace(empty.b, migration)
    assert migration.restore is not None
    migration.restore.send_signal(signal.SIGTERM)
    assert migration.restore.wait(SECONDS) == 0
    wait_until(lambda: set(empty.b.pids()) == {1, PID}, SECONDS, "the namespace's init ends")


def in_its_own_namespace(host: Host, migration: Migration) -> int:
    """The program has the PID it had, as its own ``/proc`` shows; the PID that it has outside of its namespace."""
    outside: int = next(event["pid"] for event in migration.restore_events if event["event"] == "running")
    status = (host.proc / str(outside) / "status").read_text()
    numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
    assert numbers[-1] == str(PID)
    seen = os.listdir(host.proc / str(outside) / "root" / "proc")
    assert {name for name in seen if name.isdigit()} == {"1", str(PID)}
    return outside


def test_both_commands_on_one_host(empty: Pair, program: Program) -> None:
    migration = start_dump(empty.a, empty.a, PID, port=PORT)
    start_restore(migration, port=PORT, options=("--new-pid-namespace",))
    assert migration.dump.wait(SECONDS) == 0
    program.ticks_on("alpha")
    in_its_own_namespace(empty.a, migration)
    assert migration.restore is not None
    migration.restore.send_signal(signal.SIGTERM)
    assert migration.restore.wait(SECONDS) == 0
    wait_until(lambda: empty.a.pids() == [1], SECONDS, "nothing is left")


def test_new_pid_namespace_outlives_a_detached_restore(empty: Pair, program: Program) -> None:
    options = ("-d", "--new-pid-namespace")
    migration = move(empty.a, empty.b, PID, port=PORT, restore_options=options)
    migration.wait_drained(SECONDS)
    assert migration.restore is not None
    assert migration.restore.wait(SECONDS) == 0
    program.ticks_on("beta")
    outside = in_its_own_namespace(empty.b, migration)
    empty.b.kill(outside, signal.SIGTERM)
    wait_until(lambda: empty.b.pids() == [1], SECONDS, "the program ends, then its namespace")
    program_ends_with(program, "beta")


def test_nothing_is_left_of_a_new_pid_namespace_before_commit(empty: Pair, program: Program) -> None:
    migration = start_dump(empty.a, empty.b, PID, port=PORT)
    os.environ["POSTCOPY_PAUSE_AT"] = "born"
    try:
        restore = start_restore(migration, port=PORT, options=("--new-pid-namespace",), wait=False)
    finally:
        del os.environ["POSTCOPY_PAUSE_AT"]
    wait_until(lambda: empty.b.proc_state(restore.pid) == "T", SECONDS, "restore pauses")
    restore.kill()
    wait_until(lambda: empty.b.pids() == [1], SECONDS, "nothing is left")
    assert migration.dump.wait(SECONDS) == 7
    program.ticks_on("alpha")


# -- time limits and the background ------------------------------------------------------------------------------------


def test_timeout_from_freeze_to_commit(empty: Pair, program: Program) -> None:
    migration = start_dump(empty.a, empty.b, PID, port=PORT, options=("--timeout", "0.5"))
    os.environ["POSTCOPY_PAUSE_AT"] = "received"
    try:
        restore = start_restore(migration, port=PORT, wait=False)
    finally:
        del os.environ["POSTCOPY_PAUSE_AT"]
    assert migration.dump.wait(SECONDS) == 11
    logs = dict(migration.logs())
    assert "the way from freeze to commit took longer than 0.5 s" in logs["dump on alpha, stderr"]
    assert "allow more with --timeout" in logs["dump on alpha, stderr"]
    program.ticks_on("alpha")
    wait_until(lambda: empty.b.proc_state(restore.pid) == "T", SECONDS, "restore pauses")
    restore.send_signal(signal.SIGCONT)
    assert restore.wait(SECONDS) in (4, 7, 10)
    no_traceback(migration)


def bulk_bytes(migration: Migration) -> int:
    """How much the background has brought so far."""
    found = [event["bytes_bulk"] for event in migration.restore_events if "bytes_bulk" in event]
    return max(found, default=0)


def test_background_off_brings_nothing_that_nobody_asks_for(empty: Pair, program: Program) -> None:
    migration = move(empty.a, empty.b, PID, port=PORT, restore_options=("--background", "off"))
    program.ticks_on("beta")
    empty.b.kill(PID, signal.SIGKILL)
    migration.wait_drained(SECONDS)
    assert migration.restore is not None
    assert migration.restore.wait(SECONDS) == 128 + signal.SIGKILL
    assert bulk_bytes(migration) == 0


def test_background_idle_waits_for_a_while_without_faults(empty: Pair, tmp_path: Path) -> None:
    go, ready = tmp_path / "go", tmp_path / "ready"
    # Blocked in one call, it touches nothing; its memory is for the background alone.
    os.mkfifo(go)
    wait = f"import os; content = os.urandom(4 << 20); open({str(ready)!r}, 'w').close(); signal.pause()"
    empty.a.popen([sys.executable, "-c", f"import signal; {wait}"], pid=PID)
    wait_until(ready.exists, SECONDS, "the program is ready")
    options = ("--background", "idle", "--idle-delay", "0.7")
    migration = move(empty.a, empty.b, PID, port=PORT, restore_options=options)
    migration.wait_drained(SECONDS)
    events = {event["event"]: event for event in migration.restore_events}
    assert bulk_bytes(migration) > 4 << 20
    assert events["drained"]["elapsed_s"] - events["running"]["elapsed_s"] > 0.6


def test_progress_is_told_while_pages_come(empty: Pair, program: Program) -> None:
    empty.set_rate("80mbit")
    try:
        migration = move(empty.a, empty.b, PID, port=PORT)
        migration.wait_drained(SECONDS)
    finally:
        empty.set_rate(None)
    for events in (migration.dump_events, migration.restore_events):
        left = [event["pages_left"] for event in events if event["event"] == "progress"]
        assert len(left) > 2
        assert left == sorted(left, reverse=True)


def test_progress_bar_on_a_terminal(empty: Pair, program: Program) -> None:
    ours, theirs = os.openpty()
    empty.set_rate("80mbit")
    try:
        address = ["--lazy-pages", "--address", empty.a.address, "--port", str(PORT)]
        environment = {**os.environ, "TERM": "xterm"}
        argv = [*postcopy_command(), "dump", *address, "-t", str(PID)]
        source = empty.a.popen(argv, stderr=theirs, env=environment)
        os.close(theirs)
        empty.b.popen([*postcopy_command(), "restore", *address])
        said = b""
        poll = select.poll()
        poll.register(ours, select.POLLIN)
        with contextlib.suppress(OSError):  # the terminal's end
            while poll.poll(SECONDS * 1000):
                said += os.read(ours, 65536)
        assert source.wait(SECONDS) == 0, said
    finally:
        empty.set_rate(None)
        os.close(ours)
    text = said.decode()
    assert "pages left" in text
    assert "MB/s" in text
    assert "faults" in text
    assert "stand-still" in text
    assert "Traceback" not in text


def test_json_is_parsed_line_by_line(empty: Pair, program: Program) -> None:
    out, _, other_out, _ = run_pair(empty, "--json")
    for text in (out, other_out):
        assert all(isinstance(json.loads(line), dict) for line in text.splitlines())


def test_commands_whose_standard_streams_are_closed(empty: Pair, program: Program, tmp_path: Path) -> None:
    def closed(side: str, *arguments: str) -> list[str]:
        options = ["--lazy-pages", "--address", empty.a.address, "--port", str(PORT), "-o", str(tmp_path / side)]
        return ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *postcopy_command(), side, *options, *arguments]

    dump = empty.a.popen(closed("dump", "-t", str(PID)))
    restore = empty.b.popen(closed("restore", "-d"))
    assert restore.wait(SECONDS) == 0, (tmp_path / "restore").read_text()
    assert dump.wait(SECONDS) == 0, (tmp_path / "dump").read_text()
    program.ticks_on("beta")


@pytest.mark.parametrize("caller", ["10.77", "fd77"])
def test_source_that_listens_at_every_address(empty: Pair, program: Program, caller: str) -> None:
    for host, last in zip(empty, (1, 2), strict=True):
        host.run(["ip", "addr", "replace", f"fd77::{last}/64", "dev", DEVICE, "nodad"], check=True)
    address = ["--lazy-pages", "--port", str(PORT), "--address"]
    source, ready = with_status(empty.a, ["dump", *address, "::", "-t", str(PID)])
    assert select.select([ready], [], [], SECONDS)[0]
    at = empty.a.address if caller == "10.77" else "fd77::1"
    destination, runs = with_status(empty.b, ["restore", *address, at])
    assert select.select([runs], [], [], SECONDS)[0]
    for fd in (ready, runs):
        assert os.read(fd, 2) == b"\0"
        os.close(fd)
    assert source.wait(SECONDS) == 0
    program.ticks_on(empty.b.name)
    empty.b.kill(PID, signal.SIGTERM)
    assert destination.wait(SECONDS) == 0


def test_end_of_the_program_while_dump_listens_is_noticed_at_once(empty: Pair, program: Program) -> None:
    migration = start_dump(empty.a, empty.b, PID, port=PORT)
    empty.a.kill(PID, signal.SIGKILL)
    assert migration.dump.wait(SECONDS) == 3
    said = dict(migration.logs())[f"dump on {empty.a.name}, stderr"]
    assert f"process {PID} has ended, before a destination came for it" in said
    no_traceback(migration)


def test_commands_have_the_niceness_that_they_were_given(empty: Pair, program: Program) -> None:
    address = ["--lazy-pages", "--address", empty.a.address, "--port", str(PORT)]
    argv = ["nice", "-n", "7", *postcopy_command()]
    source = empty.a.popen([*argv, "dump", *address, "-t", str(PID)])
    # With nothing pushed, both stay until the program's end.
    destination = empty.b.popen([*argv, "restore", *address, "--background", "off"])
    wait_until(lambda: witness.records(program.log)[-1].host == empty.b.name, SECONDS, "the program has moved")

    def niceness(host: Host, pid: int) -> int:
        return int((host.proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[16])

    assert (niceness(empty.a, source.pid), niceness(empty.b, destination.pid)) == (7, 7)
    assert niceness(empty.b, PID) == 0
    empty.b.kill(PID, signal.SIGTERM)
    assert (source.wait(SECONDS), destination.wait(SECONDS)) == (0, 0)
