"""Freezing: a frozen process stands still to the last instruction, and is given back untouched."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from postcopy.dump_side import collect, freeze, limits
from postcopy.dump_side.arena import Arena
from postcopy.dump_side.capture import Capture
from postcopy.dump_side.choices import Choices
from postcopy.dump_side.freeze import Frozen
from postcopy.dump_side.frozen_tree import FrozenTree
from postcopy.dump_side.lineage import is_ending
from postcopy.dump_side.looks import Looker
from postcopy.dump_side.opened import Trusted
from postcopy.dump_side.shared_memory import SharedObjects
from postcopy.dump_side.signals import late
from postcopy.dump_side.smaps import SmapsReader
from postcopy.dump_side.survey import survey
from postcopy.errors import DumpError
from postcopy.kernel import cpu, procfs, ptrace
from postcopy.kernel.calls import call
from postcopy.kernel.executor import Executor
from postcopy.reporting import Silent
from postcopy.turns import by_turns
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

EXECUTING = """
import os, sys
print("ready", flush=True)
os.read(0, 1)
os.execv(sys.executable, [sys.executable, "-c", "import os; print('again', flush=True); os.read(0, 1)"])
"""

# The end of the main thread takes long: it frees memory that it alone has in its descriptor table.
LEADING = """
import ctypes, os, threading
libc = ctypes.CDLL(None)
unshared = threading.Event()
fd = os.memfd_create("large")
os.posix_fallocate(fd, 0, 512 << 20)
def stay():
    unshared.wait()
    os.close(fd)
    print("ready", flush=True)
    os.dup2(2, 1)
    os.dup2(2, 0)
    threading.Event().wait()
threading.Thread(target=stay).start()
libc.unshare(0x400)
unshared.set()
os.read(0, 1)
libc.syscall(60, 0)
"""

FAMILY = """
import os, time
root = os.getpid()
for _ in range(5):
    if not os.fork():
        while os.getppid() == root:
            time.sleep(0.01)
        os._exit(0)
print("ready", flush=True)
while True:
    time.sleep(0.01)
"""

ADVISING = """
import mmap, sys
# Of one kind: neither the flag nor the lack of it makes or ends a mapping.
memory = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
print("ready", flush=True)
sys.stdin.readline()
memory.madvise(mmap.MADV_DONTFORK)
print("done", flush=True)
sys.stdin.read()
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


@contextlib.contextmanager
def executors_in(frozen: Frozen, vdso: range) -> Iterator[list[Executor]]:
    """An executor for each thread of a frozen process, in their order."""
    with Arena(frozen, vdso) as arena:
        yield arena.arrive()


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
                by_turns([frozen.stop_durably()])
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
            by_turns([frozen.stop_durably()])
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
                by_turns([frozen.stop_durably()])
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(1)
        assert os.waitpid(tracer, 0)[1] == signal.SIGKILL
        # Without its tracer each thread goes once more through the kernel, to stop again.
        wait_until(lambda: state(process.pid) == "T", 5, "it is stopped")
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
                with executors_in(frozen, vdso_of(process.pid)) as executors:
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


def test_process_that_executes_a_program_just_before_the_freeze_is_read() -> None:
    with program(EXECUTING) as process:
        assert process.stdin is not None and process.stdout is not None
        frozen = Frozen(process.pid)
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"again\n"
        frozen.freeze()
        try:
            vdso = vdso_of(process.pid)
            assert frozen.memory.read(vdso.start, 4) == b"\x7fELF"
            assert any(frozen.pagemap.frames(vdso.start, 1))
        finally:
            frozen.thaw()
            frozen.close()


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
            with executors_in(frozen, vdso) as executors:
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


