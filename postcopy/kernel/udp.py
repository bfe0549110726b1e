"""udp(7): what a socket keeps back to be sent with more (UDP_CORK, MSG_MORE)."""

import socket
from socket import SocketType

_MSG_PROBE = 0x10  # include/linux/socket.h: nothing is sent


def has_pending(own: SocketType) -> bool:
    """Whether a packet is begun; nothing tells what is in it.

    With one begun, the kernel looks at no address any more; without, it refuses port 0 before it does anything
    (net/ipv4/udp.c, udp_sendmsg). Before that it would give the socket a port; one without has nothing begun.
    """
    if not own.getsockname()[1]:
        return False
    nowhere = "::" if own.family == socket.AF_INET6 else "0.0.0.0"
    try:
        own.sendmsg([], [], socket.MSG_MORE | _MSG_PROBE | socket.MSG_DONTWAIT, (nowhere, 0))
    except OSError:
        return False
    return True
