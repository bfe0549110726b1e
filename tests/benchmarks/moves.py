"""One move of a measuring program between two hosts, with the two commands, and what it cost."""

import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.hosts import Pair, Process, Trio
from tests.migrate import Migration, move

PROGRAMS = Path(__file__).with_name("programs")
PID = 1000
TIMEOUT = 300.0
# Seconds between two looks at the memory of our processes; each look takes about 1 ms of a processor.
SAMPLE_EVERY = 0.1
# Time for the moved program to be seen running before and after.
SETTLED = 0.3
CONNECTIONS_PORT = 7300  # that of programs/ticking.py

OURS = "postcopy-"

#: Our processes, by side and by the kernel's name for them; None is the control process.
ROLES = {
    ("dump", None): "dump: control",
    ("dump", "postcopy-demand"): "dump: demand server",
    ("dump", "postcopy-bulk"): "dump: bulk streamer",
    ("dump", "postcopy-guard"): "dump: guard",
    # Ends before the move is over: seen only when it is slow.
    ("dump", "postcopy-smaps"): "dump: reader of smaps",
    ("restore", None): "restore: control",
    ("restore", "postcopy-watch"): "restore: watchdog",
    ("restore", "postcopy-faults"): "restore: fault handler",
    # The kernel keeps 15 characters of a name.
    ("restore", "postcopy-receiv"): "restore: bulk receiver",
}


class PeakMemory:
    """The peak resident memory (bytes) of each of our processes; what has ended between two samples keeps its last."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    def sample(self, side: str, control: Process) -> None:
        """Look at one command's processes once."""
        self._look(side, control.outer_pid, None)

    def _look(self, side: str, pid: int, name: str | None) -> None:
        try:
            status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            return
        if name is not None:
            name = status["Name"]
        # Others are the moved program, or a role that has not named itself yet. A zombie has no memory.
        if (name is not None and not name.startswith(OURS)) or "VmHWM" not in status:
            return
        role = ROLES.get((side, name), f"{side}: {name}")
        self.bytes[role] = max(self.bytes.get(role, 0), int(status["VmHWM"].split()[0]) << 10)
        for child in children:
            self._look(side, int(child), "")


