"""renameat2(2): renaming without replacing what has the new name."""

import errno
import os
from pathlib import Path

from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import address_of, syscall

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


def rename_new(old: Path, new: Path) -> None:
    """Rename ``old`` to ``new``, which must not exist yet. Raises OSError, EEXIST among them."""
    paths = os.fsencode(old) + b"\0", os.fsencode(new) + b"\0"
    arguments = _AT_FDCWD, address_of(paths[0]), _AT_FDCWD, address_of(paths[1]), _RENAME_NOREPLACE
    try:
        syscall(f"renaming {old} to {new}", NUMBERS["renameat2"], *arguments)
    except OSError as error:
        # Not every filesystem knows the flag (rename(2), "EINVAL"); a directory with something in it is never replaced.
        if error.errno != errno.EINVAL or os.path.lexists(new):
            raise
        os.rename(old, new)
