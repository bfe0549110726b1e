"""The executor: a stub that makes a list of system calls inside a stopped thread, one ptrace round trip for all.

The list is a `Batch`. Its last record sends the thread a signal that stops it under
its tracer; the word after it is zero. A thread that goes on from there, because its tracer has died, *heals*: it
takes back its signal mask and all its registers and jumps to where it was. The code never changes a flag and never
uses the stack, so nothing else needs to be taken back.

The code, with rip-relative places for what healing needs::

    call:   mov   rcx, [rbx+56]          heal:   mov   eax, 14            # rt_sigprocmask
            jrcxz heal                           mov   edi, 2             # SIG_SETMASK
            mov   rax, [rbx]                     lea   rsi, [rip+mask]
            mov   rdi, [rbx+8]                   mov   edx, 0
            mov   rsi, [rbx+16]                  mov   r10d, 8
            mov   rdx, [rbx+24]                  syscall
            mov   r10, [rbx+32]                  mov   rax, [rip+...]     # rbx rcx rdx rsi rdi r8 r9 r10 r11
            mov   r8,  [rbx+40]                  jmp   [rip+...]
            mov   r9,  [rbx+48]
            syscall
            mov   [rbx+56], rax
            lea   rbx, [rbx+64]
            jmp   call
"""

import errno
import signal
import struct
from collections.abc import Generator, Iterator

from postcopy.kernel import ptrace
from postcopy.kernel.batch import RECORD_SIZE, Answers, Batch
from postcopy.kernel.calls import NUMBERS, Call, call
from postcopy.kernel.libc import refused
from postcopy.kernel.process_memory import ProcessMemory
from postcopy.kernel.ptrace import Registers

_CALLS = bytes.fromhex(
    "488b4b38 e327 488b03 488b7b08 488b7310 488b5318 4c8b5320 4c8b4328 4c8b4b30 0f05 48894338 488d5b40 ebd3"
)
_AFTER_SYSCALL = 0x23
_HEALED = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "rip")
_LOADS = ("488b05", "488b1d", "488b0d", "488b15", "488b35", "488b3d", "4c8b05", "4c8b0d", "4c8b15", "4c8b1d", "ff25")
_PLACES = 168  # where the mask and the registers lie, behind the code
CODE_SIZE = 288

# The kernel's own codes for a call that a signal interrupted (include/linux/errno.h); a program never sees them.
ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = 512, 513, 514, 516
_SYSCALL_INSTRUCTION = b"\x0f\x05"
_NR_RESTART_SYSCALL = 219

_STOP_SIGNALS = (signal.SIGURG, signal.SIGWINCH, signal.SIGCHLD, signal.SIGCONT)
ALL_SIGNALS = 0xFFFF_FFFF_FFFF_FFFF
_NOTHING = (NUMBERS["getpid"], 0, 0, 0, 0, 0, 0, 1)
_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
_TRAP_FLAG = 1 << 8  # of eflags: a SIGTRAP after every instruction


def signal_bit(number: int) -> int:
    """The bit of signal ``number`` in a signal set."""
    return 1 << (number - 1)


def stop_signal(caught: int, pending: int) -> int:
    """The signal that ends a list: ignored by default, best not caught (then nobody notices it), never pending.

    Raises OSError EBUSY where all of them are pending.
    """
    free = [s for s in _STOP_SIGNALS if not pending & signal_bit(s)]
    if not free:
        names = ", ".join(s.name for s in _STOP_SIGNALS)
        raise refused(f"stopping a thread after its calls: {names} are all pending", errno.EBUSY)
    return next((s for s in free if not caught & signal_bit(s)), free[0])


def untrapped(registers: Registers) -> Registers:
    """Registers for code of ours: single-stepped by the program's own trap flag, it would raise SIGTRAP.

    A thread that is left alone in our code loses the flag: it heals without it.
    """
    return registers.changed(eflags=registers["eflags"] & ~_TRAP_FLAG)


