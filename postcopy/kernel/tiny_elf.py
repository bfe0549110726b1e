"""The smallest program there is: one page with a ``syscall`` instruction. It is executed and never runs by itself."""

import os
import struct

from postcopy.kernel.page import PAGE_SIZE

ADDRESS = 0x400000
_CODE = b"\x0f\x05\x0f\x0b"  # syscall; ud2
_ENTRY = ADDRESS + 120
SYSCALL_AT = _ENTRY


def image() -> bytes:
    """The ELF file: header, one PT_LOAD, the code."""
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, _ENTRY, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    size = 120 + len(_CODE)
    return header + struct.pack("<IIQQQQQQ", 1, 5, 0, ADDRESS, ADDRESS, size, size, PAGE_SIZE) + _CODE


def as_memfd() -> int:
    """A descriptor (close-on-exec) of the program, for execveat(2)."""
    fd = os.memfd_create("postcopy")
    os.write(fd, image())
    return fd
