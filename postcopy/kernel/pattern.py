"""Calls that are made thousands of times, with other words in some places, which are filled into their records."""

import struct
from collections.abc import Sequence
from itertools import repeat
from typing import NoReturn

from postcopy.kernel.batch import Batch
from postcopy.kernel.calls import Call


class Blank(int):
    """An argument that is word ``number`` of those that `Pattern.repeat` is given, plus ``offset``."""

    number: int
    offset: int

    def __new__(cls, number: int, offset: int = 0) -> "Blank":
        """It cannot be calculated with, as it is none of the words yet."""
        made = super().__new__(cls)
        made.number, made.offset = number, offset
        return made

    def __and__(self, _: int) -> NoReturn:
        """A negative argument beside a blank one (`calls.call`) is not provided for."""
        raise TypeError("a blank argument has no value yet")


class Pattern:
    """A list of calls, of which some arguments are `Blank`."""

    def __init__(self) -> None:
        """No calls yet."""
        self._blanks: list[tuple[int, int]] = []
        self._fixed: list[bytearray] = [bytearray()]
        self._texts: list[str] = []
        self._whole: list[tuple[int, int]] = []
        self._filler: tuple[struct.Struct, list[bytes | int]] | None = None

    def add(self, made: Call, text: str) -> None:
        """Append a call; ``text`` says what has failed, with {} for whom it is repeated for."""
        for word in (made.number, *made.arguments, *repeat(0, 6 - len(made.arguments)), 1):
            if isinstance(word, Blank):
                self._blanks.append((word.number, word.offset))
                self._fixed.append(bytearray())
            else:
                self._fixed[-1] += word.to_bytes(8, "little")
        self._texts.append(text)
        self._filler = None

    def must_take(self, length: Blank) -> None:
        """The call that was added last: as of `Batch.must_take`."""
        self._whole.append((len(self._texts) - 1, length.number))

    def repeat(self, batch: Batch, words: Sequence[int], subject: object) -> None:
        """Add the calls to a batch, with these words; ``subject``: for whom."""
        form, arguments = self._filler or self._prepared()
        arguments[1::2] = [words[number] + offset for number, offset in self._blanks]
        for index, number in self._whole:
            batch.must_take(len(batch) + index, words[number])
        batch.extend(form.pack(*arguments), self._texts, subject)

    def _prepared(self) -> tuple[struct.Struct, list[bytes | int]]:
        """A struct in which fixed bytes and blank words take turns, and its arguments."""
        form = struct.Struct("<" + "Q".join(f"{len(each)}s" for each in self._fixed))
        arguments: list[bytes | int] = [b""] * (2 * len(self._fixed) - 1)
        arguments[::2] = map(bytes, self._fixed)
        self._filler = form, arguments
        return self._filler
