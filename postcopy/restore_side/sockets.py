"""Sockets: the calls that those of all families need; each family's own module makes them."""

import contextlib
import functools
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

from postcopy.errors import RestoreError
from postcopy.kernel import socket_options
from postcopy.kernel.batch import Batch
from postcopy.kernel.calls import Call, call
from postcopy.kernel.pattern import Pattern
from postcopy.kernel.socket_options import (
    SO_ATTACH_FILTER,
    SO_BUF_LOCK,
    SO_PASSCRED,
    SO_PASSPIDFD,
    SO_PEEK_OFF,
    SO_RCVBUF,
    SO_SNDBUF,
    SO_SNDBUFFORCE,
    SOL_SOCKET,
    Option,
)
from postcopy.socket_kinds import InetSocket, NetlinkSocket, PacketSocket, Socket, UnixSocket
from postcopy.state import Description, Slot

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan

_F_SETFD, _F_SETFL = 2, 4
_PER_SOCKET, _PER_MESSAGE = 8192, 1024  # bytes for the calls of a socket, and of a message in it
_SIZES = ((SOL_SOCKET, SO_SNDBUF), (SOL_SOCKET, SO_RCVBUF), (SOL_SOCKET, SO_BUF_LOCK))
# With these, a socket without a name would be given one when a message is sent from it (unix(7), "Autobind").
_GIVING_A_NAME = ((SOL_SOCKET, SO_PASSCRED), (SOL_SOCKET, SO_PASSPIDFD))
_LATE = {(SOL_SOCKET, SO_SNDBUF), (SOL_SOCKET, SO_BUF_LOCK), (SOL_SOCKET, SO_PEEK_OFF), *_GIVING_A_NAME}


def room(mine: Sequence[Description]) -> int:
    """Bytes that the calls for the sockets among ``mine`` may need."""
    return sum(map(_room, mine)) + _PER_MESSAGE * rights(mine)


def _room(one: Description) -> int:
    if one.inet is not None:
        found = one.inet.connection
        queues = (found.sent, found.unsent, found.received) if found is not None else ()
        return _PER_SOCKET + sum(len(queue) + _PER_MESSAGE * (1 + (len(queue) >> 16)) for queue in queues if queue)
    if one.unix is not None:
        return _PER_SOCKET + sum(len(message.content) + _PER_MESSAGE for message in one.unix.queue)
    if one.packet is not None:
        return _PER_SOCKET + _PER_MESSAGE * len(one.packet.memberships)
    return _PER_SOCKET + _PER_MESSAGE * len(one.netlink.groups) if one.netlink is not None else 0


def numbers(mine: Sequence[Description]) -> int:
    """How many descriptors making the sockets among ``mine`` may take at once, beside those of the program."""
    return 2 * sum(map(_is_socket, mine)) + 4


def rights(mine: Sequence[Description]) -> int:
    """How many descriptors are on their way in the sockets among ``mine``."""
    return sum(len(message.rights) for one in mine if one.unix for message in one.unix.queue)


def _is_socket(one: Description) -> bool:
    return any(kind is not None for kind in (one.unix, one.inet, one.netlink, one.packet))


def place(plan: "Plan", slot: Slot, made: UnixSocket | InetSocket | NetlinkSocket | PacketSocket) -> None:
    """Add the call that gives ``slot`` a socket that has been made."""
    at = plan.sockets[made.socket.inode]
    if at != slot.fd:
        plan.duplicate(at, slot.fd, slot.close_on_exec, f"placing a socket (descriptor {slot.fd})")


class Seat(Struct, frozen=True):
    """Where a socket is opened, and where it is then: with its number in the table, or parked."""

    opened: int
    place: int
    close_on_exec: bool

    @property
    def stays(self) -> bool:
        """Whether it is opened where it is wanted."""
        return self.opened == self.place


