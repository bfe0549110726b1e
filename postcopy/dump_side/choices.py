"""What the user allows and asks for, beyond what is carried in any case."""

from msgspec import Struct, field

from postcopy.action_scripts import ActionScripts

DEFAULT_GHOST_LIMIT = 1 << 20
REFUSED, MOVED, CLOSED = "refused", "moved", "closed"


class Choices(Struct, frozen=True):
    """Options of ``dump``. ``ghost_limit``: bytes of a file without a name that may travel with the state.

    ``file_locks``: locks are taken again at the destination, where somebody else may have been faster.
    ``external``: resources outside of the tree (as ``/proc/PID/fd`` shows them) that ``restore`` will be given others
    for. ``connections``: what becomes of established TCP connections (`REFUSED`, `MOVED` or `CLOSED`);
    ``network_lock``: how their packets are kept from being answered (`network_lock.MODES`). ``shell_job``: the
    terminal that the process shares with its shell is replaced by that of ``restore``. ``scripts``: what is run at
    which points. ``unix_outside``: datagram sockets that are connected to Unix names outside of the tree are connected
    to the same names at the destination. ``sysv_ipc``: System V semaphores and message queues that the tree uses are
    its own.
    """

    ghost_limit: int = DEFAULT_GHOST_LIMIT
    file_locks: bool = False
    external: frozenset[str] = frozenset()
    connections: str = REFUSED
    network_lock: str = "nftables"
    shell_job: bool = False
    scripts: ActionScripts = field(default_factory=ActionScripts)
    unix_outside: bool = False
    sysv_ipc: bool = False
