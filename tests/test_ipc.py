"""System V semaphores and message queues, which nobody has open, move with the tree that uses them."""

import contextlib
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postcopy.kernel import message_queues, semaphores
from postcopy.kernel.ipc import listed
from tests.hosts import Host, Pair, wait_until
from tests.migrate import PORT, MigrationFailed, move, start_dump, start_restore
from tests.programs import numbered
from tests.sides import Side

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making the two hosts takes root")

SECONDS = 30
PID = 4300
OPTION = ("--sysv-ipc",)
READ, WRITE, BOTH = os.O_RDONLY, os.O_WRONLY, os.O_RDWR


class Program:
    """The program, and what it answers."""

    def __init__(self, host: Host, directory: Path) -> None:
        self._orders, self._answers = directory / "orders", directory / "answers"
        self._orders.touch()
        self._answers.touch()
        command = [sys.executable, "-m", "tests.programs.numbered", str(self._orders), str(self._answers)]
        self.process = host.popen(command, pid=PID)

    def ask(self, who: str, expression: str) -> Any:
        """What one of its processes makes of an expression: its value, or the name of an error."""
        before = len(self._answers.read_text().splitlines())
        with self._orders.open("a") as stream:
            stream.write(f"{who} {expression}\n")
        wait_until(lambda: len(self._answers.read_text().splitlines()) > before, SECONDS, f"{who} answers {expression}")
        answer = self._answers.read_text().splitlines()[before]
        return answer if answer.startswith("E") else eval(answer)

    def parent(self, expression: str) -> Any:
        """Ask the parent."""
        return self.ask("parent", expression)

    def child(self, expression: str) -> Any:
        """Ask the child."""
        return self.ask("child", expression)


@pytest.fixture
def program(hosts: Pair, tmp_path: Path) -> Program:
    started = Program(hosts.a, tmp_path)
    started.parent("1")
    started.child("1")
    return started


def of(host: Host, kind: str) -> list[list[str]]:
    """The objects of a host."""
    return [line.split() for line in host.run(["cat", f"/proc/sysvipc/{kind}"]).stdout.decode().splitlines()[1:]]


def test_semaphores_move_with_what_is_to_be_undone(hosts: Pair, program: Program) -> None:
    found = program.parent("semget(0x1234, 5)")
    nameless = program.child("semget(0, 1)")
    program.parent(f"setall({found}, 3, 0, 32767, 7, 0)")
    program.parent(f"semop({found}, (0, -2, SEM_UNDO), (3, -1, 0))")
    program.child(f"semop({found}, (1, 9, SEM_UNDO), (2, -32767, SEM_UNDO))")
    program.child(f"semop({found}, (0, 4, 0))")
    program.child(f"semop({nameless}, (0, 1, SEM_UNDO))")
    before = [5, 9, 0, 6, 0]
    users = program.parent(f"users({found}, 5)")
    state = program.parent(f"status({found}, 66)")
    assert program.parent(f"values({found}, 5)") == before
    for source, destination in ((hosts.a, hosts.b), (hosts.b, hosts.a)):
        move(source, destination, PID, dump_options=OPTION).wait_drained()
        assert of(source, "sem") == []
        assert program.child(f"values({found}, 5)") == before
        assert program.child(f"users({found}, 5)") == users
        assert program.parent(f"status({found}, 66)") == state
        assert program.parent("semget(0x1234, 0)") == found
        assert program.parent(f"values({nameless}, 1)") == [1]
    program.parent("os.kill(child, 9), os.waitpid(child, 0)")
    # What the child had done is undone, within the range of a semaphore, and what the parent had done is not.
    assert program.parent(f"values({found}, 5)") == [5, 0, 32767, 6, 0]
    assert program.parent(f"values({nameless}, 1)") == [0]
    assert program.parent(f"semop({found}, (0, -6, 0))") == "EAGAIN"
    hosts.a.run(["kill", "-9", str(PID)])
    wait_until(lambda: [row[0] for row in of(hosts.a, "sem")] == ["4660", "0"], SECONDS, "both are left")
    check = f"from tests.programs.numbered import values; print(values({found}, 5))"
    assert hosts.a.run([sys.executable, "-c", check]).stdout.decode().strip() == "[7, 0, 32767, 6, 0]"


