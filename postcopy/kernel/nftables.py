"""nf_tables by netlink (linux/netfilter/nf_tables.h): a table that drops packets and lives as long as its socket.

A table with NFT_TABLE_F_OWNER belongs to the netlink socket that made it: nobody else can change it, and the kernel
removes it when the last descriptor of the socket is closed, however its holders end.
"""

import contextlib
import functools
import socket
import struct
from collections.abc import Iterable, Sequence

from msgspec import Struct

from postcopy.kernel.libc import refused

_NETLINK_NETFILTER, _SUBSYSTEM = 12, 10
_BATCH_BEGIN, _BATCH_END = 16, 17
_NEWTABLE, _DELTABLE, _NEWCHAIN, _NEWRULE, _NEWSET, _NEWSETELEM = 0, 2, 3, 6, 9, 12
_REQUEST, _ACK, _CREATE, _APPEND = 1, 4, 0x400, 0x800
_NLA_F_NESTED = 0x8000
_NLMSG_ERROR = 2
_NFT_TABLE_F_OWNER = 2
_NFPROTO_INET = 1
_BEFORE_CONNECTION_TRACKING = -400
_INPUT, _OUTPUT = ("input", 1), ("output", 3)
_REGISTER = 8  # NFT_REG32_00; each register has four bytes
_META_MARK, _META_NFPROTO, _META_L4PROTO = 3, 15, 16
_NF_DROP, _NF_ACCEPT = 0, 1
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
_SYN, _ACKNOWLEDGED = 2, 16
_ELEMENTS_A_MESSAGE = 500  # a nested attribute is shorter than 64 KiB
_SO_SNDBUFFORCE = 32

Address = tuple[bytes, int]  # a packed IPv4 or IPv6 address (empty: any), and a port


class _Family(Struct, frozen=True):
    """Where a packet's header has its addresses (bytes)."""

    number: int
    size: int
    source: int
    target: int
    type: int


# Types of keys are for nft(8) to show: six bits for each part.
_INET_SERVICE = 13
_FAMILIES = (_Family(2, 4, 12, 16, 7), _Family(10, 16, 8, 24, 8))


