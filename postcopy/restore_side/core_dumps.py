"""Zombies that have left a core dump: only who leaves one when it ends has that in its wait status (core(5)).

So they leave a short one, in a directory that is removed with it. That takes a host whose dumps are files in the
directory of who leaves them: others are given to a program, which must not hear of these, or lie who knows where.
"""

import contextlib
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from postcopy.kernel.page import PAGE_SIZE
from postcopy.restore_side.root import HERE, Root

_PATTERN = Path("/proc/sys/kernel/core_pattern")


def problems(wanted: bool, root: Root) -> Iterator[str]:
    """Why such zombies cannot be made here; ``root``: in which they would live."""
    if not wanted:
        return
    if root != HERE:
        yield "a zombie has left a core dump, which cannot be made again with --root"
    pattern = _PATTERN.read_text().strip()
    if not pattern or pattern[0] in "|@" or "/" in pattern:
        yield f"a zombie has left a core dump: to make it again, {_PATTERN} must be a plain file name, not {pattern}"


@contextlib.contextmanager
def place(pid: int, uid: int) -> Iterator[str]:
    """A directory for the dump of a process that is to end now. Raises OSError."""
    directory = tempfile.mkdtemp(prefix="postcopy-core-")
    try:
        shutil.chown(directory, uid)
        # The least that the kernel takes for a dump (fs/binfmt_elf.c, ELF_EXEC_PAGESIZE); what is behind is cut off.
        resource.prlimit(pid, resource.RLIMIT_CORE, (PAGE_SIZE, PAGE_SIZE))
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
