"""What sockets tell whoever has a descriptor of them: of each some hundred things, asked in one go (`own_calls`)."""

import fcntl
import functools
import socket
import struct
import termios
from collections.abc import Sequence
from itertools import accumulate
from socket import SocketType
from typing import NamedTuple

from msgspec import Struct

from postcopy.kernel import socket_options, tcp_repair
from postcopy.kernel.batch import RECORD_SIZE
from postcopy.kernel.calls import call
from postcopy.kernel.own_calls import KEPT, OwnCalls
from postcopy.kernel.socket_options import LIVELY, SO_GET_FILTER, SO_LOCK_FILTER, SO_PROTOCOL, SOL_SOCKET, SOL_TCP

#: Family, type and protocol.
Kind = tuple[int, int, int]
#: What the options of a socket are, but for those that are `socket_options.LIVELY`, and what these are, each the very
#: same where they have been the same before; and what is its own.
Answers = tuple[bytes, bytes, bytes]

F_GETOWN_EX = 16
_ADDRESS_SIZE = 28
#: Device, inode, links, mode, user, group, device it is, size of struct stat.
STAT = struct.Struct("=QQQIII4xQQ88x")
_RESULTS = struct.Struct("=4q")

# The name of a call, its arguments between the descriptor and the value, and the size of the value (bytes).
_Asked = tuple[str, tuple[int, ...], int]


class Told(Struct, frozen=True):
    """``values``: for `socket_options.named`. ``filter_length``: in instructions, or a negated errno; see
    `socket_options.read_filter`. ``peek_offset``: SO_PEEK_OFF. ``info``: struct tcp_info of TCP sockets; ``local``,
    ``remote``: struct sockaddr of IP sockets; empty where the kernel tells nothing. ``unread``: bytes that TCP sockets
    have received and the program has not read."""

    kind: Kind
    values: tuple[bytes | None, ...]
    is_filter_locked: bool
    filter_length: int
    peek_offset: int
    info: bytes
    local: bytes
    remote: bytes
    unread: int

    @property
    def has_filter(self) -> bool:
        """Whether something filters what it receives."""
        return self.filter_length != 0


class Again(NamedTuple):
    """``own``: our own descriptor, or a negated errno; ``status``: struct stat; ``flags``: F_GETFL; ``delivery``:
    F_GETSIG, as 64 bits, and F_GETOWN_EX; ``lively``, ``told``: the last two of `Answers`."""

    own: int
    status: bytes
    flags: int
    delivery: bytes
    lively: bytes
    told: bytes


class _Questions:
    """Some to a socket: calls that each leave a value, and its length. What they give is kept in one piece: results,
    lengths, values."""

    def __init__(self, calls: OwnCalls, asked: Sequence[_Asked]) -> None:
        """Add the calls."""
        self._made, sizes = calls, [size for *_, size in asked]
        content = struct.pack(f"={len(sizes)}I", *sizes) + bytes(sum(sizes))
        self._place, self._size = calls.place(content), len(content)
        self._count = len(sizes)
        self._codes = struct.Struct(f"={len(sizes)}q{len(sizes)}I")
        *self._starts, _ = accumulate(sizes, initial=self._codes.size)
        numbers = []
        for number, ((name, arguments, _), start) in enumerate(zip(asked, self._starts, strict=True)):
            value = self._place + start - 8 * len(sizes)
            numbers.append(calls.add(call(name, KEPT, *arguments, value, self._place + 4 * number)))
        self._first = numbers[0] if numbers else 0

    @staticmethod
    def room(asked: Sequence[_Asked]) -> int:
        """Bytes that the calls take."""
        return sum(RECORD_SIZE + 4 + size for *_, size in asked) + 2 * RECORD_SIZE

    def answers(self) -> bytes:
        """For `values`, once the calls have been made."""
        made = self._made
        return made.results(self._first, self._count) + made.read(self._place, self._size)

    def values(self, answers: bytes) -> list[bytes | None]:
        """Of each call the value; None where it was refused."""
        codes, count = self._codes.unpack_from(answers), self._count
        places = zip(codes[:count], self._starts, codes[count:], strict=True)
        return [None if result else answers[start : start + length] for result, start, length in places]

    def last(self, answers: bytes) -> tuple[int, int]:
        """Of the last call the result, and the length of what it gave."""
        codes = self._codes.unpack_from(answers)
        return codes[self._count - 1], codes[-1]


