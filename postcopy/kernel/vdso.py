"""The vdso as an ELF image in memory (vdso(7)): its unused tail, and a ``syscall`` instruction in it."""

import struct

from postcopy.kernel.libc import refused

_PT_LOAD = 1
SYSCALL_INSTRUCTION = b"\x0f\x05"


def slack(image: bytes) -> range:
    """Offsets behind what the vdso loads (bytes): section headers and padding, which nobody reads at run time."""
    (table,) = struct.unpack_from("<Q", image, 32)
    entry_size, count = struct.unpack_from("<HH", image, 54)
    end = 0
    for number in range(count):
        kind, _, _, address, _, _, size = struct.unpack_from("<IIQQQQQ", image, table + number * entry_size)
        if kind == _PT_LOAD:
            end = max(end, address + size)
    return range((end + 63) & ~63, len(image))


def syscall_offset(image: bytes) -> int:
    """Where a ``syscall`` instruction stands. Raises OSError ENOEXEC where there is none."""
    offset = image.find(SYSCALL_INSTRUCTION)
    if offset < 0:
        raise refused("the vdso holds no syscall instruction", 8)
    return offset
