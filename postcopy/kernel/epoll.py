"""epoll(7): constants and struct epoll_event, which is packed on x86-64."""

import struct

EPOLL_CTL_ADD, EPOLL_CTL_MOD = 1, 3
EPOLLIN, EPOLLPRI, EPOLLOUT, EPOLLERR, EPOLLHUP = 0x001, 0x002, 0x004, 0x008, 0x010
EPOLLRDHUP = 0x2000
EPOLLEXCLUSIVE, EPOLLWAKEUP, EPOLLONESHOT, EPOLLET = 1 << 28, 1 << 29, 1 << 30, 1 << 31

_EVENT = struct.Struct("<IQ")
EVENT_SIZE = _EVENT.size


def event(events: int, data: int) -> bytes:
    """A struct epoll_event."""
    return _EVENT.pack(events, data)


def parse(content: bytes, count: int) -> list[tuple[int, int]]:
    """The first ``count`` events of an array: events and data."""
    return [_EVENT.unpack_from(content, EVENT_SIZE * number) for number in range(count)]
