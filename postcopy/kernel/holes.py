"""Where a sparse file has data; see lseek(2), SEEK_DATA and SEEK_HOLE."""

import errno
import os


def data_ranges(fd: int, size: int) -> list[range]:
    """The ranges of bytes, of the first ``size``, that are not in holes. Moves the position of ``fd``.

    Raises OSError.
    """
    found = []
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        found.append(range(start, end))
    return found