def test_flag_that_changes_between_survey_and_freeze_is_not_overlooked() -> None:
    with program(ADVISING) as process:
        assert process.stdin is not None and process.stdout is not None
        choices = Choices(external=frozenset(os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in (0, 1)))
        _, before = survey(process.pid, choices)
        process.stdin.write(b"now\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"done\n"
        with Capture(process.pid, before, Silent(), choices) as capture:
            capture.take()
            with pytest.raises(DumpError, match="changed the flags of its mappings"):
                capture.verify()
        _, after = survey(process.pid, choices)
        with Capture(process.pid, after, Silent(), choices) as capture:
            capture.take()
            capture.verify()
            (found,) = capture.tree.processes
            assert [vma.start for vma in found.memory.vmas if "dc" in vma.flags]


def test_survey_while_the_main_thread_ends_finds_what_the_others_have(monkeypatch: pytest.MonkeyPatch) -> None:
    with program(LEADING) as process:
        looks: list[float] = []

        def wait(seconds: float) -> None:
            looks.append(seconds)
            wait_until(lambda: procfs.stat(process.pid)[3] == "Z", 10, "the main thread is gone")

        monkeypatch.setattr("postcopy.dump_side.survey.time", SimpleNamespace(sleep=wait))
        assert process.stdin is not None
        process.stdin.write(b"x")
        process.stdin.flush()
        while not is_ending(process.pid, process.pid):
            pass
        manifest, _ = survey(process.pid)
        assert len(looks) == 1
        assert manifest.vdso
        assert manifest.memory_bytes > 0


def test_reader_of_smaps_ends_well_with_the_process_that_it_reads() -> None:
    with program(SLEEPING) as process:
        process.kill()
        process.wait()
        smaps = SmapsReader({})
        smaps.begin(process.pid)
        with pytest.raises(DumpError, match="cannot be read"):
            smaps.result(process.pid)
        wait_until(smaps._role.has_ended, 10, "it ends")
        assert not smaps._role.ended_badly()
        smaps.close()


def test_signals_that_come_after_the_collecting_are_not_lost() -> None:
    with program(SPINNING) as process:
        tree = FrozenTree(process.pid)
        tree.freeze()
        try:
            smaps, looker = SmapsReader({}), Looker({})
            # The program's own pipes lead to this test: what cannot be moved is not the point here.
            pipes = frozenset(os.stat(f"/proc/{process.pid}/fd/{fd}").st_ino for fd in (0, 1))
            (collected,) = collect.collect(tree, smaps, looker, Trusted(pipes), {}, SharedObjects()).processes
            assert late(tree.root, collected) == []
            process.send_signal(signal.SIGUSR1)
            assert [(s.tid, s.siginfo[0]) for s in late(tree.root, collected)] == [(0, signal.SIGUSR1)]
            smaps.close()
            looker.close()
        finally:
            tree.thaw()
            tree.close()


@pytest.mark.parametrize("place", ["answered", "ask"])
@pytest.mark.parametrize("failing", [0, 3, 5])
def test_all_processes_are_as_before_where_one_cannot_be_collected(
    monkeypatch: pytest.MonkeyPatch, failing: int, place: str
) -> None:
    with program(FAMILY) as process:
        tree = FrozenTree(process.pid)
        tree.freeze()
        smaps, looker = SmapsReader({}), Looker({})
        try:
            before = [as_it_stands(each) for each in tree.processes]
            assert len(before) == 6
            asked = itertools.count()
            original = getattr(limits.Question, place)

            def fails(*arguments: Any) -> Any:
                if next(asked) == failing:
                    raise DumpError("it cannot be asked")
                return original(*arguments)

            monkeypatch.setattr(limits.Question, place, fails)
            pipes = frozenset(os.stat(f"/proc/{process.pid}/fd/{fd}").st_ino for fd in (0, 1))
            # The error is kept, and with it all that was in the middle of its work.
            with pytest.raises(DumpError) as error:
                collect.collect(tree, smaps, looker, Trusted(pipes), {}, SharedObjects())
            assert [as_it_stands(each) for each in tree.processes] == before
            assert error.value.message == "it cannot be asked"
        finally:
            smaps.close()
            looker.close()
            tree.thaw()
            tree.close()


def as_it_stands(frozen: Frozen) -> tuple[object, ...]:
    """What our calls in a process could have changed."""
    (vdso,) = [line for line in procfs.for_each_vma(frozen.pid) if line.name == "[vdso]"]
    threads = [(ptrace.get_registers(each.tid), ptrace.get_signal_mask(each.tid)) for each in frozen.threads]
    return procfs.read(frozen.pid, "maps"), threads, frozen.memory.read(vdso.start, vdso.end - vdso.start)


@contextlib.contextmanager
def frozen_threads(pid: int) -> Iterator[Frozen]:
    """A process that is frozen inside."""
    frozen = Frozen(pid)
    try:
        frozen.freeze()
        yield frozen
    finally:
        frozen.thaw()
        frozen.close()


def pending(pid: int) -> set[int]:
    """The signals that wait for a process as a whole."""
    return {info[0] for info in ptrace.pending_signals(pid, shared=True)}


@pytest.mark.parametrize("while_calling", [False, True])
def test_signals_that_come_while_calls_are_made_stay_pending(while_calling: bool) -> None:
    with program(SPINNING) as process, frozen_threads(process.pid) as frozen:
        if not while_calling:
            process.send_signal(signal.SIGUSR1)
        with executors_in(frozen, vdso_of(process.pid)) as executors:
            batch = executors[0].batch()
            batch.add(call("rt_sigprocmask", 0, 0, batch.room(8), 8))
            if while_calling:
                process.send_signal(signal.SIGUSR1)
            executors[0].run(batch)
        assert pending(process.pid) == {signal.SIGUSR1}
        # The program has no handler for it.
        process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("while_calling", [False, True])
def test_sigstop_that_comes_while_calls_are_made_is_not_lost(while_calling: bool) -> None:
    # It cannot be blocked, so it comes between our calls.
    with program(SPINNING) as process:
        with frozen_threads(process.pid) as frozen:
            if not while_calling:
                process.send_signal(signal.SIGSTOP)
            with executors_in(frozen, vdso_of(process.pid)) as executors:
                if while_calling:
                    process.send_signal(signal.SIGSTOP)
                for executor in executors:
                    batch = executor.batch()
                    number = batch.add(call("rt_sigprocmask", 0, 0, batch.room(8), 8))
                    assert executor.run(batch).value(number) == 0
            assert pending(process.pid) == {signal.SIGSTOP}
        wait_until(lambda: state(process.pid) == "T", 5, "it is stopped")
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: state(process.pid) in "RS", 5, "it runs again")