class _Look:
    """All questions to sockets of one kind."""

    def __init__(self, kind: Kind) -> None:
        family, type_, protocol = self.kind = kind
        is_ip = family in (socket.AF_INET, socket.AF_INET6)
        is_tcp = is_ip and (type_, protocol) == (socket.SOCK_STREAM, socket.IPPROTO_TCP)
        sizes = {(level, name): size for level, name, size in socket_options.readable(*kind)}
        self._names = list(sizes)
        self._steady_names = [each for each in sizes if each not in LIVELY]
        self._lively_names = [each for each in sizes if each in LIVELY]
        sizes |= {(SOL_SOCKET, SO_LOCK_FILTER): 4, (SOL_SOCKET, SO_GET_FILTER): 0}
        steady, lively = (
            [("getsockopt", each, size) for each, size in sizes.items() if (each in LIVELY) is wanted]
            for wanted in (False, True)
        )
        own: list[_Asked] = [(name, (), _ADDRESS_SIZE) for name in ("getsockname", "getpeername") if is_ip]
        if is_tcp:
            own += [
                ("getsockopt", (SOL_TCP, socket.TCP_INFO), tcp_repair.INFO_SIZE),
                ("ioctl", (termios.FIONREAD,), 4),
            ]
        changing = _Questions.room(lively) + _Questions.room(own)
        self._calls, self._again = OwnCalls(_Questions.room(steady) + changing), OwnCalls(1024 + changing)
        self._steady = _Questions(self._calls, steady)
        self._lively, self._own = _Questions(self._calls, lively), _Questions(self._calls, own)
        self._opened = self._again.add(call("pidfd_getfd", 0, 0, 0), keep=True)
        self._status = self._again.room(STAT.size + 8)
        self._again.add(call("fstat", KEPT, self._status))
        self._again.add(call("fcntl", KEPT, fcntl.F_GETFL))
        self._again.add(call("fcntl", KEPT, fcntl.F_GETSIG))
        self._again.add(call("fcntl", KEPT, F_GETOWN_EX, self._status + STAT.size))
        self._lively_again, self._own_again = _Questions(self._again, lively), _Questions(self._again, own)
        self._alone = OwnCalls(_Questions.room(steady))
        self._steady_alone = _Questions(self._alone, steady)
        # Those of thousands of sockets are often the same.
        self._known: dict[bytes, bytes] = {}
        self._of_options = functools.cache(self._parse)

    def _same(self, answers: bytes) -> bytes:
        return self._known.setdefault(answers, answers)

    def ask(self, fd: int) -> Answers:
        """As the function."""
        self._calls.make(fd)
        return self._same(self._steady.answers()), self._same(self._lively.answers()), self._own.answers()

    def ask_again(self, process: int, fd: int) -> Again:
        """As the function."""
        again = self._again
        again.change(self._opened, 1, process)
        again.change(self._opened, 2, fd)
        again.make()
        results, shown = again.results(self._opened, 4), again.read(self._status, STAT.size + 8)
        own, _, flags, _ = _RESULTS.unpack(results)
        delivery = results[24:] + shown[STAT.size :]
        lively, told = self._same(self._lively_again.answers()), self._own_again.answers()
        return Again(own, shown[: STAT.size], flags, delivery, lively, told)

    def ask_steady(self, fd: int) -> bytes:
        """As the function."""
        self._alone.make(fd)
        return self._same(self._steady_alone.answers())

    def told(self, answers: Answers) -> Told:
        """As the function."""
        steady, lively, own = answers
        local, remote, info, unread, *_ = *self._own.values(own), b"", b"", b"", b""
        options = self._of_options(steady, lively)
        return Told(
            self.kind, *options, info or b"", local or b"", remote or b"", int.from_bytes(unread or b"", "little")
        )

    def _parse(self, steady: bytes, lively: bytes) -> tuple[tuple[bytes | None, ...], bool, int, int]:
        *of_program, locked, _ = self._steady.values(steady)
        code, length = self._steady.last(steady)
        found = dict(zip(self._steady_names, of_program, strict=True))
        found |= zip(self._lively_names, self._lively.values(lively), strict=True)
        peek = found.get(socket_options.PEEK_OFF)
        peek_offset = int.from_bytes(peek, "little", signed=True) if peek else -1
        return tuple(found[option] for option in self._names), any(locked or b""), code or length, peek_offset


_look = functools.cache(_Look)


def ask(fd: int, kind: Kind) -> Answers:
    """What the socket of that kind behind a descriptor of ours tells, for `told`."""
    return _look(kind).ask(fd)


def ask_again(process: int, fd: int, kind: Kind) -> Again:
    """What takes no time of descriptor ``fd`` of a process (a pidfd), where the rest has been asked before."""
    return _look(kind).ask_again(process, fd)


def ask_steady(fd: int, kind: Kind) -> bytes:
    """The first of `Answers`, of a descriptor of ours."""
    return _look(kind).ask_steady(fd)


def told(kind: Kind, answers: Answers) -> Told:
    """What `ask` has given, here or in another process of ours."""
    return _look(kind).told(answers)


def look(own: SocketType) -> Told:
    """What a socket tells."""
    kind = int(own.family), int(own.type), own.getsockopt(SOL_SOCKET, SO_PROTOCOL)
    return told(kind, ask(own.fileno(), kind))
