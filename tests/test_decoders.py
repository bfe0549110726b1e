"""What decodes files and states of others never raises anything but an error of ours, whatever it is given.

The files of a real checkpoint are damaged below their checksums, with new ones that fit: what hostile hands could do.
"""

import io
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postcopy.checkpoint.describe import describe
from postcopy.checkpoint.format import HEADER_SIZE, About, Index, Kind, PackedIndex, pack_header, parse
from postcopy.checkpoint.inspect import inspect
from postcopy.checkpoint.reader import Checkpoint
from postcopy.errors import PostcopyError, ProtocolError
from postcopy.kernel.page import ADDRESS_LIMIT, PAGE_SIZE
from postcopy.page_ranges import PageRanges
from postcopy.soundness import check
from postcopy.state import Manifest, Tree, decode, encode
from tests.checkpoints import SPACE, Taken, running, take

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="stopping and reading a process takes root")

KINDS = {"manifest": Kind.MANIFEST, "state": Kind.STATE, "pages-0.index": Kind.INDEX}


def bounded(examples: int) -> settings:
    """So many examples, however slow the machine is."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, suppress_health_check=checks)


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Taken:
    """A checkpoint that no test changes."""
    directory = tmp_path_factory.mktemp("taken")
    with running(directory, pages=64) as program:
        return take(program.pid, directory / "checkpoint")


@pytest.fixture(scope="module")
def copy(taken: Taken, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that is changed and put right again."""
    return Path(shutil.copytree(taken.directory, tmp_path_factory.mktemp("copy") / "copy"))


def plain(body: bytes | memoryview) -> Any:
    """A body as lists and dictionaries."""
    return msgpack.unpackb(body, unicode_errors="surrogateescape", strict_map_key=False)


def packed(value: Any) -> bytes:
    """The opposite of `plain`."""
    content: bytes = msgpack.packb(value, unicode_errors="surrogateescape")
    return content


# -- changes of a body that hypothesis chooses -------------------------------------------------------------------------

numbers = st.integers(-(1 << 63), (1 << 64) - 1) | st.sampled_from(
    [-1, 0, 1, 2, 64, 65, PAGE_SIZE, 1 << 22, 1 << 31, 1 << 32, ADDRESS_LIMIT, (1 << 63) - 1, (1 << 64) - 1]
)
leaves = st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=20) | st.binary(max_size=40)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | numbers, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def changed(draw: st.DrawFn, whole: Any) -> Any:
    """The same structure with one place changed."""
    if isinstance(whole, dict) and whole and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(whole)))
        return {**whole, key: draw(changed(whole[key]))}
    if isinstance(whole, list) and whole and draw(st.integers(0, 9)):
        at = draw(st.integers(0, len(whole) - 1))
        action = draw(st.sampled_from(["change", "change", "change", "repeat", "remove", "exchange"]))
        if action == "change":
            return [*whole[:at], draw(changed(whole[at])), *whole[at + 1 :]]
        if action == "repeat":
            return [*whole[:at], whole[at], *whole[at:]]
        if action == "remove":
            return [*whole[:at], *whole[at + 1 :]]
        return [*whole[at:], *whole[:at]]
    if isinstance(whole, int) and draw(st.booleans()):
        return whole + draw(st.sampled_from([-PAGE_SIZE, -1, 1, 8, PAGE_SIZE]))
    if isinstance(whole, bytes) and whole and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(whole) - 1))
        middle = draw(st.binary(max_size=9))
        return whole[:at] + middle + whole[at + draw(st.sampled_from([0, 1, len(middle)])) :]
    return draw(values)


def survives(directory: Path) -> None:
    """Open, show and read a checkpoint; only errors of ours are allowed, and showing what opens always works."""
    try:
        checkpoint = Checkpoint.open(directory, any_host=True)
    except PostcopyError:
        return
    try:
        describe(checkpoint)
        with redirect_stdout(io.StringIO()):
            inspect(directory, as_json=False)
            inspect(directory, as_json=True)
        checkpoint.sent_content()
        for space in checkpoint.plan():
            for _ in checkpoint.verified_runs(space, 0, 1):
                pass
    except PostcopyError:
        return
    finally:
        checkpoint.close()


