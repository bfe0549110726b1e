"""``/proc/PID/net``: what these tables alone tell of sockets (proc_pid_net(5))."""

import socket
import struct

from postcopy.kernel import procfs

_RAW = {socket.AF_INET: "raw", socket.AF_INET6: "raw6"}


def raw_peer(pid: int, family: int, inode: int) -> bytes:
    """The address (4 or 16 bytes) that a raw socket is connected to, empty where it is not: getpeername(2) tells none
    that has no port. As the process sees the network."""
    for line in procfs.read(pid, f"net/{_RAW[socket.AddressFamily(family)]}").splitlines()[1:]:
        fields = line.split()
        if int(fields[9]) == inode:
            host = fields[2].partition(b":")[0]
            # Words of 32 bits, each in the order of this host.
            words = [int(host[at : at + 8], 16) for at in range(0, len(host), 8)]
            address = struct.pack(f"={len(words)}I", *words)
            return address if any(address) else b""
    return b""


def netlink_answers_come(pid: int, inode: int) -> bool:
    """Whether a netlink socket is in the middle of a long answer (a dump), or has something to read."""
    for line in procfs.read(pid, "net/netlink").splitlines()[1:]:
        fields = line.split()
        if int(fields[9]) == inode:
            return bool(int(fields[4]) or int(fields[6]))
    return False
