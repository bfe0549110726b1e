"""What is queued in a Unix stream socket: where what was written at once begins."""

import errno
import socket
import struct

from postcopy.kernel.libc import address_of, syscall

_NR_RECVMSG = 47
_NOWHERE = struct.pack("=QQ", 0, 1)  # a byte at an address where nothing is


def whole_pieces(fd: int, size: int) -> int:
    """How many bytes of the queue, from SO_PEEK_OFF on, are in pieces that end within the next ``size`` bytes.

    Of a piece that reaches beyond them, copying fails; the kernel then takes what it has copied before it for all
    (net/unix/af_unix.c, unix_stream_read_generic).
    """
    room = bytearray(size + 1)
    vector = struct.pack("=QQ", address_of(room), size) + _NOWHERE
    header = bytearray(struct.pack("=QIxxxxQQQQixxxx", 0, 0, address_of(vector), 2, 0, 0, 0))
    flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
    try:
        return syscall("looking for the pieces in a Unix socket", _NR_RECVMSG, fd, address_of(header), flags)
    except OSError as error:
        if error.errno == errno.EFAULT:
            return 0
        raise
