"""Sockets: listening and telling callers apart, connecting with patience, framed control messages."""

import contextlib
import logging
import os
import selectors
import socket
import struct
import time
from array import array
from collections.abc import Callable, Collection
from typing import TypeVar

from msgspec import Struct

from postcopy.errors import CannotRun, ConnectionLost, PostcopyError, ProtocolError, UsageError
from postcopy.kernel.page import PAGE_SIZE
from postcopy.kernel.poll import readable
from postcopy.printable import printable
from postcopy.sent_pages import NUMBERS, Content, SentPages, split
from postcopy.wire import control
from postcopy.wire.control import Hello, Kind

log = logging.getLogger("postcopy")
T = TypeVar("T")

GREETING_SECONDS = 5.0
DEFAULT_ADDRESS = "127.0.0.1"
DEFAULT_PORT = 27027
_STEP = 16 * 1024 * 1024  # bytes
# A deadline on what is due says more than this.
_GRACE_SECONDS = 2
_MOST_KEEPALIVE = 32767  # seconds: MAX_TCP_KEEPIDLE of the kernel
# Of callers that have not introduced themselves: each may keep a greeting's bytes and a descriptor for some seconds.
_MOST_CALLERS = 256
# Of destinations that have not opened all their channels.
_MOST_SESSIONS = 64
_ALSO = "also"  # among what the listener waits for
CHANNELS = ("control", "demand", "bulk")


class Channel:
    """A connected socket that carries control frames."""

    def __init__(self, connection: socket.socket, peer: str) -> None:
        self.socket = connection
        self.peer = peer

    def fileno(self) -> int:
        """For poll and select."""
        return self.socket.fileno()

    def send(self, kind: Kind, body: object = control.Nothing()) -> None:
        """Send one frame. Raises ConnectionLost."""
        self.send_frame(control.pack(kind, body))

    def send_frame(self, frame: bytes | memoryview) -> None:
        """Send a frame that has been packed already. Raises ConnectionLost, or what the peer said before it hung up."""
        try:
            self.socket.sendall(frame)
        except OSError as error:
            if readable(self.socket):
                with contextlib.suppress(ConnectionLost, ProtocolError):
                    self.receive({})
            raise ConnectionLost(f"the connection to {self.peer} broke: {error.strerror or error}") from None

    def receive(self, bodies: dict[Kind, type]) -> tuple[Kind, object]:
        """The next frame, which must be of one of the kinds in ``bodies``.

        Raises ConnectionLost, ProtocolError, or, for a FAILED frame that is not asked for, what the peer says.
        """
        kind, length = self._begin(bodies)
        return kind, control.parse_body(bodies[kind], self._exactly(length))

    def expect(self, kind: Kind, body: type[T]) -> T:
        """The next frame's body, which must be of this kind."""
        found = self.receive({kind: body})[1]
        assert isinstance(found, body)
        return found

    def send_pages(self, places: "array[int]", content: memoryview) -> None:
        """Send pages: the numbers of all of them, and the contents of those that are new. Raises ConnectionLost."""
        packed = places.tobytes()
        self.send_frame(control.pack_header(Kind.PAGES, len(packed) + len(content)) + packed)
        self.send_frame(content)

    def receive_pages(self, total: int, content: Content) -> SentPages:
        """``total`` pages in the next frame, which must be PAGES; new contents are added to ``content``.

        Raises what `receive` does.
        """
        _, length = self._begin([Kind.PAGES])
        sizes = split(total, length)
        if sizes is None:
            raise ProtocolError(f"{self.peer} sent {length} bytes of pages with a state that names {total} pages")
        places = array(NUMBERS)
        places.frombytes(self._exactly(sizes[0]))
        if max(places, default=-1) + 1 > (content.size + sizes[1]) // PAGE_SIZE:
            raise ProtocolError(f"{sizes[1]} bytes of pages are not what the places of {len(places)} pages name")
        try:
            room = content.grow(sizes[1])
        except (OSError, ValueError, OverflowError) as error:
            raise ProtocolError(f"{sizes[1]} bytes of pages cannot be taken: {error}") from None
        self._fill(room)
        return SentPages(places, content)

    def _begin(self, due: Collection[Kind]) -> tuple[Kind, int]:
        """The kind of the next frame, which must be one of those, and the length of its body."""
        kind, length = control.parse_header(bytes(self._exactly(control.HEADER.size)))
        if kind in due:
            return kind, length
        if kind != Kind.FAILED:
            names = " or ".join(each.name for each in due) or "nothing"
            raise ProtocolError(f"{self.peer} sent {kind.name} where {names} was due")
        failed = control.parse_body(control.Failed, self._exactly(length))
        raise PeerFailed(f"{self.peer} gave up: {printable(failed.message)}", printable(failed.hint))

    def _exactly(self, length: int) -> bytearray:
        content = bytearray()
        while len(content) < length:
            # Memory is taken as the bytes arrive: a length that is only claimed costs nothing.
            start = len(content)
            content.extend(bytes(min(length - start, _STEP)))
            with memoryview(content)[start:] as view:
                self._fill(view)
        return content

    def _fill(self, view: memoryview) -> None:
        while view:
            try:
                count = self.socket.recv_into(view)
            except BlockingIOError:
                raise ConnectionLost(f"{self.peer} has stopped in the middle of a message") from None
            except OSError as error:
                raise ConnectionLost(f"the connection to {self.peer} broke: {error.strerror or error}") from None
            if not count:
                raise ConnectionLost(f"{self.peer} closed the connection")
            view = view[count:]

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


