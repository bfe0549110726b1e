"""The destination's side of a migration, from the first connection to the end of the program.

The states and messages stand in docs/protocol.md.
"""

import contextlib
import gc
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType

import msgpack
from msgspec import Struct, field

from postcopy import roles, soundness
from postcopy.action_scripts import Action, ActionScripts
from postcopy.checkpoint.reader import Checkpoint
from postcopy.deadline import deadline, disregard_signals, uninterrupted
from postcopy.drafts import ProcessState, State
from postcopy.errors import (
    ConnectionLost,
    LostAfterCommit,
    PostcopyError,
    ProblemsError,
    RestoreError,
)
from postcopy.kernel.limits import allow_descriptors
from postcopy.kernel.poll import readable
from postcopy.kernel.sched import scheduling
from postcopy.page_ranges import PageRanges
from postcopy.reporting import Reporter
from postcopy.restore_side import eager, ptys, socket_changes
from postcopy.restore_side import manifest as manifests
from postcopy.restore_side.arrival import Arrival
from postcopy.restore_side.birth import Newborn, give_birth, kill, take_back
from postcopy.restore_side.clocks import ProgramClocks
from postcopy.restore_side.fault_handler import Background, HandedSpace
from postcopy.restore_side.handover import Handover
from postcopy.restore_side.ipc import IpcObjects
from postcopy.restore_side.job import ShellJob
from postcopy.restore_side.leftovers import Leftovers
from postcopy.restore_side.network import Network
from postcopy.restore_side.offspring import Family
from postcopy.restore_side.own import check_privileges
from postcopy.restore_side.pid_namespace import PidNamespace
from postcopy.restore_side.root import HERE, Root
from postcopy.restore_side.shared_filling import HandedObject
from postcopy.restore_side.shared_memory import SharedObjects
from postcopy.restore_side.tree import Begun, BuiltTree, build_tree
from postcopy.restore_side.watchdog import COMMITTED, RESUMED, TAKING_ADDRESSES, Watchdog
from postcopy.roles import Role
from postcopy.state import Draft, FileIdentity, Tree, prepare_to_decode
from postcopy.transport import DEFAULT_PORT, Channels, connect
from postcopy.turns import by_turns
from postcopy.wire import control
from postcopy.wire.control import Kind

log = logging.getLogger("postcopy")

_NEWS_SIZE = 65536
_LAST_WORD_SECONDS = 1.0
# Processes that are busy on their own while the next ones arrive.
_AT_ONCE = 2


class Options(Struct, frozen=True):
    """What the user asked for. ``timeout``: seconds from the state's arrival to commit, and without a sign of life;
    ``patience``: seconds to wait for the source to listen. ``inherited``: descriptors of ours, by the external resource
    whose place each is to take; those above 2 are closed here. ``root``: what takes the place of ``/`` for the tree."""

    address: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    timeout: float = 10.0
    patience: float = 30.0
    lazy: bool = True
    detach: bool = False
    pidfile: Path | None = None
    new_pid_namespace: bool = False
    inherited: Mapping[str, int] = {}
    network_lock: str = "nftables"
    shell_job: bool = False
    scripts: ActionScripts = field(default_factory=ActionScripts)
    background: Background = field(default_factory=Background)
    root: Root = HERE


def restore(
    options: Options,
    reporter: Reporter,
    running: Callable[[], None],
    checkpoint: Checkpoint | None = None,
    channels: Channels | None = None,
) -> int:
    """Take a process tree over; the exit status of its root.

    The source is at ``options.address``, unless there are ``channels`` to one already. Where there is a ``checkpoint``
    the state comes from there, and all pages too without ``lazy``. ``running`` is called once when the tree runs here.
    With ``detach``, returns 0 right after that. Raises PostcopyError; before commit nothing is then left here and the
    program runs on at the source.
    """
    check_privileges()
    allow_descriptors()
    if channels is None:
        channels, peer = connect(options.address, options.port, options.patience)
        channels.limit_silence(options.timeout)
        reporter.event("connected", peer=channels.control.peer, kernel=peer.kernel)
    takeover = _Takeover(options, channels, reporter, checkpoint)
    try:
        takeover.prepare()
        takeover.build()
    except BaseException as error:
        takeover.undo()
        if isinstance(error, OSError):
            error = RestoreError(str(error))
        if isinstance(error, PostcopyError) and not isinstance(error, ConnectionLost):
            with contextlib.suppress(PostcopyError):
                channels.control.send(Kind.FAILED, control.Failed(error.message, error.hint))
        raise error from None
    takeover.resume(running)
    if options.detach:
        return 0
    return takeover.stay()