def test_message_queues_move_with_their_messages(hosts: Pair, program: Program) -> None:
    queue, empty = program.parent("msgget(77)"), program.parent("msgget(0)")
    for number, content in enumerate([b"first", b"", b"x" * 5000, b"\0\n"], start=1):
        program.parent(f"send({queue}, {number % 3 + 1}, {content!r})")
    program.child(f"send({empty}, 5, b'gone'), receive({empty})")
    state = program.parent(f"status({queue}, 71)")
    for source, destination in ((hosts.a, hosts.b), (hosts.b, hosts.a)):
        move(source, destination, PID, dump_options=OPTION).wait_drained()
        assert of(source, "msg") == []
        assert program.child(f"status({queue}, 71)") == state
        assert program.child(f"receive({empty})") == "ENOMSG"
    assert program.child(f"receive({queue}, 1)") == (1, b"x" * 5000)
    assert program.child(f"receive({queue})") == (2, b"first")
    assert program.child(f"receive({queue})") == (3, b"")
    assert program.parent(f"receive({queue})") == (2, b"\0\n")
    assert program.parent(f"receive({queue})") == "ENOMSG"
    assert program.parent("msgget(77)") == queue


def test_queue_that_somebody_waits_for_moves(hosts: Pair, program: Program, tmp_path: Path) -> None:
    queue, found = program.parent("msgget(0)"), program.parent("semget(0, 1)")
    with (tmp_path / "orders").open("a") as stream:
        stream.write(f"child _call(70, {queue}, ctypes.create_string_buffer(64), 50, 0, 0)\n")
        stream.write(f"parent _call(65, {found}, TAKE, 1)\n")
    child = int((hosts.a.proc / str(PID) / "task" / str(PID) / "children").read_text())
    wait_until(partial(waits, hosts.a, PID, 65), SECONDS, "the parent waits")
    wait_until(partial(waits, hosts.a, child, 70), SECONDS, "the child waits")
    with pytest.raises(MigrationFailed, match=f"message queue {queue} .* has been used by process"):
        start_dump(hosts.a, hosts.b, PID)
    move(hosts.a, hosts.b, PID, dump_options=OPTION).wait_drained()
    giving = f"semop({found}, (0, 1, 0)), send({queue}, 3, b'abc')"
    hosts.b.run([sys.executable, "-c", f"from tests.programs.numbered import *; {giving}"], check=True)
    answers = tmp_path / "answers"
    wait_until(lambda: sorted(answers.read_text().splitlines()[4:]) == ["0", "3"], SECONDS, "both go on")


def waits(host: Host, pid: int, call: int) -> bool:
    """Whether a process is in this call."""
    return (host.proc / str(pid) / "syscall").read_text().startswith(f"{call} ")


def test_semaphores_of_those_who_have_ended(hosts: Pair, program: Program) -> None:
    found = program.child("semget(0x77, 1)")
    program.child(f"setall({found}, 5)")
    program.parent("os.kill(child, 9)")
    child = int((hosts.a.proc / str(PID) / "task" / str(PID) / "children").read_text())
    wait_until(lambda: hosts.a.proc_state(child) == "Z", SECONDS, "there is a zombie")
    with pytest.raises(MigrationFailed, match="has been used by process"):
        start_dump(hosts.a, hosts.b, PID)
    move(hosts.a, hosts.b, PID, dump_options=OPTION).wait_drained()
    assert program.parent(f"values({found}, 1)") == [5]
    # From here on it is known whose it is.
    program.parent("os.waitpid(child, 0)")
    with pytest.raises(MigrationFailed, match=f"has been used by process {PID}"):
        start_dump(hosts.b, hosts.a, PID)
    assert program.parent(f"users({found}, 1)") == [PID]


def test_what_nobody_can_tell_is_said(hosts: Pair, program: Program) -> None:
    found = program.child("semget(0x77, 1)")
    program.child(f"setall({found}, 5)")
    program.parent("os.kill(child, 9), os.waitpid(child, 0)")
    migration = move(hosts.a, hosts.b, PID)
    log = "".join(text for _, text in migration.logs())
    assert f"System V semaphore set {found} (key 0x77) has been used last by nobody who lives" in log
    assert of(hosts.b, "sem") == []


