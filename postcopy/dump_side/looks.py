"""What can be seen of a frozen process without its help, by a process of ours: meanwhile it is asked for the rest."""

import contextlib
import os
import pickle
import socket
import stat
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import BinaryIO, TypeVar

from msgspec import Struct

from postcopy import roles
from postcopy.dump_side import attributes, filesystem, lineage, memory, namespaces, threads, timers
from postcopy.dump_side.smaps import Known
from postcopy.errors import DumpError
from postcopy.kernel import pidfd, procfs, socket_options
from postcopy.kernel.pagemap import Pagemap
from postcopy.kernel.sched import scheduling
from postcopy.state import Filesystem

# A process and the root to look at; or a process alone, whose sockets are to be looked at.
_ASKED = struct.Struct("=QQ")
_LENGTH = struct.Struct("=Q")
# So many processes are looked at before they are wanted; what asks for them always fits into a pipe.
_AHEAD = 64
_SOCKETS_AT_ONCE = 32
T = TypeVar("T")


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


def _look_at_sockets(pid: int) -> Iterator[list[tuple[int, socket_options.Told]]]:
    """What the options of the sockets of a process tell, in the order of their numbers, some at a time; in the end
    nothing. What cannot be read so is left out."""
    process = pidfd.of_task(pid)
    try:
        found = []
        for fd in procfs.descriptors(pid):
            with contextlib.suppress(OSError):
                if not stat.S_ISSOCK(os.stat(f"/proc/{pid}/fd/{fd}").st_mode):
                    continue
                with socket.socket(fileno=pidfd.getfd(process, fd)) as own:
                    found.append((fd, socket_options.told(own)))
            if len(found) == _SOCKETS_AT_ONCE:
                yield found
                found = []
        if found:
            yield found
        yield []
    finally:
        os.close(process)


class Looker:
    """A process that looks at the processes of a tree, some ahead of who asks for them."""

    def __init__(self, known: Mapping[int, Known]) -> None:
        """Fork it, before the freeze; it waits for `ask`."""
        asked_read, self._asking = os.pipe()
        self._found, found_write = os.pipe()
        self._waiting: deque[tuple[int, int]] = deque()

        def body() -> None:
            os.close(self._asking)
            # The tree stands still.
            scheduling(nice=-20)
            with open(asked_read, "rb") as questions, open(found_write, "wb") as answers:
                while words := questions.read(_ASKED.size):
                    pid, root = _ASKED.unpack(words)
                    try:
                        for each in _look_at_sockets(pid) if not root else [look(pid, root, known)]:
                            _send(answers, each)
                    except (OSError, LookupError, ValueError) as error:
                        # Of a process that has just been killed anything may be read.
                        _send(answers, error)

        self._role = roles.start("postcopy-look", body, dies_with_parent=True)
        os.close(asked_read)
        os.close(found_write)
        self._answers = open(self._found, "rb", closefd=False)  # noqa: SIM115 (closed by `close`)

    def ask_for_sockets(self, pid: int) -> Iterator[tuple[int, socket_options.Told]]:
        """Of the sockets of a process, in the order of their numbers, what its options tell; before `ask`. Each has
        then been read.
        """
        os.write(self._asking, _ASKED.pack(pid, 0))

        def answers() -> Iterator[tuple[int, socket_options.Told]]:
            while found := self._receive(list):
                yield from found

        return answers()

    def ask(self, pids: Iterable[int], root: int) -> None:
        """Of these processes, in their order, `result` will tell; all by the threads that show them (`procfs.face`)."""
        self._waiting.extend((pid, root) for pid in pids)
        for _ in range(_AHEAD):
            self._ask_next()

    def _ask_next(self) -> None:
        if self._waiting:
            os.write(self._asking, _ASKED.pack(*self._waiting.popleft()))

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
        """End it, whatever it is doing."""
        self._role.kill()
        os.close(self._asking)
        self._answers.close()
        os.close(self._found)


def _send(stream: BinaryIO, answer: object) -> None:
    # Nobody but us, who have forked it, writes into this pipe.
    packed = pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)
    stream.write(_LENGTH.pack(len(packed)) + packed)
    stream.flush()