def interrupted(registers: Registers) -> int:
    """Which restart code the call that a stopped thread was in ended with; 0 where it was in none."""
    if registers["orig_rax"] >> 63:
        return 0
    code = -registers["rax"] & 0xFFFF_FFFF_FFFF_FFFF
    return code if code in (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK) else 0


def _restarted(registers: Registers) -> Registers:
    """What the kernel would make of the registers at the next return to user mode without a signal to handle."""
    code = interrupted(registers)
    if not code:
        return registers
    number = _NR_RESTART_SYSCALL if code == ERESTART_RESTARTBLOCK else registers["orig_rax"]
    return registers.changed(rax=number, rip=registers["rip"] - len(_SYSCALL_INSTRUCTION))


def _heal_code(offset: int, mask: int, registers: Registers) -> bytes:
    """The healing code to stand at ``offset`` of a stub, with its places, up to CODE_SIZE."""

    def place(number: int, after: int) -> bytes:
        return struct.pack("<i", _PLACES + 8 * number - after)

    code = bytes.fromhex("b80e000000 bf02000000 488d35")
    code += place(0, offset + len(code) + 4)
    code += bytes.fromhex("ba00000000 41ba08000000 0f05")
    for number, load in enumerate(_LOADS, start=1):
        code += bytes.fromhex(load)
        code += place(number, offset + len(code) + 4)
    healed = _restarted(registers)
    places = struct.pack("<12Q", mask, *(healed[name] for name in _HEALED))
    return code.ljust(_PLACES - offset, b"\xcc") + places


