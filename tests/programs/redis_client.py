"""Checks every answer of a Redis server: ``... -m tests.programs.redis_client DIRECTORY COUNT KEYS ADDRESS``.

COUNT connections to port 6379 have keys of their own, and write KEYS values each. Then each of them sets, reads, counts
and appends, a question after the answer to the one before, and compares each answer with what it must be. At last all
that was ever acknowledged is read again. See `tests.programs.checking`.
"""

import socket
import sys
from pathlib import Path

from tests.programs import checking

PORT = 6379
_VALUE = 1000
_PIPELINE = 500

Answer = bytes | int | None


class Connection(checking.Connection):
    """One connection, and what the server must have of it."""

    def __init__(self, number: int, address: str, keys: int) -> None:
        super().__init__(number)
        self.sock = socket.create_connection((address, PORT), timeout=checking.PATIENCE)
        self.file = self.sock.makefile("rb")
        self.keys = keys
        self.values: dict[bytes, bytes] = {}

    def begin(self) -> None:
        """Write all values."""
        for first in range(0, self.keys, _PIPELINE):
            names = [self._key(key) for key in range(first, min(first + _PIPELINE, self.keys))]
            for name in names:
                self.values[name] = self._new_value()
            self.sock.sendall(b"".join(_command(b"SET", name, self.values[name]) for name in names))
            for _ in names:
                self._expect(b"OK")
                self.writes += 1

    def step(self) -> None:
        """Ask something."""
        name = self._key(self.random.randrange(self.keys))
        match self.random.randrange(4):
            case 0:
                value = self._new_value()
                self._ask(b"OK", b"SET", name, value)
                self._acknowledged(name, value)
            case 1:
                value = self.values[name] + b"+"
                self._ask(len(value), b"APPEND", name, b"+")
                self._acknowledged(name, value)
            case 2:
                counter = b"counter:%d" % self.number
                count = int(self.values.get(counter, b"0")) + 1
                self._ask(count, b"INCR", counter)
                self._acknowledged(counter, b"%d" % count)
            case _:
                self._ask(self.values[name], b"GET", name)

    def end(self) -> None:
        """Read all that was acknowledged."""
        names = list(self.values)
        for first in range(0, len(names), _PIPELINE):
            some = names[first : first + _PIPELINE]
            self.sock.sendall(b"".join(_command(b"GET", name) for name in some))
            for name in some:
                self._expect(self.values[name])

    def _acknowledged(self, name: bytes, value: bytes) -> None:
        self.writes += 1
        self.values[name] = value

    def _ask(self, expected: Answer, *words: bytes) -> None:
        self.sock.sendall(_command(*words))
        self._expect(expected)

    def _expect(self, expected: Answer) -> None:
        answer = self._answer()
        if answer != expected:
            raise ValueError(f"{expected!r:.60} was due and not {answer!r:.60}")

    def _answer(self) -> Answer:
        line = self.file.readline()
        if not line:
            raise ConnectionError("closed")
        kind, text = line[:1], line[1:-2]
        if kind == b"+":
            return text
        if kind == b":":
            return int(text)
        if kind != b"$":
            raise ValueError(f"the server says {line!r}")
        return None if text == b"-1" else self.file.read(int(text) + 2)[:-2]

    def _key(self, key: int) -> bytes:
        return b"key:%d:%d" % (self.number, key)

    def _new_value(self) -> bytes:
        return self.random.randbytes(_VALUE)


def _command(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


def main() -> None:
    """Connect, work, report."""
    directory, count, keys, address = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    checking.run(directory, [Connection(number, address, keys) for number in range(count)])


if __name__ == "__main__":
    main()
