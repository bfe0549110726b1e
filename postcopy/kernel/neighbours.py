"""arp(7), icmp6(7): telling everybody on a link that an address is here now."""

import array
import contextlib
import fcntl
import socket
import struct
from collections.abc import Iterable, Iterator

_SIOCGIFCONF = 0x8912
_IFCONF, _IFREQ = struct.Struct("@i4xP"), struct.Struct("@16s4x4s16x")  # struct ifconf, struct ifreq of an IPv4 address
_ARPHRD_ETHER = 1
_ETH_P_ARP, _ETH_P_IPV6 = 0x0806, 0x86DD
_ARP = struct.Struct("!HHBBH6s4s6s4s")
_ARP_REQUEST = 1
_EVERYBODY = b"\xff" * 6
_ICMPV6, _ADVERTISEMENT, _OVERRIDE = 58, 136, 0x20000000
_TARGET_LINK_ADDRESS = 2
_ALL_NODES = socket.inet_pton(socket.AF_INET6, "ff02::1")
_ALL_NODES_LINK = bytes.fromhex("333300000001")


def announce(addresses: Iterable[bytes], told_by: contextlib.ExitStack) -> None:
    """Tell the neighbours that these addresses of this host (4 or 16 bytes each) are here: by a gratuitous ARP request
    (RFC 5227, 3) or an unsolicited neighbor advertisement (RFC 4861, 7.2.6), on those devices that have them and where
    there is anybody to be told. Raises OSError.

    The sockets are closed with ``told_by``: to close one takes an RCU grace period, some ten milliseconds.
    """
    wanted = set(addresses)
    for device, address in {*_of_ipv4(), *_of_ipv6()}:
        if address in wanted:
            own = told_by.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
            own.bind((device, 0))
            *_, kind, mac = own.getsockname()
            if kind == _ARPHRD_ETHER:
                own.send(_request(mac, address) if len(address) == 4 else _advertisement(mac, address))


def _of_ipv4() -> Iterator[tuple[str, bytes]]:
    """Device and address of every IPv4 address of this network namespace."""
    size = 64 * _IFREQ.size
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        while True:
            found = array.array("b", bytes(size))
            answer = fcntl.ioctl(own, _SIOCGIFCONF, _IFCONF.pack(size, found.buffer_info()[0]))
            used = _IFCONF.unpack(answer)[0]
            # What has no room is left out without a word: netdevice(7).
            if used + _IFREQ.size <= size:
                break
            size *= 2
    for name, address in _IFREQ.iter_unpack(found.tobytes()[:used]):
        # An alias of the old kind is a label on the device's address.
        yield name.split(b"\0")[0].decode().partition(":")[0], address


def _of_ipv6() -> Iterator[tuple[str, bytes]]:
    try:
        with open("/proc/self/net/if_inet6") as stream:
            for line in stream:
                address, *_, device = line.split()
                yield device, bytes.fromhex(address)
    except FileNotFoundError:
        return  # a kernel without IPv6


def _request(mac: bytes, address: bytes) -> bytes:
    """The frame of a gratuitous ARP request."""
    header = _EVERYBODY + mac + struct.pack("!H", _ETH_P_ARP)
    return header + _ARP.pack(_ARPHRD_ETHER, 0x0800, 6, 4, _ARP_REQUEST, mac, address, bytes(6), address)


def _advertisement(mac: bytes, address: bytes) -> bytes:
    """The frame of an unsolicited neighbor advertisement."""
    option = struct.pack("!BB6s", _TARGET_LINK_ADDRESS, 1, mac)
    rest = struct.pack("!I16s", _OVERRIDE, address) + option
    length = 4 + len(rest)
    pseudo_header = address + _ALL_NODES + struct.pack("!II", length, _ICMPV6)
    message = (
        struct.pack("!BBH", _ADVERTISEMENT, 0, _checksum(pseudo_header + bytes([_ADVERTISEMENT, 0]) + rest)) + rest
    )
    header = struct.pack("!IHBB", 6 << 28, length, _ICMPV6, 255) + address + _ALL_NODES
    return _ALL_NODES_LINK + mac + struct.pack("!H", _ETH_P_IPV6) + header + message


def _checksum(content: bytes) -> int:
    """RFC 1071; of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(content) // 2}H", content))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