class Executor:
    """A stopped thread with its stub: ``base`` is executable memory of the target, of ``capacity`` bytes."""

    def __init__(
        self, tid: int, memory: ProcessMemory, base: int, capacity: int, stop: int, inner: tuple[int, int]
    ) -> None:
        """``inner`` is the PID and TID as the thread itself sees them, ``stop`` the signal that ends a list."""
        self.tid = tid
        self._memory = memory
        self._base = base
        self._capacity = capacity
        self._stop = stop
        self._last = call("tgkill", *inner, stop)
        self._running: Batch | None = None
        self.born: list[int] = []  # tasks that the calls made, while PTRACE_O_TRACECLONE and TRACEFORK were on
        self.swallowed: list[int] = []  # signals of somebody else that came meanwhile, to be sent again

    def grow(self, size: int) -> None:
        """Its memory has become ``size`` bytes larger."""
        self._capacity += size

    def install(self, mask: int, registers: Registers) -> None:
        """Write the stub, with what a thread without a tracer takes back."""
        self._memory.write(self._base, _CALLS + _heal_code(len(_CALLS), mask, registers))

    def healing(self, registers: Registers) -> Registers:
        """Registers with which the thread, if left alone, goes back to where `install` found it."""
        return untrapped(registers).changed(rip=self._base + len(_CALLS), orig_rax=ALL_SIGNALS)

    @property
    def syscall_at(self) -> int:
        """The address of the stub's ``syscall`` instruction."""
        return self._base + _AFTER_SYSCALL - len(_SYSCALL_INSTRUCTION)

    @property
    def is_running(self) -> bool:
        """Whether a list has been started and not finished."""
        return self._running is not None

    def batch(self) -> Batch:
        """A new, empty list."""
        return Batch(self._base + CODE_SIZE, self._capacity - CODE_SIZE)

    def behind(self, batch: Batch) -> Batch:
        """A new list in the memory that ``batch`` has left free: it can be filled while that one is running."""
        base = batch.base + RECORD_SIZE * (len(batch) + 2)
        return Batch(base, batch.top - base)

    def pause(self, batch: Batch) -> int:
        """Append a stop in the middle of the list, for `run_to`; a thread without a tracer does not stop there."""
        return batch.add(self._last)

    def run_to(self, batch: Batch, pause: int) -> Answers:
        """Begin the list and wait for its pause; the answers up to there. `leave_out` and `finish` may follow."""
        self.start(batch)
        self._until(pause)
        return self._answers(pause)

    def leave_out(self, number: int) -> None:
        """Leave out a call that is still to be made."""
        assert self._running is not None
        nothing = struct.pack("<8Q", *_NOTHING)
        self._memory.write(self._running.base + RECORD_SIZE * number, nothing)

    def go_on(self) -> Answers:
        """Go on after a pause, to the end of the list."""
        ptrace.cont(self.tid)
        return self.finish()

    def start(self, batch: Batch) -> None:
        """Let the thread make the calls; `finish` waits for it."""
        records, top = batch.image(self._last)
        self._memory.write(batch.base, records)
        if top:
            self._memory.write(batch.top, top)
        registers = untrapped(ptrace.get_registers(self.tid))
        # orig_rax -1: the kernel must not take a leftover in rax for an interrupted call and move rip.
        ptrace.set_registers(self.tid, registers.changed(rip=self._base, rbx=batch.base, rax=0, orig_rax=ALL_SIGNALS))
        self._running = batch
        ptrace.cont(self.tid)

    def at_end(self, stop: ptrace.Stop) -> bool:
        """Whether ``stop`` is the one that ends the running list."""
        assert self._running is not None
        return self._is_at(stop, len(self._running))

    def _is_at(self, stop: ptrace.Stop, number: int) -> bool:
        """Whether ``stop`` is the one that record ``number`` makes."""
        assert self._running is not None
        registers = ptrace.get_registers(self.tid)
        record = self._running.base + RECORD_SIZE * number
        is_there = registers["rip"] == self._base + _AFTER_SYSCALL and registers["rbx"] == record
        return stop.signal == self._stop and not stop.event and is_there

    def finish(self, stop: ptrace.Stop | None = None) -> Answers:
        """Wait for the end of the started list. Raises OSError ESRCH where the thread ended."""
        assert self._running is not None
        self._until(len(self._running), stop)
        answers = self._answers(len(self._running))
        self._running = None
        return answers

    def _until(self, number: int, stop: ptrace.Stop | None = None) -> None:
        """Wait for the stop that record ``number`` makes."""
        while True:
            stop = stop or ptrace.wait(self.tid)
            if stop.ended is not None:
                raise ptrace.ended(stop, self.tid)
            if stop.event in (ptrace.PTRACE_EVENT_CLONE, ptrace.PTRACE_EVENT_FORK):
                self.born.append(ptrace.event_message(self.tid))
                ptrace.cont(self.tid)
                stop = None
                continue
            if self._is_at(stop, number):
                return
            _note(stop, self.swallowed)
            ptrace.cont(self.tid)
            stop = None

    def _answers(self, count: int) -> Answers:
        """What the first ``count`` calls of the running list gave back."""
        batch = self._running
        assert batch is not None
        records = self._memory.read(batch.base, RECORD_SIZE * count)
        top = self._memory.read(batch.top, batch.end - batch.top) if batch.end > batch.top else b""
        return Answers.of(batch, records, top)

    def run(self, batch: Batch) -> Answers:
        """`start` and `finish`."""
        self.start(batch)
        return self.finish()


