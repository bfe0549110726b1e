"""Names of files whose name in ``/proc`` was deleted."""

import os


def in_same_directory(deleted: str, file: os.stat_result) -> str | None:
    """A name that ``file`` has in the directory of its deleted one, if any. Raises OSError: it cannot be searched.

    The kernel shows a file by the name that it was opened by, whatever other links it has.
    """
    with os.scandir(os.path.dirname(deleted)) as entries:
        for entry in entries:
            if entry.inode() == file.st_ino and os.path.samestat(entry.stat(follow_symlinks=False), file):
                return entry.path
    return None