class DropTable:
    """A table of ours that drops packets of TCP connections, both ways, and SYNs to listening sockets."""

    def __init__(self, name: str) -> None:
        """Open the netlink socket; raises OSError where this kernel has no nf_tables. Nothing is dropped yet."""
        self._table = _text(1, name)
        self._sets = 0
        self._made = False
        # For which connections there are sets, and the rules that use them.
        self._foreseen: tuple[Sequence[tuple[Address, Address]], list[tuple[int, bytes]]] = [], []
        self._door = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        self._door.bind((0, 0))
        with contextlib.suppress(OSError):
            self._door.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 1 << 25)  # a batch is one message

    def fileno(self) -> int:
        """The descriptor of the netlink socket: whoever has a duplicate keeps the table alive."""
        return self._door.fileno()

    def let_pass(self) -> None:
        """Drop nothing any more, from now on: unlike `remove`, this does not take long. Raises OSError."""
        messages: list[tuple[int, bytes]] = []
        for chain in (_INPUT, _OUTPUT):
            self._add_rule(chain, [], messages, _NF_ACCEPT)
        # Before all others.
        self._commit(messages, _CREATE)

    def remove(self) -> None:
        """Drop nothing any more, whoever else has the socket. Raises OSError."""
        self._commit([_message(_DELTABLE, self._table)])
        self._made, self._foreseen = False, ([], [])

    def close(self) -> None:
        """Give our descriptor of the socket back; with the last one the table goes."""
        self._door.close()

    def drop(self, connections: Sequence[tuple[Address, Address]], listeners: Sequence[Address], mark: int = 0) -> None:
        """From now on drop what belongs to ``connections`` (local, remote) and every SYN to ``listeners``.

        Not what carries ``mark`` (SO_MARK), where it is not 0. Raises OSError, and then no more is dropped than before.
        """
        messages = [] if self._made else self._begun(mark)
        foreseen, rules = self._foreseen
        if connections and connections == foreseen:
            messages += rules
        else:
            messages += self._add_ends(connections, messages)
        for family in _FAMILIES:
            here = [_key(address) for address in listeners if len(address[0]) == family.size]
            if here:
                found = self._add_set(here, [family.type, _INET_SERVICE], messages)
                _, target = _load_ends(family)
                self._add_rule(_INPUT, [*_is_tcp(family), *_is_syn(), *target(0), found], messages)
        ports = [_key(address) for address in listeners if not address[0]]
        if ports:
            found = self._add_set(ports, [_INET_SERVICE], messages)
            self._add_rule(_INPUT, [*_is_tcp(None), *_is_syn(), _payload(_TRANSPORT_HEADER, 2, 2, 0), found], messages)
        self._commit(messages)
        self._made = True

    def foresee(self, connections: Sequence[tuple[Address, Address]], mark: int = 0) -> None:
        """Most of what `drop` has to do for the very same connections: nothing is dropped yet. Raises OSError."""
        messages = [] if self._made else self._begun(mark)
        rules = self._add_ends(connections, messages)
        self._commit(messages)
        self._made, self._foreseen = True, (connections, rules)

    def _add_ends(
        self, connections: Sequence[tuple[Address, Address]], messages: list[tuple[int, bytes]]
    ) -> list[tuple[int, bytes]]:
        """Add the sets of their ends; the rules that use them."""
        rules: list[tuple[int, bytes]] = []
        for family in _FAMILIES:
            ends = [_key(local) + _key(remote) for local, remote in connections if len(local[0]) == family.size]
            if ends:
                found = self._add_set(ends, [family.type, _INET_SERVICE] * 2, messages)
                source, target = _load_ends(family)
                self._add_rule(_INPUT, [*_is_tcp(family), *target(0), *source(1), found], rules)
                self._add_rule(_OUTPUT, [*_is_tcp(family), *source(0), *target(1), found], rules)
        return rules

    def _begun(self, mark: int) -> list[tuple[int, bytes]]:
        """The messages that make the table."""
        messages = [_message(_NEWTABLE, self._table, _word(2, _NFT_TABLE_F_OWNER))]
        for name, hook in (_INPUT, _OUTPUT):
            place = _nest(4, _word(1, hook), _word(2, _BEFORE_CONNECTION_TRACKING))
            messages.append(_message(_NEWCHAIN, self._table, _text(3, name), place, _word(5, 1), _text(7, "filter")))
            if mark:
                marked = [_meta(_META_MARK), _equal(struct.pack("=I", mark))]
                self._add_rule((name, hook), marked, messages, _NF_ACCEPT)
        return messages

    def _add_set(self, keys: Iterable[bytes], types: list[int], messages: list[tuple[int, bytes]]) -> bytes:
        """Add a set of ``keys``; the expression that goes on with a rule where what was loaded is among them."""
        self._sets += 1
        unique = sorted(set(keys))
        name, number = _text(2, f"set{self._sets}"), self._sets
        kind = _word(4, functools.reduce(lambda all_, one: all_ << 6 | one, types))
        length = _word(5, len(unique[0]))
        messages.append(_message(_NEWSET, self._table, name, _word(3, 0), kind, length, _word(10, number)))
        # All keys are of one length, and in whole words: nothing is padded.
        before = _nest(1, _nest(1, _attribute(1, unique[0]))).removesuffix(unique[0])
        for start in range(0, len(unique), _ELEMENTS_A_MESSAGE):
            elements = [before + key for key in unique[start : start + _ELEMENTS_A_MESSAGE]]
            messages.append(_message(_NEWSETELEM, self._table, name, _word(4, number), _nest(3, *elements)))
        return _expression("lookup", _text(1, f"set{number}"), _word(2, _REGISTER), _word(4, number))

    def _add_rule(
        self,
        chain: tuple[str, int],
        expressions: list[bytes],
        messages: list[tuple[int, bytes]],
        verdict: int = _NF_DROP,
    ) -> None:
        decide = _expression("immediate", _word(1, 0), _nest(2, _nest(2, _word(1, verdict))))
        messages.append(_message(_NEWRULE, self._table, _text(2, chain[0]), _nest(4, *expressions, decide)))

    def _commit(self, messages: list[tuple[int, bytes]], of_rules: int = _CREATE | _APPEND) -> None:
        """All of it or nothing. ``of_rules``: flags of the messages that make rules."""
        batch = struct.pack(">BBH", 0, 0, _SUBSYSTEM)
        pieces = [_header(_BATCH_BEGIN, _REQUEST, 0, batch)]
        for number, (kind, body) in enumerate(messages, 1):
            flags = _REQUEST | (of_rules if kind == _NEWRULE else _CREATE) | (_ACK if number == len(messages) else 0)
            pieces.append(_header(_SUBSYSTEM << 8 | kind, flags, number, body))
        pieces.append(_header(_BATCH_END, _REQUEST, len(messages) + 1, batch))
        self._door.send(b"".join(pieces))
        while True:
            answer = self._door.recv(1 << 16)
            if struct.unpack_from("=IH", answer)[1] == _NLMSG_ERROR:
                number = -struct.unpack_from("=i", answer, 16)[0]
                if number:
                    raise refused("dropping packets by nf_tables", number)
                return