class SingleCall:
    """A stub for one call at a time, which needs no memory that its thread can write::

    syscall              mov  esi, tid
    mov  rbx, rax        mov  edx, signal
    mov  eax, 234        syscall            # tgkill: stops the thread
    mov  edi, pid        (the healing code)
    """

    def __init__(self, tid: int, at: int, stop: int, inner: tuple[int, int]) -> None:
        """``at``: where the stub is to stand; ``stop``, ``inner``: as of `Executor`."""
        self.tid = tid
        self.swallowed: list[int] = []
        self._at = at
        self._stop = stop
        pid, own = inner
        moves = b"".join(
            bytes([opcode]) + struct.pack("<I", value)
            for opcode, value in ((0xB8, NUMBERS["tgkill"]), (0xBF, pid), (0xBE, own), (0xBA, stop))
        )
        self._code = _SYSCALL_INSTRUCTION + bytes.fromhex("4889c3") + moves + _SYSCALL_INSTRUCTION

    def stub(self, mask: int, registers: Registers) -> bytes:
        """The stub, with what a thread without a tracer takes back."""
        return self._code + _heal_code(len(self._code), mask, registers)

    def healing(self, registers: Registers) -> Registers:
        """As of `Executor`."""
        return untrapped(registers).changed(rip=self._at + len(self._code), orig_rax=ALL_SIGNALS)

    def begin(self, made: Call) -> None:
        """Let the thread make one call; `finish` waits for it.

        The thread should have every signal blocked but the one that stops it.
        """
        _set_up(self.tid, self._at, made)
        ptrace.cont(self.tid)

    def finish(self) -> int:
        """Wait for the call; leaves the thread in get_signal(), where the kernel restarts interrupted calls.

        The result as the kernel gave it. Raises OSError ESRCH where the thread ended.
        """
        while True:
            stop = ptrace.wait(self.tid)
            if stop.ended is not None:
                raise ptrace.ended(stop, self.tid)
            if stop.signal == self._stop and not stop.event:
                registers = ptrace.get_registers(self.tid)
                if registers["rip"] == self._at + len(self._code):
                    return _signed(registers["rbx"])
            _note(stop, self.swallowed)
            ptrace.cont(self.tid)


def lone_syscall(tid: int, at: int, made: Call) -> int:
    """Make one call in a stopped thread by the ``syscall`` instruction at ``at``; leaves it in its syscall-exit-stop.

    The result as the kernel gave it (a negative errno for a refusal). The thread should have every signal blocked:
    what comes all the same is kept from it.
    """
    _set_up(tid, at, made)
    for _ in ("entry", "exit"):
        ptrace.cont_to_syscall(tid)
        _await_syscall_stop(tid)
    return _signed(ptrace.get_registers(tid)["rax"])


def last_syscall(tid: int, at: int, made: Call) -> Generator[None, None, int]:
    """The same in steps, but for where it leaves the thread: see `make_and_interrupt`. It must be a call that nothing
    interrupts."""
    _set_up(tid, at, made)
    yield from make_and_interrupt(tid)
    return _signed(ptrace.get_registers(tid)["rax"])


def make_and_interrupt(tid: int) -> Iterator[None]:
    """Let a stopped thread, whose next instruction is ``syscall``, make its call, which is interrupted if it waits.

    Leaves it in get_signal(), the one place where the kernel restarts interrupted calls. In steps: after each the
    thread is busy on its own.
    """
    ptrace.cont_to_syscall(tid)
    yield
    _await_syscall_stop(tid)
    while True:
        # Asked for within the call, the stop is the next thing that comes; any other takes it away (ptrace_stop).
        ptrace.interrupt(tid)
        ptrace.cont(tid)
        yield
        stop = ptrace.wait(tid)
        if stop.ended is not None:
            raise ptrace.ended(stop, tid)
        if stop.event == ptrace.PTRACE_EVENT_STOP:
            return


def _set_up(tid: int, at: int, made: Call) -> None:
    """Put the thread before the call."""
    arguments = dict(zip(_ARGUMENTS, made.arguments, strict=False))
    before = untrapped(ptrace.get_registers(tid))
    ptrace.set_registers(tid, before.changed(rip=at, rax=made.number, orig_rax=ALL_SIGNALS, **arguments))


def _await_syscall_stop(tid: int) -> None:
    while not (stop := ptrace.wait(tid)).is_syscall:
        if stop.ended is not None:
            raise ptrace.ended(stop, tid)
        ptrace.cont_to_syscall(tid)


def _signed(result: int) -> int:
    return result - (1 << 64) if result >> 63 else result


def _note(stop: ptrace.Stop, swallowed: list[int]) -> None:
    if not stop.event:
        swallowed.append(stop.signal)