def test_no_sigcont_wakes_a_process_that_has_been_let_go_after_commit() -> None:
    with program(SPINNING) as process:
        frozen = Frozen(process.pid)
        frozen.freeze()
        by_turns([frozen.stop_durably()])
        process.send_signal(signal.SIGCONT)
        before = [ptrace.get_registers(thread.tid) for thread in frozen.threads]
        tids = [thread.tid for thread in frozen.threads]
        frozen.let_go()
        frozen.close()
        wait_until(lambda: {procfs.status(process.pid, tid)["State"][0] for tid in tids} == {"T"}, 5, "it is stopped")
        with frozen_threads(process.pid) as again:
            assert [ptrace.get_registers(thread.tid) for thread in again.threads] == before


def test_job_that_is_continued_while_it_is_frozen_runs_after_the_thaw() -> None:
    with program(SPINNING) as process:
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: state(process.pid) == "T", 5, "it is stopped")
        with frozen_threads(process.pid) as frozen:
            assert frozen.stopped_by == signal.SIGSTOP
            with executors_in(frozen, vdso_of(process.pid)) as executors:
                for executor in executors:
                    executor.run(executor.batch())
            process.send_signal(signal.SIGCONT)
        wait_until(lambda: state(process.pid) in "RS", 5, "it runs again")


def test_job_that_was_stopped_is_stopped_again_after_the_thaw() -> None:
    with program(SPINNING) as process:
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: state(process.pid) == "T", 5, "it is stopped")
        with frozen_threads(process.pid) as frozen, executors_in(frozen, vdso_of(process.pid)) as executors:
            for executor in executors:
                executor.run(executor.batch())
        tids = procfs.tids(process.pid)
        wait_until(lambda: {procfs.status(process.pid, tid)["State"][0] for tid in tids} == {"T"}, 5, "it is stopped")
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: state(process.pid) in "RS", 5, "it runs again")