class PeerFailed(PostcopyError):
    """The other side gave up and said why."""

    exit_code = 10


class Channels(Struct):
    """The three connections of one migration, by name."""

    control: Channel
    demand: Channel
    bulk: Channel

    @classmethod
    def pair(cls, here: str, there: str) -> "tuple[Channels, Channels]":
        """Both sides of a migration within one host; each side knows the other by its name."""
        pairs = [socket.socketpair() for _ in CHANNELS]
        mine = cls(*(Channel(one, there) for one, _ in pairs))
        return mine, cls(*(Channel(other, here) for _, other in pairs))

    def limit_silence(self, seconds: float) -> None:
        """Take the peer for lost when its host has not answered for so long (tcp(7)).

        Only the control channel gives up by itself, and who watches it ends the others: on these, a peer that has no
        time to read is no loss.
        """
        whole = max(int(seconds), 1)
        control = self.control.socket
        if control.family == socket.AF_UNIX:
            return  # the kernel itself tells when the peer is gone
        control.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, min(max(whole // 2, 1), _MOST_KEEPALIVE))
        control.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, min(max(whole // 4, 1), _MOST_KEEPALIVE))
        control.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, whole * 1000)
        # Whoever waits for a message that need not come waits for its first byte by poll(2).
        control.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", whole + _GRACE_SECONDS, 0))

    def close(self) -> None:
        """Close all of them."""
        for channel in (self.control, self.demand, self.bulk):
            channel.close()


class _Caller(Struct):
    """A connection that has not introduced itself yet."""

    connection: socket.socket
    peer: str
    until: float
    received: bytearray = bytearray()


class _Session(Struct):
    """A destination whose channels are coming in; the greeting is that of its control channel."""

    greeting: Hello
    until: float
    found: dict[str, Channel] = {}

    def left(self) -> bool:
        """Whether one of its channels has been closed again, or the others have not come for too long."""
        late = time.monotonic() > self.until and len(self.found) < len(CHANNELS)
        return late or any(_closed(channel.socket) for channel in self.found.values())

    def drop(self) -> None:
        for channel in self.found.values():
            channel.close()


class Listener:
    """The listening port of a source: answers whoever speaks the protocol, and lets nobody else disturb it."""

    def __init__(self, address: str, port: int) -> None:
        """Listen; at ``::`` for IPv4 too. Raises CannotRun when the address cannot be had."""
        try:
            family, *_, found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
            every = found[0] == "::" and socket.has_dualstack_ipv6()
            self._socket = socket.create_server((address, port), family=family, backlog=16, dualstack_ipv6=every)
        except OSError as error:
            hint = "choose another port with --port, or end what listens there" if error.errno == 98 else ""
            raise CannotRun(f"cannot listen at {address}:{port}: {error.strerror or error}", hint) from None
        except UnicodeError:
            raise _no_name(address) from None
        self._socket.setblocking(False)
        self._sessions: dict[bytes, _Session] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ, None)

    @property
    def port(self) -> int:
        """The port that is listened at."""
        found: int = self._socket.getsockname()[1]
        return found

    def accept(
        self, refuse: Callable[[Hello], str | None], meanwhile: Callable[[], object] = lambda: None, also: int = -1
    ) -> tuple[Channels, Hello]:
        """Wait for a destination with all its channels; ``refuse`` says why a peer's host will not do.

        Who sends anything else, or nothing, is logged and dropped; the listener goes on. ``meanwhile`` is called a
        few times a second, and when the descriptor ``also`` becomes readable.
        """
        if also >= 0:
            self._selector.register(also, selectors.EVENT_READ, _ALSO)
        while True:
            for caller in self._introduced():
                self._take_in(caller, refuse)
            for name, session in list(self._sessions.items()):
                if session.left():
                    log.warning("%s left before all its channels were there", session.found["control"].peer)
                    session.drop()
                    del self._sessions[name]
                elif len(session.found) == len(CHANNELS):
                    del self._sessions[name]
                    for channel in session.found.values():
                        _tune(channel.socket)
                    return Channels(**session.found), session.greeting
            meanwhile()

    def close(self) -> None:
        """Stop listening, and drop whoever has not introduced himself."""
        for session in self._sessions.values():
            session.drop()
        self._sessions.clear()
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, _Caller):
                key.data.connection.close()
        self._selector.close()
        self._socket.close()

    def _introduced(self) -> list[_Caller]:
        """Wait a moment; the callers whose greeting is complete by now."""
        ready: list[_Caller] = []
        for key, _ in self._selector.select(timeout=0.25):
            if key.data is None:
                self._take_call()
            if not isinstance(key.data, _Caller):
                continue
            caller = key.data
            try:
                content = caller.connection.recv(control.GREETING_LIMIT)
                if not content:
                    raise ProtocolError("it closed the connection before it had said hello")
                caller.received += content
                if self._complete(caller):
                    self._selector.unregister(caller.connection)
                    ready.append(caller)
            except (OSError, ProtocolError) as reason:
                self._drop(caller, reason)
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, _Caller) and key.data.until < time.monotonic():
                self._drop(key.data, "it said nothing, or not enough, for too long")
        return ready

    def _take_call(self) -> None:
        with contextlib.suppress(OSError):
            connection, address = self._socket.accept()
            connection.setblocking(False)
            callers = [key.data for key in self._selector.get_map().values() if isinstance(key.data, _Caller)]
            if len(callers) >= _MOST_CALLERS:
                self._drop(min(callers, key=lambda caller: caller.until), "too many are calling at once")
            host = address[0].removeprefix("::ffff:")
            caller = _Caller(connection, f"{host}:{address[1]}", time.monotonic() + GREETING_SECONDS)
            self._selector.register(connection, selectors.EVENT_READ, caller)

    @staticmethod
    def _complete(caller: _Caller) -> bool:
        received = caller.received
        if len(received) < control.HEADER.size:
            known = min(len(received), len(control.MAGIC))
            if received[:known] != control.MAGIC[:known]:
                raise ProtocolError(f"it does not speak the postcopy protocol (it began with {bytes(received[:16])!r})")
            return False
        kind, length = control.parse_header(bytes(received[: control.HEADER.size]))
        if kind != Kind.HELLO:
            raise ProtocolError(f"it began with {kind.name} instead of HELLO")
        if len(received) > control.HEADER.size + length:
            raise ProtocolError("it said more than HELLO")
        return len(received) == control.HEADER.size + length

    def _take_in(self, caller: _Caller, refuse: Callable[[Hello], str | None]) -> None:
        """Answer the caller's greeting; drop him where it is not acceptable."""
        channel = Channel(caller.connection, caller.peer)
        caller.connection.setblocking(True)
        try:
            hello = control.parse_body(Hello, caller.received[control.HEADER.size :])
            if hello.channel not in CHANNELS:
                raise ProtocolError(f"it asked for an unknown channel {hello.channel!r}")
            session = self._sessions.get(hello.session)
            if hello.channel == "control":
                name, session = os.urandom(16), _Session(hello, time.monotonic() + GREETING_SECONDS)
            elif session is None or hello.channel in session.found:
                raise ProtocolError("it named a session that is not one of ours")
            else:
                name = hello.session
            if reason := refuse(hello):
                raise ProtocolError(reason)
            channel.send(Kind.HELLO, Hello(hello.channel, name))
        except (ProtocolError, ConnectionLost) as reason:
            with contextlib.suppress(PostcopyError):
                channel.send(Kind.FAILED, control.Failed(reason.message, reason.hint))
            self._drop(caller, reason)
            return
        session.found[hello.channel] = channel
        if name not in self._sessions and len(self._sessions) >= _MOST_SESSIONS:
            oldest = next(iter(self._sessions))
            log.warning("dropped %s: too many have begun", self._sessions[oldest].found["control"].peer)
            self._sessions.pop(oldest).drop()
        self._sessions[name] = session

    def _drop(self, caller: _Caller, reason: object) -> None:
        log.warning("dropped the connection from %s: %s", caller.peer, reason)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(caller.connection)
        if isinstance(reason, ProtocolError) and reason.hint:
            # A peer of another version can at least read why.
            with contextlib.suppress(OSError):
                caller.connection.sendall(control.pack(Kind.FAILED, control.Failed(reason.message, reason.hint)))
        caller.connection.close()


