"""What ``restore`` itself has, and so what a new process begins with."""

import os
from functools import cache

from postcopy import capabilities
from postcopy.kernel import procfs
from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import syscall
from postcopy.kernel.prctl import PR_GET_SECUREBITS
from postcopy.state import Credentials


@cache
def own_credentials() -> Credentials:
    """Our credentials, as those of a thread are collected."""
    securebits = syscall("reading the secure bits", NUMBERS["prctl"], PR_GET_SECUREBITS)
    return Credentials.from_status(procfs.status(os.getpid()), securebits)


def check_privileges() -> None:
    """That we may make processes with chosen PIDs and userfaultfds. Raises CannotRun naming the missing capability."""
    capabilities.require({"CAP_SYS_ADMIN", "CAP_SYS_PTRACE"})
