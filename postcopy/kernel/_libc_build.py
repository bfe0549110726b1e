"""Builds ``_libc.py``, the cffi binding of the C library in ABI mode.

The generated module is kept in the tree, so that nobody needs a compiler or a C parser, neither at install nor at
import. After a change here: ``python -m postcopy.kernel._libc_build``.
"""

from pathlib import Path

import cffi

DECLARATIONS = """
    long syscall(long number, long a, long b, long c, long d, long e, long f);
    int ioctl(int fd, unsigned long request, void *argument);
"""


def build(target: Path) -> None:
    """Write the binding to ``target``."""
    ffi = cffi.FFI()
    ffi.cdef(DECLARATIONS)
    ffi.set_source("postcopy.kernel._libc", None)
    ffi.emit_python_code(str(target))


if __name__ == "__main__":
    build(Path(__file__).with_name("_libc.py"))
