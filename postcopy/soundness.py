"""Whether a state makes sense: well-typed, it could still contradict itself or ask for what cannot be."""

from postcopy.errors import ProtocolError
from postcopy.state import Manifest, Tree


def check(tree: Tree, manifest: Manifest) -> None:
    """Raises ProtocolError with the field and the value of what cannot be."""
    if not tree.processes:
        raise ProtocolError("processes: none")
    if manifest.pid not in [process.pid for process in tree.processes]:
        raise ProtocolError(f"pid {manifest.pid} of the manifest: no process of the state has it")
