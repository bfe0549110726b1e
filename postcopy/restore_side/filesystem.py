"""Root, working directory and umask."""

from postcopy.kernel.batch import Batch
from postcopy.kernel.calls import call
from postcopy.state import Filesystem


def rebuild(state: Filesystem, batch: Batch) -> None:
    """Add the calls; after all paths have been opened, since they are those of the host."""
    batch.add(call("chdir", batch.text(state.cwd)), f"changing directory to {state.cwd}")
    if state.root != "/":
        batch.add(call("chroot", batch.text(state.root)), f"changing the root to {state.root}")
    batch.add(call("umask", state.umask), "setting the umask")
