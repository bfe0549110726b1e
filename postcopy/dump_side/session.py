"""The ways to dump: to a destination, to a checkpoint directory, or the state to a directory and the pages to both.

Here is decided what is done when; the states and messages stand in docs/protocol.md.
"""

import contextlib
import gc
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from msgspec import Struct, field
from msgspec.structs import replace

from postcopy.action_scripts import Action
from postcopy.checkpoint.writer import Writer
from postcopy.deadline import Interrupted, deadline, disregard_signals, uninterrupted
from postcopy.dump_side import clocks
from postcopy.dump_side.capture import Capture
from postcopy.dump_side.choices import Choices
from postcopy.dump_side.giving import Giving, unfit
from postcopy.dump_side.opened import Trusted
from postcopy.dump_side.survey import survey
from postcopy.errors import ConnectionLost, DumpError, LostAfterCommit, PostcopyError
from postcopy.kernel import procfs
from postcopy.kernel.limits import allow_descriptors
from postcopy.kernel.poll import readable
from postcopy.kernel.sched import scheduling
from postcopy.page_ranges import PageRanges
from postcopy.reporting import Reporter
from postcopy.spaces import huge_areas, pushed
from postcopy.state import Draft, LateSignal, Manifest
from postcopy.transport import Listener
from postcopy.wire import control

log = logging.getLogger("postcopy")

# Somebody who sends signals without end must not keep the process from its end.
_LOOKS_AT_SIGNALS = 5


class Options(Struct, frozen=True):
    """What the user asked for; ``timeout``: seconds from freeze to commit, and without a sign of life.

    ``choices``: what is moved only if asked for.
    """

    pid: int
    address: str
    port: int
    timeout: float = 10.0
    choices: Choices = field(default_factory=Choices)


def dump(options: Options, reporter: Reporter, listening: Callable[[], None]) -> None:
    """Hand process ``options.pid`` over to the first destination that comes for it.

    ``listening`` is called once when a destination can connect. Returns when the destination has every page and the
    source process has ended. Raises PostcopyError; before commit the process then runs on as if nothing had happened,
    after it (LostAfterCommit) it stays stopped.
    """
    allow_descriptors()
    manifest, before = survey(options.pid, options.choices)
    with contextlib.closing(Listener(options.address, options.port)) as listener, _watched(options.pid) as program:
        _listens(options, manifest, listener, reporter)
        listening()
        channels, peer = listener.accept(unfit, lambda: _check_alive(options.pid, program), program)
    try:
        channels.limit_silence(options.timeout)
        reporter.event("connected", peer=channels.control.peer, kernel=peer.kernel)
        _hand_over(options, before, Giving(channels, reporter, options.timeout), reporter)
    finally:
        channels.close()


@contextlib.contextmanager
def _watched(pid: int) -> Iterator[int]:
    """A pidfd. Raises DumpError."""
    try:
        program = os.pidfd_open(pid)
    except OSError:
        raise DumpError(f"process {pid} has ended meanwhile") from None
    try:
        yield program
    finally:
        os.close(program)


def _check_alive(pid: int, program: int) -> None:
    if readable(program):
        raise DumpError(f"process {pid} has ended, before a destination came for it")


def dump_to_directory(
    pid: int,
    directory: Path,
    reporter: Reporter,
    *,
    leave_running: bool = False,
    leave_stopped: bool = False,
    choices: Choices | None = None,
) -> None:
    """Write process ``pid`` to ``directory``, which must not exist, and end it once it is safely there.

    Raises PostcopyError; the process then runs on, and ``directory`` does not exist.
    """
    allow_descriptors()
    choices = choices or Choices()
    choices.scripts.run(Action.PRE_DUMP, pid)
    manifest, trusted = survey(pid, choices)
    writer = Writer(directory, pages_elsewhere=False)
    whole = False
    try:
        with _errors_named(pid), Capture(pid, trusted, reporter, choices) as capture:
            capture.take()
            capture.verify()
            for space, source in capture.sources.items():
                writer.write_space(space, source, *capture.to_write(space))
            late = capture.late_signals()
            writer.finish(manifest, replace(capture.tree, late_signals=late))
            reporter.event("written", directory=str(directory), bytes=writer.bytes_written)
            choices.scripts.run(Action.POST_DUMP, pid)
            with uninterrupted():
                if leave_stopped:
                    capture.frozen.stop_durably()
                elif not leave_running:
                    _write_signals_since(late, capture, writer)
                # From here on the directory may be all that there is of the process.
                whole = True
                if leave_stopped:
                    capture.commit()
                elif not leave_running:
                    capture.end()
                disregard_signals()
    except BaseException:
        if not whole:
            writer.withdraw()
        raise


def dump_state_to_directory(
    options: Options, directory: Path, reporter: Reporter, listening: Callable[[], None]
) -> None:
    """Write all but the lazy pages to ``directory``, and serve those from the frozen process.

    A destination that fails before commit is told of, and the next one is waited for. Otherwise like `dump`; where it
    raises before commit, ``directory`` does not exist.
    """
    pid, scripts = options.pid, options.choices.scripts
    allow_descriptors()
    scripts.run(Action.PRE_DUMP, pid)
    manifest, trusted = survey(pid, options.choices)
    with contextlib.closing(Listener(options.address, options.port)) as listener:
        writer = Writer(directory, pages_elsewhere=True)
        try:
            with _errors_named(pid), Capture(pid, trusted, reporter, options.choices) as capture:
                capture.take()
                capture.verify()
                for space, source in capture.sources.items():
                    writer.write_space(space, source, capture.sent[space], PageRanges())
                checkpoint = writer.finish(manifest, capture.tree)
                reporter.event("written", directory=str(directory), bytes=writer.bytes_written)
                scripts.run(Action.POST_DUMP, pid)
                _listens(options, manifest, listener, reporter)
                listening()
                while not capture.committed:
                    _offer(options, capture, manifest, checkpoint, listener, reporter)
        except LostAfterCommit:
            raise
        except BaseException:
            writer.withdraw()
            raise


