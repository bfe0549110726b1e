"""What this CPU and kernel can do: the features a program may have found and come to rely on."""

import contextlib
import errno
import mmap
import os
import signal
from collections.abc import Iterator

from postcopy.kernel import ptrace
from postcopy.kernel._libc import ffi
from postcopy.kernel.libc import address_of, refused
from postcopy.kernel.page import PAGE_SIZE


def features() -> frozenset[str]:
    """The flags of ``/proc/cpuinfo`` (those of the first CPU)."""
    with open("/proc/cpuinfo") as stream:
        for line in stream:
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


@contextlib.contextmanager
def stopped_child() -> Iterator[int]:
    """A child of ours that has stopped under our ptrace, to look at; its PID. It ends with the scope."""
    child = os.fork()
    if not child:
        try:
            os.kill(os.getpid(), signal.SIGSTOP)
        finally:
            os._exit(0)
    try:
        ptrace.seize(child, 0)
        ptrace.interrupt(child)
        if ptrace.wait(child).ended is not None:
            raise refused("stopping a child", errno.ESRCH)
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, ptrace.WALL)


def xsave_size() -> int:
    """The size of the XSAVE area and of NT_X86_XSTATE in bytes (CPUID leaf 0Dh, for the enabled features)."""
    try:
        with mmap.mmap(-1, PAGE_SIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
            page.write(_ASK_CPUID)
            return int(ffi.cast("uint32_t (*)(void)", address_of(page))())
    except PermissionError:
        # Such memory is forbidden here (PR_SET_MDWE, SELinux); a child takes some milliseconds.
        with stopped_child() as child:
            return len(ptrace.get_xstate(child))


# push rbx; mov eax, 0Dh; xor ecx, ecx; cpuid; mov eax, ebx; pop rbx; ret
_ASK_CPUID = bytes.fromhex("53 b80d000000 31c9 0fa2 89d8 5b c3")
