"""What can be seen of a frozen process without its help, by a process of ours: meanwhile it is asked for the rest."""

import contextlib
import enum
import fcntl
import os
import pickle
import select
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import BinaryIO, TypeVar

from msgspec import Struct

from postcopy import roles
from postcopy.dump_side import attributes, filesystem, lineage, memory, namespaces, socket_looks, threads, timers
from postcopy.dump_side.smaps import Known
from postcopy.errors import DumpError
from postcopy.kernel import procfs
from postcopy.kernel.pagemap import Pagemap
from postcopy.kernel.sched import scheduling, set_niceness
from postcopy.state import Filesystem

_ASKED = struct.Struct("=QQQ")
_LAST_SOCKETS_SECONDS = 1
_PIPE_SIZE = 1 << 20  # fs.pipe-max-size
_LENGTH = struct.Struct("=Q")
# So many processes are looked at before they are wanted; what asks for them always fits into a pipe.
_AHEAD = 64
_SOCKETS_AT_ONCE = 32
T = TypeVar("T")


class _Question(enum.IntEnum):
    """What a process shows, and has in common with the root; what its sockets do; and what is done of these before and
    after (`socket_looks.Looks`)."""

    PROCESS = 1
    SOCKETS = 2
    FORESEE = 3
    BEGIN = 4
    VERIFY = 5


class Look(Struct, frozen=True):
    """What is seen. ``maps``: its mappings, empty where they are as they were known; ``pages``: which pages exist.

    ``apart``: the directories of threads that do not share those of the process; ``threads``: by their TIDs.
    """

    problems: list[str]
    places: Filesystem
    apart: dict[int, Filesystem]
    maps: bytes
    pages: memory.Pages
    memory: memory.Seen
    attributes: attributes.Seen
    threads: dict[int, threads.Seen]


def look(pid: int, root: int, known: Mapping[int, Known]) -> Look:
    """Look at a process, before it has anything of ours, and at what it must have in common with the ``root``.

    ``known``: the mappings of each, as they once were. Raises OSError.
    """
    tids = procfs.tids(pid)
    problems = [*lineage.problems(pid, frozen=True), *timers.problems(pid)]
    problems += namespaces.problems_of_member(pid, root)
    places = filesystem.collect(pid, problems)
    apart = lineage.with_places_of_their_own(pid, tids, problems)
    maps = procfs.read(pid, "maps")
    lines = known[pid].lines if pid in known and known[pid].maps == maps else None
    pagemap = Pagemap(pid)
    try:
        pages = memory.scan(pagemap, lines or list(procfs.parse_maps(maps)))
    finally:
        pagemap.close()
    return Look(
        problems=problems,
        places=places,
        apart={tid: filesystem.collect(tid, problems) for tid in apart},
        maps=b"" if lines else maps,
        pages=pages,
        memory=memory.see(pid),
        attributes=attributes.see(pid),
        threads=dict(_threads(pid, tids)),
    )


def _threads(pid: int, tids: Iterable[int]) -> Iterator[tuple[int, threads.Seen]]:
    """Those that have not ended: a main thread may have before the others."""
    for tid in tids:
        with contextlib.suppress(OSError):
            yield tid, threads.see(pid, tid)


def _outliving(found: Iterator[T]) -> Iterator[T]:
    """What is found, by a process that does not die in the middle of that when its parent is killed: then the tree goes
    on at once, and is to find no connection in repair."""
    with roles.outliving_parent():
        yield from found


def _some(found: Iterator[T]) -> Iterator[list[T]]:
    """What is found, some at a time; in the end nothing."""
    while some := list(islice(found, _SOCKETS_AT_ONCE)):
        yield some
    yield []


