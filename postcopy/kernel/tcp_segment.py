"""A TCP segment of our own making (RFC 9293, 3.1), for a connection that is under repair here."""

import socket
import struct

from postcopy.kernel.socket_options import SOL_SOCKET

FIN, ACK = 1, 16
_SO_MARK, _IPV6_HDRINCL = 36, 36
_TTL = 64


def send(source: tuple[bytes, int], target: tuple[bytes, int], numbers: tuple[int, int], flags: int, mark: int) -> None:
    """Send a segment without content to ``target``, an address and port of this host, as if it came from ``source``.

    Its window is closed: nothing is to be sent for an answer.

    ``numbers``: the sequence number and the acknowledged one; ``mark``: of the packet (SO_MARK). Raises OSError.
    """
    (from_address, from_port), (to_address, to_port) = source, target
    head = struct.pack(">HHIIBBHHH", from_port, to_port, *numbers, 5 << 4, flags, 0, 0, 0)
    if len(to_address) == 4:
        pseudo = from_address + to_address + struct.pack(">BBH", 0, socket.IPPROTO_TCP, len(head))
        # The kernel fills in identification, length and checksum (raw(7)).
        ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(head), 0, 0, _TTL, socket.IPPROTO_TCP, 0)
        ip += from_address + to_address
        family, place = socket.AF_INET, (socket.inet_ntop(socket.AF_INET, to_address), 0)
    else:
        pseudo = from_address + to_address + struct.pack(">II", len(head), socket.IPPROTO_TCP)
        ip = struct.pack(">IHBB", 6 << 28, len(head), socket.IPPROTO_TCP, _TTL) + from_address + to_address
        family, place = socket.AF_INET6, (socket.inet_ntop(socket.AF_INET6, to_address), 0)
    head = head[:16] + struct.pack(">H", _checksum(pseudo + head)) + head[18:]
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.setsockopt(SOL_SOCKET, _SO_MARK, mark)
        if family == socket.AF_INET6:
            raw.setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 1)
        raw.sendto(ip + head, place)


def _checksum(content: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    total: int = sum(struct.unpack(f">{len(content) // 2}H", content))
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