def wait(
    what: str, condition: Callable[[], bool], sample: Callable[[], None] | None = None, every: float = SAMPLE_EVERY
) -> None:
    """Ask ``condition`` every so many seconds, and call ``sample`` each time, until it is true."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {TIMEOUT:.0f} s: {what}")
        if sample is not None:
            sample()
        time.sleep(every)


def clear(hosts: Pair) -> None:
    """Leave nothing of this move to the next. TimeoutError if something cannot be killed."""

    def empty() -> bool:
        left = [(host, pid) for host in hosts for pid in host.pids() if pid != 1]
        for host, pid in left:
            with contextlib.suppress(ProcessLookupError):
                host.kill(pid)
        return not left

    wait("nothing is left of the move", empty)


def _run(
    hosts: Pair,
    program: str,
    arguments: Sequence[str],
    told: signal.Signals,
    *,
    holding: Sequence[str] = (),
    started: Callable[[], object] = lambda: None,
    prepared: Callable[[], object] = lambda: None,
    options: Sequence[str] = (),
) -> dict[str, Any]:
    """Start, move, tell the program when every page is in; what the program and both commands say of it.

    ``holding``: what it is to have open, where ``{}`` is a directory; ``started`` is called when it runs, and
    ``prepared`` when it is prepared; ``options`` of dump.
    """
    memory = PeakMemory()
    with tempfile.TemporaryDirectory(prefix="postcopy-bench-") as directory, contextlib.ExitStack() as stack:
        stack.callback(clear, hosts)
        ready, result = Path(directory, "ready"), Path(directory, "result")
        argv = [sys.executable, "-I", "-S", str(PROGRAMS / f"{program}.py"), *arguments, str(ready), str(result)]
        process = hosts.a.popen([*argv, *(each.format(directory) for each in holding)], pid=PID)
        started()
        wait(f"{program} is prepared", lambda: ready.exists() or process.poll() is not None)
        prepared()
        time.sleep(SETTLED)
        migration = move(hosts.a, hosts.b, PID, dump_options=options)
        restore = migration.restore
        assert restore is not None

        def sample() -> None:
            memory.sample("dump", migration.dump)
            memory.sample("restore", restore)

        def ended() -> bool:
            return migration.dump.poll() is not None or restore.poll() is not None

        wait("every page is in", ended, sample)
        migration.wait_drained()
        time.sleep(SETTLED)
        try:
            hosts.b.kill(PID, told)
        except ProcessLookupError:
            migration.fail("the moved program has ended before it was told to")
        if (status := restore.wait(TIMEOUT)) != 0:
            migration.fail(f"restore ended with {status}")
        figures: dict[str, Any] = json.loads(result.read_text())
        if not figures["complete"]:
            migration.fail("the moved program has other memory than before")
    return {"program": figures, "peak_bytes": memory.bytes, **_of_the_commands(migration)}


def _of_the_commands(migration: Migration) -> dict[str, Any]:
    dumped = {event["event"]: event for event in migration.dump_events}
    restored = {event["event"]: event for event in migration.restore_events}
    return {
        "standstill_seconds": dumped["resumed"]["standstill_ns"] / 1e9,
        "drain_seconds": restored["statistics"]["drain_ns"] / 1e9,
        "statistics": restored["statistics"],
    }


def standing_still(hosts: Pair, mib: int) -> dict[str, Any]:
    """Move a program that reads the clock all the time."""
    return _seen(hosts, _run(hosts, "ticking", [str(mib)], signal.SIGTERM))


def with_files(hosts: Pair, count: int) -> dict[str, Any]:
    """The same with so many files open."""
    holding = ["files", str(count), "{}"]
    return _seen(hosts, _run(hosts, "ticking", ["1"], signal.SIGTERM, holding=holding))


def with_connections(count: int) -> dict[str, Any]:
    """The same with so many TCP connections to a third host."""
    script = str(PROGRAMS / "connecting.py")
    with Trio() as hosts:
        hosts.add_service(hosts.a)
        client = [sys.executable, "-I", "-S", script, hosts.service, str(CONNECTIONS_PORT), str(count)]
        figures = _run(
            hosts,
            "ticking",
            ["1"],
            signal.SIGTERM,
            holding=["connections", str(count), hosts.service],
            started=lambda: hosts.c.popen(client),
            prepared=lambda: hosts.add_service(hosts.b),
            options=["--tcp-established"],
        )
        return _seen(hosts, figures)


def with_children(hosts: Pair, kind: str, count: int) -> dict[str, Any]:
    """The same with children, so that they are so many processes: ``forks`` of it, or small ``programs``."""
    holding, options = [kind, str(count), "-"], ["--timeout", "60"]
    return _seen(hosts, _run(hosts, "ticking", ["1"], signal.SIGTERM, holding=holding, options=options))


def _seen(hosts: Pair, figures: dict[str, Any]) -> dict[str, Any]:
    """What the gaps between two looks at the clock were."""
    gaps = figures["program"]["gaps"]
    before = [gap for gap, host in gaps if host == hosts.a.name]
    after = [gap for gap, host in gaps if host == hosts.b.name]
    figures["seen_seconds"] = max(gap for gap, _ in gaps) / 1e9
    figures["quiet_seconds"] = max(before, default=0) / 1e9
    figures["move_seconds"] = after[0] / 1e9
    figures["program"]["gaps"] = [gap for gap, _ in gaps][-20:]
    return figures


def touching(hosts: Pair, mib: int, order: str) -> dict[str, Any]:
    """Move a program that touches its memory in this order as soon as it has moved."""
    return _run(hosts, "touching", [str(mib), order], signal.SIGUSR1)