@pytest.mark.parametrize("name", KINDS)
def test_changed_bodies_with_fitting_checksums(taken: Taken, copy: Path, name: str) -> None:
    original = (taken.directory / name).read_bytes()
    checkpoint, body = parse(name, original, KINDS[name])

    @bounded(150)
    @given(changed(plain(body)))
    def check_one(value: Any) -> None:
        try:
            content = packed(value)
        except (OverflowError, ValueError):
            return
        (copy / name).write_bytes(pack_header(KINDS[name], SPACE, checkpoint, content) + content)
        survives(copy)

    try:
        check_one()
    finally:
        (copy / name).write_bytes(original)


@pytest.mark.parametrize("name", KINDS)
def test_changed_bytes_with_fitting_checksums(taken: Taken, copy: Path, name: str) -> None:
    original = (taken.directory / name).read_bytes()
    checkpoint, body = parse(name, original, KINDS[name])

    @bounded(100)
    @given(st.integers(0, len(body) - 1), st.binary(max_size=8), st.integers(0, 8))
    def check_one(at: int, middle: bytes, left_out: int) -> None:
        content = b"".join([body[:at], middle, body[at + left_out :]])
        (copy / name).write_bytes(pack_header(KINDS[name], SPACE, checkpoint, content) + content)
        survives(copy)

    try:
        check_one()
    finally:
        (copy / name).write_bytes(original)


@bounded(200)
@given(st.binary(max_size=2 * HEADER_SIZE) | st.binary(max_size=HEADER_SIZE).map(lambda rest: b"POSTCKPT\1\0" + rest))
def test_any_bytes_as_a_file(content: bytes) -> None:
    for kind in Kind:
        with pytest.raises(PostcopyError):
            parse("file", content, kind)


@bounded(200)
@given(values.map(packed) | st.binary(max_size=60))
def test_any_bytes_as_a_body(content: bytes) -> None:
    for kind in (About, Tree, Manifest):
        with pytest.raises(PostcopyError):
            decode(kind, content)


ranges = st.lists(st.integers(0, 40), max_size=8).map(
    lambda found: PageRanges.from_pairs((page * PAGE_SIZE, (page + 1) * PAGE_SIZE) for page in found)
)


@bounded(300)
@given(
    ranges.map(PageRanges.pack) | st.binary(max_size=40),
    ranges.map(PageRanges.pack) | st.binary(max_size=40),
    st.binary(max_size=6),
    st.binary(max_size=50),
)
def test_any_index(held: bytes, zero: bytes, pages: bytes, checksums: bytes) -> None:
    try:
        index = Index.unpack(PackedIndex(held, zero, pages, checksums))
    except PostcopyError:
        return
    assert index.pack() == PackedIndex(held, zero, pages, checksums)


# -- well-typed, but senseless -----------------------------------------------------------------------------------------


def step(path: str) -> Iterator[str | int]:
    """The keys and indices of a path like ``a.b[3].c``."""
    for name, number in re.findall(r"([a-z_]+)|\[(-?\d+)\]", path):
        yield name or int(number)


def with_value(whole: Any, path: str, value: Any) -> Any:
    """A copy of ``whole`` (plain) in which ``path`` is ``value``, or what ``value`` makes of what is there."""
    made = plain(packed(whole))
    *way, last = step(path)
    place = made
    for key in way:
        place = place[key]
    place[last] = value(place[last]) if callable(value) else value
    return made


def span(*pairs: tuple[int, int]) -> bytes:
    """Packed page ranges."""
    return PageRanges.from_pairs(pairs).pack()


def terminal(**content: Any) -> dict[str, Any]:
    """A pseudoterminal with something in it."""
    whole = {"output": b"", "lines": [], "typed": b"", "literal_next": False, "stopped": 0, **content}
    modes = {"locked": False, "packets": False, "session": 0, "foreground": 0}
    return {"index": 0, "settings": bytes(44), "window": bytes(8), **modes, "content": whole}


def twice(items: list[Any]) -> list[Any]:
    """With the first item once more."""
    return [items[0], *items]


def with_signal(number: int) -> bytes:
    """A siginfo."""
    return number.to_bytes(4, "little", signed=True) + bytes(124)


