"""seccomp strict mode; filters are among the states of `tests/programs/cases/seccomp.py`."""

import sys
from pathlib import Path

from tests.hosts import Host, Pair
from tests.migrate import move

PROGRAM = Path(__file__).parent / "programs" / "strict.py"
PID = 4600


def mode(host: Host) -> str:
    lines = Path(f"/proc/{host.outer_pid(PID)}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("Seccomp:"))


def test_program_in_strict_mode_stays_in_it(hosts: Pair, tmp_path: Path) -> None:
    question, answer = tmp_path / "question", tmp_path / "answer"
    question.touch()
    answer.touch()
    hosts.a.popen([sys.executable, str(PROGRAM), str(question), str(answer)], pid=PID)
    hosts.a.wait_until(lambda: mode(hosts.a) == "1", 20, "the program is confined")
    migration = move(hosts.a, hosts.b, PID)
    migration.wait_drained()
    assert migration.restore is not None
    assert mode(hosts.b) == "1"
    question.write_bytes(b"go")
    assert migration.restore.wait(20) == 7
    assert answer.read_bytes() == b"rgo"
