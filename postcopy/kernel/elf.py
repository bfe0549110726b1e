"""Of ELF (elf(5)) just the GNU build id, which tells whether two hosts have the same program or library."""

import struct

_PT_NOTE = 4
_NT_GNU_BUILD_ID = 3


def build_id(path: str) -> bytes:
    """The GNU build id of the ELF object at ``path``; empty where there is none or the file is no ELF object."""
    try:
        with open(path, "rb") as stream:
            header = stream.read(64)
            if header[:5] != b"\x7fELF\x02" or len(header) < 64:
                return b""
            (table,) = struct.unpack_from("<Q", header, 32)
            size, count = struct.unpack_from("<HH", header, 54)
            stream.seek(table)
            entries = stream.read(size * count)
            for number in range(count):
                kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", entries, number * size)
                if kind == _PT_NOTE:
                    stream.seek(offset)
                    if found := _in_notes(stream.read(min(length, 65536))):
                        return found
    except (OSError, struct.error):
        pass
    return b""


def _in_notes(notes: bytes) -> bytes:
    place = 0
    while place + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, place)
        name = place + 12
        content = name + (name_size + 3 & ~3)
        if kind == _NT_GNU_BUILD_ID and notes[name : name + name_size] == b"GNU\0":
            return notes[content : content + size]
        place = content + (size + 3 & ~3)
    return b""
