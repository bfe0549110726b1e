"""rtnetlink(7), ip(7): the addresses of this host, and when they leave it."""

import errno
import select
import socket
from types import TracebackType
from typing import Self

from postcopy.kernel.netlink import attributes, messages

_NETLINK_ROUTE = 0
_RTMGRP_IPV4_IFADDR, _RTMGRP_IPV6_IFADDR = 0x10, 0x100
_RTM_DELADDR = 21
_IFADDRMSG_SIZE = 8
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_MOST = 1 << 16


def is_here(address: bytes) -> bool:
    """Whether it (4 or 16 bytes) is an address of this host."""
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as own:
        try:
            own.bind((socket.inet_ntop(family, address), 0))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True


class Departures:
    """Addresses that leave this host from now on, also those that come back at once."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_ROUTE)
        self._socket.bind((0, _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()

    def fileno(self) -> int:
        """The descriptor."""
        return self._socket.fileno()

    def wait(self, seconds: float) -> set[bytes]:
        """Those of which has been told, when it has of some or the time is over. What is told is lost where it is much
        at once."""
        if not select.select([self._socket], [], [], seconds)[0]:
            return set()
        try:
            content = self._socket.recv(_MOST)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            return set()
        found = set()
        for kind, body in messages(content):
            if kind == _RTM_DELADDR:
                told = dict(attributes(body[_IFADDRMSG_SIZE:]))
                # The address is the peer's on a point-to-point link; IPv6 tells a local one there alone.
                found |= {told[each] for each in (_IFA_LOCAL, _IFA_ADDRESS) if each in told}
        return found
