"""System calls that this process makes itself, many in one go: of thousands of sockets each is asked a hundred times,
and most of the time would go into the calls' way through the interpreter.

The lists are those of `executor`, and so is the code that makes them, but for what a function needs, and for a
descriptor that one call opens and the following ones use: ``rdi`` is what was kept where a record has KEPT for it, and
a record whose last word is 2 keeps its result::

            push  rbx                            mov   r8,  [rbx+40]
            push  r12                            mov   r9,  [rbx+48]
            mov   rbx, rdi                       syscall
            mov   r12, rsi                       mov   rcx, [rbx+56]
    call:   mov   rcx, [rbx+56]                  mov   [rbx+56], rax
            jrcxz done                           cmp   rcx, 2
            mov   rax, [rbx]                     cmove r12, rax
            mov   rdi, [rbx+8]                   lea   rbx, [rbx+64]
            cmp   rdi, KEPT                      jmp   call
            cmove rdi, r12               done:   pop   r12
            mov   rsi, [rbx+16]                  pop   rbx
            mov   rdx, [rbx+24]                  ret
            mov   r10, [rbx+32]
"""

import functools
import mmap
import struct
from collections.abc import Callable

from postcopy.kernel._libc import ffi
from postcopy.kernel.batch import RECORD_SIZE, RESULT, Batch
from postcopy.kernel.calls import Call
from postcopy.kernel.libc import address_of, lib, memory_at

#: Stands for the result of the last call that was to be kept: no descriptor, and no address.
KEPT = -4096

_CODE = bytes.fromhex(
    "53 4154 4889fb 4989f4"
    "488b4b38 e33e 488b03 488b7b08 4881ff00f0ffff 490f44fc 488b7310 488b5318 4c8b5320 4c8b4328 4c8b4b30 0f05"
    "488b4b38 48894338 4883f902 4c0f44e0 488d5b40 ebbc"
    "415c 5b c3"
)

_KEEP = 2  # the last word of a record before its call is made
_WORD = struct.Struct("=q")


@functools.cache
def _maker() -> tuple[Callable[[int, int], None], mmap.mmap | None]:
    """What makes the calls, given the address of the first record and what is kept; and the memory of the code."""
    try:
        memory = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except PermissionError:
        # Some hosts allow nobody memory that can be written and executed.
        return one_by_one, None
    memory[: len(_CODE)] = _CODE
    return ffi.cast("void (*)(uintptr_t, long)", address_of(memory)), memory


def one_by_one(records: int, kept: int) -> None:
    """Make the calls without code of ours."""
    words = memory_at(records, RECORD_SIZE).cast("q")
    while wanted := words[RESULT]:
        number, first, *others = words[:RESULT]
        result = lib.syscall(number, kept if first == KEPT else first, *others)
        words[RESULT] = result = -ffi.errno if result == -1 else result
        if wanted == _KEEP:
            kept = result
        records += RECORD_SIZE
        words = memory_at(records, RECORD_SIZE).cast("q")


class OwnCalls:
    """A list of calls that is prepared once, by `add`, `place` and `room`, and made as often as is wanted."""

    def __init__(self, capacity: int) -> None:
        """``capacity``: bytes for the calls and what they point to."""
        capacity = (capacity + 15) & ~15
        self._memory = mmap.mmap(-1, capacity, mmap.MAP_PRIVATE)
        self._words = memoryview(self._memory).cast("q")
        self._base = address_of(self._memory)
        self._batch = Batch(self._base, capacity)
        self._keeping: list[int] = []
        self._image = bytearray()
        self._make, self._code = _maker()
        #: As those of `Batch`, before the calls are made for the first time.
        self.place, self.room = self._batch.place, self._batch.room

    def add(self, made: Call, keep: bool = False) -> int:
        """Append a call; the number by which its result is found. ``keep``: from there on KEPT is its result."""
        number = self._batch.add(made)
        if keep:
            self._keeping.append(number)
        return number

    def _prepared(self) -> bytearray:
        if not self._image:
            records, top = self._batch.image()
            self._image[:] = records.ljust(len(self._memory) - len(top), b"\0") + top
            for number in self._keeping:
                self.change(number, RESULT, _KEEP)
        return self._image

    def change(self, number: int, word: int, value: int) -> None:
        """Make another call of number ``number``: ``word`` 1 is its first argument."""
        _WORD.pack_into(self._prepared(), RECORD_SIZE * number + 8 * word, value)

    def write(self, address: int, content: bytes) -> None:
        """Lay other bytes where `place` or `room` has given ``address``."""
        start = address - self._base
        self._prepared()[start : start + len(content)] = content

    def make(self, kept: int = -1) -> None:
        """Make the calls; ``kept`` is KEPT up to the first one that is to be kept."""
        self._memory[:] = self._prepared()
        self._make(self._base, kept)

    def result(self, number: int) -> int:
        """What a call has given: not negative, or the negated errno."""
        return self._words[8 * number + RESULT]

    def results(self, first: int, count: int) -> bytes:
        """Of so many calls, as 64-bit words."""
        return self._words[8 * first + RESULT : 8 * (first + count) : 8].tobytes()

    def read(self, address: int, length: int) -> bytes:
        """What a call has left at ``address``."""
        start = address - self._base
        return self._memory[start : start + length]
