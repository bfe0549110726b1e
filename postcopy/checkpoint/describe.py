"""What is in a checkpoint, as plain data: all of the state, with what it means where only bytes are kept."""

import datetime
import signal
import struct
from collections.abc import Iterator
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from postcopy.checkpoint.reader import Checkpoint
from postcopy.kernel.page import PAGE_SIZE
from postcopy.kernel.ptrace import Registers
from postcopy.page_ranges import PageRanges
from postcopy.state import Memory, Process, Signals, Thread, Timers, Vma

_SIGACTION = struct.Struct("<4Q")  # handler, flags, restorer, mask
_SIGINFO = struct.Struct("<iii4xiI")  # number, errno, code; and for those that a process sent: its pid and uid
_ITIMERVAL = struct.Struct("<4q")
_SIG_DFL, _SIG_IGN = 0, 1
_TIMERS = ("ITIMER_REAL", "ITIMER_VIRTUAL", "ITIMER_PROF")
_SIGRTMIN = 34


class Pages(Struct, frozen=True):
    """The pages of a mapping: how many exist, and of these how many are zero, lazy, or sent with the state."""

    exist: int
    zero: int
    lazy: int
    sent: int


class MemoryMap:
    """How much of each mapping of a process there is."""

    def __init__(self, checkpoint: Checkpoint, process: Process) -> None:
        self._lazy = PageRanges.unpack(process.memory.lazy)
        self._sent = PageRanges.unpack(process.memory.sent)
        self._zero = checkpoint.indices[process.space].zero
        self.vmas = process.memory.vmas

    def of(self, start: int, end: int) -> Pages:
        """The pages from ``start`` to ``end``."""
        zero, lazy, sent = (
            sum(part.pages for part, _ in ranges.overlapping(start, end))
            for ranges in (self._zero, self._lazy, self._sent)
        )
        return Pages(zero + lazy + sent, zero, lazy, sent)

    def total(self) -> Pages:
        """Those of the whole process."""
        zero, lazy, sent = (ranges.total_pages for ranges in (self._zero, self._lazy, self._sent))
        return Pages(zero + lazy + sent, zero, lazy, sent)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """All of a checkpoint but its page data, as what JSON can hold; bytes as hexadecimal text."""
    about = _plain(checkpoint.about)
    about["id"] = checkpoint.id.hex()
    about["taken_at"] = taken_at(checkpoint).isoformat()
    processes = [_process(checkpoint, process) for process in checkpoint.tree.processes]
    return {
        **about,
        "sizes": checkpoint.sizes,
        **_plain(replace(checkpoint.tree, processes=[])),
        "processes": processes,
    }


def taken_at(checkpoint: Checkpoint) -> datetime.datetime:
    """When it was taken, in UTC."""
    return datetime.datetime.fromtimestamp(checkpoint.about.taken_at / 1e9, datetime.UTC)


def _process(checkpoint: Checkpoint, process: Process) -> dict[str, Any]:
    plain: dict[str, Any] = _plain(process)
    memory = MemoryMap(checkpoint, process)
    plain["memory"] |= _memory(process.memory)
    plain["memory"]["pages"] = _plain(memory.total())
    for vma, described in zip(memory.vmas, plain["memory"]["vmas"], strict=True):
        described["pages"] = _plain(memory.of(vma.start, vma.end))
    plain["signals"] |= {
        "handlers": {name: text for name, text, _ in handlers(process.signals)},
        "pending_signals": pending(process.signals),
    }
    plain["timers"]["armed"] = list(timers(process.timers))
    for thread, described in zip(process.threads, plain["threads"], strict=True):
        described["name"] = name_of(thread)
        described["registers"] = Registers.unpack(thread.registers)
        described["blocked_signals"] = signals_in(thread.signal_mask)
        described["pending_signals"] = pending(thread)
    return plain


def _memory(memory: Memory) -> dict[str, Any]:
    return {
        name: [[each.start, each.end] for each in PageRanges.unpack(getattr(memory, name))]
        for name in ("sent", "lazy", "guards")
    }


def _plain(value: Any) -> Any:
    """Structs as dictionaries, bytes as hexadecimal text."""
    if isinstance(value, Struct):
        return {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.hex() if isinstance(value, bytes) else value


def name_of(thread: Thread) -> str:
    """The name that the thread has given itself."""
    return thread.name.decode(errors="surrogateescape")


def signal_name(number: int) -> str:
    """As kill(1) names it."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - _SIGRTMIN}" if number > _SIGRTMIN else f"signal {number}"


def signals_in(mask: int) -> list[str]:
    """The signals of a mask."""
    return [signal_name(number) for number in range(1, 65) if mask >> (number - 1) & 1]


def handlers(signals: Signals) -> Iterator[tuple[str, str, int]]:
    """The signals that are not left to their default: name, ``ignored`` or the handler's address, flags."""
    for number, action in enumerate(signals.actions, start=1):
        handler, flags, _, _ = _SIGACTION.unpack(action)
        if handler != _SIG_DFL:
            yield signal_name(number), "ignored" if handler == _SIG_IGN else f"{handler:#x}", flags


def pending(of: Signals | Thread) -> list[str]:
    """The signals that wait, each with who sent it."""
    return [_sent(siginfo) for siginfo in of.pending]


def _sent(siginfo: bytes) -> str:
    number, _, code, pid, uid = _SIGINFO.unpack_from(siginfo)
    # sigaction(2): what is not above 0 was sent by a process, and says by which.
    return f"{signal_name(number)} from process {pid} (user {uid})" if code <= 0 else f"{signal_name(number)} (kernel)"


def timers(of: Timers) -> Iterator[str]:
    """The interval timers that run."""
    for name, timer in zip(_TIMERS, of.intervals, strict=True):
        every, every_fraction, left, left_fraction = _ITIMERVAL.unpack(timer)
        if left or left_fraction:
            text = f"{name} in {left + left_fraction / 1e6:g} s"
            yield f"{text}, then every {every + every_fraction / 1e6:g} s" if every or every_fraction else text


def protection(vma: Vma) -> str:
    """As ``/proc/PID/maps`` writes it."""
    letters = "".join(letter if vma.prot >> bit & 1 else "-" for bit, letter in enumerate("rwx"))
    return letters + ("s" if vma.shared else "p")


def size_text(size: int) -> str:
    """A number of bytes, for people."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.3g} {unit}"
        amount /= 1024
    return f"{amount:.4g} TiB"


def pages_text(pages: int) -> str:
    """A number of pages in bytes; nothing for none."""
    return size_text(pages * PAGE_SIZE) if pages else ""