def zombie(pid: int, parent: int = 0, session: int = 0, status: int = 0) -> dict[str, Any]:
    """One that cannot be: the root is somebody else."""
    lineage = {"parent": parent, "session": session, "process_group": 0, "exit_signal": 17, "foreground": False}
    return {"pid": pid, "lineage": lineage, "name": b"z", "uid": 0, "status": status}


def memory(kind: str, size: int, huge_shift: int = 0, segment: int = 0) -> dict[str, Any]:
    """Shared memory without pages; ``segment``: the size of the System V segment that it is."""
    system_v = {"identifier": 1, "key": 0, "size": segment, "removed": False} if segment else None
    common = {"space": 1 << 20, "inode": 1, "name": "m", "mode": 0o600, "owner": [0, 0], "seals": 0, "reserved": True}
    own = {"kind": kind, "size": size, "huge_shift": huge_shift, "system_v": system_v}
    return common | own | {"sent": bytes(8), "lazy": bytes(8)}


def unix(**changes: Any) -> dict[str, Any]:
    """The description of a Unix socket."""
    common = {"protocol": 0, "inode": 5, "family": 1, "type": 1, "nonblocking": False, "owner": [0, 0]}
    plain_one = {
        "socket": common | {"options": [], "filter": b""},
        "name": b"",
        "place": "",
        "mode": 0,
        "file_owner": [0, 0],
        "peer": 0,
        "made_by": None,
        "backlog": -1,
        "shutdown": 0,
        "reset": False,
        "queue": [],
    }
    return {"unix": plain_one | changes}


