"""Who listens to a migration does not decide about it."""

import subprocess
import sys

import pytest

TELLS = """
from postcopy.reporting import Printer, configure_logging
configure_logging(1, {log})
printer = Printer({as_json}, statistics=True)
for _ in range(3):
    printer.event("progress", pages_left=1)
    printer.event("drained")
    printer.event("statistics", drain_ns=1)
print("told", file=open({done!r}, "w"))
"""


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "text"])
def test_full_disk_does_not_end_what_is_told_of(as_json: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    done = tmp_path_factory.mktemp("told") / "done"
    for log in (None, "/dev/full"):
        program = TELLS.format(log=repr(log), as_json=as_json, done=str(done))
        with open("/dev/full", "wb", buffering=0) as full:
            assert subprocess.run([sys.executable, "-c", program], stdout=full, stderr=full, timeout=20).returncode == 0
        assert done.read_text() == "told\n"
        done.unlink()