@pytest.mark.parametrize("kind", ["sem", "msg"])
def test_what_others_may_use_is_refused_unless_it_is_said_to_be_the_trees_own(
    hosts: Pair, program: Program, kind: str
) -> None:
    made = "setall(semget(9, 1), 1)" if kind == "sem" else "send(msgget(9), 1, b'x')"
    program.parent(made)
    with pytest.raises(MigrationFailed, match="it is moved with --sysv-ipc"):
        start_dump(hosts.a, hosts.b, PID)
    use = "semop(semget(9, 0), (0, 1, 0))" if kind == "sem" else "receive(msgget(9))"
    other = hosts.a.popen([sys.executable, "-c", f"from tests.programs.numbered import *; {use}; time.sleep(1000)"])
    mine = program.parent("os.getpid()")
    column = {"sem": None, "msg": 6}[kind]  # lrpid

    def is_used() -> bool:
        if column is not None:
            return of(hosts.a, kind)[0][column] not in ("0", str(mine))
        return bool(program.parent("users(semget(9, 0), 1)") != [mine])

    wait_until(is_used, SECONDS, "the other process uses it")
    # Of a semaphore, only the last one is known who has used it: the tree has to use it again.
    if kind == "sem":
        program.parent("setall(semget(10, 2), 1, 1)")
        extra = "from tests.programs.numbered import *; semop(semget(10, 0), (1, 1, 0)); time.sleep(1000)"
        another = hosts.a.popen([sys.executable, "-c", extra])
        wait_until(lambda: program.parent("users(semget(10, 0), 2)")[1] != mine, SECONDS, "it is used, too")
    with pytest.raises(MigrationFailed, match=r"is used by process \d+, too, which is not moved"):
        start_dump(hosts.a, hosts.b, PID, options=OPTION)
    assert program.child("1") == 1
    other.kill()
    if kind == "sem":
        another.kill()


@pytest.mark.parametrize("taken", ["semget(0x55, 1)", "msgget(0x66)"])
def test_what_is_taken_at_the_destination_is_refused_before_the_freeze(
    hosts: Pair, program: Program, taken: str
) -> None:
    program.parent("setall(semget(0x55, 1), 1), send(msgget(0x66), 1, b'x')")
    hosts.b.run([sys.executable, "-c", f"from tests.programs.numbered import *; {taken}"], check=True)
    migration = start_dump(hosts.a, hosts.b, PID, options=OPTION)
    with pytest.raises(MigrationFailed, match="is taken here"):
        start_restore(migration)
    assert program.child("values(semget(0x55, 0), 1)") == [1]
    assert program.child("receive(msgget(0x66))") == (1, b"x")


def test_failed_restore_leaves_none(hosts: Pair, program: Program, tmp_path: Path) -> None:
    script = tmp_path / "failing"
    script.write_text('#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" != post-restore ]\n')
    script.chmod(0o755)
    program.parent("setall(semget(0x55, 1), 1), send(msgget(0x66), 1, b'x')")
    queue = program.parent(f"mq_open('named', {BOTH | os.O_CREAT})")
    program.parent(f"mq_send({queue}, 2, b'first'), mq_send({queue}, 1, b'last'), mq_send({queue}, 2, b'second')")
    migration = start_dump(hosts.a, hosts.b, PID, options=OPTION)
    with pytest.raises(MigrationFailed):
        start_restore(migration, options=("--action-script", str(script)))
    wait_until(lambda: not of(hosts.b, "sem") and not of(hosts.b, "msg"), SECONDS, "nothing is left")
    assert not exists(hosts.b, "named")
    received = [program.parent(f"mq_receive({queue})") for _ in range(3)]
    assert received == [(2, b"first"), (2, b"second"), (1, b"last")]
    assert program.parent("receive(msgget(0x66))") == (1, b"x")
    assert program.child("values(semget(0x55, 0), 1)") == [1]