P = "processes[0]"
HUGE = 2 << 20
SENSELESS: list[tuple[str, Any, str]] = [
    ("processes", [], "state.processes: a length of 0"),
    ("processes", twice, "tid"),
    (f"{P}.pid", 3, "is not the pid 3"),
    (f"{P}.space", 1 << 32, "space: 4294967296 is not within 0 to 4294967295"),
    (f"{P}.stopped_by", 65, "stopped_by: 65"),
    (f"{P}.lineage.parent", 7, "there are 0 processes without a parent"),
    (f"{P}.lineage.exit_signal", 65, "exit_signal"),
    (
        "shared_memory",
        [memory("memfd", 4096, 21)],
        "shared_memory[0].huge_shift: memory that is not made of whole pages",
    ),
    ("shared_memory", [memory("deleted", HUGE, 21)], "shared_memory[0].huge_shift: 21 for memory that is deleted"),
    ("shared_memory", [memory("memfd", HUGE, 12)], "shared_memory[0].huge_shift: 12 for memory that is"),
    (
        "shared_memory",
        [memory("huge", HUGE, 21) | {"lazy": span((0, PAGE_SIZE))}],
        "shared_memory[0].lazy: 0x0-0x1000 is not made of whole pages of 2097152 bytes",
    ),
    (
        "shared_memory",
        [memory("system_v", HUGE, 21, HUGE + 1)],
        "shared_memory[0].system_v.size: 2097153 bytes in memory",
    ),
    (
        "shared_memory",
        [memory("system_v", 8192, 0, 4096)],
        "shared_memory[0].system_v.size: 4096 bytes in memory of 8192",
    ),
    ("zombies", [zombie(99, parent=98)], "process 99 is not a descendant of the root"),
    ("zombies", [zombie(99, session=98), zombie(99, session=98)], "tid 99 occurs twice"),
    (f"{P}.threads", [], "threads: a length of 0"),
    (f"{P}.threads", twice, "occurs twice"),
    (f"{P}.threads[0].registers", bytes(215), "registers: a length of 215"),
    (f"{P}.threads[0].xstate", bytes(1 << 20), "xstate: a length of 1048576"),
    (f"{P}.threads[0].name", b"sixteen letters!", "name: a length of 16"),
    (f"{P}.threads[0].name", b"a\0b", "has a NUL"),
    (f"{P}.threads[0].pending", [b""], "pending[0]: 0 bytes; it must have 128"),
    (f"{P}.threads[0].pending", [with_signal(0)], "there is no signal 0"),
    (f"{P}.threads[0].pending", [with_signal(-5)], "there is no signal -5"),
    (f"{P}.threads[0].alternate_stack", b"", "alternate_stack: a length of 0"),
    (f"{P}.threads[0].rseq.pointer", 1 << 63, "rseq.pointer"),
    (f"{P}.threads[0].sleep", {"call": 1, "left": 1 << 63}, "sleep.left"),
    (f"{P}.threads[0].credentials.groups", [0] * 65537, "groups: a length of 65537"),
    (f"{P}.threads[0].credentials.uids", [0, 0, 0, 1 << 32], "uids[3]: 4294967296"),
    (f"{P}.threads[0].scheduling.attributes", bytes(8), "attributes: a length of 8"),
    (f"{P}.threads[0].scheduling.affinity", [1 << 40], "affinity[0]"),
    (f"{P}.signals.actions", [bytes(32)] * 65, "actions: a length of 65"),
    (f"{P}.signals.actions[3]", bytes(31), "actions[3]: 31 bytes"),
    (f"{P}.signals.pending", [with_signal(65)], "there is no signal 65"),
    (f"{P}.timers.intervals", [bytes(32)] * 4, "intervals: a length of 4"),
    (f"{P}.timers.intervals[0]", b"", "intervals[0]: 0 bytes"),
    (f"{P}.limits.limits[7]", [2, 1], "limits[7]: soft 2 and hard 1"),
    (f"{P}.filesystem.cwd", "relative", "cwd: 'relative' is not an absolute path"),
    (f"{P}.filesystem.root", "/a\0b", "root: '/a\\x00b'"),
    (f"{P}.filesystem.umask", 0o1000, "umask: 512"),
    (f"{P}.attributes.oom_score_adj", -1001, "oom_score_adj: -1001"),
    (f"{P}.memory.exe", "/" * 5000, "exe"),
    (f"{P}.memory.brk", 1 << 60, "memory.brk"),
    (f"{P}.memory.auxv", bytes(15), "auxv: 15 bytes"),
    (f"{P}.memory.vdso", bytes(1), "vdso: 1 bytes for a mapping"),
    (f"{P}.memory.vmas", [], "vmas: a length of 0"),
    (f"{P}.memory.vmas", twice, "vmas[1].start"),
    (f"{P}.memory.vmas", lambda vmas: vmas[::-1], "vmas[1].start"),
    (f"{P}.memory.vmas", lambda vmas: [v for v in vmas if v["backing"] != "vdso"], "0 of them are the vdso"),
    (f"{P}.memory.vmas[0].start", lambda start: start + 1, "is no page boundary"),
    (f"{P}.memory.vmas[0].end", 0, "end: 0x0 is not behind start"),
    (f"{P}.memory.vmas[0].file", 1 << 20, "file: 1048576 is none of the"),
    (f"{P}.memory.vmas[0].file", -1, "file: -1 is none of the"),
    (f"{P}.memory.vmas[0].offset", 1, "offset: 0x1 is no page boundary"),
    (f"{P}.memory.vmas[0].backing", "gold", "backing: 'gold' is none of"),
    (f"{P}.memory.vmas[-1].shared", True, "is never shared"),
    (f"{P}.memory.vmas[-1].flags", ["\x1b[2J"], "flags: '\\x1b[2J'"),
    (f"{P}.memory.files[0].path", "", "files[0].path"),
    (f"{P}.memory.lazy", b"\1", "lazy: page ranges of 1 bytes"),
    (f"{P}.memory.lazy", span((0, PAGE_SIZE)), "lazy: 0x0-0x1000 is outside"),
    (f"{P}.memory.lazy", span((0, ADDRESS_LIMIT)), "lazy: 0x0-"),
    (f"{P}.memory.sent", span((0, PAGE_SIZE)), "sent: 0x0-0x1000 is outside"),
    (f"{P}.memory.guards", span((0, PAGE_SIZE)), "guards: 0x0-0x1000 is outside"),
    (f"{P}.slots", twice, "occurs twice"),
    (f"{P}.slots[0].description", -1, "is none of the"),
    (f"{P}.slots[0].description", 1 << 40, "is none of the"),
    (f"{P}.leader_ended", 9, "leader_ended: 0x9 is not how a thread ends"),
    (f"{P}.table_of", 3, "processes[0].table_of: 3 is none before it that has its own"),
    (f"{P}.places_of", 3, "processes[0].places_of: 3 is none before it that has its own"),
    (f"{P}.threads[0].filesystem", {"root": "", "cwd": "/", "umask": 0}, "filesystem.root: ''"),
    (
        "pid_namespaces",
        [{"init": 99, "parent": 0, "names": [[99, 1]], "awaited_by": [], "mounted_for": []}],
        "pid_namespaces[0].init: 99 is no process",
    ),
    ("descriptors.descriptions[0]", {}, "kind: none where exactly one is due"),
    (
        "descriptors.descriptions[0]",
        {"file": {"path": "/x", "flags": 0, "position": 0, "kind": "path"}, "stream": {"fd": 0, "flags": 0}},
        "kind: file and stream",
    ),
    ("descriptors.descriptions[0]", {"pipe": {"pipe": 0, "flags": 0}}, "pipe.pipe: 0 is none of the 0 pipes"),
    ("descriptors.descriptions[0]", {"stream": {"fd": 7, "flags": 0}}, "stream.fd: 7"),
    ("descriptors.descriptions[0]", {"stream": {"fd": 0, "flags": 0, "settings": b"12"}}, "settings: a length of 2"),
    ("descriptors.descriptions[0]", {"stream": {"fd": 0, "flags": 0}}, "of which the manifest says nothing"),
    (
        "descriptors.descriptions[0]",
        {"file": {"path": "/x", "flags": 0, "position": 0, "kind": "odd"}},
        "kind: 'odd' is none of",
    ),
    ("descriptors.descriptions[0]", unix(backlog=1, pending=[7]), "socket 7 does not wait to be accepted by 5 alone"),
    ("descriptors.descriptions[0]", unix(backlog=0, pending=[7, 8]), "2 connections wait for socket 5, with a"),
    ("descriptors.descriptions[0]", unix(accepted=True), "accepted: it has no name or is not connected"),
    ("descriptors.descriptions[0]", unix(maker=3, backlog=1), "process 3, maker of socket 5, has no table"),
    (
        "descriptors.descriptions[0]",
        unix(queue=[{"content": b"", "sender": b"", "credentials": [77, 0, 0]}]),
        "a message in socket 5 is of process 77",
    ),
    ("descriptors.descriptions[0]", {"ended": {"identity": 1, "status": 0x8B, "flags": 2}}, "status: 0x8b is none of"),
    (
        "descriptors.descriptions[0]",
        {
            "fanotify": {
                "made_with": 0,
                "event_flags": 0,
                "flags": 2,
                "marks": [{"kind": "odd", "path": "/", "flags": 0, "mask": 1, "ignored": 0}],
            }
        },
        "kind: 'odd' is none of",
    ),
    ("descriptors.pipes", [{"content": bytes(4097), "capacity": 4096}], "4097 bytes in a pipe of 4096"),
    ("descriptors.pipes", [{"content": b"", "capacity": 1 << 40}], "capacity"),
    ("descriptors.ptys", [terminal(lines=[b"line\n"] * 900)], "content: more than the 4095 bytes that can be typed"),
    ("descriptors.ptys", [terminal(output=bytes(1 << 20))], "output: a length of 1048576"),
    ("descriptors.ptys", [terminal(stopped=3)], "stopped: 3"),
    ("late_signals", [{"pid": 1, "tid": 1, "siginfo": bytes(128)}], "late_signals[0].siginfo: there is no signal 0"),
    ("late_signals", [{"pid": 1, "tid": 1, "siginfo": with_signal(9)[:64]}], "late_signals[0].siginfo: a length of 64"),
    ("files", [{"path": "x", "size": 0, "build_id": b"", "changing": False}], "files[0].path: 'x'"),
    ("files", [{"path": "/x", "size": 1 << 63, "build_id": b"", "changing": False}], "files[0].size"),
]


