"""ptrace(2): stop, look into and steer another task. Linux 3.4 and newer (PTRACE_SEIZE)."""

import errno
import os
import struct

from msgspec import Struct

from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import address_of, refused, syscall

PTRACE_CONT = 7
PTRACE_DETACH = 17
PTRACE_SYSCALL = 24
PTRACE_SETOPTIONS = 0x4200
PTRACE_GETEVENTMSG = 0x4201
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_PEEKSIGINFO = 0x4209
PTRACE_GETREGSET = 0x4204
PTRACE_SETREGSET = 0x4205
PTRACE_GETSIGMASK = 0x420A
PTRACE_SETSIGMASK = 0x420B
PTRACE_SECCOMP_GET_FILTER = 0x420C
PTRACE_SECCOMP_GET_METADATA = 0x420D
PTRACE_GET_RSEQ_CONFIGURATION = 0x420F

PTRACE_O_TRACESYSGOOD = 0x01
PTRACE_O_TRACEFORK = 0x02
PTRACE_O_TRACECLONE = 0x08
PTRACE_O_TRACEEXEC = 0x10
PTRACE_O_EXITKILL = 0x100000
PTRACE_O_SUSPEND_SECCOMP = 0x200000

PTRACE_EVENT_FORK = 1
PTRACE_EVENT_CLONE = 3
PTRACE_EVENT_EXEC = 4
PTRACE_EVENT_STOP = 128

PTRACE_PEEKSIGINFO_SHARED = 1

NT_PRSTATUS = 1
NT_X86_XSTATE = 0x202

SIGINFO_SIZE = 128
WALL = 0x40000000  # __WALL, which the os module does not name

_REGISTERS = (
    "r15",
    "r14",
    "r13",
    "r12",
    "rbp",
    "rbx",
    "r11",
    "r10",
    "r9",
    "r8",
    "rax",
    "rcx",
    "rdx",
    "rsi",
    "rdi",
    "orig_rax",
    "rip",
    "cs",
    "eflags",
    "rsp",
    "ss",
    "fs_base",
    "gs_base",
    "ds",
    "es",
    "fs",
    "gs",
)
_LAYOUT = struct.Struct("<27Q")  # struct user_regs_struct, arch/x86/include/asm/user_64.h
_IOVEC = struct.Struct("<QQ")


class Registers(dict[str, int]):
    """The general registers of a task by the kernel's names (struct user_regs_struct), as unsigned 64-bit values."""

    @classmethod
    def unpack(cls, raw: bytes) -> "Registers":
        """From the NT_PRSTATUS register set."""
        return cls(zip(_REGISTERS, _LAYOUT.unpack(raw), strict=True))

    def pack(self) -> bytes:
        """As the NT_PRSTATUS register set."""
        return _LAYOUT.pack(*(self[name] & 0xFFFF_FFFF_FFFF_FFFF for name in _REGISTERS))

    def changed(self, **values: int) -> "Registers":
        """A copy with some registers replaced."""
        return Registers({**self, **values})


class Stop(Struct, frozen=True):
    """How a wait ended: a ptrace-stop (signal and event), or the end of the task (``ended``, the wait status)."""

    signal: int = 0
    event: int = 0
    ended: int | None = None

    @property
    def is_syscall(self) -> bool:
        """A syscall-stop, told apart by PTRACE_O_TRACESYSGOOD."""
        return self.signal & 0x80 != 0


class RseqConfiguration(Struct, frozen=True):
    """Where a thread registered its rseq area (bytes) and with which signature; ``pointer`` 0: not registered."""

    pointer: int
    size: int
    signature: int
    flags: int


def _ptrace(what: str, request: int, tid: int, address: int = 0, data: int = 0) -> int:
    return syscall(f"{what} of task {tid}", NUMBERS["ptrace"], request, tid, address, data)


def seize(tid: int, options: int) -> None:
    """Begin to trace ``tid`` without stopping it. Raises OSError: EPERM (somebody else traces it), ESRCH (ended)."""
    _ptrace("PTRACE_SEIZE", PTRACE_SEIZE, tid, 0, options)


def set_options(tid: int, options: int) -> None:
    """Replace the PTRACE_O_ options of a stopped task.

    Raises OSError: EINVAL or EPERM for PTRACE_O_SUSPEND_SECCOMP, which the kernel must be built for
    (CONFIG_CHECKPOINT_RESTORE), and which takes CAP_SYS_ADMIN and a tracer that is not confined by seccomp itself.
    """
    _ptrace("PTRACE_SETOPTIONS", PTRACE_SETOPTIONS, tid, 0, options)


def interrupt(tid: int) -> None:
    """Ask a seized task to stop; the stop arrives by `wait` as PTRACE_EVENT_STOP."""
    _ptrace("PTRACE_INTERRUPT", PTRACE_INTERRUPT, tid)


def cont(tid: int, signal: int = 0) -> None:
    """Let a stopped task run on, delivering ``signal`` where it is not 0."""
    _ptrace("PTRACE_CONT", PTRACE_CONT, tid, 0, signal)


def cont_to_syscall(tid: int) -> None:
    """Let a stopped task run to the next entry into, or exit from, a system call."""
    _ptrace("PTRACE_SYSCALL", PTRACE_SYSCALL, tid)


def detach(tid: int, signal: int = 0) -> None:
    """Stop tracing ``tid`` and let it run on, delivering ``signal`` where it is not 0."""
    _ptrace("PTRACE_DETACH", PTRACE_DETACH, tid, 0, signal)


def wait(tid: int) -> Stop:
    """Wait for the next stop, or the end, of a traced task."""
    return _stop(os.waitpid(tid, WALL)[1])