# -- what rules are made of --------------------------------------------------------------------------------------------


def _key(address: Address) -> bytes:
    """As it stands in the registers: each part begins a new one."""
    return address[0] + struct.pack(">HH", address[1], 0)


def _load_ends(family: _Family) -> tuple["_Loader", "_Loader"]:
    return _Loader(family, family.source, 0), _Loader(family, family.target, 2)


class _Loader(Struct, frozen=True):
    """Loads one end of a packet, its source or its target, as the first or second part of the key."""

    family: _Family
    address: int
    port: int

    def __call__(self, part: int) -> list[bytes]:
        first = part * (self.family.size // 4 + 1)
        return [
            _payload(_NETWORK_HEADER, self.address, self.family.size, first),
            _payload(_TRANSPORT_HEADER, self.port, 2, first + self.family.size // 4),
        ]


def _is_tcp(family: _Family | None) -> list[bytes]:
    expressions = [_meta(_META_L4PROTO), _equal(bytes([socket.IPPROTO_TCP]))]
    return expressions if family is None else [_meta(_META_NFPROTO), _equal(bytes([family.number])), *expressions]


def _is_syn() -> list[bytes]:
    mask, nothing = bytes([_SYN | _ACKNOWLEDGED]), b"\0"
    masked = _expression(
        "bitwise",
        _word(1, _REGISTER),
        _word(2, _REGISTER),
        _word(3, 1),
        _nest(4, _attribute(1, mask)),
        _nest(5, _attribute(1, nothing)),
    )
    return [_payload(_TRANSPORT_HEADER, 13, 1, 0), masked, _equal(bytes([_SYN]))]


def _meta(key: int) -> bytes:
    return _expression("meta", _word(2, key), _word(1, _REGISTER))


def _equal(value: bytes) -> bytes:
    return _expression("cmp", _word(1, _REGISTER), _word(2, 0), _nest(3, _attribute(1, value)))


def _payload(base: int, offset: int, length: int, register: int) -> bytes:
    return _expression("payload", _word(1, _REGISTER + register), _word(2, base), _word(3, offset), _word(4, length))


def _expression(name: str, *attributes: bytes) -> bytes:
    return _nest(1, _text(1, name), _nest(2, *attributes))


# -- netlink -----------------------------------------------------------------------------------------------------------


def _message(kind: int, *attributes: bytes) -> tuple[int, bytes]:
    return kind, struct.pack(">BBH", _NFPROTO_INET, 0, 0) + b"".join(attributes)


def _header(kind: int, flags: int, number: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, number, 0) + body


def _attribute(kind: int, content: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(content), kind) + content + bytes(-len(content) % 4)


def _word(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack(">I", value & 0xFFFF_FFFF))


def _text(kind: int, text: str) -> bytes:
    return _attribute(kind, text.encode() + b"\0")


def _nest(kind: int, *attributes: bytes) -> bytes:
    return _attribute(kind | _NLA_F_NESTED, b"".join(attributes))
