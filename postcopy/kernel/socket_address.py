"""struct sockaddr_in and sockaddr_in6 (ip(7), ipv6(7))."""

import socket
import struct

_IPV4 = struct.pack("=H", socket.AF_INET)
_MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291, 2.5.5.2


def pack(family: int, address: tuple[str, int] | tuple[str, int, int, int]) -> bytes:
    """An address as Python's sockets give it."""
    host, port, *rest = address
    if family == socket.AF_INET:
        return struct.pack("=H", family) + struct.pack(">H", port) + socket.inet_aton(host) + bytes(8)
    flow, scope = rest or (0, 0)
    packed = socket.inet_pton(family, host.partition("%")[0])
    return struct.pack("=H", family) + struct.pack(">HI", port, flow) + packed + struct.pack("=I", scope)


def portless(family: int, host: bytes) -> bytes:
    """An address of 4 or 16 bytes, with port 0."""
    if family == socket.AF_INET:
        return struct.pack("=HH", family, 0) + host + bytes(8)
    return struct.pack("=HHI", family, 0, 0) + host + bytes(4)


def unpack(address: bytes) -> tuple[bytes, int]:
    """IP address (4 or 16 bytes) and port. An IPv4 address mapped into IPv6 is an IPv4 address to the network."""
    port = address[2] << 8 | address[3]
    if address[:2] == _IPV4:
        return address[4:8], port
    host = address[8:24]
    return (host[12:] if host.startswith(_MAPPED) else host), port


def is_loopback(address: bytes) -> bool:
    """Whether it is one that never leaves the host."""
    host, _ = unpack(address)
    return host[:1] == b"\x7f" if len(host) == 4 else host == socket.inet_pton(socket.AF_INET6, "::1")


def scope(address: bytes) -> int:
    """The number of the interface that a link-local IPv6 address belongs to; 0 elsewhere."""
    return int.from_bytes(address[24:28], "little") if len(address) == 28 else 0


def text(address: bytes) -> str:
    """``10.0.0.1:80`` or ``[::1]:80``."""
    host, port = unpack(address)
    if len(host) == 4:
        return f"{socket.inet_ntop(socket.AF_INET, host)}:{port}"
    return f"[{socket.inet_ntop(socket.AF_INET6, host)}]:{port}"
