"""Tell everybody on a link that IPv4 and IPv6 addresses are here now: ``announce.py DEVICE ADDRESS...``.

By a gratuitous ARP request (RFC 5227) and an unsolicited neighbor advertisement (RFC 4861, 7.2.6).
"""

import socket
import struct
import sys

ETH_P_ARP, ETH_P_IPV6 = 0x0806, 0x86DD
BROADCAST = b"\xff" * 6


def arp(mac: bytes, address: bytes) -> bytes:
    """The frame of a gratuitous ARP request."""
    body = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + mac + address + bytes(6) + address
    return BROADCAST + mac + struct.pack(">H", ETH_P_ARP) + body


def advertisement(mac: bytes, address: bytes) -> bytes:
    """The frame of an unsolicited neighbor advertisement to all nodes, with the override flag."""
    target = socket.inet_pton(socket.AF_INET6, "ff02::1")
    body = struct.pack(">BBHI", 136, 0, 0, 0x20000000) + address + struct.pack(">BB", 2, 1) + mac
    pseudo = address + target + struct.pack(">II", len(body), 58)
    total = sum(struct.unpack(f">{(len(pseudo) + len(body)) // 2}H", pseudo + body))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    body = body[:2] + struct.pack(">H", checksum) + body[4:]
    header = struct.pack(">IHBB", 6 << 28, len(body), 58, 255) + address + target
    return bytes.fromhex("333300000001") + mac + struct.pack(">H", ETH_P_IPV6) + header + body


def main() -> None:
    """Send one frame for each address."""
    device, *addresses = sys.argv[1:]
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((device, 0))
        mac = raw.getsockname()[4]
        for address in addresses:
            if ":" in address:
                raw.send(advertisement(mac, socket.inet_pton(socket.AF_INET6, address)))
            else:
                raw.send(arp(mac, socket.inet_pton(socket.AF_INET, address)))


if __name__ == "__main__":
    main()
