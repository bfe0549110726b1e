"""Shared memory in a checkpoint directory; the cases are those of `tests/programs/cases/shared_memory.py`."""

import json
import sys
from pathlib import Path

from tests.hosts import Pair, postcopy_command
from tests.programs.cases import shared_memory

PID = 4800
CASES = (
    shared_memory.SharedAnonymous,
    shared_memory.Memfd,
    shared_memory.SealedMemfds,
    shared_memory.MemfdWithoutDescriptor,
    shared_memory.SysvSegments,
    shared_memory.DeletedFiles,
)


def test_shared_memory_is_kept_in_a_checkpoint(hosts: Pair, tmp_path: Path) -> None:
    names = [case.name() for case in CASES]
    command = [sys.executable, "-m", "tests.programs.states", "--directory", str(tmp_path), "--only", *names]
    program = hosts.a.popen(command, pid=PID)
    hosts.a.wait_until(lambda: (tmp_path / "ready").exists() or program.poll() is not None, 30, "the program is ready")
    written = hosts.a.run([*postcopy_command(), "dump", "-t", str(PID), "-D", str(tmp_path / "checkpoint")])
    assert written.returncode == 0, written.stderr
    restore = hosts.b.popen([*postcopy_command(), "restore", "-D", str(tmp_path / "checkpoint")])
    (tmp_path / "go").touch()
    assert restore.wait(60) == 0
    assert json.loads((tmp_path / "report.json").read_text()) == dict.fromkeys(names)
