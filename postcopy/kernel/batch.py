"""Lists of system calls, to be made by another task (`executor`) or by ourselves (`own_calls`).

A *record* is eight 64-bit words: the call's number, its six arguments, and a word that is not zero while the call is
to be made and holds its result afterwards. Behind the last one is a record of zeros.
"""

import errno
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from msgspec import Struct

from postcopy.kernel.calls import NAMES, Call

RECORD_SIZE = 64
RESULT = 7  # the word of a record that holds it
_RECORD, _PADDING = struct.Struct("<8Q"), (0,) * 6
_LEAST_RESULT = -4095  # MAX_ERRNO, include/linux/err.h


class Batch:
    """A list of system calls to be, with the bytes their arguments point to and the room for what they give back.

    Lies in memory at ``base``: records from the bottom, bytes from ``top`` to ``end``.
    """

    def __init__(self, base: int, capacity: int) -> None:
        """``capacity``: bytes."""
        self.base = base
        self.top = self.end = base + capacity
        self._records: list[bytes] = []
        self._purposes: list[object] = []  # of a single call, or a `_Run`
        self._count = 0
        self._whole: list[tuple[int, int]] = []
        self._pieces: list[bytes] = []

    def __len__(self) -> int:
        """The number of calls."""
        return self._count

    def add(self, made: Call, purpose: object = "") -> int:
        """Append a call; the number by which its result is found. With a ``purpose`` a refusal is an error.

        What ``purpose`` is as a string says what has failed.
        """
        self._records.append(_record(made))
        self._purposes.append(purpose)
        self._count += 1
        return self._count - 1

    def extend(self, records: bytes, texts: Sequence[str], subject: object) -> None:
        """Append calls by their records, each with a purpose: a text that is to be formatted with ``subject``."""
        self._records.append(records)
        self._purposes.append(_Run(texts, subject))
        self._count += len(texts)

    def must_take(self, number: int, length: int) -> None:
        """The result of a call must be ``length`` bytes: to take fewer of them is an error, too."""
        self._whole.append((number, length))

    def place(self, content: bytes) -> int:
        """Lay ``content`` into the memory; its address (16-byte aligned)."""
        padded = content.ljust((len(content) + 15) & ~15, b"\0")
        self.top -= len(padded)
        self._pieces.append(padded)
        return self.top

    def room(self, length: int) -> int:
        """The address of ``length`` zero bytes, for a call to fill."""
        return self.place(bytes(length))

    def text(self, content: str | bytes) -> int:
        """The address of a NUL-terminated string."""
        encoded = content.encode(errors="surrogateescape") if isinstance(content, str) else content
        return self.place(encoded + b"\0")

    @property
    def free(self) -> int:
        """Bytes still free (the records that end the list are accounted for)."""
        return self.top - self.base - RECORD_SIZE * (len(self) + 2)

    def image(self, *last: Call) -> tuple[bytes, bytes]:
        """The records with ``last`` behind them, and the bytes of the top."""
        if self.free < 0:
            raise ValueError(f"{len(self)} calls and their data do not fit into {self.end - self.base} bytes")
        records = b"".join([*self._records, *map(_record, last), bytes(RECORD_SIZE)])
        return records, b"".join(reversed(self._pieces))

    def refused(self, results: Sequence[int]) -> Iterable[tuple[Call, str, int]]:
        """Each call with a purpose whose result is an error: the call, its purpose, the errno."""
        short = {number for number, length in self._whole if 0 <= results[number] < length}
        if min(results, default=0) >= 0 and not short:
            return
        records = b"".join(self._records)
        for number, (purpose, result) in enumerate(zip(self._each_purpose(), results, strict=True)):
            if number in short or (purpose and _LEAST_RESULT <= result < 0):
                of_call, *arguments, _ = _RECORD.unpack_from(records, RECORD_SIZE * number)
                made = Call(NAMES[of_call], of_call, tuple(arguments))
                if number in short:
                    yield made, f"{purpose}, which took {result} bytes and no more", errno.EIO
                else:
                    yield made, purpose, -result

    def _each_purpose(self) -> Iterator[str]:
        for purpose in self._purposes:
            if isinstance(purpose, _Run):
                yield from (text.format(purpose.subject) for text in purpose.texts)
            else:
                yield str(purpose)


class _Run(NamedTuple):
    """Why calls are made that were added together."""

    texts: Sequence[str]
    subject: object


class Answers(Struct):
    """What a batch gave back: the results, and the memory its calls filled."""

    batch: Batch
    results: list[int]
    top: bytes

    @classmethod
    def of(cls, batch: Batch, records: bytes, top: bytes) -> "Answers":
        """From the memory of the first so many records, and from that above."""
        return cls(batch, memoryview(records).cast("q")[RESULT::8].tolist(), top)

    def read(self, address: int, length: int) -> bytes:
        """``length`` bytes of the room at ``address``."""
        start = address - self.batch.end + len(self.top)
        return self.top[start : start + length]

    def value(self, number: int) -> int:
        """The result of call ``number``: not negative, or the negated errno."""
        return self.results[number]

    def refusals(self) -> Iterable[tuple[Call, str, int]]:
        """As `Batch.refused`."""
        return self.batch.refused(self.results)


def _record(made: Call) -> bytes:
    return _RECORD.pack(made.number, *made.arguments, *_PADDING[len(made.arguments) :], 1)