class Looker:
    """A process that looks at the processes of a tree, some ahead of who asks for them."""

    def __init__(self, known: Mapping[int, Known]) -> None:
        """Fork it, before the freeze; it waits for `ask`."""
        self._looking_at = 0
        self._has_to_verify = self._is_verifying = False
        asked_read, self._asking = os.pipe()
        self._found, found_write = os.pipe()
        for pipe in (self._asking, found_write):
            with contextlib.suppress(OSError):
                # As much as everybody may have: neither of us is to wait for the other one to read.
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        self._waiting: deque[tuple[int, int]] = deque()
        self._told = os.memfd_create("postcopy-sockets", os.MFD_CLOEXEC)

        def body() -> None:
            # Else it would wait for itself when nobody else is left.
            os.close(self._asking)
            os.close(self._found)
            # The tree stands still.
            scheduling(nice=-20)
            # Where nobody wants to know any more.
            with contextlib.suppress(BrokenPipeError):
                answer(asked_read, found_write)

        sockets = socket_looks.Looks(lambda: not roles.is_orphaned())

        def found(what: int, pid: int, root: int) -> Iterable[object]:
            match what:
                case _Question.PROCESS:
                    return [look(pid, root, known)]
                case _Question.SOCKETS:
                    return _outliving(_some(sockets.look(pid)))
                case _Question.FORESEE:
                    sockets.foresee(self._known)
                    return [[]]
                case _Question.BEGIN:
                    sockets.begin(self._known)
                    return []
            # Others, whom the stand-still waits for, come first, until somebody waits for this.
            scheduling(nice=19)
            return [sockets.verify()]

        def answer(asked_read: int, found_write: int) -> None:
            with open(asked_read, "rb") as questions, open(found_write, "wb") as answers:
                while words := questions.read(_ASKED.size):
                    try:
                        for each in found(*_ASKED.unpack(words)):
                            _send(answers, each)
                    except (OSError, LookupError, ValueError) as error:
                        # Of a process that has just been killed anything may be read.
                        _send(answers, error)

        # It has the guard's connection, as all that is forked here: so the guard, who brings connections together again
        # when we die, hears of our end only when it has ended, too.
        self._role = roles.start("postcopy-look", body, dies_with_parent=True)
        os.close(asked_read)
        os.close(found_write)
        self._answers = open(self._found, "rb", closefd=False)  # noqa: SIM115 (closed by `close`)

    def _tell(self, what: _Question, known: socket_looks.Known) -> None:
        # Too much for the pipe.
        os.pwrite(self._told, pickle.dumps(known, pickle.HIGHEST_PROTOCOL), 0)
        self._ask(what)

    @property
    def _known(self) -> socket_looks.Known:
        """What `_tell` has been told last, for the process that looks."""
        content = os.pread(self._told, os.fstat(self._told).st_size, 0)
        found: socket_looks.Known = pickle.loads(content)
        return found

    def foresee(self, known: socket_looks.Known) -> None:
        """Let it look at the connections while the tree runs, and wait for that. Once it has nothing else to do, it
        finds out whether that was still so when the tree was frozen."""
        self._tell(_Question.FORESEE, known)
        self._receive(list)
        self._has_to_verify = True

    def begin(self, known: socket_looks.Known) -> None:
        """What sockets there are; before `ask_for_sockets`."""
        self._tell(_Question.BEGIN, known)

    def otherwise(self) -> list[socket_looks.Otherwise]:
        """What was not: as of `socket_looks.Looks.verify`; after the last `result`."""
        if not self._is_verifying:
            return []
        # From here on it is waited for.
        set_niceness(self._role.pid, -20)
        return self._receive(list)

    @property
    def is_taking_apart(self) -> bool:
        """Whether it may have a connection under repair."""
        return self._looking_at > 0

    def ask_for_sockets(self, pid: int) -> Iterator[socket_looks.Seen]:
        """What the sockets of a process show that are known, in the order of descriptors; before `ask`. All must
        be taken before the first `result`."""
        self._ask(_Question.SOCKETS, pid)
        self._looking_at += 1

        def answers() -> Iterator[socket_looks.Seen]:
            while found := self._receive(list):
                yield from found
            self._looking_at -= 1

        return answers()

    def ask(self, pids: Iterable[int], root: int) -> None:
        """Of these processes, in their order, `result` will tell; all by the threads that show them (`procfs.face`)."""
        self._waiting.extend((pid, root) for pid in pids)
        for _ in range(_AHEAD):
            self._ask_next()

    def _ask_next(self) -> None:
        if self._waiting:
            self._ask(_Question.PROCESS, *self._waiting.popleft())
        elif self._has_to_verify:
            self._ask(_Question.VERIFY)
            self._has_to_verify, self._is_verifying = False, True

    def _ask(self, what: _Question, pid: int = 0, root: int = 0) -> None:
        # That it has ended is told where its answer is missed.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._asking, _ASKED.pack(what, pid, root))

    def result(self) -> Look:
        """That of the next one. Raises what `look` does, and DumpError when it cannot look any more."""
        answer = self._receive(Look)
        self._ask_next()
        return answer

    def _receive(self, kind: type[T]) -> T:
        header = self._answers.read(_LENGTH.size)
        answer = pickle.loads(self._answers.read(*_LENGTH.unpack(header))) if header else None
        if isinstance(answer, Exception):
            raise answer
        if not isinstance(answer, kind):
            raise DumpError("the processes cannot be looked at")
        return answer

    def close(self) -> None:
        """End it, whatever it is doing; but let it bring a connection that it has taken apart together again."""
        os.close(self._asking)
        self._answers.close()
        os.close(self._found)
        os.close(self._told)
        if self.is_taking_apart:
            select.select([self._role.pidfd], [], [], _LAST_SOCKETS_SECONDS)
        self._role.kill()


def _send(stream: BinaryIO, answer: object) -> None:
    # Nobody but us, who have forked it, writes into this pipe.
    packed = pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)
    stream.write(_LENGTH.pack(len(packed)) + packed)
    stream.flush()
