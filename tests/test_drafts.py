"""What is begun before the freeze: whatever the program has changed since, it moves as it is; nothing is told twice."""

import contextlib
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from postcopy.drafts import ProcessState, State, complete, complete_process, shorten, shorten_process
from postcopy.dump_side import memory
from postcopy.dump_side.choices import Choices
from postcopy.dump_side.collect import collect
from postcopy.dump_side.frozen_tree import FrozenTree
from postcopy.dump_side.looks import Looker
from postcopy.dump_side.opened import Trusted
from postcopy.dump_side.shared_memory import SharedObjects
from postcopy.dump_side.smaps import SmapsReader
from postcopy.dump_side.socket_looks import Known
from postcopy.dump_side.survey import survey
from postcopy.errors import ProtocolError
from postcopy.restore_side.birth import Newborn, give_birth, take_back
from postcopy.restore_side.offspring import Family
from postcopy.restore_side.tree import Begun
from postcopy.state import Descriptors, Draft, Lineage, Memory, Tree, decode, encode
from tests import migrate
from tests.hosts import Pair, wait_until
from tests.programs.redrafting import HOW
from tests.test_trees import Clan

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making the two hosts takes root")

SECONDS = 30
FIRST_PID = 31000


# -- moves -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
def test_tree_that_is_not_as_it_was_drafted_moves(
    hosts: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    clan = Clan(hosts.a, tmp_path, 4)
    command = [sys.executable, "-m", "tests.programs.redrafting", how]
    monkeypatch.setattr(migrate, "postcopy_command", lambda: command)
    moved = migrate.move(hosts.a, hosts.b, clan.pid)
    moved.wait_drained()
    drafted = next(event["processes"] for event in moved.dump_events if event["event"] == "drafted")
    assert drafted == {"nothing": 0, "one-process-less": 3, "one-process-more": 5}.get(how, 4)
    clan.host = hosts.b
    clan.goes_on()


def test_process_ids_can_be_had_again_at_once() -> None:
    root, *children = range(FIRST_PID, FIRST_PID + 6)
    lineages = {root: Lineage(0, 0, root, 17, False), **{pid: Lineage(root, 0, root, 17, False) for pid in children}}
    family = Family(lineages, {}, {})
    for _ in range(20):
        newborns: dict[int, Newborn] = {}
        newborn = give_birth(root, None)
        try:
            Begun(family, newborn, newborns)
            assert set(newborns) == set(lineages)
        finally:
            take_back(list({**newborns, root: newborn}.values()))
        assert not any(os.path.exists(f"/proc/{pid}") for pid in lineages)


# -- what is said ------------------------------------------------------------------------------------------------------


HOLDING = """
import os, socket, sys, time
kept = {}
print("ready", flush=True)
with open(sys.argv[1]) as orders:
    while True:
        order = orders.readline()
        if order.endswith("\\n"):
            try:
                exec(order)
            except OSError:
                pass
            os.write(1, b".")
        else:
            time.sleep(0.002)
"""
# What a program may do to its files, and others to their names, between two looks.
ORDERS = (
    "kept[{0}] = os.open({1!r}, os.O_RDWR | os.O_CREAT)",
    "kept[{0}] = os.open({1!r}, os.O_RDONLY | os.O_CLOEXEC) if os.path.exists({1!r}) else 0",
    "kept[{0}] = os.open({2!r}, os.O_RDONLY)",
    "kept[{0}] = os.open({1!r}, os.O_PATH) if os.path.exists({1!r}) else 0",
    "kept[{0}] = os.open({1!r}, os.O_RDWR | os.O_APPEND | os.O_CREAT)",
    "kept[{0}] = os.dup(kept.get({3}, 1))",
    "kept[{0}] = os.dup(kept.get({3}, 1))",
    "os.dup2(kept.get({3}, 1), kept.get({0}, 1)) if kept.get({0}, 1) > 9 else 0",
    "os.close(kept.pop({0})) if kept.get({0}, 0) > 9 else 0",
    "os.close(kept.pop({0})) if kept.get({0}, 0) > 9 else 0",
    "os.lseek(kept.get({0}, -1), {3}, os.SEEK_SET)",
    "os.set_inheritable(kept.get({0}, 1), bool({3} % 2))",
    "os.set_blocking(kept.get({0}, -1), bool({3} % 2))",
    "os.rename({1!r}, {4!r}) if os.path.exists({1!r}) else 0",
    "open({1!r}, 'a').write('x')",
)


class Holding:
    """A program that does with its files what it is told."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._orders = directory / "orders"
        self._done = directory / "done"
        self._orders.touch()
        self._done.touch()
        null = os.open(os.devnull, os.O_RDWR)
        self.pid = os.fork()
        if not self.pid:
            os.dup2(null, 0)
            done = os.open(self._done, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(done, 1)
            os.dup2(null, 2)
            # Numbers above those that the interpreter takes are the orders' own.
            os.closerange(3, 256)
            os.execv(sys.executable, [sys.executable, "-S", "-c", HOLDING, str(self._orders)])
        os.close(null)

    def await_ready(self) -> None:
        """Wait until it takes orders."""
        wait_until(lambda: self._done.read_bytes().startswith(b"ready\n"), SECONDS, "the program is ready")

    def do(self, *orders: str) -> None:
        """Have it do that; done when this returns."""
        wanted = self._done.stat().st_size + len(orders)
        with self._orders.open("a") as stream:
            stream.write("".join(f"{order}\n" for order in orders))
        wait_until(lambda: self._done.stat().st_size >= wanted, SECONDS, f"{orders} are done")

    def end(self) -> None:
        """End it."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def holding(tmp_path: Path) -> Iterator[Holding]:
    program = Holding(tmp_path)
    try:
        program.await_ready()
        yield program
    finally:
        program.end()


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[FrozenTree]:
    tree = FrozenTree(pid)
    try:
        tree.freeze()
        yield tree
    finally:
        tree.thaw()
        tree.close()


def state_of(tree: FrozenTree, trusted: Trusted, known: Known | None = None, choices: Choices | None = None) -> Tree:
    """What is collected of a frozen tree."""
    smaps, looker = SmapsReader(trusted.known), Looker(trusted.known)
    looker.begin(known or Known())
    try:
        return collect(tree, smaps, looker, trusted, {}, SharedObjects(), choices, known=known)
    finally:
        smaps.close()
        looker.close()


def without_times(tree: Tree) -> Descriptors:
    """What is open; to look into a file without a name changes when it was read last."""
    found = tree.descriptors
    return replace(found, ghosts=[replace(ghost, times=(0, 0)) for ghost in found.ghosts])


@pytest.mark.parametrize("seed", range(6))
def test_what_is_remembered_of_files_is_what_a_look_would_find(holding: Holding, seed: int) -> None:
    chosen = random.Random(seed)
    names = [str(holding.directory / f"file-{number}") for number in range(5)]

    def order() -> str:
        numbers = chosen.randrange(12), chosen.randrange(12)
        name, other = chosen.sample(names, 2)
        return chosen.choice(ORDERS).format(numbers[0], name, str(holding.directory), numbers[1], other)

    holding.do("kept[0] = os.dup2(1, 10)", *(order() for _ in range(40)))
    differing = 0
    for _ in range(6):
        manifest, trusted = survey(holding.pid)
        holding.do(*(order() for _ in range(chosen.randrange(6))))
        with frozen(holding.pid) as tree:
            remembered, looked = state_of(tree, trusted), state_of(tree, replace(trusted, remembered={}))
        assert without_times(remembered) == without_times(looked)
        assert set(remembered.files) == set(looked.files)
        assert [each.slots for each in remembered.processes] == [each.slots for each in looked.processes]
        announced = {id(one) for one in trusted.draft.descriptions if one is not None}
        told = [id(one) in announced for one in remembered.descriptors.descriptions]
        differing += not all(told)
        said = decode(State, encode(shorten(remembered, trusted.draft, manifest.files)))
        drafted = decode(Draft, encode(trusted.draft))
        (process,) = remembered.processes
        shortened = shorten_process(process, trusted.draft.processes[0])
        completed = complete_process(decode(ProcessState, encode(shortened)), drafted.processes[0])
        assert complete(said, [completed], drafted, manifest.files) == remembered
    assert differing


def test_no_draft_of_what_has_changed_while_it_was_read(holding: Holding, monkeypatch: pytest.MonkeyPatch) -> None:
    _, trusted = survey(holding.pid)
    assert [sketch.pid for sketch in trusted.draft.processes] == [holding.pid]
    collected = memory.collect

    def torn(*arguments: Any) -> Memory:
        # As /proc/PID/maps shows what is moved up meanwhile: where it was, and once more where it is now.
        found: Memory = collected(*arguments)
        lower, upper = found.vmas[:2]
        return replace(found, vmas=[lower, replace(upper, start=lower.start, end=lower.end), *found.vmas[1:]])

    monkeypatch.setattr(memory, "collect", torn)
    _, trusted = survey(holding.pid)
    assert trusted.draft == Draft()


def test_nothing_is_said_twice(holding: Holding) -> None:
    names = [str(holding.directory / f"file-{number}") for number in range(8)]
    holding.do(*(f"kept[{number}] = os.open({name!r}, os.O_RDWR | os.O_CREAT)" for number, name in enumerate(names)))
    manifest, trusted = survey(holding.pid)
    with frozen(holding.pid) as tree:
        state = state_of(tree, trusted)
    said = shorten(state, trusted.draft, manifest.files)
    assert said.tree.processes == []
    shortened = shorten_process(state.processes[0], trusted.draft.processes[0])
    assert (shortened.laid_out, shortened.table) == (True, True)
    process = shortened.process
    assert (process.memory.vmas, process.memory.files, process.memory.vdso, process.slots) == ([], [], b"", [])
    assert not [one.file for one in said.tree.descriptors.descriptions if one.file and one.file.path in names]


def test_sockets_that_another_process_looks_at_are_what_a_look_would_find(holding: Holding) -> None:
    holding.do(
        *(f"kept[{n}] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)" for n in range(40)),
        *(f"kept[{n}] = socket.socket(socket.AF_UNIX)" for n in range(40, 60)),
        *(f"kept[{n}] = kept[{n - 60}].dup()" for n in range(60, 65)),
    )
    _, trusted = survey(holding.pid)
    assert len(set(trusted.sockets[holding.pid].values())) == 60
    assert len(trusted.sockets[holding.pid]) == 65
    holding.do(
        *(f"kept[{n}].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, {10000 + n})" for n in range(0, 60, 7)),
        "kept.pop(3).close()",
        "kept[3] = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)",
        "kept[90] = os.open('/dev/null', os.O_RDONLY)",
        "kept[91] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        f"kept[92] = socket.socket(socket.AF_UNIX); kept[92].bind({str(holding.directory / 'name')!r})",
        f"kept[93] = os.open({str(holding.directory / 'name')!r}, os.O_PATH)",
    )
    with frozen(holding.pid) as tree:
        told = state_of(tree, trusted, Known(trusted.sockets))
        looked = state_of(tree, trusted)
    assert told.descriptors == looked.descriptors
    (path,) = [one.file for one in told.descriptors.descriptions if one.file and one.file.kind == "path"]
    assert path.path == str(holding.directory / "name")
    sizes = {
        option.value
        for one in told.descriptors.descriptions
        if one.inet is not None or one.unix is not None
        for option in (one.inet or one.unix).socket.options  # type: ignore[union-attr]
    }
    assert (2 * 10007).to_bytes(4, "little") in sizes


def test_external_sockets_are_left_out_among_many(holding: Holding) -> None:
    holding.do(*(f"kept[{n}] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)" for n in range(40)))
    _, trusted = survey(holding.pid)
    fd, inode = list(trusted.sockets[holding.pid].items())[35]
    choices = Choices(external=frozenset({f"socket:[{inode}]"}))
    _, trusted = survey(holding.pid, choices)
    with frozen(holding.pid) as tree:
        state = state_of(tree, trusted, Known(trusted.sockets), choices)
    described = {slot.fd: state.descriptors.descriptions[slot.description] for slot in state.processes[0].slots}
    assert described[fd].external is not None
    assert sum(one.inet is not None for one in described.values()) == 39


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"descriptions": [99999]}, "state.descriptions: 99999 is none"),
        ({"descriptions": [0, 0]}, "the same twice"),
        ({"files": [1 << 40]}, "state.files: "),
    ],
)
def test_what_no_draft_has_is_refused(holding: Holding, change: dict[str, list[int]], expected: str) -> None:
    holding.do(f"kept[0] = os.open({str(holding.directory / 'file')!r}, os.O_RDWR | os.O_CREAT)")
    manifest, trusted = survey(holding.pid)
    with frozen(holding.pid) as tree:
        state = state_of(tree, trusted)
    said = shorten(state, trusted.draft, manifest.files)
    with pytest.raises(ProtocolError, match="1 where none are due"):
        complete(replace(said, tree=state), state.processes, trusted.draft, manifest.files)
    shortened = shorten_process(state.processes[0], trusted.draft.processes[0])
    for unheard_of in (replace(shortened, laid_out=True, table=False), replace(shortened, laid_out=False, table=True)):
        with pytest.raises(ProtocolError, match=f"the draft has no process {holding.pid}"):
            complete_process(unheard_of, None)
    with pytest.raises(ProtocolError, match=expected):
        complete(replace(said, **change), state.processes, trusted.draft, manifest.files)
