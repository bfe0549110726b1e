"""Action scripts are run when they should be, and what they fail at is undone."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.hosts import Host, Pair, Process, postcopy_command, wait_until
from tests.migrate import Migration, move, start_dump, start_restore

PID = 6300
SECONDS = 30
SOURCE = ["pre-dump", "network-lock", "post-dump"]
DESTINATION = ["pre-restore", "post-restore", "network-unlock", "pre-resume", "post-resume"]

# ls has the directory open as descriptor 3.
RECORDING = """#!/bin/sh
echo "$(hostname) $CRTOOLS_SCRIPT_ACTION $CRTOOLS_INIT_PID $(ls /proc/self/fd | tr -d '\\n')" >> {log}
echo "hello from $CRTOOLS_SCRIPT_ACTION"
if [ "$CRTOOLS_SCRIPT_ACTION" = "{action}" ]; then
    {then}
fi
"""


def recording(directory: Path, action: str = "", then: str = "true") -> list[str]:
    """The option for a script that writes down what it is run for, and does something at one point."""
    path = directory / "script"
    path.write_text(RECORDING.format(log=directory / "log", action=action, then=then))
    path.chmod(0o755)
    return ["--action-script", str(path)]


def recorded(directory: Path, host: str) -> list[str]:
    """For what the script was run on a host."""
    path = directory / "log"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split()[1] for line in lines if line.startswith(host)]


def sleeper(host: Host) -> Process:
    """A program that does nothing."""
    return host.popen(["sleep", "1000"], pid=PID)


def runs_on(host: Host) -> None:
    """The program sleeps as before, and nobody traces it."""
    wait_until(lambda: host.proc_state(PID) == "S", SECONDS, "the program runs on")
    assert "\nTracerPid:\t0\n" in (host.proc / str(PID) / "status").read_text()


def said(migration: Migration, side: str) -> str:
    """What a side has logged."""
    return next(text for title, text in migration.logs() if title.startswith(side) and title.endswith("stderr"))


def test_scripts_run_at_the_known_points_with_the_known_variables(hosts: Pair, tmp_path: Path) -> None:
    sleeper(hosts.a)
    script = recording(tmp_path)
    migration = move(hosts.a, hosts.b, PID, dump_options=script, restore_options=[*script, "-d"])
    migration.wait_drained()
    assert migration.restore is not None and migration.restore.wait(SECONDS) == 0
    lines = (tmp_path / "log").read_text().splitlines()
    # A script has the three standard streams and nothing of ours.
    expected = [f"alpha {action} {PID} 0123" for action in ("status-ready", *SOURCE)]
    expected += [f"beta {action} {PID} 0123" for action in DESTINATION]
    assert lines == expected
    assert "hello from network-lock" in said(migration, "dump")
    assert "hello from pre-resume" in said(migration, "restore")


@pytest.mark.parametrize("action", SOURCE)
def test_script_that_fails_at_the_source_fails_the_dump(hosts: Pair, tmp_path: Path, action: str) -> None:
    sleeper(hosts.a)
    script = recording(tmp_path, action, "exit 3")
    migration = start_dump(hosts.a, hosts.b, PID, options=script)
    restore = start_restore(migration, wait=False)
    assert (migration.dump.wait(SECONDS), restore.wait(SECONDS)) == (3, 10), migration.logs()
    assert f"action script at {action}: {script[1]} ended with status 3" in said(migration, "dump")
    assert "ended with status 3" in said(migration, "restore")
    # Whatever has been locked is unlocked again.
    done = SOURCE[: SOURCE.index(action) + 1]
    assert recorded(tmp_path, "alpha") == ["status-ready", *done, *(["network-unlock"] if len(done) > 1 else [])]
    runs_on(hosts.a)


@pytest.mark.parametrize("action", DESTINATION[:2])
def test_script_that_fails_at_the_destination_fails_the_restore(hosts: Pair, tmp_path: Path, action: str) -> None:
    sleeper(hosts.a)
    script = recording(tmp_path, action, "kill -9 $$")
    migration = start_dump(hosts.a, hosts.b, PID, options=script)
    restore = start_restore(migration, options=script, wait=False)
    assert (migration.dump.wait(SECONDS), restore.wait(SECONDS)) == (10, 4), migration.logs()
    assert f"action script at {action}: {script[1]} was killed by signal 9" in said(migration, "restore")
    done = DESTINATION[: DESTINATION.index(action) + 1]
    assert recorded(tmp_path, "beta") == [*done, "network-lock"]
    assert recorded(tmp_path, "alpha") == ["status-ready", *SOURCE, "network-unlock"]
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines.index(f"beta network-lock {PID} 0123") < lines.index(f"alpha network-unlock {PID} 0123")
    runs_on(hosts.a)


@pytest.mark.parametrize("action", DESTINATION[2:])
def test_script_that_fails_after_commit_is_reported(hosts: Pair, tmp_path: Path, action: str) -> None:
    sleeper(hosts.a)
    script = recording(tmp_path, action, "exit 3")
    migration = move(hosts.a, hosts.b, PID, restore_options=[*script, "-d"])
    migration.wait_drained()
    assert migration.restore is not None and migration.restore.wait(SECONDS) == 0
    assert recorded(tmp_path, "beta") == DESTINATION
    assert f"action script at {action}: {script[1]} ended with status 3" in said(migration, "restore")
    runs_on(hosts.b)


def test_script_that_hangs_is_killed(hosts: Pair, tmp_path: Path) -> None:
    sleeper(hosts.a)
    script = recording(tmp_path, "pre-dump", f"sleep 1000 & echo $! > {tmp_path}/child; sleep 1000")
    migration = start_dump(hosts.a, hosts.b, PID, options=[*script, "--timeout", "0.5"])
    restore = start_restore(migration, wait=False)
    assert (migration.dump.wait(SECONDS), restore.wait(SECONDS)) == (3, 10), migration.logs()
    assert "took longer than 0.5 s and was killed" in said(migration, "dump")
    child = int((tmp_path / "child").read_text())
    wait_until(lambda: not hosts.a.alive(child), SECONDS, "its children are killed, too")
    runs_on(hosts.a)


def test_what_a_script_leaves_in_the_background_delays_nobody(hosts: Pair, tmp_path: Path) -> None:
    sleeper(hosts.a)
    script = recording(tmp_path, "post-dump", "sleep 1000 &")
    migration = move(hosts.a, hosts.b, PID, dump_options=script)
    migration.wait_drained()


def blocking(directory: Path, action: str) -> list[str]:
    """The option for a script that says that it has come to a point, and stays there."""
    return recording(directory, action, f"touch {directory}/there; sleep 1000")


def test_addresses_are_given_back_when_dump_is_killed(hosts: Pair, tmp_path: Path) -> None:
    sleeper(hosts.a)
    migration = start_dump(hosts.a, hosts.b, PID, options=blocking(tmp_path, "network-lock"))
    restore = start_restore(migration, wait=False)
    wait_until((tmp_path / "there").exists, SECONDS, "the script is at work")
    migration.dump.kill()
    assert restore.wait(SECONDS) == 7
    expected = ["status-ready", "pre-dump", "network-lock", "network-unlock"]
    wait_until(lambda: recorded(tmp_path, "alpha") == expected, SECONDS, "the network is unlocked")
    runs_on(hosts.a)


def test_addresses_are_given_up_when_restore_is_killed(hosts: Pair, tmp_path: Path) -> None:
    sleeper(hosts.a)
    script = blocking(tmp_path, "pre-restore")
    migration = start_dump(hosts.a, hosts.b, PID, options=script)
    restore = start_restore(migration, options=script, wait=False)
    wait_until((tmp_path / "there").exists, SECONDS, "the script is at work")
    restore.kill()
    assert migration.dump.wait(SECONDS) == 7
    assert recorded(tmp_path, "alpha")[-1] == "network-unlock"
    wait_until(lambda: recorded(tmp_path, "beta") == ["pre-restore", "network-lock"], SECONDS, "it is undone")
    runs_on(hosts.a)


DIRECTORY = """#!/bin/sh
echo "$CRTOOLS_SCRIPT_ACTION $(ls $CRTOOLS_IMAGE_DIR | wc -l)" >> {log}
[ "$CRTOOLS_SCRIPT_ACTION" != "{failing}" ]
"""


@pytest.mark.parametrize("failing", ["", "post-dump"])
def test_scripts_of_a_dump_to_a_directory(host: Host, tmp_path: Path, failing: str) -> None:
    sleeper(host)
    script = tmp_path / "script"
    script.write_text(DIRECTORY.format(log=tmp_path / "log", failing=failing))
    script.chmod(0o755)
    options = ["-D", str(tmp_path / "images"), "--action-script", str(script)]
    dumped = host.run([*postcopy_command(), "dump", "-t", str(PID), "-R", *options])
    assert dumped.returncode == (3 if failing else 0), dumped.stderr
    assert (tmp_path / "images").exists() == (not failing)
    runs_on(host)
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    expected = [*SOURCE, "network-unlock", *([] if failing else ["status-ready"])]
    assert [action for action, _ in lines] == expected
    # After the dump all of it is there.
    assert (int(lines[0][1]), int(lines[2][1]) > 1) == (0, True)
    if not failing:
        host.kill(PID)
        wait_until(lambda: not host.alive(PID), SECONDS, "the program has ended")
        (tmp_path / "log").unlink()
        restored = host.run([*postcopy_command(), "restore", "-d", *options])
        assert restored.returncode == 0, restored.stderr
        assert [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()] == DESTINATION


@pytest.mark.parametrize("kind", ["missing", "not executable"])
def test_script_that_cannot_be_run_is_refused_at_once(host: Host, tmp_path: Path, kind: str) -> None:
    script = tmp_path / "script"
    if kind == "not executable":
        script.write_text("#!/bin/sh\n")
    sleeper(host)
    command = [*postcopy_command(), "dump", "--lazy-pages", "-t", str(PID), "--action-script", str(script)]
    result = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False, env=dict(os.environ))
    assert result.returncode == 2
    assert b"is no program that can be run" in result.stderr
    assert b"Traceback" not in result.stderr