def test_set_that_somebody_who_has_ended_has_used_last_is_found_by_what_is_to_be_undone(
    hosts: Pair, program: Program
) -> None:
    found = program.parent("semget(0x93, 1)")
    program.parent(f"semop({found}, (0, 5, SEM_UNDO))")
    program.parent(f"worker('semop({found}, (0, 1, 0))')")
    with pytest.raises(MigrationFailed, match="--sysv-ipc"):
        move(hosts.a, hosts.b, PID)
    assert program.parent(f"values({found}, 1)") == [6]
    move(hosts.a, hosts.b, PID, dump_options=OPTION).wait_drained()
    assert program.parent(f"values({found}, 1)") == [6]


def test_who_has_made_a_set_keeps_access_to_it(hosts: Pair, program: Program) -> None:
    program.child("os.setgid(1001), os.setuid(1000)")
    found = program.child("_call(64, 0x79, 1, 0o1600)")
    program.child(f"semop({found}, (0, 1, SEM_UNDO))")
    program.parent(f"ipc_set({found}, 66, 4, '<I', 2000)")
    for source, destination in ((hosts.a, hosts.b), (hosts.b, hosts.a)):
        move(source, destination, PID, dump_options=OPTION).wait_drained()
        assert program.child(f"values({found}, 1)") == [1]
    program.parent("os.kill(child, 9), os.waitpid(child, 0)")
    assert program.parent(f"values({found}, 1)") == [0]


def test_hundreds_of_semaphores_with_something_to_undo(hosts: Pair, program: Program) -> None:
    found = program.parent("semget(0x94, 700)")
    program.parent(f"[semop({found}, (n, n + 1, SEM_UNDO)) for n in range(700)][0]")
    move(hosts.a, hosts.b, PID, dump_options=OPTION).wait_drained()
    assert program.child(f"values({found}, 700)") == list(range(1, 701))
    hosts.b.run(["kill", "-9", str(PID)])
    wait_until(lambda: program.child(f"values({found}, 700)") == [0] * 700, SECONDS, "all is undone")


def test_queue_that_was_made_smaller_than_what_is_in_it(hosts: Pair, program: Program) -> None:
    queue = program.parent("msgget(85)")
    program.parent(f"send({queue}, 2, b'x' * 8192), send({queue}, 1, b'y' * 8192)")
    program.parent(f"ipc_set({queue}, 71, 88, '<Q', 100)")
    move(hosts.a, hosts.b, PID, dump_options=OPTION).wait_drained()
    assert program.parent(f"receive({queue})") == (2, b"x" * 8192)
    assert program.parent(f"send({queue}, 1, b'z')") == "EAGAIN"


def test_host_without_a_list_of_objects(hosts: Pair, program: Program) -> None:
    hosts.a.run(["mount", "-t", "tmpfs", "none", "/proc/sysvipc"], check=True)
    move(hosts.a, hosts.b, PID).wait_drained()


def test_killed_restore_leaves_none(hosts: Pair, program: Program, tmp_path: Path) -> None:
    program.parent("setall(semget(0x55, 1), 1), send(msgget(0x66), 1, b'x')")
    queue = program.parent(f"mq_open('named', {BOTH | os.O_CREAT})")
    address = ["--address", hosts.a.address, "--port", str(PORT)]
    command = ["dump", "--lazy-pages", "-t", str(PID), *address, *OPTION]
    source = Side.start(hosts.a, tmp_path / "dump.err", command)
    source.await_event("listening")
    destination = Side.start(hosts.b, tmp_path / "restore.err", ["restore", "--lazy-pages", *address], pause="built")
    destination.await_pause("built")
    assert (len(of(hosts.b, "sem")), len(of(hosts.b, "msg")), exists(hosts.b, "named")) == (1, 1, True)
    destination.process.kill()
    source.ends(7)
    wait_until(lambda: not of(hosts.b, "sem") and not of(hosts.b, "msg"), SECONDS, "they are gone")
    wait_until(lambda: not exists(hosts.b, "named"), SECONDS, "the queue is gone")
    assert (len(of(hosts.a, "sem")), len(of(hosts.a, "msg")), exists(hosts.a, "named")) == (1, 1, True)
    assert program.parent(f"mq_attributes({queue})") == (0, 4, 100, 0)


