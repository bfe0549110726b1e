"""What this process may do (capabilities(7))."""

import os
from collections.abc import Iterable

from postcopy.errors import CannotRun
from postcopy.kernel import procfs

_BITS = {
    "CAP_KILL": 5,
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_NICE": 23,
    "CAP_SYS_RESOURCE": 24,
    "CAP_CHECKPOINT_RESTORE": 40,
}


def missing(names: Iterable[str]) -> list[str]:
    """Which of these capabilities are not in our effective set."""
    effective = int(procfs.status(os.getpid())["CapEff"], 16)
    return sorted(name for name in names if not effective >> _BITS[name] & 1)


def require(names: Iterable[str]) -> None:
    """Raises CannotRun naming what is missing."""
    if lacking := missing(names):
        raise CannotRun(f"{' and '.join(lacking)} missing: this needs root", "run it as root, or with sudo")