class Workshop:
    """Where sockets are made: with numbers that are known beforehand, and parked until their slots come, or moved there
    at once (`seat`)."""

    def __init__(self, plan: "Plan") -> None:
        self._plan = plan
        self._placed: dict[bytes, int] = {}
        self._usual = {
            (each.family, each.type, each.protocol): {(one.level, one.name): one.value for one in each.options}
            for each in plan.state.socket_defaults
        }
        self._wanted: dict[tuple[int, int, int], dict[Option, bytes]] = {}
        self._widened: set[int] = set()
        self._last: tuple[Socket, dict[Option, bytes]] | None = None
        self._adder: Callable[[Call, str], object] | None = None
        # By what they have in common.
        self.patterns: dict[object, Pattern] = {}

    @property
    def batch(self) -> Batch:
        """Where calls are added now."""
        return self._plan.batch

    def add(self, made: Call, purpose: str) -> None:
        """A call that must not be refused."""
        (self._adder or self.batch.add)(made, purpose)

    @contextlib.contextmanager
    def adding_to(self, add: Callable[[Call, str], object]) -> Iterator[None]:
        """The calls do not go into the batch meanwhile."""
        self._adder = add
        try:
            yield
        finally:
            self._adder = None

    def place(self, content: bytes) -> int:
        """The address of bytes that no call changes; equal ones lie there once."""
        if content not in self._placed:
            self._placed[content] = self.batch.place(content)
        return self._placed[content]

    def parked(self, made: Call, purpose: str, many: int = 1) -> list[int]:
        """Add a call that opens ``many`` descriptors, and put these out of the way; where they are then."""
        opened = [self._plan.next_fd() for _ in range(many)]
        self.add(made, purpose)
        return [self._plan.park(fd, purpose) for fd in opened]

    def seat(self, inode: int) -> Seat:
        """Where a socket (by its inode at the source) will be opened by the next call, and where it is to be then."""
        plan, opened = self._plan, self._plan.next_fd()
        slot = plan.seats.get(inode)
        seat = Seat(opened, slot.fd, slot.close_on_exec) if slot else Seat(opened, plan.parking(), True)
        if not seat.stays:
            plan.release(opened)
            plan.used.add(seat.place)
        return seat

    def sit_down(self, seat: Seat, place: int) -> None:
        """Move the socket to ``place``, that of its seat."""
        purpose = "placing a socket"
        if seat.stays:
            self.add(call("fcntl", seat.opened, _F_SETFD, int(seat.close_on_exec)), purpose)
            return
        self.add(call("dup3", seat.opened, place, os.O_CLOEXEC if seat.close_on_exec else 0), purpose)
        self.add(call("close", seat.opened), purpose)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        self._plan.unpark(fd)

    def socket(self, common: Socket, purpose: str, but: frozenset[Option] = frozenset()) -> int:
        """Make a socket with the options that must be there before it is used."""
        (fd,) = self.parked(call("socket", common.family, common.type, common.protocol), purpose)
        self.set_early(fd, common, but)
        return fd

    def set(self, fd: int, option: Option, value: bytes) -> None:
        """setsockopt(2)."""
        level, name, told = socket_options.setting(option, value)
        what = f"setting socket option {name} of level {level}"
        self.add(call("setsockopt", fd, level, name, self.place(told), len(told)), what)

    def likeness(self, common: Socket) -> tuple[object, ...]:
        """What is the same in sockets that are made by the same calls."""
        return (
            common.family, common.type, common.protocol, common.nonblocking, common.owner, common.filter,
            *common.options,
        )  # fmt: skip

    def given(self, common: Socket) -> dict[Option, bytes]:
        """The options that a socket is to have and a new one here has not."""
        if self._last is not None and self._last[0] is common:
            return self._last[1]
        kind = common.family, common.type, common.protocol
        here = _defaults(*kind)
        if kind not in self._wanted:
            usual = self._usual.get(kind, here)
            self._wanted[kind] = {option: value for option, value in usual.items() if here.get(option) != value}
        own = {(each.level, each.name): each.value for each in common.options}
        wanted = {**self._wanted[kind], **own}
        given = {option: value for option, value in wanted.items() if here.get(option) != value}
        self._last = common, given
        return given

    def value(self, common: Socket, option: Option) -> bytes:
        """An option's value at the source; Raises ValueError where it is not known."""
        for each in common.options:
            if (each.level, each.name) == option:
                return each.value
        usual = self._usual.get((common.family, common.type, common.protocol), {})
        if option not in usual:
            raise ValueError(f"socket option {option} is not told")
        return usual[option]

    def set_early(self, fd: int, common: Socket, but: frozenset[Option] = frozenset()) -> None:
        """Set all options that can be set at the beginning."""
        for option, value in self.given(common).items():
            if option in _LATE or option in but:
                continue
            try:
                self.set(fd, option, value)
            except OSError as error:
                name = os.fsdecode(value)
                raise RestoreError(f"network interface {name}, which a socket uses: {error.strerror}") from None

    def widen(self, fd: int, size: int) -> None:
        """Let the socket take ``size`` bytes from us, whatever its own limit; `finish` sets that."""
        self.resized(fd)
        value = struct.pack("=i", min(size, 1 << 29))
        what = "making room for what is queued in a socket"
        self.add(call("setsockopt", fd, SOL_SOCKET, SO_SNDBUFFORCE, self.place(value), 4), what)

    def resized(self, fd: int) -> None:
        """Take note that the sizes of the buffers are not those of a new socket any more."""
        self._widened.add(fd)

    def finish(self, fd: int, common: Socket) -> None:
        """What comes last: the sizes and locks of the buffers, the filter, the owner, the flags."""
        given, resized = self.given(common), fd in self._widened
        self._widened.discard(fd)
        if resized or (SOL_SOCKET, SO_SNDBUF) in given:
            self.set(fd, (SOL_SOCKET, SO_SNDBUF), self.value(common, (SOL_SOCKET, SO_SNDBUF)))
        if resized or any(option in given for option in _SIZES):
            # Setting a size locks it.
            self.set(fd, (SOL_SOCKET, SO_BUF_LOCK), self.value(common, (SOL_SOCKET, SO_BUF_LOCK)))
        for option in (*_GIVING_A_NAME, (SOL_SOCKET, SO_PEEK_OFF)):
            if option in given:
                self.set(fd, option, given[option])
        if common.filter:
            program = struct.pack("=HxxxxxxQ", len(common.filter) // 8, self.place(common.filter))
            what = "attaching a socket's filter"
            self.add(call("setsockopt", fd, SOL_SOCKET, SO_ATTACH_FILTER, self.place(program), 16), what)
        if common.owner != (os.geteuid(), os.getegid()):
            self.add(call("fchown", fd, *common.owner), f"giving a socket to user {common.owner[0]}")
        if common.nonblocking:
            self.add(call("fcntl", fd, _F_SETFL, os.O_RDWR | os.O_NONBLOCK), "making a socket non-blocking")


@functools.cache
def _defaults(family: int, kind: int, protocol: int) -> dict[Option, bytes]:
    try:
        return socket_options.defaults(family, kind, protocol)
    except OSError as error:
        name = socket.AddressFamily(family).name
        raise RestoreError(f"sockets of family {name} cannot be made here: {error.strerror}") from None
