"""Freezing: a frozen process stands still to the last instruction, and is given back untouched."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from postcopy.dump_side import collect, memory
from postcopy.dump_side.freeze import Frozen
from postcopy.dump_side.signals import late
from postcopy.kernel import procfs, ptrace
from postcopy.kernel.calls import call
from tests.hosts import wait_until

# pbkdf2 lets go of the interpreter's lock: all the threads really run.
SPINNING = """
import hashlib, threading, sys
def spin():
    while True:
        hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 2000000)
for _ in range(24):
    threading.Thread(target=spin, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""
SLEEPING = """
import time
print("ready", flush=True)
begin = time.monotonic()
time.sleep(1.5)
print(time.monotonic() - begin >= 1.5, flush=True)
"""


@contextlib.contextmanager
def program(source: str) -> Iterator[subprocess.Popen[bytes]]:
    """A running Python program that has said that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def vdso_of(pid: int) -> range:
    """Where the vdso of a process lies."""
    return next(range(line.start, line.end) for line in procfs.for_each_vma(pid) if line.name == "[vdso]")


def state(pid: int) -> str:
    """The state letter of a process."""
    return procfs.status(pid)["State"][0]


def test_no_thread_runs_between_the_freeze_and_the_durable_stop() -> None:
    # Whether a thread that is let go too early gets as far as its own code is a race: hence the rounds.
    with program(SPINNING) as process:
        for _ in range(60):
            frozen = Frozen(process.pid)
            frozen.freeze()
            try:
                before = [ptrace.get_registers(thread.tid) for thread in frozen.threads]
                frozen.stop_durably()
                assert [ptrace.get_registers(thread.tid) for thread in frozen.threads] == before
            finally:
                frozen.thaw()
                frozen.close()
            wait_until(lambda: state(process.pid) in "RS", 5, "it runs again")


@pytest.mark.parametrize("durably", [False, True])
def test_thawed_process_runs_on(durably: bool) -> None:
    with program(SLEEPING) as process:
        frozen = Frozen(process.pid)
        frozen.freeze()
        if durably:
            frozen.stop_durably()
        frozen.thaw()
        frozen.close()
        assert process.stdout is not None
        assert process.stdout.readline() == b"True\n"
        assert process.wait(10) == 0


def test_durably_stopped_process_stays_stopped_when_its_tracer_dies() -> None:
    with program(SPINNING) as process:
        tracer = os.fork()
        if not tracer:
            with contextlib.suppress(BaseException):
                frozen = Frozen(process.pid)
                frozen.freeze()
                frozen.stop_durably()
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(1)
        assert os.waitpid(tracer, 0)[1] == signal.SIGKILL
        assert state(process.pid) == "T"
        assert procfs.status(process.pid)["TracerPid"] == "0"
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: state(process.pid) in "RS", 5, "it runs again")


@pytest.mark.parametrize("calls", [0, 1, 40])
def test_thread_heals_when_its_tracer_dies_with_the_executor_in_it(calls: int) -> None:
    with program(SLEEPING) as process:
        tracer = os.fork()
        if not tracer:
            with contextlib.suppress(BaseException):
                frozen = Frozen(process.pid)
                frozen.freeze()
                with frozen.executors(vdso_of(process.pid)) as executors:
                    batch = executors[0].batch()
                    for _ in range(calls):
                        batch.add(call("brk", 0))
                    if calls:
                        executors[0].start(batch)
                    os.kill(os.getpid(), signal.SIGKILL)
            os._exit(1)
        assert os.waitpid(tracer, 0)[1] == signal.SIGKILL
        assert process.stdout is not None
        # It sleeps on for what was left, no signal of ours ends the sleep or the program.
        assert process.stdout.readline() == b"True\n"
        assert process.wait(10) == 0


def test_executor_leaves_neither_memory_nor_registers_changed() -> None:
    with program(SPINNING) as process:
        frozen = Frozen(process.pid)
        frozen.freeze()
        try:
            maps = procfs.read(process.pid, "maps")
            before = [thread.registers for thread in frozen.threads]
            masks = [ptrace.get_signal_mask(thread.tid) for thread in frozen.threads]
            vdso = vdso_of(process.pid)
            image = frozen.memory.read(vdso.start, len(vdso))
            with frozen.executors(vdso) as executors:
                for executor in executors:
                    batch = executor.batch()
                    number = batch.add(call("rt_sigprocmask", 0, 0, batch.room(8), 8))
                    assert executor.run(batch).value(number) == 0
            assert procfs.read(process.pid, "maps") == maps
            assert [ptrace.get_registers(thread.tid) for thread in frozen.threads] == before
            assert [ptrace.get_signal_mask(thread.tid) for thread in frozen.threads] == masks
            assert frozen.memory.read(vdso.start, len(vdso)) == image
        finally:
            frozen.thaw()
            frozen.close()


def test_signals_that_come_after_the_collecting_are_not_lost() -> None:
    with program(SPINNING) as process:
        frozen = Frozen(process.pid)
        frozen.freeze()
        try:
            smaps = memory.SmapsReader(process.pid)
            smaps.begin()
            # The program's own pipes lead to this test: what cannot be moved is not the point here.
            pipes = frozenset(os.stat(f"/proc/{process.pid}/fd/{fd}").st_ino for fd in (0, 1))
            collected, _, _ = collect.collect(frozen, 0, smaps, pipes, {})
            assert late(frozen, collected) == []
            process.send_signal(signal.SIGUSR1)
            assert [(s.tid, s.siginfo[0]) for s in late(frozen, collected)] == [(0, signal.SIGUSR1)]
            smaps.close()
        finally:
            frozen.thaw()
            frozen.close()
