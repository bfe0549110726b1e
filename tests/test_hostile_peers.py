"""The other side, or somebody in between, sends what no side of ours would.

Before commit: one clear error on the side that it was sent to, and the program runs on at the source. After commit: the
program ends at the destination before it could see a wrong byte, and the source keeps it stopped.
"""

import contextlib
import resource
import signal
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.errors import PostcopyError
from postcopy.kernel.page import ADDRESS_LIMIT, PAGE_SIZE
from postcopy.restore_side import manifest as manifests
from postcopy.sent_pages import Content
from postcopy.soundness import check_message
from postcopy.state import Clocks, LateSignal, decode, encode
from postcopy.transport import Channel, PeerFailed
from postcopy.wire import control
from postcopy.wire import pages as wire
from postcopy.wire.control import HEADER, MAGIC, PROTOCOL_VERSION, Hello, Kind
from tests.checkpoints import Taken
from tests.hosts import Host, wait_until
from tests.sides import SECONDS, Side
from tests.stage import Stage, Witness
from tests.tamper import PAGE_HEADER, SILENCE, Change, Frame, Tamper, socket_in
from tests.test_decoders import bounded, changed, packed, plain, span, taken  # noqa: F401 (a fixture)
from tests.test_failures import Scene, Watched, scene, scene_of_module, watched  # noqa: F401 (fixtures)

DUMP_FAILED, RESTORE_FAILED, PROBLEMS, PROTOCOL, GONE, LOST, GAVE_UP, TOO_LATE = 3, 4, 5, 6, 7, 8, 10, 11
TIMEOUT = "2"


# -- before commit -----------------------------------------------------------------------------------------------------


def is_stopped_for_good(scene: Scene, victim: Watched) -> None:  # noqa: F811
    """Lost after commit: the program stays stopped at the source, has run nowhere else, and all of ours is gone."""
    victim.stays_stopped()
    victim.ran_once()
    scene.end(victim)
    scene.nothing_is_left()


def on(to: str, name: str, change: Change, channel: str = "control") -> Change:
    """Do this to one kind of frame, and pass on the rest."""

    def changing(frame: Frame) -> bytes | None:
        return change(frame) if (frame.to, frame.channel, frame.name) == (to, channel, name) else frame.whole

    return changing


def another_kind(kind: Kind) -> Change:
    """The same under another header."""
    return lambda frame: frame.with_body(frame.body, kind)


def body(content: bytes) -> Change:
    """Another body."""
    return lambda frame: frame.with_body(content)


def claims(length: int) -> Change:
    """A header that announces so many bytes more than come."""
    return lambda frame: frame.header[:12] + struct.pack("<I", length) + frame.body


