"""The source's side of a migration, from the survey to the end of the source tree. Here is decided what is done when.

The states and messages stand in docs/protocol.md.
"""

import contextlib
import logging
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from postcopy import roles
from postcopy.deadline import Interrupted, deadline, uninterrupted
from postcopy.dump_side import memory, signals, sleepers
from postcopy.dump_side.collect import Sleepers, collect
from postcopy.dump_side.freeze import Frozen
from postcopy.dump_side.guard import Guard
from postcopy.dump_side.page_source import FrozenProcess
from postcopy.dump_side.serve import Board, serve_demand, stream_bulk
from postcopy.dump_side.survey import survey
from postcopy.errors import (
    ConnectionLost,
    DumpError,
    LostAfterCommit,
    PostcopyError,
    ProblemsError,
)
from postcopy.kernel import ptrace
from postcopy.kernel.page import PAGE_SIZE
from postcopy.kernel.sched import scheduling
from postcopy.page_ranges import PageRanges
from postcopy.reporting import Reporter
from postcopy.roles import Role
from postcopy.state import Manifest, Process, Tree
from postcopy.transport import Channels, Listener
from postcopy.wire import control
from postcopy.wire.control import Hello, Kind

log = logging.getLogger("postcopy")

_SPACE = 0
_PROGRESS_SECONDS = 0.2


@dataclass(frozen=True)
class Options:
    """What the user asked for; ``timeout``: seconds from freeze to commit, and without a sign of life."""

    pid: int
    address: str
    port: int
    timeout: float = 10.0


def dump(options: Options, reporter: Reporter, listening: Callable[[], None]) -> None:
    """Hand process ``options.pid`` over to the first destination that comes for it.

    ``listening`` is called once when a destination can connect. Returns when the destination has every page and the
    source process has ended. Raises PostcopyError; before commit the process then runs on as if nothing had happened,
    after it (LostAfterCommit) it stays stopped.
    """
    manifest, _ = survey(options.pid)
    listener = Listener(options.address, options.port)
    try:
        reporter.event("listening", address=options.address, port=listener.port, pid=options.pid, name=manifest.name)
        listening()
        channels, peer = listener.accept(_refusal)
    finally:
        listener.close()
    try:
        channels.limit_silence(options.timeout)
        reporter.event("connected", peer=channels.control.peer, kernel=peer.kernel)
        _Handoff(options, channels, reporter).run()
    finally:
        channels.close()


def _refusal(peer: Hello) -> str | None:
    """Why a destination's host will not do, as far as its greeting tells."""
    mine = Hello("", b"")
    if peer.architecture != mine.architecture:
        return f"this host's architecture is {mine.architecture}, the destination's {peer.architecture}"
    if peer.page_size != mine.page_size:
        return f"this host's page size is {mine.page_size} bytes, the destination's {peer.page_size}"
    if missing := sorted(set(mine.cpu_features) - set(peer.cpu_features)):
        return f"the destination's CPU lacks features that programs here may use: {' '.join(missing)}"
    return None


