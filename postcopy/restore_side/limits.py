"""Resource limits, set from outside once everything is built."""

import resource

from postcopy.errors import RestoreError
from postcopy.state import Limits

_INFINITY = 2**64 - 1


def rebuild(state: Limits, pid: int) -> None:
    """Set the limits of process ``pid``; only differences, since raising a hard limit needs CAP_SYS_RESOURCE."""
    for number, wanted in enumerate(state.limits):
        soft, hard = (-1 if value == _INFINITY else value for value in wanted)
        if resource.prlimit(pid, number) == (soft, hard):
            continue
        try:
            resource.prlimit(pid, number, (soft, hard))
        except (PermissionError, ValueError) as error:
            raise RestoreError(
                f"resource limit {number} cannot be set to {wanted}: {error}",
                "raise the hard limit of the shell that runs restore, or give it CAP_SYS_RESOURCE",
            ) from None
