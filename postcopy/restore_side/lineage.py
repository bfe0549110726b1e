"""Session and process group."""

from postcopy.kernel.calls import call
from postcopy.kernel.executor import Batch
from postcopy.state import Lineage


def rebuild(state: Lineage, batch: Batch) -> None:
    """Add the calls; what the process did not lead itself it now shares with ``restore``."""
    if state.session:
        batch.add(call("setsid"), "making the session")
    elif state.process_group:
        batch.add(call("setpgid", 0, 0), "making the process group")