def half(frame: Frame) -> bytes:
    """Half of it; whatever follows is taken for the rest by nobody, since nothing does."""
    return frame.whole[: len(frame.whole) // 2]


def then_silence(change: Change) -> Change:
    """After one changed frame, nothing more in that direction."""
    done: set[tuple[str, str]] = set()

    def changing(frame: Frame) -> bytes | None:
        place = frame.to, frame.channel
        if place in done:
            return b""
        content = change(frame)
        if content != frame.whole:
            done.add(place)
        return content

    return changing


def edited(path: list[Any], value: Any) -> Change:
    """A body with one field changed; ``value`` may be a function of what was there."""

    def change(frame: Frame) -> bytes:
        whole = plain(frame.body)
        place = whole
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value(place[path[-1]]) if callable(value) else value
        return frame.with_body(packed(whole))

    return change


def silent(frame: Frame) -> None:
    """Nothing more."""


def twice() -> Change:
    """A process, its pages, and the process again."""
    told: list[bytes] = []

    def change(frame: Frame) -> bytes:
        if (frame.to, frame.name) == ("restore", "PROCESS"):
            told.append(frame.whole)
        return frame.whole + (told.pop() if frame.name == "PAGES" and told else b"")

    return change


TO_RESTORE: dict[str, tuple[Change, str]] = {
    "manifest-of-another-kind": (on("restore", "MANIFEST", another_kind(Kind.READY)), "sent READY where MANIFEST"),
    "manifest-of-noise": (on("restore", "MANIFEST", body(b"\xc1" * 100)), "not a Offer"),
    "manifest-of-nothing": (on("restore", "MANIFEST", body(b"")), "not a Offer"),
    "manifest-without-end": (on("restore", "MANIFEST", claims((1 << 32) - 1)), "268435456 is the limit"),
    "manifest-of-an-unknown-kind": (on("restore", "MANIFEST", another_kind(77)), "unknown message 77"),  # type: ignore[arg-type]
    "manifest-withheld": (on("restore", "MANIFEST", silent), "took longer than 2 s"),
    "half-a-manifest": (then_silence(on("restore", "MANIFEST", half)), "took longer than 2 s"),
    "path-with-nul": (
        on("restore", "MANIFEST", edited(["manifest", "files", 0, "path"], "/a\0b")),
        "offer.manifest.files[0].path",
    ),
    "pid-twice": (on("restore", "MANIFEST", edited(["manifest", "tids"], lambda tids: [*tids, *tids])), "occurs twice"),
    "pid-of-another": (on("restore", "MANIFEST", edited(["manifest", "pid"], 1)), ""),
    "clocks-of-the-far-future": (on("restore", "MANIFEST", edited(["clocks", "boottime"], (1 << 63) - 1)), ""),
    "draft-of-another-kind": (on("restore", "DRAFT", another_kind(Kind.STATE)), "sent STATE where DRAFT"),
    "draft-of-noise": (on("restore", "DRAFT", body(b"\xc1")), "not a Draft"),
    "draft-withheld": (on("restore", "DRAFT", silent), "took longer than 2 s"),
    "half-a-draft": (then_silence(on("restore", "DRAFT", half)), "took longer than 2 s"),
    "draft-of-a-process-twice": (
        on("restore", "DRAFT", edited(["processes"], lambda all: [*all, *all])),
        "occurs twice",
    ),
    "draft-of-shared-memory": (
        on("restore", "DRAFT", edited(["processes", 0, "memory", "vmas", 0, "backing"], "object")),
        "a draft has no memory with an identity",
    ),
    "draft-of-descriptors-that-are-not-there": (
        on("restore", "DRAFT", edited(["descriptions"], [])),
        "is none of the descriptions",
    ),
    "draft-without-the-process": (on("restore", "DRAFT", edited(["processes"], [])), "the draft has no process"),
    "draft-of-a-layout-that-cannot-be": (
        on("restore", "DRAFT", edited(["processes", 0, "memory", "vmas"], lambda all: [all[1], all[0], *all[2:]])),
        "is before the end of the one before it",
    ),
    "process-of-another-kind": (
        on("restore", "PROCESS", another_kind(Kind.PAGES)),
        "sent PAGES where PROCESS or STATE was due",
    ),
    "process-of-noise": (on("restore", "PROCESS", body(b"\x93\xc0" * 50)), "not a ProcessState"),
    "process-withheld": (on("restore", "PROCESS", silent), "took longer than 2 s"),
    "half-a-process": (then_silence(on("restore", "PROCESS", half)), "took longer than 2 s"),
    "process-that-was-not-drafted": (
        on("restore", "PROCESS", edited(["process", "pid"], 77)),
        "process.laid_out: the draft has no process 77",
    ),
    "process-twice": (twice(), "has come already"),
    "process-that-cannot-be": (
        on("restore", "PROCESS", edited(["process", "threads", 0, "signal_mask"], -1)),
        "not a ProcessState",
    ),
    "state-without-processes": (
        lambda frame: b"" if frame.to == "restore" and frame.name in ("PROCESS", "PAGES") else frame.whole,
        "state.processes: a length of 0",
    ),
    "state-of-another-kind": (
        on("restore", "STATE", another_kind(Kind.PAGES)),
        "sent PAGES where PROCESS or STATE was due",
    ),
    "state-of-noise": (on("restore", "STATE", body(b"\x93\xc0" * 50)), "not a State"),
    "state-withheld": (on("restore", "STATE", silent), "took longer than 2 s"),
    "half-a-state": (then_silence(on("restore", "STATE", half)), "took longer than 2 s"),
    "lazy-pages-outside": (
        on("restore", "PROCESS", edited(["process", "memory", "lazy"], span((0, PAGE_SIZE)))),
        "lazy: ",
    ),
    "fewer-pages": (on("restore", "PAGES", lambda frame: frame.with_body(frame.body[PAGE_SIZE:])), "bytes of pages"),
    "more-pages": (on("restore", "PAGES", lambda frame: frame.with_body(frame.body + bytes(1))), "bytes of pages"),
    "pages-without-end": (on("restore", "PAGES", claims((1 << 32) - 1)), "bytes of pages"),
    "half-of-the-pages": (then_silence(on("restore", "PAGES", half)), "took longer than 2 s"),
    "pages-of-another-kind": (on("restore", "PAGES", another_kind(Kind.GO)), "sent GO where PAGES"),
    "failure-with-escapes": (
        on("restore", "STATE", lambda frame: control.pack(Kind.FAILED, control.Failed("\x1b[2J\n", "\x07"))),
        "gave up: \\x1b[2J\\n",
    ),
}


def start(watched: Watched, change: Change) -> tuple[Tamper, Side]:  # noqa: F811
    """A dump that listens and the machine in the middle; a restore is still to come."""
    source = watched.dump("--timeout", TIMEOUT)
    source.await_event("listening")
    return Tamper(watched.hosts.b, (watched.hosts.a.address, watched.port), change), source


def restore(watched: Watched, tamper: Tamper) -> Side:  # noqa: F811
    """Through the machine in the middle."""
    return watched.restore(*tamper.address, "--timeout", TIMEOUT)


@pytest.mark.parametrize("name", TO_RESTORE)
def test_restore_refuses_what_is_wrong_before_commit(scene: Scene, watched: Watched, name: str) -> None:  # noqa: F811
    change, expected = TO_RESTORE[name]
    tamper, source = start(watched, change)
    with tamper:
        destination = restore(watched, tamper)
        destination.ends(RESTORE_FAILED, PROBLEMS, PROTOCOL, GONE, GAVE_UP, TOO_LATE)
        # Both wait as long for a silent peer: whoever is first leaves, and the other sees that.
        silence = "took longer than" in expected and destination.process.returncode == GONE
        assert expected in destination.text or silence
        source.ends(DUMP_FAILED, PROBLEMS, GONE, GAVE_UP, TOO_LATE)
    watched.goes_on()
    scene.nothing_is_left()


def request(space: int, address: int, pages: int, length: int = 0, kind: int = wire.REQUEST) -> bytes:
    """A frame of the demand channel, right or wrong."""
    return PAGE_HEADER.pack(kind, space, address, pages, length)


REQUESTS = {
    "an-unknown-space": (request(99, 0x10000, 1), "there is no address space 99"),
    "no-page": (request(0, 0x10000, 0), "a frame of 0 pages"),
    "a-billion-pages": (request(0, 0x10000, 1 << 30), "a frame of 1073741824 pages"),
    "half-a-page": (request(0, 0x10001, 1), "misaligned or no user memory"),
    "pages-beyond-all-memory": (request(0, ADDRESS_LIMIT - PAGE_SIZE, 2), "misaligned or no user memory"),
    "an-address-that-overflows": (request(0, (1 << 64) - PAGE_SIZE, 64), "misaligned or no user memory"),
    "what-is-not-mapped": (request(0, 0x1000, 1), "cannot be read"),
    "an-unknown-kind": (request(0, 0, 0, kind=55), "unknown frame of kind 55"),
    "a-payload": (request(0, 0x10000, 1, 8), "8 bytes of payload"),
    "an-answer": (request(0, 0x10000, 1, PAGE_SIZE, wire.PAGES), "4096 bytes of payload"),
}

TO_DUMP: dict[str, tuple[Change, str]] = {
    "prepared-of-another-kind": (on("dump", "PREPARED", another_kind(Kind.DRAINED)), "sent DRAINED where PREPARED"),
    "prepared-of-noise": (on("dump", "PREPARED", body(b"\xc1")), "not a Prepared"),
    "prepared-without-end": (on("dump", "PREPARED", claims(1 << 31)), "65536 is the limit"),
    "greeting-and-no-more": (on("dump", "PREPARED", silent), "took longer than 2 s"),
    "half-of-prepared": (then_silence(on("dump", "PREPARED", half)), "took longer than 2 s"),
    "ready-before-it-is-due": (
        on("dump", "PREPARED", lambda frame: control.pack(Kind.READY, control.Nothing())),
        "sent READY where PREPARED",
    ),
    "drafted-of-another-kind": (on("dump", "DRAFTED", another_kind(Kind.READY)), "sent READY where DRAFTED"),
    "drafted-withheld": (on("dump", "DRAFTED", silent), "took longer than 2 s"),
    "ready-of-another-kind": (on("dump", "READY", another_kind(Kind.RESUMED)), "sent RESUMED where READY"),
    "ready-withheld": (on("dump", "READY", silent), "took longer than 2 s"),
    "more-than-ready": (
        on("dump", "READY", lambda frame: frame.whole + control.pack(Kind.RESUMED, control.Nothing())),
        "sent RESUMED where nothing was due",
    ),
    "problems-with-escapes": (
        on("dump", "PREPARED", lambda frame: control.pack(Kind.PROBLEMS, control.Problems(["\x1b[2J"]))),
        "\\x1b[2J",
    ),
}


def at_work(host: Host, name: str) -> list[int]:
    """The processes of this name that have not ended."""
    found = []
    for pid in host.pids():
        with contextlib.suppress(OSError):
            if (host.proc / str(pid) / "comm").read_text().strip() == name and host.proc_state(pid) not in (None, "Z"):
                found.append(pid)
    return found


@pytest.mark.parametrize("name", [*TO_DUMP, *REQUESTS])
def test_dump_refuses_what_is_wrong_before_commit(scene: Scene, watched: Watched, name: str) -> None:  # noqa: F811
    frame, expected = REQUESTS.get(name, (b"", ""))

    def asking(passing: Frame) -> bytes | None:
        if (passing.to, passing.name) == ("dump", "PREPARED"):
            tamper.to_source["demand"].sendall(frame)
        if (passing.to, passing.name) == ("dump", "READY"):
            # Who asks only after commit is told only then.
            wait_until(lambda: expected in source.text and not at_work(watched.hosts.a, "postcopy-demand"), SECONDS)
        return passing.whole

    change, expected = TO_DUMP.get(name, (asking, expected))
    tamper, source = start(watched, change)
    with tamper:
        destination = restore(watched, tamper)
        source.ends_with_error(DUMP_FAILED, PROBLEMS, PROTOCOL, GONE, TOO_LATE)
        assert expected in source.text
        destination.ends(RESTORE_FAILED, PROTOCOL, GONE, GAVE_UP, TOO_LATE)
    watched.goes_on()
    scene.nothing_is_left()


# -- after commit ------------------------------------------------------------------------------------------------------

ANSWER = PAGE_HEADER.pack(wire.PAGES, 0, 0x10000, 1, PAGE_SIZE) + bytes(PAGE_SIZE)
AFTER: dict[str, tuple[str, bytes]] = {
    "pages-of-an-unknown-space": ("bulk", PAGE_HEADER.pack(wire.PAGES, 99, 0x10000, 1, PAGE_SIZE) + bytes(PAGE_SIZE)),
    "pages-and-another-length": ("bulk", PAGE_HEADER.pack(wire.PAGES, 0, 0x10000, 2, PAGE_SIZE) + bytes(PAGE_SIZE)),
    "an-address-that-overflows": ("bulk", PAGE_HEADER.pack(wire.PAGES, 0, (1 << 64) - PAGE_SIZE, 1, PAGE_SIZE)),
    "too-many-pages": ("bulk", PAGE_HEADER.pack(wire.PAGES, 0, 0, 1 << 19, 1 << 31)),
    "a-reason-without-end": ("bulk", PAGE_HEADER.pack(wire.FAILED, 0, 0, 0, (1 << 32) - 1)),
    "an-unknown-kind": ("demand", PAGE_HEADER.pack(0xDEAD, 0, 0, 0, 0)),
    "an-end-on-the-demand-channel": ("demand", wire.end()),
    "pages-of-an-unknown-space-on-demand": (
        "demand",
        PAGE_HEADER.pack(wire.PAGES, 99, 0x10000, 1, PAGE_SIZE) + bytes(PAGE_SIZE),
    ),
    "pages-that-are-also-those-of-an-unknown-space": ("bulk", wire.also(99, 0x10000, 1) + ANSWER),
    "other-pages-than-were-announced": ("demand", wire.also(0, 0x20000, 1) + ANSWER),
    "an-announcement-of-no-memory": ("demand", wire.also(0, (1 << 64) - PAGE_SIZE, 1)),
    "a-request": ("demand", wire.request(0, 0x10000, 1)),
    "a-message-on-the-control-channel": ("control", control.pack(Kind.PREPARED, control.Prepared(True))),
}


@pytest.mark.parametrize("name", AFTER)
def test_program_ends_before_it_sees_what_is_wrong_after_commit(scene: Scene, name: str) -> None:  # noqa: F811
    channel, frame = AFTER[name]
    victim = scene.watch()

    def change(passing: Frame) -> bytes | None:
        if (passing.to, passing.name) == ("dump", "RESUMED"):
            tamper.to_destination[channel].sendall(frame)
        # No page comes, so that it is the wrong frame alone which ends it.
        return SILENCE if passing.to == "restore" and passing.name == "pages" else passing.whole

    tamper, source = start(victim, change)
    with tamper:
        destination = restore(victim, tamper)
        destination.ends_with_error(LOST)
        source.ends_with_error(LOST)
    is_stopped_for_good(scene, victim)


def test_pages_that_nobody_asked_for_do_no_harm(scene: Scene) -> None:  # noqa: F811
    victim = scene.watch()

    def change(passing: Frame) -> bytes:
        if (passing.to, passing.name) == ("restore", "pages"):
            # Twice, and one that is nowhere.
            return ANSWER + passing.whole + (passing.whole if passing.body else b"")
        return passing.whole

    tamper, source = start(victim, change)
    with tamper:
        destination = restore(victim, tamper)
        destination.await_event("drained")
        source.ends_well()
        victim.ran_once()
        destination.process.terminate()
        assert destination.process.wait(SECONDS) == 0, destination.text
    victim.ran_once()
    scene.watched.remove(victim)
    scene.nothing_is_left()


@pytest.mark.parametrize(
    "go",
    [
        encode(control.Go([LateSignal(1, 1, b"\1")])),
        encode(control.Go([LateSignal(1, 1, bytes(128))])),
        b"\xc1",
    ],
    ids=["short-signal", "no-signal", "noise"],
)
def test_program_is_not_resumed_by_an_order_that_is_wrong(scene: Scene, go: bytes) -> None:  # noqa: F811
    victim = scene.watch()
    tamper, source = start(victim, on("restore", "GO", body(go)))
    with tamper:
        destination = restore(victim, tamper)
        destination.ends(PROTOCOL)
        source.ends_with_error(LOST)
    is_stopped_for_good(scene, victim)


def test_half_a_message_after_commit_is_given_up(scene: Scene) -> None:  # noqa: F811
    victim = scene.watch()
    tamper, source = start(victim, then_silence(on("dump", "DRAINED", half)))
    tamper.passes_ends_on = False
    with tamper:
        destination = restore(victim, tamper)
        source.ends_with_error(LOST)
        assert "has stopped in the middle of a message" in source.text
        victim.stays_stopped()
        destination.process.terminate()
        assert destination.process.wait(SECONDS) == 0, destination.text
    victim.ran_once()
    scene.end(victim)
    scene.nothing_is_left()


@pytest.mark.parametrize("name", ["PREPARED", "READY"])
def test_server_of_a_directory_gives_up_who_falls_silent_and_goes_on(stage: Stage, name: str) -> None:
    work, program = stage.begin(Witness)
    stage.dump(program).ends_well()
    files = stage.copy(work.directory), work.directory
    serve = stage.command(stage.hosts.a, "serve", "-D", stage.checkpoint, *stage.source, "--timeout", TIMEOUT)
    serve.await_event("serving")
    with Tamper(stage.hosts.b, (stage.hosts.a.address, stage.port), on("dump", name, silent)) as tamper:
        mute = stage.command(stage.hosts.b, "restore", "--lazy-pages", *tamper.address, "--timeout", TIMEOUT)
        mute.ends(PROTOCOL, GONE, GAVE_UP, TOO_LATE)
        wait_until(lambda: "took longer than 2 s" in serve.text, SECONDS, "it is given up")
    restore = stage.remote_restore(files=files)
    restore.await_event("drained")
    work.finish(restore.process, files[0])
    serve.process.terminate()
    assert serve.process.wait(SECONDS) == 0, serve.text
    assert "Traceback" not in serve.text


def test_frozen_process_waits_for_the_next_when_a_destination_falls_silent(stage: Stage) -> None:
    work, program = stage.begin(Witness)
    dump = stage.lazy_dump(program, "--timeout", TIMEOUT)
    with Tamper(stage.hosts.b, (stage.hosts.a.address, stage.port), on("dump", "PREPARED", silent)) as tamper:
        mute = stage.command(stage.hosts.b, "restore", "--lazy-pages", *tamper.address, "--timeout", TIMEOUT)
        mute.ends(PROTOCOL, GONE, GAVE_UP, TOO_LATE)
        wait_until(lambda: "took longer than 2 s" in dump.text, SECONDS, "it is given up")
    assert "stays frozen here, for the next destination" in dump.text
    restore = stage.remote_restore()
    restore.await_event("drained")
    assert dump.process.wait(SECONDS) == 0, dump.text
    assert program.wait(SECONDS) == -signal.SIGKILL
    work.finish(restore.process)


# -- floods ------------------------------------------------------------------------------------------------------------


def memory_of(side: Side) -> int:
    """Bytes that it has had at most."""
    host = side.process.host
    status = (host.proc / str(side.process.pid) / "status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@contextlib.contextmanager
def many_descriptors() -> Iterator[None]:
    """Allow this process as many as it may have."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_flood_of_destinations_takes_little_memory_and_keeps_nobody_out(scene: Scene, watched: Watched) -> None:  # noqa: F811
    source = watched.dump()
    source.await_event("listening")
    before = memory_of(source)
    features = [*Hello("", b"").cpu_features, *(f"{number:x}" for number in range(8000))]
    greeting = control.pack(Kind.HELLO, Hello("control", b"", cpu_features=features))
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            caller = stack.enter_context(socket_in(watched.hosts.b))
            caller.connect((watched.hosts.a.address, watched.port))
            caller.sendall(greeting)
            caller.recv(1)
        wait_until(lambda: "too many have begun" in source.text, SECONDS, "some are dropped")
        destination = watched.restore(pause="connected")
        destination.await_pause("connected")
        # Whoever leaves before the source has taken all its channels has never come.
        source.await_event("connected")
        assert memory_of(source) - before < 60 << 20
        destination.process.kill()
    source.ends(GONE)
    watched.goes_on()
    scene.nothing_is_left()


def test_flood_of_greetings_takes_little_memory_and_keeps_nobody_out(scene: Scene, watched: Watched) -> None:  # noqa: F811
    source = watched.dump()
    source.await_event("listening")
    address = watched.hosts.a.address, watched.port
    before = memory_of(source)
    greeting = HEADER.pack(MAGIC, PROTOCOL_VERSION, Kind.HELLO, 60_000) + bytes(59_000)
    with contextlib.ExitStack() as stack:
        stack.enter_context(many_descriptors())
        for _ in range(900):
            caller = stack.enter_context(socket_in(watched.hosts.b))
            caller.connect(address)
            with contextlib.suppress(ConnectionError):
                caller.sendall(greeting)
        wait_until(lambda: "too many are calling at once" in source.text, SECONDS, "some are dropped")
        # A proper one, which goes no further.
        destination = watched.restore(pause="connected")
        destination.await_pause("connected")
        source.await_event("connected")
        assert memory_of(source) - before < 40 << 20
        destination.process.kill()
    source.ends(GONE)
    watched.goes_on()
    scene.nothing_is_left()


def test_why_the_peer_has_hung_up_is_heard_though_more_is_to_be_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as one:
        other, _ = server.accept()
        channel = Channel(one, "it")
        channel.send(Kind.READY)
        Channel(other, "we").send(Kind.FAILED, control.Failed("no room", "make some"))
        # With something unread, this resets the connection.
        other.close()
        with pytest.raises(PeerFailed, match="it gave up: no room"):
            while True:
                channel.send(Kind.READY)


# -- whatever bytes ----------------------------------------------------------------------------------------------------

ANY = st.binary(max_size=40)
HEADED = st.builds(
    lambda kind, length, rest: HEADER.pack(MAGIC, PROTOCOL_VERSION, kind, length) + rest,
    st.integers(0, 12) | st.integers(0, (1 << 16) - 1),
    st.integers(0, 40) | st.integers(0, (1 << 32) - 1),
    ANY,
)
BODIES: list[dict[Kind, type]] = [
    {Kind.MANIFEST: control.Offer},
    {Kind.PREPARED: control.Prepared, Kind.PROBLEMS: control.Problems},
    {Kind.GO: control.Go},
    {Kind.DRAINED: control.Drained},
    {},
]


@bounded(300)
@given(ANY | HEADED, st.sampled_from(BODIES))
def test_any_bytes_on_the_control_channel(content: bytes, bodies: dict[Kind, type]) -> None:
    one, other = socket.socketpair()
    with one, other:
        one.sendall(content)
        one.shutdown(socket.SHUT_WR)
        channel = Channel(other, "it")
        with contextlib.suppress(PostcopyError):
            channel.receive(bodies)
            channel.receive_pages(16, Content())


@bounded(300)
@given(st.binary(min_size=wire.HEADER_SIZE, max_size=wire.HEADER_SIZE) | st.builds(
    PAGE_HEADER.pack,
    st.integers(0, 9),
    st.integers(0, 3),
    st.integers(0, (1 << 52) - 1).map(lambda page: page << 12),
    st.integers(0, 65),
    st.integers(0, 65).map(lambda pages: pages << 12),
))  # fmt: skip
def test_any_header_on_the_page_channels(header: bytes) -> None:
    for parse, most in ((wire.parse_demand, 0), (wire.parse_answer, 64 * PAGE_SIZE)):
        with contextlib.suppress(PostcopyError):
            found = parse(header)
            assert found.length <= most
            assert found.address + found.pages * PAGE_SIZE <= ADDRESS_LIMIT or found.kind not in (
                wire.REQUEST,
                wire.PAGES,
            )


@bounded(300)
@given(st.data())
def test_changed_offers_are_refused_or_looked_into(taken: Taken, data: st.DataObject) -> None:  # noqa: F811
    offer = control.Offer(taken.manifest, Clocks(1, 1))
    value = data.draw(changed(plain(encode(offer))))
    try:
        found = decode(control.Offer, packed(value))
        check_message("offer", found)
    except (OverflowError, ValueError):
        return  # what msgpack cannot hold, nobody can send
    except PostcopyError:
        return
    manifests.problems(found.manifest, new_pid_namespace=False)
