"""clone3(2) with set_tid: a child whose PID is chosen, in this PID namespace or in that of ``pid_for_children``."""

import struct
from collections.abc import Sequence

from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import address_of, syscall

CLONE_VM = 0x100
CLONE_FS = 0x200
CLONE_FILES = 0x400
CLONE_SIGHAND = 0x800
CLONE_PARENT = 0x8000
CLONE_THREAD = 0x10000
CLONE_NEWNS = 0x20000
CLONE_SYSVSEM = 0x40000
CLONE_NEWPID = 0x20000000

SIZE = 80  # CLONE_ARGS_SIZE_VER1, which has set_tid


def arguments(flags: int, exit_signal: int, set_tid_address: int, set_tid_count: int) -> bytes:
    """struct clone_args; ``set_tid_address`` points to 32-bit PIDs, innermost namespace first."""
    # flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size
    return struct.pack("<10Q", flags, 0, 0, 0, exit_signal, 0, 0, 0, set_tid_address, set_tid_count)


def set_tid(pids: Sequence[int]) -> bytes:
    """The PIDs that ``set_tid_address`` points to."""
    return struct.pack(f"<{len(pids)}I", *pids)


def fork(exit_signal: int, pids: Sequence[int] = (), flags: int = 0) -> int:
    """Like fork(2), with the child's PIDs chosen, that in its innermost PID namespace first. 0 in the child.

    Raises OSError: EEXIST (the PID is taken), EPERM (CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN missing).
    """
    wanted = set_tid(pids)
    packed = arguments(flags, exit_signal, address_of(wanted) if pids else 0, len(pids))
    what = f"making a process with PID {pids[-1]}" if pids else "making a process"
    return syscall(what, NUMBERS["clone3"], address_of(packed), SIZE)
