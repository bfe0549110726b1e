"""timerfd_create(2), seen through a descriptor of somebody else's timer."""

import struct

from postcopy.kernel.libc import address_of, syscall

TFD_TIMER_ABSTIME = 1
TFD_IOC_SET_TICKS = 0x40085400  # include/uapi/linux/timerfd.h

_NR_TIMERFD_GETTIME = 287
_ITIMERSPEC = struct.Struct("<4q")  # interval, value: seconds and nanoseconds each
_SECOND = 1_000_000_000


def pack(interval: int, value: int) -> bytes:
    """A struct itimerspec of nanoseconds."""
    return _ITIMERSPEC.pack(*divmod(interval, _SECOND), *divmod(value, _SECOND))


def times(fd: int) -> tuple[int, int]:
    """Interval and time left (ns).

    A periodic timer that has expired rests until it is read or asked for its time: only then ``ticks`` of its fdinfo
    counts what it has missed (fs/timerfd.c).
    """
    buffer = bytearray(_ITIMERSPEC.size)
    syscall("reading a timerfd", _NR_TIMERFD_GETTIME, fd, address_of(buffer))
    interval, interval_ns, value, value_ns = _ITIMERSPEC.unpack(buffer)
    return interval * _SECOND + interval_ns, value * _SECOND + value_ns
