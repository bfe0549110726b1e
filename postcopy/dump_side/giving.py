"""Giving a tree to one destination: the source's half of the conversation, wherever state and pages come from."""

import contextlib
import select
import time
from collections.abc import Callable, Mapping

from postcopy import roles
from postcopy.deadline import deadline
from postcopy.drafts import shorten, shorten_process
from postcopy.dump_side.sent_pages import PageReader
from postcopy.dump_side.serve import Board, serve_demand, stream_bulk
from postcopy.errors import ConnectionLost, PostcopyError, ProblemsError
from postcopy.huge_pages import HugeAreas
from postcopy.kernel.page import PAGE_SIZE
from postcopy.kernel.poll import readable
from postcopy.page_ranges import PageRanges
from postcopy.printable import printable
from postcopy.reporting import Reporter
from postcopy.roles import Role
from postcopy.sent_pages import PageSource
from postcopy.socket_kinds import SocketChange
from postcopy.spaces import Space, space_of, spaces_shared
from postcopy.state import Clocks, Draft, FileIdentity, Manifest, Process, Sketch, Tree
from postcopy.transport import Channels
from postcopy.wire import control
from postcopy.wire.control import Hello, Kind

_PROGRESS_MS = 200
# The control channel says more of a failure than the one on which it is met.
_LAST_WORD_SECONDS = 2.0


def unfit(peer: Hello) -> str | None:
    """Why a destination's host will not do, as far as its greeting tells."""
    mine = Hello("", b"")
    if peer.architecture != mine.architecture:
        return f"this host's architecture is {mine.architecture}, the destination's {peer.architecture}"
    if peer.page_size != mine.page_size:
        return f"this host's page size is {mine.page_size} bytes, the destination's {peer.page_size}"
    if missing := sorted(set(mine.cpu_features) - set(peer.cpu_features)):
        return f"the destination's CPU lacks features that programs here may use: {' '.join(missing)}"
    return None


