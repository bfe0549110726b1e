"""A machine in the middle: passes a migration's frames on, and changes, drops, adds or withholds those it is told to.

It listens at the loopback address of the destination's host and calls the source when it is called. Each frame of each
channel is one call of ``change``: the bytes to pass on in its place. `SILENCE` withholds it and all that follow it on
that channel, in that direction; the connection stays.
"""

import contextlib
import ctypes
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from postcopy.wire.control import HEADER, Kind
from postcopy.wire.pages import HEADER_SIZE
from tests.hosts import Host

CLONE_NEWNET = 0x40000000
SILENCE = None
PAGE_HEADER = struct.Struct("<IIQII")


@dataclass(frozen=True)
class Frame:
    """``to``: dump or restore; ``name``: the kind on the control channel, ``pages`` on the others."""

    to: str
    channel: str
    name: str
    header: bytes
    body: bytes

    @property
    def whole(self) -> bytes:
        """As it came."""
        return self.header + self.body

    def with_body(self, body: bytes, kind: Kind | None = None) -> bytes:
        """Another body under a header that fits; of a control frame."""
        magic, version, number, _ = HEADER.unpack(self.header)
        return HEADER.pack(magic, version, number if kind is None else kind, len(body)) + body


Change = Callable[[Frame], bytes | None]


def socket_in(host: Host) -> socket.socket:
    """A TCP socket in the network of a host; it stays there."""
    made: list[socket.socket] = []

    def make() -> None:
        with open(f"/proc/{host.init_pid}/ns/net") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        made.append(socket.socket())

    # In a thread of its own, since only that thread moves.
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


@dataclass
class Tamper:
    """The machine in the middle; ``to_source``, ``to_destination``: its connections by channel, to add to."""

    destination: Host
    source: tuple[str, int]
    change: Change
    to_source: dict[str, socket.socket] = field(default_factory=dict)
    to_destination: dict[str, socket.socket] = field(default_factory=dict)
    passes_ends_on: bool = True

    def __enter__(self) -> Self:
        self._listener = socket_in(self.destination)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(8)
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in (self._listener, *self.to_source.values(), *self.to_destination.values()):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join(10)

    @property
    def address(self) -> list[str]:
        """The options that bring a restore here."""
        return ["--address", "127.0.0.1", "--port", str(self._listener.getsockname()[1])]

    def _accept(self) -> None:
        for channel in ("control", "demand", "bulk"):
            try:
                theirs, _ = self._listener.accept()
            except OSError:
                return
            ours = socket_in(self.destination)
            self.to_source[channel], self.to_destination[channel] = ours, theirs
            ours.connect(self.source)
            for one, other, to in ((theirs, ours, "dump"), (ours, theirs, "restore")):
                thread = threading.Thread(target=self._pass_on, args=(one, other, to, channel), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pass_on(self, one: socket.socket, other: socket.socket, to: str, channel: str) -> None:
        with contextlib.suppress(OSError, EOFError):
            greeted = False
            while True:
                frame = self._frame(one, to, channel, greeted)
                greeted = True
                content = self.change(frame)
                if content is SILENCE:
                    return
                other.sendall(content)
        if self.passes_ends_on:
            with contextlib.suppress(OSError):
                other.shutdown(socket.SHUT_WR)

    @staticmethod
    def _frame(one: socket.socket, to: str, channel: str, greeted: bool) -> Frame:
        if channel == "control" or not greeted:
            header = _exactly(one, HEADER.size)
            _, _, number, length = HEADER.unpack(header)
            return Frame(to, channel, Kind(number).name, header, _exactly(one, length))
        header = _exactly(one, HEADER_SIZE)
        return Frame(to, channel, "pages", header, _exactly(one, PAGE_HEADER.unpack(header)[-1]))


def _exactly(one: socket.socket, length: int) -> bytes:
    content = bytearray()
    while len(content) < length:
        more = one.recv(min(length - len(content), 1 << 20))
        if not more:
            raise EOFError
        content += more
    return bytes(content)
