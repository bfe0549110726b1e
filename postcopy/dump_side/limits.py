"""Resource limits."""

import resource

from postcopy.state import Limits

_COUNT = 16  # RLIM_NLIMITS
_INFINITY = 2**64 - 1


def collect(pid: int) -> Limits:
    """The limits of a process (prlimit(2)), by number."""
    found = (resource.prlimit(pid, number) for number in range(_COUNT))
    return Limits([(soft & _INFINITY, hard & _INFINITY) for soft, hard in found])