# -- what SEM_UNDO keeps, as it is asked for ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def semaphore() -> Iterator[int]:
    """A set of one."""
    identifier = numbered.semget(0, 1)
    yield identifier
    semaphores.remove(identifier)
    assert identifier not in listed("sem")


def attempt(identifier: int, operations: tuple[bytes, int]) -> str:
    """The error of operations that cannot be done."""
    packed, count = operations
    try:
        numbered._call(65, identifier, packed, count)
    except OSError as error:
        return os.strerror(error.errno or 0)
    raise AssertionError("it has been done")


AMOUNTS = st.integers(-32768, 32767) | st.sampled_from([0, 1, -1, 32767, -32768, 32766, -32767])


@settings(deadline=None)
@given(st.integers(0, 32767) | st.sampled_from([0, 32767]), AMOUNTS, AMOUNTS)
def test_adjustments_are_found_without_a_change(semaphore: int, value: int, amount: int, asked: int) -> None:
    numbered.setall(semaphore, value)  # which clears what was to be undone
    packed, count = semaphores.using(0, value, amount)
    assert numbered._call(65, semaphore, packed, count) == 0
    assert numbered.values(semaphore, 1) == [value]
    assert numbered.users(semaphore, 1) == [os.getpid()]
    question = semaphores.is_above if asked >= 0 else semaphores.is_below
    expected = amount > asked if asked >= 0 else amount < asked
    for _ in range(2):
        refused = attempt(semaphore, question(0, value, asked))
        assert refused == os.strerror(34 if expected else 11)  # ERANGE, EAGAIN
        assert (attempt(semaphore, semaphores.is_below(0, value, 0)) == os.strerror(34)) == (amount < 0)
        assert numbered.values(semaphore, 1) == [value]


def test_messages_are_read_without_being_received() -> None:
    identifier = numbered.msgget(0)
    try:
        for kind, content in ((3, b"abc"), (1, b""), (1 << 40, bytes(8000))):
            numbered.send(identifier, kind, content)
        for _ in range(2):
            found = message_queues.messages(identifier, message_queues.stat(identifier))
            assert found == [(3, b"abc"), (1, b""), (1 << 40, bytes(8000))]
        assert numbered.receive(identifier) == (3, b"abc")
    finally:
        message_queues.remove(identifier)


# -- POSIX message queues ----------------------------------------------------------------------------------------------


def test_posix_queues_move_with_their_messages(hosts: Pair, program: Program) -> None:
    both = program.parent(f"mq_open('named', {BOTH | os.O_CREAT})")
    writing = program.child(f"mq_open('named', {WRITE | os.O_NONBLOCK})")
    for priority, content in ((1, b"one"), (30000, b"two"), (1, b""), (1, b"\0" * 100)):
        program.parent(f"mq_send({both}, {priority}, {content!r})")
    hidden = program.parent(f"mq_open('hidden', {BOTH | os.O_CREAT | os.O_NONBLOCK}, 2, 50)")
    other = program.parent(f"mq_open('hidden', {READ | os.O_NONBLOCK}, 2, 50)")
    program.parent(f"mq_unlink('hidden'), mq_send({hidden}, 7, b'seven')")
    modes = f"[(os.fstat(fd).st_mode, os.fstat(fd).st_uid, os.get_inheritable(fd)) for fd in ({both}, {hidden})]"
    shown = program.parent(modes)
    for source, destination in ((hosts.a, hosts.b), (hosts.b, hosts.a)):
        move(source, destination, PID).wait_drained()
        assert program.parent(f"mq_attributes({both})") == (0, 4, 100, 4)
        assert program.parent(f"mq_attributes({other})") == (os.O_NONBLOCK, 2, 50, 1)
        assert program.parent(modes) == shown
        assert exists(destination, "named")
        assert not exists(source, "named")
        assert os.readlink(destination.proc / str(PID) / "fd" / str(hidden)).endswith(" (deleted)")
    assert program.child(f"mq_send({writing}, 0, b'x')") == "EAGAIN"
    assert program.child(f"mq_receive({writing})") == "EBADF"
    assert program.parent(f"mq_receive({both})") == (30000, b"two")
    assert [program.parent(f"mq_receive({both})") for _ in range(3)] == [(1, b"one"), (1, b""), (1, b"\0" * 100)]
    assert program.child(f"mq_send({writing}, 3, b'x')") == 0
    assert program.parent(f"mq_receive({both})") == (3, b"x")
    assert program.parent(f"mq_receive({other})") == (7, b"seven")
    assert program.parent(f"mq_receive({hidden})") == "EAGAIN"
    assert program.parent(f"mq_send({hidden}, 1, b'y'), mq_receive({other})") == (0, (1, b"y"))