def _write_signals_since(late: list[LateSignal], capture: Capture, writer: Writer) -> None:
    """Those that have come while the directory was made durable. What comes now is lost with the process."""
    for _ in range(_LOOKS_AT_SIGNALS):
        if (now := capture.late_signals()) == late:
            return
        writer.amend(replace(capture.tree, late_signals=now))
        late = now


def _listens(options: Options, manifest: Manifest, listener: Listener, reporter: Reporter) -> None:
    reporter.event("listening", address=options.address, port=listener.port, pid=options.pid, name=manifest.name)


@contextlib.contextmanager
def _errors_named(pid: int) -> Iterator[None]:
    """Every error is one of ours."""
    try:
        yield
    except OSError as error:
        if not procfs.exists(pid):
            raise DumpError(f"process {pid} has ended meanwhile") from None
        raise DumpError(f"process {pid}: {error}") from error


def _hand_over(options: Options, before: Trusted, giving: Giving, reporter: Reporter) -> None:
    """Survey again, freeze, and give it all to the destination that has connected; ``before``: what was seen before."""
    scripts = options.choices.scripts
    try:
        with _errors_named(options.pid):
            scripts.run(Action.PRE_DUMP, options.pid)
            manifest, trusted = survey(options.pid, options.choices)
            reporter.event("surveyed", files=len(manifest.files))
            giving.agree(manifest, clocks.now(options.pid))
            # A tree that changes all the time would have changed by the time that it is frozen, too.
            giving.send_draft(trusted.draft if trusted.known.keys() == before.known.keys() else Draft())
            with Capture(options.pid, trusted, reporter, options.choices, foresees=True) as capture:
                # On a busy host, every other process would lengthen the stand-still.
                scheduling(nice=-20)
                # Forks have made our own memory copy-on-write; this touches most of it before the tree stands still.
                gc.collect()
                with deadline(options.timeout, "the way from freeze to commit"):
                    reader = capture.take(giving.send_process)
                    # Before the destination's first: what they take away here is to come up there.
                    scripts.run(Action.POST_DUMP, options.pid)
                    giving.send_state(capture.tree, reader)
                    # Forked while the destination builds: this costs no stand-still.
                    giving.start_servers(pushed(capture.tree), capture.sources, huge_areas(capture.tree))
                    giving.await_ready()
                    giving.change(capture.changes())
                    go = _stop(capture, giving, reporter)
                _commit(options, capture, giving, go)
    except (ConnectionLost, LostAfterCommit):
        raise
    except PostcopyError as error:
        giving.fail(error)
        raise
    finally:
        scheduling()
        giving.end()


def _offer(
    options: Options, capture: Capture, manifest: Manifest, checkpoint: bytes, listener: Listener, reporter: Reporter
) -> None:
    """Give the frozen process to the next destination that comes; a failure before commit is told and no more."""
    channels, peer = listener.accept(unfit, capture.frozen.check_alive)
    giving = Giving(channels, reporter, options.timeout)
    try:
        channels.limit_silence(options.timeout)
        reporter.event("connected", peer=channels.control.peer, kernel=peer.kernel)
        has_state = giving.agree(manifest, capture.tree.clocks, checkpoint)
        if not has_state:
            giving.send_draft(Draft())
        with deadline(options.timeout, "the way from the agreement to commit"):
            if not has_state:
                giving.send_tree(capture.tree, capture.page_reader())
            giving.start_servers(pushed(capture.tree), capture.sources, huge_areas(capture.tree))
            giving.await_ready()
            go = _stop(capture, giving, reporter)
        _commit(options, capture, giving, go)
    except (LostAfterCommit, Interrupted):
        raise
    except PostcopyError as error:
        giving.fail(error)
        log.error("%s; process %d stays frozen here, for the next destination", error, options.pid)
    finally:
        giving.end()
        channels.close()


def _stop(capture: Capture, giving: Giving, reporter: Reporter) -> control.Go:
    """The destination is ready: the order to go. The process is then stopped durably."""
    capture.verify()
    capture.stop()
    go = control.Go(capture.late_signals())
    reporter.event("stopped")
    capture.frozen.check_alive()
    if readable(giving.control):
        # Nothing is due but that the destination has given up: the last moment to hear it.
        giving.control.receive({})
    return go


def _commit(options: Options, capture: Capture, giving: Giving, go: control.Go) -> None:
    """From here to the end of the source process. Raises LostAfterCommit."""
    try:
        with uninterrupted():
            capture.commit()
            giving.go(go)
        # The program's faults come first now, which other processes answer.
        scheduling()
        giving.await_resumed(capture.began)
        drained = giving.await_drained(capture.frozen.stay_stopped)
        disregard_signals()
        giving.end()
        capture.end()
        giving.tell(drained)
    except (PostcopyError, OSError) as error:
        if not capture.committed:
            raise
        raise _lost(capture, options.pid, error) from None


def _lost(capture: Capture, pid: int, error: PostcopyError | OSError) -> LostAfterCommit:
    if isinstance(error, Interrupted):
        what = "dump was ended while it was serving the program's memory"
    else:
        what = f"lost the destination after commit: {error}"
    try:
        capture.frozen.check_alive()
    except DumpError as ended:
        return LostAfterCommit(f"{what}; here, {ended.message}: its memory is lost")
    return LostAfterCommit(
        f"{what}; process {pid} stays stopped here, with all its memory as it was at the hand-over",
        f"only if it is certain that it does not run at the destination: kill -CONT {pid}",
    )