def look(tid: int) -> Stop | None:
    """Like `wait`, but None where the task has neither stopped nor ended."""
    found, status = os.waitpid(tid, WALL | os.WNOHANG)
    return _stop(status) if found else None


def has_news(tid: int) -> bool:
    """Whether `wait` would return at once."""
    return os.waitid(os.P_PID, tid, os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT | WALL) is not None


def _stop(status: int) -> Stop:
    if os.WIFSTOPPED(status):
        return Stop(signal=os.WSTOPSIG(status), event=status >> 16)
    return Stop(ended=status)


def _get_regset(tid: int, kind: int, size: int) -> bytes:
    buffer = bytearray(size)
    vector = bytearray(_IOVEC.pack(address_of(buffer), size))
    _ptrace("PTRACE_GETREGSET", PTRACE_GETREGSET, tid, kind, address_of(vector))
    return bytes(buffer[: _IOVEC.unpack(vector)[1]])


def _set_regset(tid: int, kind: int, content: bytes) -> None:
    vector = _IOVEC.pack(address_of(content), len(content))
    _ptrace("PTRACE_SETREGSET", PTRACE_SETREGSET, tid, kind, address_of(vector))


def get_registers(tid: int) -> Registers:
    """The general registers of a stopped task."""
    return Registers.unpack(_get_regset(tid, NT_PRSTATUS, _LAYOUT.size))


def set_registers(tid: int, registers: Registers) -> None:
    """Replace the general registers of a stopped task."""
    _set_regset(tid, NT_PRSTATUS, registers.pack())


def get_xstate(tid: int) -> bytes:
    """The XSAVE area of a stopped task, as long as the CPU's features make it (bytes)."""
    return _get_regset(tid, NT_X86_XSTATE, 16384)


def set_xstate(tid: int, content: bytes) -> None:
    """Replace the XSAVE area of a stopped task; EINVAL or EFAULT where this CPU has not the same features."""
    _set_regset(tid, NT_X86_XSTATE, content)


def get_signal_mask(tid: int) -> int:
    """The blocked signals of a stopped task as a bit mask (bit 0 is signal 1)."""
    buffer = bytearray(8)
    _ptrace("PTRACE_GETSIGMASK", PTRACE_GETSIGMASK, tid, 8, address_of(buffer))
    return int.from_bytes(buffer, "little")


def set_signal_mask(tid: int, mask: int) -> None:
    """Replace the blocked signals of a stopped task (bit 0 is signal 1)."""
    buffer = mask.to_bytes(8, "little")
    _ptrace("PTRACE_SETSIGMASK", PTRACE_SETSIGMASK, tid, 8, address_of(buffer))


def pending_signals(tid: int, shared: bool) -> list[bytes]:
    """The siginfo (128 bytes each) of the queued signals, of the thread or of its process, in queue order."""
    found: list[bytes] = []
    batch = 32
    while True:
        arguments = struct.pack("<QIi", len(found), PTRACE_PEEKSIGINFO_SHARED if shared else 0, batch)
        buffer = bytearray(SIGINFO_SIZE * batch)
        count = _ptrace("PTRACE_PEEKSIGINFO", PTRACE_PEEKSIGINFO, tid, address_of(arguments), address_of(buffer))
        found += [bytes(buffer[i * SIGINFO_SIZE : (i + 1) * SIGINFO_SIZE]) for i in range(count)]
        if count < batch:
            return found


def rseq_configuration(tid: int) -> RseqConfiguration:
    """The rseq registration of a stopped task (Linux 5.13)."""
    buffer = bytearray(24)
    _ptrace("PTRACE_GET_RSEQ_CONFIGURATION", PTRACE_GET_RSEQ_CONFIGURATION, tid, 24, address_of(buffer))
    pointer, size, signature, flags, _ = struct.unpack("<QIIII", buffer)
    return RseqConfiguration(pointer, size, signature, flags)


def ended(stop: Stop, tid: int) -> OSError:
    """The error for a task that ended while it was being traced."""
    return refused(f"task {tid} ended ({os.waitstatus_to_exitcode(stop.ended or 0)}) while it was traced", 3)


def event_message(tid: int) -> int:
    """What belongs to the event a task stopped for; for PTRACE_EVENT_CLONE the new task's TID as we see it."""
    buffer = bytearray(8)
    _ptrace("PTRACE_GETEVENTMSG", PTRACE_GETEVENTMSG, tid, 0, address_of(buffer))
    return int.from_bytes(buffer, "little")


def seccomp_filters(tid: int) -> list[tuple[bytes, int]]:
    """The seccomp filters of a stopped task, oldest first: the program (8 bytes an instruction) and its flags.

    Raises OSError: EACCES without CAP_SYS_ADMIN or where we are confined ourselves, EMEDIUMTYPE for a program that is
    not classic BPF.
    """
    found: list[tuple[bytes, int]] = []
    while True:
        try:
            count = _ptrace("PTRACE_SECCOMP_GET_FILTER", PTRACE_SECCOMP_GET_FILTER, tid, len(found))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return found
            raise
        program = bytearray(8 * count)
        _ptrace("PTRACE_SECCOMP_GET_FILTER", PTRACE_SECCOMP_GET_FILTER, tid, len(found), address_of(program))
        metadata = bytearray(struct.pack("<QQ", len(found), 0))
        what = "PTRACE_SECCOMP_GET_METADATA"
        _ptrace(what, PTRACE_SECCOMP_GET_METADATA, tid, len(metadata), address_of(metadata))
        found.append((bytes(program), struct.unpack("<QQ", metadata)[1]))
