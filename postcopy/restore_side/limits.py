"""Resource limits, set by the process itself while it still has its privileges."""

import functools
import struct

from postcopy.kernel.batch import Batch
from postcopy.kernel.calls import call
from postcopy.kernel.pattern import Blank, Pattern
from postcopy.state import Limits

_RLIMIT = struct.Struct("<QQ")


def rebuild(state: Limits, batch: Batch) -> None:
    """Add the calls. Raising a hard limit above that of ``restore`` needs CAP_SYS_RESOURCE."""
    wanted = batch.place(b"".join(_RLIMIT.pack(*each) for each in state.limits))
    _setting(len(state.limits)).repeat(batch, [wanted], state.limits)


@functools.cache
def _setting(count: int) -> Pattern:
    pattern = Pattern()
    for number in range(count):
        text = f"setting resource limit {number} to {{0[{number}][0]}}"
        text += f" (hard: {{0[{number}][1]}}; raise it for restore, too)"
        pattern.add(call("prlimit64", 0, number, Blank(0, number * _RLIMIT.size), 0), text)
    return pattern
