"""The network lock: from freeze until the sockets are at the destination, packets of the tree's TCP connections are
dropped rather than answered, and so are new connections to its listening sockets. Their senders try again.
"""

import contextlib
import ipaddress
import secrets
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence

from msgspec import Struct

from postcopy.errors import CannotRun
from postcopy.kernel.nftables import Address, DropTable

_COMMANDS = {"iptables-restore": 4, "ip6tables-restore": 16}  # for addresses of so many bytes
MODES = ("nftables", "iptables", "skip")


class Traffic(Struct, frozen=True):
    """What is to be dropped: connections (local and remote end), and listening sockets (an empty address: any)."""

    connections: Sequence[tuple[Address, Address]]
    listeners: Sequence[Address]

    def __bool__(self) -> bool:
        return bool(self.connections or self.listeners)


class NetworkLock:
    """Nothing is locked until `lock`. With nftables the kernel itself takes the lock away when the last process that
    has it ends; what is made for iptables has to be removed by somebody.

    ``is_locked``: whether there may be something to take away; a process forked before `lock` has to be told.
    ``mark``: packets that carry it (SO_MARK) are let through.
    """

    def __init__(self, mode: str, name: str) -> None:
        """``name`` tells tables and chains of several migrations apart."""
        self._mode = mode
        self._name = name
        self._table: DropTable | None = None
        self._chains: set[str] = set()
        self.is_locked = False
        self.mark = secrets.randbits(31) | 1
        if mode == "nftables":
            with contextlib.suppress(OSError):
                # Now, so that every process forked from here on shares it.
                self._table = DropTable(name)

    def foresee(self, connections: Sequence[tuple[Address, Address]]) -> None:
        """`lock` will most likely be for these, and then take less time."""
        if self._table is not None and connections:
            # Where that fails, so will `lock`.
            with contextlib.suppress(OSError):
                self._table.foresee(connections, self.mark)

    def lock(self, traffic: Traffic) -> None:
        """From now on drop ``traffic`` too. Raises PostcopyError, and then nothing is dropped any more."""
        if not traffic or self._mode == "skip":
            return
        self.is_locked = True
        try:
            if self._mode == "iptables":
                self._lock_by_iptables(traffic)
            elif self._table is None:
                raise OSError("this kernel has no nf_tables")
            else:
                self._table.drop(traffic.connections, traffic.listeners, self.mark)
        except OSError as error:
            self.unlock()
            raise CannotRun(
                f"the network cannot be locked: {error}",
                "choose another way (--network-lock iptables), or none (--network-lock skip): then the peers may "
                "see their connections reset",
            ) from None

    def let_pass(self) -> None:
        """Drop nothing any more from now on; `close` is still to come, which takes longer."""
        if self._table is None or not self.is_locked:
            self.unlock()
            return
        try:
            self._table.let_pass()
        except OSError:
            self.unlock()

    def unlock(self) -> None:
        """Drop nothing any more, whatever other process shares the lock."""
        if not self.is_locked:
            return
        self.is_locked = False
        if self._table is not None:
            with contextlib.suppress(OSError):
                self._table.remove()
        if self._mode == "iptables":
            for command in _COMMANDS:
                for line in ("-D INPUT -j", "-D OUTPUT -j", "-F", "-X"):
                    # One by one: whoever has died may have made only a part of it.
                    with contextlib.suppress(OSError):
                        _feed(command, [f"{line} {self._name}"])

    @property
    def descriptors(self) -> list[int]:
        """What a process must keep open to keep the lock."""
        return [self._table.fileno()] if self._table is not None else []

    def close(self) -> None:
        """`unlock`, and give back what the lock was held with."""
        self.unlock()
        self.leave()

    def leave(self) -> None:
        """Give back what the lock was held with; another process keeps it."""
        self.is_locked = False
        if self._table is not None:
            self._table.close()
            self._table = None

    def _lock_by_iptables(self, traffic: Traffic) -> None:
        chain = self._name
        for command, size in _COMMANDS.items():
            rules = list(_rules(chain, traffic, size))
            if rules and command not in self._chains:
                self._chains.add(command)
                ours = f"-A {chain} -m mark --mark {self.mark} -j ACCEPT"
                rules = [f":{chain} - [0:0]", ours, *rules, f"-I INPUT -j {chain}", f"-I OUTPUT -j {chain}"]
            if rules:
                _feed(command, rules)


def _rules(chain: str, traffic: Traffic, size: int) -> Iterator[str]:
    for local, remote in traffic.connections:
        if len(local[0]) == size:
            for one, other in ((local, remote), (remote, local)):
                ends = f"-s {_text(one)} --sport {one[1]} -d {_text(other)} --dport {other[1]}"
                yield f"-A {chain} -p tcp {ends} -j DROP"
    for address in traffic.listeners:
        if len(address[0]) in (size, 0):
            place = f"-d {_text(address)}" if address[0] else ""
            yield f"-A {chain} -p tcp --syn {place} --dport {address[1]} -j DROP"


def _text(address: Address) -> str:
    return str(ipaddress.ip_address(address[0]))


def _feed(command: str, lines: Iterable[str]) -> None:
    path = shutil.which(command, path="/usr/sbin:/sbin:/usr/bin:/bin")
    if path is None:
        raise OSError(f"the command {command} is missing")
    text = "\n".join(["*filter", *lines, "COMMIT", ""])
    done = subprocess.run([path, "-w", "--noflush"], input=text.encode(), capture_output=True, check=False)
    if done.returncode:
        raise OSError(f"{command}: {done.stderr.decode(errors='replace').strip()}")