def exists(host: Host, name: str) -> bool:
    """Whether a host has a queue of this name."""
    code = f"from postcopy.kernel.mqueue import exists; print(exists({name!r}))"
    return bool(eval(host.run([sys.executable, "-c", code], check=True).stdout))


def test_receiver_that_waits_goes_on_waiting(hosts: Pair, program: Program, tmp_path: Path) -> None:
    queue = program.parent(f"mq_open('named', {BOTH | os.O_CREAT})")
    inherited = program.child(f"mq_open('named', {READ})")
    orders = tmp_path / "orders"
    with orders.open("a") as stream:
        stream.write(f"child mq_receive({inherited})\n")
    child = int((hosts.a.proc / str(PID) / "task" / str(PID) / "children").read_text())
    wait_until(partial(waits, hosts.a, child, 243), SECONDS, "the child waits")
    move(hosts.a, hosts.b, PID).wait_drained()
    with orders.open("a") as stream:
        stream.write(f"parent mq_send({queue}, 2, b'here')\n")
    wait_until(lambda: "(2, b'here')" in (tmp_path / "answers").read_text(), SECONDS, "the child has received it")


def test_posix_queues_of_others_are_refused(hosts: Pair, program: Program) -> None:
    queue = program.parent(f"mq_open('named', {BOTH | os.O_CREAT})")
    program.parent(f"mq_send({queue}, 2, b'still here')")
    opening = "from tests.programs.numbered import *; mq_open('named', {})"
    other = hosts.a.popen([sys.executable, "-c", f"{opening.format(READ)}; time.sleep(1000)"])
    wait_until(lambda: has_queue(hosts.a, other.pid), SECONDS, "the other process has opened it")
    with pytest.raises(MigrationFailed, match="has this message queue open, too"):
        start_dump(hosts.a, hosts.b, PID)
    other.kill()
    other.wait()
    program.parent(f"mq_receive({queue}), mq_notify({queue})")
    with pytest.raises(MigrationFailed, match="is to be told of its next message"):
        start_dump(hosts.a, hosts.b, PID)
    program.parent(f"mq_send({queue}, 2, b'still here')")
    hosts.b.run([sys.executable, "-c", opening.format(BOTH | os.O_CREAT)], check=True)
    migration = start_dump(hosts.a, hosts.b, PID)
    with pytest.raises(MigrationFailed, match="there is a message queue /named here"):
        start_restore(migration)
    assert program.parent(f"mq_receive({queue})") == (2, b"still here")


def test_queue_that_another_has_open_by_another_path(hosts: Pair, program: Program, tmp_path: Path) -> None:
    program.parent(f"mq_open('named', {BOTH | os.O_CREAT})")
    hosts.a.run(["mount", "-t", "mqueue", "none", str(tmp_path)], check=True)
    with pytest.raises(MigrationFailed, match="has this message queue open, too"):
        code = f"import os, time; os.open({str(tmp_path / 'named')!r}, os.O_RDONLY); time.sleep(1000)"
        other = hosts.a.popen([sys.executable, "-c", code])
        wait_until(partial(has_queue, hosts.a, other.pid, str(tmp_path / "named")), SECONDS, "it is open")
        start_dump(hosts.a, hosts.b, PID)


def has_queue(host: Host, pid: int, link: str = "/named") -> bool:
    """Whether a process has the queue open."""
    descriptors = host.proc / str(pid) / "fd"
    with contextlib.suppress(FileNotFoundError):  # it closes some meanwhile
        return any(os.readlink(each) == link for each in descriptors.iterdir())
    return False