class Giving:
    """One destination that has connected. The steps are called in the order in which they stand here."""

    def __init__(self, channels: Channels, reporter: Reporter, timeout: float | None = None) -> None:
        """``timeout``: seconds for each answer before commit; None: a destination on this host has all the time."""
        self._timeout = timeout
        self._channels = channels
        self._reporter = reporter
        self._board = Board()
        self._servers: list[Role] = []
        self._lazy_pages = 0
        self._boot_bytes = 0
        self._resumed_at = 0
        self._draft = Draft()
        self._sketches: dict[int, Sketch] = {}
        self._announced: list[FileIdentity] = []
        self.control = channels.control

    def agree(self, manifest: Manifest, clocks: Clocks, checkpoint: bytes = b"") -> bool:
        """Let the destination check everything that can be checked; whether it has the state of ``checkpoint``."""
        with self.in_time("waiting for the destination to prepare"):
            self._announced = manifest.files
            self.control.send(Kind.MANIFEST, control.Offer(manifest, clocks, checkpoint))
            _, body = self.control.receive({Kind.PREPARED: control.Prepared, Kind.PROBLEMS: control.Problems})
        if isinstance(body, control.Problems):
            raise ProblemsError([printable(each) for each in body.problems], "the destination cannot take it")
        assert isinstance(body, control.Prepared)
        self._reporter.event("prepared")
        return body.has_state

    def send_draft(self, draft: Draft) -> None:
        """What the tree is seen to be, and will most likely be: the destination begins with that, while it runs."""
        self._draft = draft
        self._sketches = {sketch.pid: sketch for sketch in draft.processes}
        with self.in_time("waiting for the destination to begin with the tree"):
            self.control.send(Kind.DRAFT, draft)
            self.control.expect(Kind.DRAFTED, control.Nothing)
        self._reporter.event("drafted", processes=len(draft.processes))

    def send_tree(self, tree: Tree, reader: PageReader) -> None:
        """All of a tree, and the pages that travel with its state."""
        for process in tree.processes:
            self.send_process(process, reader)
        self.send_state(tree, reader)

    def send_process(self, process: Process, reader: PageReader) -> None:
        """A process, before what else there is of its tree; its pages are read while the destination looks at it."""
        self.control.send(Kind.PROCESS, shorten_process(process, self._sketches.get(process.pid)))
        self._send_pages(space_of(process), reader)

    def send_state(self, tree: Tree, reader: PageReader) -> None:
        """What there is of a tree beside its processes, which have been sent in their order."""
        self.control.send(Kind.STATE, shorten(tree, self._draft, self._announced))
        for space in spaces_shared(tree):
            self._send_pages(space, reader)

    def _send_pages(self, space: Space, reader: PageReader) -> None:
        piece = reader.read(space)
        self.control.send_pages(piece.places, piece.content)
        self._boot_bytes += len(piece.content)

    def start_servers(
        self, plan: Mapping[int, PageRanges], sources: Mapping[int, PageSource], huge: Mapping[int, HugeAreas]
    ) -> None:
        """Fork the demand server and the bulk streamer of the pages of ``plan``, by address space."""
        demand, bulk, board = self._channels.demand.socket, self._channels.bulk.socket, self._board

        def demand_body() -> None:
            serve_demand(demand, sources, board, plan, huge)

        def bulk_body() -> None:
            stream_bulk(bulk, plan, sources, board, huge)

        # Each keeps its own connection and the board; the tree dies with none of them.
        self._servers = [
            roles.start("postcopy-demand", demand_body, dies_with_parent=True),
            roles.start("postcopy-bulk", bulk_body, dies_with_parent=True),
        ]
        self._lazy_pages = sum(ranges.total_pages for ranges in plan.values())
        self._reporter.event("state", boot_bytes=self._boot_bytes, lazy_pages=self._lazy_pages)

    def await_ready(self) -> None:
        """Until the tree has been built. Raises ConnectionLost too when a server has ended by then."""
        poll = select.poll()
        for fd in (self.control.fileno(), *(server.pidfd for server in self._servers)):
            poll.register(fd, select.POLLIN)
        while self.control.fileno() not in (ready := {fd for fd, _ in poll.poll()}):
            if not readable(self.control, _LAST_WORD_SECONDS):
                self._check_servers()
            for fd in ready:
                poll.unregister(fd)
        self.control.expect(Kind.READY, control.Nothing)
        self._check_servers()
        self._reporter.event("ready")

    def change(self, sockets: list[SocketChange]) -> None:
        """Have the destination change that, and be ready again."""
        if sockets:
            self.control.send(Kind.CHANGES, control.Changes(sockets))
            self.await_ready()

    def _check_servers(self) -> None:
        """What a destination can do to them before commit must not cost the tree."""
        for server in self._servers:
            if server.ended_badly():
                raise ConnectionLost(f"{server.name} ended before the destination was ready")

    def in_time(self, what: str) -> contextlib.AbstractContextManager[None]:
        """A deadline on what the destination has to do before commit."""
        return deadline(self._timeout, what) if self._timeout else contextlib.nullcontext()

    def go(self, order: control.Go) -> None:
        """Commit: whether it arrives or not, the tree is no longer ours to run."""
        self.control.send(Kind.GO, order)

    def await_resumed(self, began: int = 0) -> None:
        """Until the tree runs there. ``began``: the monotonic clock's ns at the freeze, where there was one."""
        # However long it takes: the tree is no longer ours to run.
        poll = select.poll()
        poll.register(self.control.fileno(), select.POLLIN)
        poll.poll()
        self.control.expect(Kind.RESUMED, control.Nothing)
        self._resumed_at = time.monotonic_ns()
        self._standstill = {"standstill_ns": self._resumed_at - began} if began else {}
        self._reporter.event("resumed", **self._standstill)

    def await_drained(self, watch: Callable[[], object] = lambda: None) -> control.Drained:
        """Watch over the servers until the destination says that it has every page; ``watch`` is called meanwhile."""
        poll = select.poll()
        for fd in (self.control.fileno(), *(server.pidfd for server in self._servers)):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(_PROGRESS_MS)}
            if self.control.fileno() in ready:
                drained = self.control.expect(Kind.DRAINED, control.Drained)
                self._reporter.event("drained")
                return drained
            for server in self._servers:
                if server.pidfd in ready:
                    if server.ended_badly() and not readable(self.control, _LAST_WORD_SECONDS):
                        raise ConnectionLost(f"{server.name} ended before the destination had every page")
                    poll.unregister(server.pidfd)
            watch()
            sent = self._board.demand_bytes + self._board.bulk_bytes + self._board.spared_bytes
            self._reporter.event(
                "progress",
                pages_left=max(self._lazy_pages - sent // PAGE_SIZE, 0),
                faults=self._board.demand_requests,
                bytes_demand=self._board.demand_bytes,
                bytes_bulk=self._board.bulk_bytes,
            )

    def tell(self, drained: control.Drained) -> None:
        """The statistics."""
        self._reporter.event(
            "statistics",
            **self._standstill,
            drain_ns=time.monotonic_ns() - self._resumed_at,
            faults=drained.faults,
            fault_p50_ns=drained.fault_p50,
            fault_p99_ns=drained.fault_p99,
            fault_max_ns=drained.fault_max,
            bytes_boot=self._boot_bytes,
            bytes_demand=drained.bytes_demand,
            bytes_bulk=drained.bytes_bulk,
            bytes_zero=drained.bytes_zero,
        )

    def fail(self, error: PostcopyError) -> None:
        """Tell the destination why nothing will come of it, if it can still hear."""
        with contextlib.suppress(PostcopyError):
            self.control.send(Kind.FAILED, control.Failed(error.message, error.hint))

    def end(self) -> None:
        """End the servers; the channels are the caller's."""
        for server in self._servers:
            server.kill()
        self._servers = []
