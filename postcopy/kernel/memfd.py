"""memfd_create(2) and its seals (fcntl(2))."""

import struct

from postcopy.kernel.libc import address_of, syscall

MFD_ALLOW_SEALING = 2
F_ADD_SEALS, F_GET_SEALS = 1033, 1034

_NR_FSTATFS = 138
_HUGETLBFS_MAGIC = 0x958458F6


def is_huge(fd: int) -> bool:
    """Whether the file lies in huge pages (MFD_HUGETLB)."""
    buffer = bytearray(120)
    syscall("asking for the filesystem of a file", _NR_FSTATFS, fd, address_of(buffer))
    kind: int = struct.unpack_from("<q", buffer)[0]
    return kind == _HUGETLBFS_MAGIC
