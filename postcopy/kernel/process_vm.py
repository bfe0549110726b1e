"""process_vm_readv(2): reading the memory of another process."""

import errno
import platform
from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any

from postcopy.kernel._libc import ffi
from postcopy.kernel.libc import lib, refused

_NUMBERS = {"x86_64": 310, "aarch64": 270, "riscv64": 270}
_NUMBER = _NUMBERS.get(platform.machine(), -1)

MOST_PLACES = 1024  # IOV_MAX
# One iovec each way, made once: {base, length}.
_local: Any = ffi.new("unsigned long[2]")
_remote: Any = ffi.new("unsigned long[2]")
_local_address = int(ffi.cast("unsigned long", _local))
_remote_address = int(ffi.cast("unsigned long", _remote))
_from_buffer = ffi.from_buffer
_cast = ffi.cast
_syscall = lib.syscall


def process_vm_readv_all(pid: int, places: Sequence[tuple[int, int]], buffer: memoryview) -> None:
    """Fill ``buffer`` with what lies at ``places``: at most `MOST_PLACES`, the address of each, and its bytes.

    Raises OSError like `process_vm_readv`.
    """
    length = len(buffer)
    remote = array("Q", chain.from_iterable(places))
    with _from_buffer(buffer) as pinned, _from_buffer(remote) as vectors:
        _local[0], _local[1] = int(_cast("unsigned long", pinned)), length
        address = int(_cast("unsigned long", vectors))
        done: int = _syscall(_NUMBER, pid, _local_address, 1, address, len(places), 0)
    if done != length:
        raise _failure(done, f"process_vm_readv of process {pid} at {len(places)} places, {length} bytes")


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
    if done != length:
        raise _failure(done, f"process_vm_readv of process {pid} at {address:#x}, {length} bytes")


def _failure(done: int, what: str) -> OSError:
    return refused(what) if done == -1 else refused(f"{what}: cut short after {done}", errno.EFAULT)
