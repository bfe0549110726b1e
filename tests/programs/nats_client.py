"""Checks every answer of a NATS server: ``... -m tests.programs.nats_client DIRECTORY COUNT MESSAGES ADDRESS``.

COUNT connections to port 4222 have a stream each, which the server keeps in memory, and put MESSAGES messages into it.
Then each of them has messages sent back to itself, reads from its stream and adds to it, a question after the answer to
the one before. At last all that was ever acknowledged is read again. See `tests.programs.checking`.
"""

import base64
import json
import socket
import sys
from pathlib import Path
from typing import Any

from tests.programs import checking

PORT = 4222
_SIZE = 1000
_PIPELINE = 200


class Connection(checking.Connection):
    """One connection, and what is in its stream."""

    def __init__(self, number: int, address: str, messages: int) -> None:
        super().__init__(number)
        self.sock = socket.create_connection((address, PORT), timeout=checking.PATIENCE)
        self.file = self.sock.makefile("rb")
        self.messages = messages
        self.kept: list[bytes] = []
        self.inbox = b"inbox.%d" % number
        self.stream = f"stream{number}"

    def begin(self) -> None:
        """Make the stream and fill it."""
        self._line(b"INFO ")
        self.sock.sendall(b'CONNECT {"verbose":false,"headers":false}\r\nSUB %b 1\r\n' % self.inbox)
        wanted = {"name": self.stream, "subjects": [self._subject.decode()], "storage": "memory", "retention": "limits"}
        self._ask(f"$JS.API.STREAM.CREATE.{self.stream}", wanted)
        for _ in range(0, self.messages, _PIPELINE):
            new = [self.random.randbytes(_SIZE) for _ in range(_PIPELINE)]
            self.sock.sendall(b"".join(self._frame(self._subject, each) for each in new))
            for each in new:
                self._acknowledged(each)

    def step(self) -> None:
        """Ask something."""
        match self.random.randrange(3):
            case 0:
                content = self.random.randbytes(self.random.randrange(1, 20_000))
                self.sock.sendall(b"PUB %b %d\r\n%b\r\n" % (self.inbox, len(content), content))
                if self._message() != content:
                    raise ValueError("another message came back")
            case 1:
                self._read(self.random.randrange(len(self.kept)))
            case _:
                content = self.random.randbytes(_SIZE)
                self.sock.sendall(self._frame(self._subject, content))
                self._acknowledged(content)

    def end(self) -> None:
        """Read all that was acknowledged."""
        for place in range(len(self.kept)):
            self._read(place)

    @property
    def _subject(self) -> bytes:
        return b"keep.%d" % self.number

    def _read(self, place: int) -> None:
        found = self._ask(f"$JS.API.STREAM.MSG.GET.{self.stream}", {"seq": place + 1})
        if base64.b64decode(found["message"]["data"]) != self.kept[place]:
            raise ValueError(f"message {place + 1} is not what was kept")

    def _acknowledged(self, content: bytes) -> None:
        self.kept.append(content)
        found = json.loads(self._message())
        if found.get("seq") != len(self.kept):
            raise ValueError(f"message {len(self.kept)} was due to be acknowledged, and not {found}")

    def _ask(self, subject: str, question: dict[str, Any]) -> dict[str, Any]:
        self.sock.sendall(self._frame(subject.encode(), json.dumps(question).encode()))
        answer: dict[str, Any] = json.loads(self._message())
        if "error" in answer:
            raise ValueError(f"the server says {answer['error']}")
        return answer

    def _frame(self, subject: bytes, content: bytes) -> bytes:
        return b"PUB %b %b %d\r\n%b\r\n" % (subject, self.inbox, len(content), content)

    def _message(self) -> bytes:
        header = self._line(b"MSG ").split()
        content = self.file.read(int(header[-1]) + 2)
        return content[:-2]

    def _line(self, expected: bytes) -> bytes:
        while line := self.file.readline():
            if line == b"PING\r\n":
                self.sock.sendall(b"PONG\r\n")
            elif not line.startswith(expected):
                raise ValueError(f"the server says {line!r}")
            else:
                return line
        raise ConnectionError("closed")


def main() -> None:
    """Connect, work, report."""
    directory, count, messages, address = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    checking.run(directory, [Connection(number, address, messages) for number in range(count)])


if __name__ == "__main__":
    main()
