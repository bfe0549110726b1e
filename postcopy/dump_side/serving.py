"""Serving a checkpoint directory to other hosts, to any number of them, at once and again."""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

from msgspec import Struct

from postcopy import roles
from postcopy.checkpoint.reader import Checkpoint
from postcopy.deadline import Interrupted
from postcopy.dump_side.giving import Giving, unfit
from postcopy.dump_side.sent_pages import PageReader
from postcopy.errors import ConnectionLost, PostcopyError
from postcopy.page_ranges import PageRanges
from postcopy.reporting import Reporter, Silent
from postcopy.roles import Role
from postcopy.spaces import filled_first, huge_areas
from postcopy.state import Draft
from postcopy.transport import Channels, Listener
from postcopy.wire import control

log = logging.getLogger("postcopy")


class Options(Struct, frozen=True):
    """Where to listen; ``timeout``: seconds without a sign of life after which a destination is given up."""

    address: str
    port: int
    timeout: float = 10.0


class _Customers(Struct):
    """The processes that serve one destination each."""

    roles: list[Role] = []

    def reap(self) -> None:
        """Give up what is left of those that have come to their end."""
        for role in [role for role in self.roles if role.has_ended()]:
            role.wait()
            self.roles.remove(role)

    def end(self) -> None:
        for role in self.roles:
            role.kill()


class _Named(Struct, frozen=True):
    """A reporter that says of whom it speaks."""

    reporter: Reporter
    peer: str

    def event(self, name: str, /, **fields: Any) -> None:
        self.reporter.event(name, **{"peer": self.peer, **fields})


def serve(checkpoint: Checkpoint, options: Options, reporter: Reporter, listening: Callable[[], None]) -> None:
    """Give ``checkpoint`` to every destination that comes for it, until a signal ends it. Raises PostcopyError."""
    customers = _Customers()
    manifest = checkpoint.manifest
    with contextlib.closing(Listener(options.address, options.port)) as listener:
        try:
            reporter.event("serving", address=options.address, port=listener.port, pid=manifest.pid, name=manifest.name)
            listening()
            while True:
                channels, peer = listener.accept(unfit, customers.reap)
                channels.limit_silence(options.timeout)
                named = _Named(reporter, channels.control.peer)
                named.event("connected", kernel=peer.kernel)

                def body(channels: Channels = channels, named: _Named = named) -> None:
                    listener.close()
                    give(checkpoint, checkpoint.plan(), channels, named, options.timeout)

                customers.roles.append(roles.start("postcopy-serve", body, dies_with_parent=True))
                channels.close()
        except Interrupted as end:
            log.info("%s", end)
        finally:
            customers.end()


def give_here(checkpoint: Checkpoint, lazy: bool) -> tuple[Channels, Role]:
    """The destination's channels to a process on this host that gives ``checkpoint``; its pages too where ``lazy``.

    That process is nobody's child; what has started it ends at once and is to be waited for when there is time.
    """
    here, there = Channels.pair("restore", "the server of the checkpoint")

    def body() -> None:
        here.close()
        roles.leave_output(but_logs=True)
        try:
            give(checkpoint, checkpoint.plan() if lazy else {}, there, Silent())
        except PostcopyError as error:
            log.debug("serving the checkpoint here: %s", error)

    def start() -> None:
        # It serves the daemon, which stays when `restore -d` has ended; it ends with the connection.
        roles.start("postcopy-serve", body, dies_with_parent=False)

    # Not a child of ours: nobody would wait for it.
    between = roles.start("postcopy-serve", start, dies_with_parent=True)
    there.close()
    return here, between


def give(
    checkpoint: Checkpoint,
    plan: dict[int, PageRanges],
    channels: Channels,
    reporter: Reporter,
    timeout: float | None = None,
) -> None:
    """Give a checkpoint to one destination, ``plan`` of its pages by the page protocol. Raises PostcopyError."""
    giving = Giving(channels, reporter, timeout)
    try:
        has_state = giving.agree(checkpoint.manifest, checkpoint.tree.clocks, checkpoint.id)
        first = filled_first(checkpoint.tree)
        pushed = {space: pages for space, pages in plan.items() if space not in first}
        if not has_state:
            giving.send_draft(Draft())
        with giving.in_time("waiting for the destination to build the tree"):
            if not has_state:
                giving.send_tree(checkpoint.tree, PageReader(checkpoint.sources, {}))
            giving.start_servers(pushed, checkpoint.sources, huge_areas(checkpoint.tree))
            giving.await_ready()
        giving.go(control.Go(checkpoint.tree.late_signals))
        giving.await_resumed()
        giving.tell(giving.await_drained())
    except ConnectionLost:
        raise
    except PostcopyError as error:
        giving.fail(error)
        raise
    finally:
        giving.end()
        channels.close()