def test_zombies_that_have_ended_as_none_can_are_refused(taken: Taken) -> None:
    for status in (0x80 | 9, 0x80, 65, 11 | 1 << 8, 19):
        ended = [zombie(99, parent=taken.tree.processes[0].pid, status=status)]
        changed_tree = decode(Tree, packed(with_value(plain(encode(taken.tree)), "zombies", ended)))
        with pytest.raises(ProtocolError, match=f"zombies.0..status: {status:#x} is not how a process ends"):
            check(changed_tree, taken.manifest)


@pytest.mark.parametrize(
    ("path", "value", "expected"), SENSELESS, ids=[f"{path}-{i}" for i, (path, *_) in enumerate(SENSELESS)]
)
def test_senseless_state_is_refused_with_its_field_and_value(
    taken: Taken, path: str, value: Any, expected: str
) -> None:
    check(taken.tree, taken.manifest)
    changed_tree = decode(Tree, packed(with_value(plain(encode(taken.tree)), path, value)))
    with pytest.raises(ProtocolError) as caught:
        check(changed_tree, taken.manifest)
    assert expected in caught.value.message
    assert caught.value.message.startswith("state.")


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("pid", 5, "manifest.pid: 5 is none of the state's processes"),
        ("tids", twice, "manifest.tids"),
        ("tids", [], "manifest.tids: a length of 0"),
        ("xsave_size", 1 << 40, "manifest.xsave_size"),
        ("memory_bytes", (1 << 64) - 1, "manifest.memory_bytes"),
        ("huge_pages", [(1 << 60, 1)], "manifest.huge_pages"),
        ("huge_pages", [(21, 1 << 60)], "manifest.huge_pages"),
        ("init", True, "manifest.init: True is not what the state says of the root"),
    ],
)
def test_senseless_manifest_is_refused(taken: Taken, path: str, value: Any, expected: str) -> None:
    manifest = decode(Manifest, packed(with_value(plain(encode(taken.manifest)), path, value)))
    with pytest.raises(ProtocolError) as caught:
        check(taken.tree, manifest)
    assert caught.value.message.startswith(expected)