class _Handoff:
    """One migration to a destination that has connected."""

    def __init__(self, options: Options, channels: Channels, reporter: Reporter) -> None:
        self._options = options
        self._channels = channels
        self._control = channels.control
        self._reporter = reporter
        self._board = Board()
        self._servers: list[Role] = []
        self._standstill = 0
        self._resumed_at = 0
        self._boot_bytes = 0
        self._trusted_pipes: frozenset[int] = frozenset()

    def run(self) -> None:
        """All of it."""
        try:
            manifest, self._trusted_pipes = survey(self._options.pid)
            self._reporter.event("surveyed", files=len(manifest.files))
            self._agree(manifest)
            self._reporter.event("prepared")
            self._move()
        except (ConnectionLost, LostAfterCommit):
            raise
        except (PostcopyError, OSError) as raw:
            error = raw if isinstance(raw, PostcopyError) else DumpError(f"process {self._options.pid}: {raw}")
            with contextlib.suppress(PostcopyError):
                self._control.send(Kind.FAILED, control.Failed(error.message, error.hint))
            raise error from raw
        finally:
            for server in self._servers:
                server.kill()

    def _agree(self, manifest: Manifest) -> None:
        """Let the destination check everything that can be checked before anything is frozen."""
        self._control.send(Kind.MANIFEST, manifest)
        kind, body = self._control.receive({Kind.PREPARED: control.Nothing, Kind.PROBLEMS: control.Problems})
        if kind == Kind.PROBLEMS:
            assert isinstance(body, control.Problems)
            raise ProblemsError(body.problems, "the destination cannot take it")

    def _move(self) -> None:
        frozen = Frozen(self._options.pid)
        guard = Guard(frozen.pidfd)
        smaps = memory.SmapsReader(frozen.pid)
        committed = False
        sleeping = sleepers.observe(frozen.pid)
        # On a busy host, every other process would lengthen the stand-still.
        scheduling(nice=-20)
        try:
            with deadline(self._options.timeout, "the way from freeze to commit"):
                began = time.monotonic_ns()
                frozen.freeze()
                smaps.begin()
                collected = self._hand_over(frozen, smaps, sleeping)
                self._control.expect(Kind.READY, control.Nothing)
                self._reporter.event("ready")
                guard.stopping()
                frozen.stop_durably()
                go = control.Go(signals.late(frozen, collected))
                self._reporter.event("stopped")
                if select.select([self._control], [], [], 0)[0]:
                    # Nothing is due but that the destination has given up: the last moment to hear it.
                    self._control.receive({})
            with uninterrupted():
                # Whoever dies from here on: nobody wakes the tree, since nobody can know whether GO arrived.
                guard.committing()
                committed = True
                frozen.stay_stopped()
                self._control.send(Kind.GO, go)
            self._control.expect(Kind.RESUMED, control.Nothing)
            self._resumed_at = time.monotonic_ns()
            self._standstill = self._resumed_at - began
            self._reporter.event("resumed", standstill_ns=self._standstill)
            statistics = self._serve(frozen)
            self._end(frozen)
            self._tell(statistics)
        except (PostcopyError, OSError) as error:
            if committed:
                raise self._lost(error) from None
            raise
        finally:
            if committed:
                frozen.let_go()
            else:
                frozen.thaw()
            smaps.close()
            guard.dismiss()
            frozen.close()

    def _hand_over(self, frozen: Frozen, smaps: memory.SmapsReader, sleeping: Sleepers) -> Process:
        """Collect and send the state, and start the servers."""
        self._reporter.event("frozen", threads=len(frozen.threads))
        process, pages, needed = collect(frozen, _SPACE, smaps, self._trusted_pipes, sleeping)
        self._reporter.event("collected", vmas=len(process.memory.vmas))
        self._control.send(Kind.STATE, Tree([process], needed))
        content = memory.contents(frozen.memory, pages.sent)
        self._control.send_pages(content)
        self._boot_bytes = len(content)
        # Forked while the destination builds: this costs no stand-still.
        self._start_servers(frozen, pages.lazy)
        self._reporter.event("state", boot_bytes=len(content), lazy_pages=pages.lazy.total_pages)
        return process

    def _start_servers(self, frozen: Frozen, lazy: PageRanges) -> None:
        sources, board = {_SPACE: FrozenProcess(frozen.pid, frozen.memory)}, self._board
        demand, bulk = self._channels.demand.socket, self._channels.bulk.socket

        def demand_body() -> None:
            serve_demand(demand, sources, board)

        def bulk_body() -> None:
            stream_bulk(bulk, {_SPACE: lazy}, sources, board)

        # Each keeps its own connection and the board; the tree dies with none of them.
        self._servers = [
            roles.start("postcopy-demand", demand_body, dies_with_parent=True),
            roles.start("postcopy-bulk", bulk_body, dies_with_parent=True),
        ]
        self._lazy_pages = lazy.total_pages

    def _serve(self, frozen: Frozen) -> control.Drained:
        """Watch over the servers, and over the stop, until the destination says that it has every page."""
        poll = select.poll()
        poll.register(self._control.fileno(), select.POLLIN)
        while True:
            if poll.poll(_PROGRESS_SECONDS * 1000):
                return self._control.expect(Kind.DRAINED, control.Drained)
            for server in self._servers:
                if server.ended_badly():
                    raise ConnectionLost(f"{server.name} ended before the destination had every page")
            frozen.stay_stopped()
            sent = self._board.demand_bytes + self._board.bulk_bytes
            self._reporter.event(
                "progress",
                pages_left=max(self._lazy_pages - sent // PAGE_SIZE, 0),
                faults=self._board.demand_requests,
                bytes_demand=self._board.demand_bytes,
                bytes_bulk=self._board.bulk_bytes,
            )

    def _end(self, frozen: Frozen) -> None:
        """The destination has everything: the source tree is of no more use."""
        self._reporter.event("drained")
        for server in self._servers:
            server.kill()
        self._servers = []
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(frozen.pidfd, signal.SIGKILL)
        # As tracer we are told of each thread's end before its parent is; the leader's comes last.
        for thread in (*frozen.threads[1:], frozen.threads[0]):
            with contextlib.suppress(ChildProcessError):
                while ptrace.wait(thread.tid).ended is None:
                    pass
        frozen.threads = []
        self._reporter.event("killed", pid=frozen.pid)

    def _tell(self, drained: control.Drained) -> None:
        self._reporter.event(
            "statistics",
            standstill_ns=self._standstill,
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

    def _lost(self, error: PostcopyError | OSError) -> LostAfterCommit:
        pid = self._options.pid
        if isinstance(error, Interrupted):
            what = "dump was ended while it was serving the program's memory"
        else:
            what = f"lost the destination after commit: {error}"
        return LostAfterCommit(
            f"{what}; process {pid} stays stopped here, with all its memory as it was at the hand-over",
            f"only if it is certain that it does not run at the destination: kill -CONT {pid}",
        )
