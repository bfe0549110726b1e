"""The flags of mappings, which only ``smaps`` has: for it the kernel walks all page tables, some 10 ms for a GiB.

So what the survey has read is taken where the layout of the frozen process is the same, and a process of its own finds
out meanwhile whether a flag has changed in between.
"""

import os
import struct
from collections.abc import Mapping, Sequence

from msgspec import Struct

from postcopy import roles
from postcopy.dump_side.memory import Checked, Layout, layout
from postcopy.dump_side.shared_memory import SharedObjects
from postcopy.errors import DumpError
from postcopy.kernel import procfs
from postcopy.kernel.procfs import MapsLine
from postcopy.kernel.sched import scheduling

_ASKED = struct.Struct("=Q")
_ANSWER = struct.Struct("=QQ?")


class Known(Struct, frozen=True):
    """The mappings of a process as they once were: what ``maps`` says, the same with flags, the layout made of that.

    ``told``: see `procfs.layout_in_smaps`.
    """

    maps: bytes
    told: Sequence[bytes]
    lines: Sequence[MapsLine]
    layout: Layout


def look(pid: int, shared: SharedObjects, checked: Checked) -> Known:
    """Read and judge the mappings of a process, as `memory.layout`. Raises OSError."""
    content = procfs.read(pid, "smaps")
    lines = list(procfs.parse_smaps(content))
    maps, told = procfs.maps_in_smaps(content), procfs.layout_in_smaps(content)
    return Known(maps, told, lines, layout(pid, shared, lines, checked))


class SmapsReader:
    """A process that reads ``smaps`` while we do other things. ``known``: by PID, what has been read before."""

    def __init__(self, known: Mapping[int, Known]) -> None:
        """Fork it; it waits for `begin`."""
        self._known = known
        self._foreseen: set[int] = set()
        self._found: dict[int, bytes | None] = {}
        asked_read, self._asked = os.pipe()
        self._answers, answers_write = os.pipe()

        def body() -> None:
            os.close(self._asked)
            # The tree stands still until it has been verified.
            scheduling(nice=-20)
            with open(asked_read, "rb") as asked, open(answers_write, "wb") as stream:
                while words := asked.read(_ASKED.size):
                    (pid,) = _ASKED.unpack(words)
                    try:
                        content = procfs.read(pid, "smaps")
                    except OSError:
                        return  # somebody has ended it: `result` says that there is nothing more
                    same = pid in known and procfs.layout_in_smaps(content) == known[pid].told
                    content = b"" if same else content
                    stream.write(_ANSWER.pack(pid, len(content), same) + content)
                    stream.flush()

        self._role = roles.start("postcopy-smaps", body, dies_with_parent=True)
        os.close(asked_read)
        os.close(answers_write)
        self._stream = open(self._answers, "rb", closefd=False)  # noqa: SIM115 (closed by `close`)

    def foresee(self, pid: int) -> Known:
        """The mappings of a frozen process as they were known, where ``maps`` says so still; to be `verify`-ed."""
        self._foreseen.add(pid)
        return self._known[pid]

    def begin_foreseen(self, pid: int) -> None:
        """Let it read now, of this process, where that was foreseen."""
        if pid in self._foreseen:
            self.begin(pid)

    def begin(self, pid: int) -> None:
        """Let it read now, of this process."""
        os.write(self._asked, _ASKED.pack(pid))

    def result(self, pid: int) -> Sequence[MapsLine]:
        """The mappings of a process for which `begin` was called. Raises DumpError when it cannot read any more."""
        while pid not in self._found:
            words = self._stream.read(_ANSWER.size)
            if not words:
                raise DumpError("the memory layout of a process cannot be read")
            other, size, same = _ANSWER.unpack(words)
            content = self._stream.read(size)
            self._found[other] = None if same else content
        found = self._found.pop(pid)
        return self._known[pid].lines if found is None else list(procfs.parse_smaps(found))

    def verify(self) -> None:
        """That what was foreseen is so. Raises DumpError where a program has changed a flag just before the freeze."""
        for pid in self._foreseen:
            if self.result(pid) != self._known[pid].lines:
                raise DumpError(
                    f"process {pid} has changed the flags of its mappings (madvise, mlock) while it was being frozen",
                    "it runs on: try again",
                )
        self._foreseen.clear()

    def close(self) -> None:
        """End it, whether it has read or not."""
        # Killed rather than waited for: what it has still to write, nobody reads any more.
        self._role.kill()
        os.close(self._asked)
        self._stream.close()
        os.close(self._answers)