def test_page_that_is_lazy_where_no_fault_can_be_caught_is_refused(taken: Taken) -> None:
    tree = plain(encode(taken.tree))
    memory = tree["processes"][0]["memory"]
    of_file = next(vma for vma in memory["vmas"] if vma["backing"] == "file")
    anonymous = next(vma for vma in memory["vmas"] if vma["backing"] == "anonymous")
    vdso = next(vma for vma in memory["vmas"] if vma["backing"] == "vdso")
    page = (anonymous["start"], anonymous["start"] + PAGE_SIZE)
    wrong = [
        ({"lazy": span((of_file["start"], of_file["end"]))}, "lazy: "),
        ({"sent": span((vdso["start"], vdso["end"]))}, "sent: "),
        ({"lazy": span(page), "sent": span(page)}, "is in sent as well"),
        ({"guards": span(page), "sent": span(page)}, "is in sent as well"),
        ({"lazy": span(page), "guards": span(page)}, "as well"),
    ]
    for change, expected in wrong:
        tree["processes"][0]["memory"] = {**memory, **change}
        with pytest.raises(ProtocolError, match=expected):
            check(decode(Tree, packed(tree)), taken.manifest)


def test_part_of_a_huge_page_and_a_huge_page_without_a_reserve_are_not_lazy(taken: Taken) -> None:
    tree = plain(encode(taken.tree))
    memory = tree["processes"][0]["memory"]
    anonymous = next(vma for vma in memory["vmas"] if vma["backing"] == "anonymous")
    huge = {**anonymous, "backing": "huge", "huge_shift": 21, "start": HUGE, "end": 2 * HUGE}
    for lazy, flags, expected in (
        ((HUGE, HUGE + PAGE_SIZE), [], "lazy: 0x200000-0x201000 is not made of whole pages"),
        ((HUGE, 2 * HUGE), ["nr"], "lazy: 0x200000-0x400000 is outside"),
    ):
        vmas = [{**huge, "flags": flags}, *memory["vmas"]]
        tree["processes"][0]["memory"] = {**memory, "vmas": vmas, "lazy": span(lazy)}
        with pytest.raises(ProtocolError, match=expected):
            check(decode(Tree, packed(tree)), taken.manifest)


@bounded(300)
@given(st.data())
def test_changed_states_are_sound_or_refused(taken: Taken, data: st.DataObject) -> None:
    value = data.draw(changed(plain(encode(taken.tree))))
    try:
        check(decode(Tree, packed(value)), taken.manifest)
    except (OverflowError, ValueError):
        return  # what msgpack cannot hold, nobody can send
    except PostcopyError:
        return
