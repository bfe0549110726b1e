"""Resource limits, set by the process itself while it still has its privileges."""

import struct

from postcopy.kernel.batch import Batch
from postcopy.kernel.calls import call
from postcopy.state import Limits


def rebuild(state: Limits, batch: Batch) -> None:
    """Add the calls. Raising a hard limit above that of ``restore`` needs CAP_SYS_RESOURCE."""
    for number, (soft, hard) in enumerate(state.limits):
        wanted = batch.place(struct.pack("<QQ", soft, hard))
        purpose = f"setting resource limit {number} to {soft} (hard: {hard}; raise it for restore, too)"
        batch.add(call("prlimit64", 0, number, wanted, 0), purpose)
