"""process_vm_readv(2): reading the memory of another process."""

import errno
import platform
from typing import Any

from postcopy.kernel._libc import ffi
from postcopy.kernel.libc import lib, refused

_NUMBERS = {"x86_64": 310, "aarch64": 270, "riscv64": 270}
_NUMBER = _NUMBERS.get(platform.machine(), -1)

# One iovec each way, made once: {base, length}.
_local: Any = ffi.new("unsigned long[2]")
_remote: Any = ffi.new("unsigned long[2]")
_local_address = int(ffi.cast("unsigned long", _local))
_remote_address = int(ffi.cast("unsigned long", _remote))
_from_buffer = ffi.from_buffer
_cast = ffi.cast
_syscall = lib.syscall


def process_vm_readv(pid: int, address: int, buffer: memoryview) -> None:
    """Fill ``buffer`` with the memory of process ``pid`` from ``address`` on.

    Raises OSError: EFAULT when not all of it is mapped, ESRCH when the process is gone, EPERM.
    """
    length = len(buffer)
    with _from_buffer(buffer) as pinned:
        _local[0] = int(_cast("unsigned long", pinned))
        _local[1] = _remote[1] = length
        _remote[0] = address
        done: int = _syscall(_NUMBER, pid, _local_address, 1, _remote_address, 1, 0)
    if done == length:
        return
    what = f"process_vm_readv of process {pid} at {address:#x}, {length} bytes"
    if done == -1:
        raise refused(what)
    raise refused(f"{what}: cut short after {done}", errno.EFAULT)