def test_trap_flag_of_the_program_does_not_step_through_our_calls() -> None:
    # A SIGTRAP while it is blocked makes the kernel take the program's handler away, and kill it with the next.
    source = f"import signal; signal.signal(signal.SIGTRAP, lambda *_: None)\n{SPINNING}"
    with program(source) as process, frozen_threads(process.pid) as frozen:
        caught = procfs.status(process.pid)["SigCgt"]
        plain = [thread.registers for thread in frozen.threads]
        for thread in frozen.threads:
            thread.registers = thread.registers.changed(eflags=thread.registers["eflags"] | 0x100)
            ptrace.set_registers(thread.tid, thread.registers)
        with executors_in(frozen, vdso_of(process.pid)) as executors:
            for executor in executors:
                executor.run(executor.batch())
        assert [ptrace.get_registers(thread.tid) for thread in frozen.threads] == [
            thread.registers for thread in frozen.threads
        ]
        assert procfs.status(process.pid)["SigCgt"] == caught
        for thread, registers in zip(frozen.threads, plain, strict=True):
            ptrace.set_registers(thread.tid, registers)


def test_threads_already_stopped_are_given_back_when_another_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    with program(SPINNING) as process:
        last = procfs.tids(process.pid)[-1]
        seize = freeze._seize

        def refuse(pid: int, tid: int) -> bool:
            if tid == last:
                raise DumpError("no")
            return seize(pid, tid)

        monkeypatch.setattr(freeze, "_seize", refuse)
        frozen = Frozen(process.pid)
        with pytest.raises(DumpError):
            frozen.freeze()
        frozen.close()
        assert {procfs.status(process.pid, tid)["TracerPid"] for tid in procfs.tids(process.pid)} == {"0"}


def test_freeze_is_not_hindered_by_threads_that_come_and_go() -> None:
    source = SPINNING.replace("print", "threading.Thread(target=churn, daemon=True).start()\nprint", 1)
    churn = "def churn():\n    while True:\n        threading.Thread(target=int).start()\n"
    with program(churn + source) as process:
        for _ in range(100):
            with frozen_threads(process.pid) as frozen:
                assert {thread.tid for thread in frozen.threads} == set(procfs.tids(process.pid))


WAITING = """
import ctypes, signal
libc = ctypes.CDLL(None)
wanted = (ctypes.c_ulong * 16)(1 << (signal.SIGUSR1 - 1))
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
print("ready", flush=True)
print(libc.sigwaitinfo(wanted, None), flush=True)
"""


def test_call_that_a_stop_breaks_off_is_begun_again() -> None:
    with program(WAITING) as process:
        wait_until(lambda: procfs.read(process.pid, "syscall").startswith(b"128 "), 5, "it waits")
        with frozen_threads(process.pid):
            pass
        process.send_signal(signal.SIGUSR1)
        assert process.stdout is not None
        assert process.stdout.readline() == f"{int(signal.SIGUSR1)}\n".encode()


def test_size_of_the_register_state_is_what_ptrace_gives() -> None:
    with cpu.stopped_child() as child:
        assert cpu.xsave_size() == len(ptrace.get_xstate(child))


def test_size_of_the_register_state_where_memory_must_not_be_executable() -> None:
    source = """
import ctypes
from postcopy.kernel import cpu
PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
assert ctypes.CDLL(None).prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) == 0
print(cpu.xsave_size())
"""
    found = subprocess.run([sys.executable, "-c", source], stdout=subprocess.PIPE, check=True)
    assert int(found.stdout) == cpu.xsave_size()


FORKING = """
import os, time
for _ in range(4):
    if not os.fork():
        while True:
            time.sleep(0.001)
print("ready", flush=True)
while True:
    time.sleep(0.001)
"""


def test_death_of_one_in_the_midst_of_the_durable_stop_keeps_nobody() -> None:
    with program(FORKING) as process:
        children = procfs.children(process.pid)
        tree = FrozenTree(process.pid)
        tree.freeze()
        try:
            assert len(tree.processes) == 5
            os.kill(tree.processes[2].pid, signal.SIGKILL)
            with pytest.raises((DumpError, OSError)):
                tree.stop_durably()
        finally:
            tree.thaw()
            tree.close()
        left = {process.pid, *children} - {tree.processes[2].pid}
        wait_until(lambda: all(state(pid) in "RS" for pid in left), 5, "all others run again")
        for pid in left - {process.pid}:
            os.kill(pid, signal.SIGKILL)