def connect(address: str, port: int, patience: float) -> tuple[Channels, Hello]:
    """Connect to a source and open all three channels; its greeting. Waits up to ``patience`` seconds for it.

    Raises ConnectionLost when nobody answers there, ProtocolError or PeerFailed when it is no source for us.
    """
    opened = [_connect_patiently(address, port, patience)]
    try:
        greeting = _introduce(opened[0], "control", b"")
        for name in CHANNELS[1:]:
            opened.append(_connect_patiently(address, port, GREETING_SECONDS))
            _introduce(opened[-1], name, greeting.session)
    except BaseException:
        for channel in opened:
            channel.close()
        raise
    return Channels(*opened), greeting


def _connect_patiently(address: str, port: int, patience: float) -> Channel:
    until = time.monotonic() + patience
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=GREETING_SECONDS)
            _tune(connection)
            return Channel(connection, f"{address}:{port}")
        except OSError as error:
            if time.monotonic() >= until or isinstance(error, socket.gaierror):
                raise ConnectionLost(
                    f"nobody answers at {address}:{port}: {error.strerror or error}",
                    "start postcopy dump there, or correct --address and --port",
                ) from None
        except UnicodeError:
            raise _no_name(address) from None
        time.sleep(0.1)


def _no_name(address: str) -> UsageError:
    """For what cannot be encoded as a name (RFC 3490)."""
    return UsageError(f"{address!r} is no name of a host", "correct --address")


def _introduce(channel: Channel, name: str, session: bytes) -> Hello:
    channel.send(Kind.HELLO, Hello(name, session))
    greeting = channel.expect(Kind.HELLO, Hello)
    channel.socket.settimeout(None)
    return greeting


def _tune(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _closed(connection: socket.socket) -> bool:
    """Whether the peer has closed a connection on which nothing is due."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