def _warm_up() -> None:
    """While the source freezes its tree: what would otherwise take milliseconds when its state arrives."""
    # Forks have made our own memory copy-on-write; this touches most of it.
    gc.collect()
    prepare_to_decode(ProcessState)
    prepare_to_decode(State)
    soundness.prepare()


class _Takeover:
    """One migration to this host."""

    def __init__(self, options: Options, channels: Channels, reporter: Reporter, checkpoint: Checkpoint | None) -> None:
        self._options = options
        self._channels = channels
        self._reporter = reporter
        self._checkpoint = checkpoint
        self._namespace: PidNamespace | None = None
        self._newborn: Newborn | None = None
        self._newborns: dict[int, Newborn] = {}
        self._draft = Draft()
        self._settled: list[FileIdentity] = []
        self._begun: Begun | None = None
        self._built: BuiltTree | None = None
        self._leftovers = Leftovers(options.root)
        self._shared = SharedObjects(self._leftovers)
        self._numbered = IpcObjects(self._leftovers)
        self._inherited: Mapping[str, int] = {}
        self._network: Network | None = None
        self._watchdog: Role | None = None
        self._orders = -1
        self._news: socket.socket | None = None
        self._resumed_at = 0
        self._boot_bytes = 0
        self._drained = False
        self._lazy_pages = 0
        self._go = control.Go([])
        self._terminal_settings = b""

    # -- before commit ------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Check the manifest and make what can be made before the tree is frozen. Raises ProblemsError."""
        if self._options.lazy:
            # Every other process would lengthen the stand-still, and first of all those that we are about to fork.
            scheduling(nice=-20)
        if self._checkpoint is None:
            offer = self._receive_offer()
            manifest, self._clocks = offer.manifest, ProgramClocks(offer.clocks)
        else:
            manifest, self._clocks = self._checkpoint.manifest, ProgramClocks(self._checkpoint.tree.clocks)
        self._manifest = manifest
        if problems := manifests.problems(
            manifest,
            self._options.new_pid_namespace,
            self._options.inherited,
            self._options.shell_job,
            self._options.root,
        ):
            if self._checkpoint is not None:
                # Unread, it would make a reset of our end, and the reasons be lost.
                self._receive_offer()
            self._channels.control.send(Kind.PROBLEMS, control.Problems(problems))
            raise ProblemsError(problems, f"process {manifest.pid} ({manifest.name}) cannot be restored here")
        with self._options.root.entered():
            self._settled = manifests.settled(manifest.files)
        self._reporter.event("checked", pid=manifest.pid, name=manifest.name)
        if self._options.new_pid_namespace:
            self._namespace = PidNamespace(self._options.root)
        with self._options.root.entered():
            self._inherited = {**self._options.inherited, **ptys.make(manifest.ptys)}
        for fd in self._inherited.values():
            os.set_inheritable(fd, True)
        self._newborn = self._give_birth()
        # It has them now: were they open here too, nobody would be told when it closes them.
        for fd in {fd for fd in self._inherited.values() if fd > 2}:
            os.close(fd)
        self._start_watchdog()
        self._reporter.event("born", pid=self._newborn.pid)
        if self._checkpoint is not None and self._receive_offer().checkpoint != self._checkpoint.id:
            raise RestoreError(
                f"the source at {self._channels.control.peer} does not serve the pages of this checkpoint",
                "name the address and port of the dump that wrote it, which must still run",
            )
        self._channels.control.send(Kind.PREPARED, control.Prepared(has_state=self._checkpoint is not None))
        if self._checkpoint is None:
            self._draft = self._receive_draft()

    def _give_birth(self) -> Newborn:
        """Make the root of the tree."""
        if self._namespace:
            self._namespace.enter()
        try:
            mounts = self._namespace.mount_namespace if self._namespace else None
            with self._clocks.namespace():
                return give_birth(self._manifest.pid, mounts, self._manifest.init, self._options.root)
        finally:
            if self._namespace:
                self._namespace.leave()

    def _receive_draft(self) -> Draft:
        """Begin with what the tree is seen to be, while it runs at the source."""
        with deadline(self._options.timeout, "waiting for the source to look at the process"):
            draft = self._channels.control.expect(Kind.DRAFT, Draft)
        soundness.check_message("draft", draft)
        # What was given here for external resources only the first root has inherited.
        if draft.processes and not self._inherited:
            with self._deadline():
                self._begin(draft)
        self._channels.control.send(Kind.DRAFTED)
        return draft

    def _begin(self, draft: Draft) -> None:
        """What is begun in vain costs nothing but time: the tree itself will not be as it was drafted."""
        assert self._newborn is not None
        try:
            self._begun = Begun(Family.of(draft), self._newborn, self._newborns, self._inherited)
            self._begun.lay_out(draft)
        except (OSError, ValueError, RestoreError) as reason:
            log.info("what was to be prepared of the tree cannot be: %s", reason)
            self._begin_anew()

    def _begin_anew(self) -> None:
        """Nothing but a root."""
        assert self._newborn is not None
        begun = {**self._newborns, self._newborn.number: self._newborn}
        if self._begun is not None:
            self._begun.give_up()
        self._newborns.clear()
        self._begun, self._newborn = None, None
        take_back(list(begun.values()))
        self._newborn = self._give_birth()

    def _receive_offer(self) -> control.Offer:
        with deadline(self._options.timeout, "waiting for the source to look at the process"):
            offer = self._channels.control.expect(Kind.MANIFEST, control.Offer)
        soundness.check_message("offer", offer)
        return offer

    def build(self) -> None:
        """Take the state, build the tree, start the daemon, and wait for GO."""
        if self._options.lazy:
            # Looking for garbage would lengthen the stand-still.
            gc.disable()
        if self._checkpoint is not None:
            tree, pages = self._checkpoint.tree, self._checkpoint.sent_content()
        else:
            _warm_up()
            arrival = Arrival(self._channels.control, self._draft, self._manifest)
            with deadline(self._options.timeout, "waiting for the state of the process"):
                by_turns(self._beginnings(arrival), _AT_ONCE)
            tree, pages = arrival.tree, arrival.pages
        self._reporter.event("received", boot_bytes=pages.content.size)
        self._stopped_at = tree.clocks
        streams = [each.stream for each in tree.descriptors.descriptions if each.stream]
        self._terminal_settings = next((stream.settings for stream in streams if stream.settings), b"")
        with self._deadline():
            # What the source still says was looked at a moment ago; most of it is the same object, too.
            seen, same = set(self._settled), set(map(id, self._settled))
            fresh = [file for file in tree.files if id(file) not in same and file not in seen]
            with self._options.root.entered():
                problems = list(manifests.files(fresh, frozen=True))
            if problems:
                raise RestoreError("; ".join(problems))
            assert self._newborn is not None
            self._run_scripts(Action.PRE_RESTORE)
            self._network = Network(tree, self._options.network_lock, self._options.root)
            self._network.prepare(self._leftovers)
            begun = self._begun_for(tree)
            self._built = build_tree(
                tree,
                pages,
                begun,
                self._shared,
                self._numbered,
                self._parent_stays,
                self._options.root,
                self._network.await_lock,
            )
            pages.content.close()
            self._network.complete(self._pidfds())
            self._boot_bytes = pages.content.size
            self._hand_over(self._built)
            threads = sum(len(process.threads) for process in tree.processes)
            self._reporter.event("built", pid=self._newborn.pid, processes=len(tree.processes), threads=threads)
            self._check_daemon()
            self._run_scripts(Action.POST_RESTORE)
            self._channels.control.send(Kind.READY)
            # While the source does its last.
            self._network.hold(self._pidfds())
            self._go = self._await_go()

    def _beginnings(self, arrival: Arrival) -> Iterator[Iterator[None]]:
        """Begin with each process that arrives, where that can be done while the source collects the next ones."""
        for process, pages in arrival.processes():
            if self._begun is None or self._options.scripts.paths or not self._begun.can_begin(process):
                continue
            yield self._begun.begin(process, pages, self._shared, self._parent_stays)

    @property
    def _parent_stays(self) -> bool:
        return not self._options.detach

    def _begun_for(self, tree: Tree) -> Begun:
        """What has been begun of the tree, if it is of the family that was drafted; else it is begun now."""
        family = Family.of(tree)
        if self._begun is not None and self._begun.family != family:
            self._begin_anew()
        assert self._newborn is not None
        return self._begun or Begun(family, self._newborn, self._newborns, self._inherited)

    def _run_scripts(self, action: Action) -> None:
        """Before commit: what they fail at fails the restore, and the watchdog undoes what they have done."""
        assert self._newborn is not None
        if self._options.scripts.paths:
            os.write(self._orders, TAKING_ADDRESSES)
            self._options.scripts.run(action, self._newborn.pid)

    def _pidfds(self) -> dict[int, int]:
        """Of the processes that have been built, by the PIDs that they have in the state."""
        assert self._built is not None
        return {each.state.pid: each.newborn.pidfd for each in self._built.processes}

    def _deadline(self) -> contextlib.AbstractContextManager[None]:
        """No tree stands still while all of its memory is filled from a directory."""
        return deadline(self._options.timeout, "building the tree") if self._options.lazy else contextlib.nullcontext()

    def _await_go(self) -> control.Go:
        assert self._watchdog is not None
        order = self._await_order({Kind.GO: control.Go, Kind.CHANGES: control.Changes})
        if isinstance(order, control.Changes):
            socket_changes.apply(order.sockets, self._pidfds())
            self._channels.control.send(Kind.READY)
            order = self._await_order({Kind.GO: control.Go})
        assert isinstance(order, control.Go)
        return order

    def _await_order(self, bodies: dict[Kind, type]) -> object:
        assert self._watchdog is not None
        select.select([self._watchdog.pidfd, self._channels.control.fileno()], [], [])
        self._check_daemon()
        _, order = self._channels.control.receive(bodies)
        soundness.check_message("order", order)
        return order

    def _check_daemon(self) -> None:
        assert self._watchdog is not None
        if readable(self._watchdog.pidfd):
            # Where it ended because the source has failed, that is about to be told, with the reason.
            with contextlib.suppress(ConnectionLost):
                if readable(self._channels.control, _LAST_WORD_SECONDS):
                    self._channels.control.receive({})
            raise RestoreError("the daemon that would fetch the program's memory has died")

    def _start_watchdog(self) -> None:
        """Fork the daemon, before there is anything to guard: this costs no stand-still."""
        assert self._newborn is not None
        orders_read, self._orders = os.pipe()
        self._handovers, watchdogs_handovers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._news, watchdogs_news = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        watchdog = Watchdog(
            channels=self._channels,
            background=self._options.background,
            orders=orders_read,
            handovers=watchdogs_handovers,
            news=watchdogs_news,
            namespace_init=self._namespace.pidfd if self._namespace else None,
            detached=self._options.detach,
            leftovers=self._leftovers,
            scripts=self._options.scripts,
            program=self._newborn.pid,
        )

        def body() -> None:
            os.close(self._orders)
            self._handovers.close()
            watchdog.run()

        self._watchdog = roles.start("postcopy-watch", body, dies_with_parent=False)
        os.close(orders_read)
        watchdogs_handovers.close()
        watchdogs_news.close()
        self._channels.demand.close()
        self._channels.bulk.close()

    def _to_fill(self, built: BuiltTree) -> tuple[list[HandedSpace], list[HandedObject]]:
        """What is left to fill once the tree has been built."""
        spaces, objects = built.spaces(), self._shared.to_fill()
        if self._options.lazy:
            return spaces, objects
        assert self._checkpoint is not None
        eager.fill(self._checkpoint, spaces, objects)
        self._reporter.event("filled", pages=_pages(each.lazy for each in spaces) + _pages(o.lazy for o in objects))
        return [HandedSpace(each.space, each.uffd, PageRanges()) for each in spaces], []

    def _hand_over(self, built: BuiltTree) -> None:
        """Give the built tree to the daemon; from here on that alone keeps its memory waiting for pages."""
        spaces, objects = self._to_fill(built)
        first = _pages(each.lazy for each in objects if each.first)
        self._lazy_pages = _pages(each.lazy for each in spaces) + _pages(each.lazy for each in objects) - first
        Handover(spaces, objects, [(each.pid, each.newborn.pidfd) for each in built.processes]).send(self._handovers)
        built.close_userfaultfds()
        if first:
            self._await_first(first)
        self._shared.finish()
        self._numbered.finish()

    def _await_first(self, pages: int) -> None:
        """Until the daemon has filled what the tree needs whole."""
        assert self._news is not None
        assert self._watchdog is not None
        news, control_fd = self._news.fileno(), self._channels.control.fileno()
        event = ""
        while event != "filled first":
            ready, _, _ = select.select([news, control_fd, self._watchdog.pidfd], [], [])
            if control_fd in ready:
                # Nothing is due there but the reason why no pages come.
                self._channels.control.receive({})
            if news not in ready:
                self._check_daemon()
                continue
            report = msgpack.unpackb(self._news.recv(_NEWS_SIZE) or msgpack.packb({"event": "lost"}))
            event = report["event"]
            if event == "lost":
                raise RestoreError(f"the program's shared memory cannot be filled: {report.get('reason', 'no reason')}")
        self._reporter.event("filled", pages=pages)

    def undo(self) -> None:
        """Leave nothing here."""
        if self._newborn is not None:
            kill({**self._newborns, self._newborn.number: self._newborn}.values())
        if self._watchdog is not None:
            os.close(self._orders)
            self._watchdog.wait()
        if self._network is not None:
            self._network.give_up()
        self._shared.undo()
        self._numbered.undo()
        self._leftovers.cleared()
        if self._namespace is not None:
            self._namespace.kill()

    # -- commit and after ---------------------------------------------------------------------------------------------

    def resume(self, running: Callable[[], None]) -> None:
        """GO has arrived: only this host may run the tree now."""
        assert self._built is not None
        with uninterrupted():
            try:
                os.write(self._orders, COMMITTED)
            except BrokenPipeError:
                self.undo()
                raise LostAfterCommit(
                    "the daemon that fetches the program's memory died at commit: the program was never resumed here",
                    self._where_it_is,
                ) from None
            if self._namespace:
                self._namespace.entrust(self._built.root.state.pid)
            self._job = ShellJob(self._built.root, self._terminal_settings)
            self._job.lend()
            scripts, pid = self._options.scripts, self._built.root.pid
            scripts.report(Action.NETWORK_UNLOCK, pid)
            if self._network is not None:
                self._network.settle()
            scripts.report(Action.PRE_RESUME, pid)
            self._clocks.wait_for(self._stopped_at)
            self._built.resume(self._go.signals)
            self._job.show()
            self._resumed_at = time.monotonic_ns()
            # From here on the watchdog speaks for this host, so that RESUMED comes before DRAINED.
            os.write(self._orders, RESUMED)
            # The program's faults come first now, which other processes answer.
            scheduling()
            # Before anybody is told that the program runs: who ends us from here on means the program.
            self._leave_signals_to_the_program()
        self._channels.control.close()
        gc.enable()
        if self._options.pidfile:
            try:
                self._options.pidfile.write_text(f"{pid}\n")
            except OSError as error:
                log.error("the program runs, but its PID cannot be written to %s: %s", error.filename, error.strerror)
        running()
        self._reporter.event("running", pid=pid, lazy_pages=self._lazy_pages)
        if self._network is not None:
            # The program comes first now, with those that answer its faults.
            scheduling(nice=10)
            try:
                self._network.close()
            finally:
                scheduling()
        scripts.report(Action.POST_RESUME, pid)

    def _leave_signals_to_the_program(self) -> None:
        if self._options.detach:
            disregard_signals()
            return
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._pass_on)
        # A terminal's Ctrl-C goes to the program too, and it is the program's to decide about.
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd(), number)

    def stay(self) -> int:
        """Be the tree's parent until its root ends; the exit status of the root, as a shell would give it."""
        assert self._built is not None and self._news is not None
        with _told_of_children() as children:
            return self._stay(children)

    def _stay(self, children: socket.socket) -> int:
        assert self._built is not None and self._news is not None
        poll = select.poll()
        poll.register(children, select.POLLIN)
        poll.register(self._pidfd(), select.POLLIN)
        poll.register(self._news.fileno(), select.POLLIN)
        lost = ""
        watching = True
        self._job.follow()
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if children.fileno() in ready:
                children.recv(_NEWS_SIZE)
                self._job.follow()
            if watching and self._news.fileno() in ready:
                content = self._news.recv(_NEWS_SIZE)
                if content:
                    lost = self._hear(msgpack.unpackb(content)) or lost
                else:
                    poll.unregister(self._news.fileno())
                    watching = False
                    lost = lost or self._silence()
                    if self._watchdog:
                        self._watchdog.wait()
                continue
            if self._pidfd() in ready:
                break
        _, status = os.waitpid(self._built.root.pid, 0)
        self._job.take_back()
        if watching:
            rest = self._hear_the_rest()
            lost = lost or rest
        if lost:
            raise LostAfterCommit(f"the program was killed: {lost}", self._where_it_is)
        code = os.waitstatus_to_exitcode(status)
        code = 128 - code if code < 0 else code
        self._reporter.event("exited", pid=self._built.root.pid, status=code)
        return code

    @property
    def _where_it_is(self) -> str:
        """Where the tree still is as it was at commit."""
        if self._checkpoint is not None and not self._checkpoint.pages_elsewhere:
            return "the checkpoint directory is as it was"
        return "the source keeps it stopped, with all its memory; see there"

    def _pidfd(self) -> int:
        assert self._built is not None
        return self._built.root.newborn.pidfd

    def _hear_the_rest(self) -> str:
        """What the watchdog still has to say once the program has ended; its reason if the program was killed."""
        assert self._news is not None
        lost = ""
        while content := self._news.recv(_NEWS_SIZE):
            lost = self._hear(msgpack.unpackb(content)) or lost
        return lost or self._silence()

    def _silence(self) -> str:
        """What it means that the watchdog says no more."""
        return "" if self._drained else "the watchdog has died"

    def _hear(self, news: dict[str, object]) -> str:
        """Pass an event of the watchdog on; its reason if it is a loss."""
        name = str(news.pop("event"))
        if name == "lost":
            return str(news["reason"])
        if name == "drained":
            self._drained = True
            self._reporter.event("drained")
            self._reporter.event(
                "statistics",
                drain_ns=time.monotonic_ns() - self._resumed_at,
                faults=news["faults"],
                fault_p50_ns=news["latency_p50_ns"],
                fault_p99_ns=news["latency_p99_ns"],
                fault_max_ns=news["latency_max_ns"],
                bytes_boot=self._boot_bytes,
                bytes_demand=news["bytes_demand"],
                bytes_bulk=news["bytes_bulk"],
                bytes_zero=news["bytes_zero"],
            )
            return ""
        self._reporter.event(name, **news)
        return ""


@contextlib.contextmanager
def _told_of_children() -> Iterator[socket.socket]:
    """What becomes readable when something has happened to a child: it has ended, or been stopped."""
    told, telling = socket.socketpair()
    with told, telling:
        telling.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(telling.fileno(), warn_on_full_buffer=False)
        try:
            yield told
        finally:
            signal.set_wakeup_fd(-1)


def _pages(sets: Iterable[PageRanges]) -> int:
    return sum(each.total_pages for each in sets)
