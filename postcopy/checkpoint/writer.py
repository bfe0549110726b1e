"""Write a checkpoint directory: it appears whole and durable under its name, or not at all."""

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path

from msgspec.structs import replace

from postcopy.checkpoint.format import (
    ID_SIZE,
    MANIFEST,
    PARTIAL,
    STATE,
    About,
    Kind,
    SpaceInfo,
    index_name,
    pack_header,
    pages_name,
)
from postcopy.checkpoint.page_writer import PageWriter, write_failed
from postcopy.deadline import uninterrupted
from postcopy.errors import CannotRun, DumpError, ProtocolError, UsageError
from postcopy.kernel.rename import rename_new
from postcopy.page_ranges import PageRanges
from postcopy.sent_pages import PageSource
from postcopy.soundness import check
from postcopy.state import Manifest, Process, SharedMemory, Tree, encode

_NEW = ".new"


class Writer:
    """A checkpoint on its way into a directory that does not exist yet."""

    def __init__(self, directory: Path, *, pages_elsewhere: bool) -> None:
        """Begin, in a directory of another name beside ``directory``.

        ``pages_elsewhere``: the lazy pages stay with the frozen tree. Raises UsageError where ``directory`` exists,
        CannotRun where nothing can be made beside it.
        """
        self._directory = directory.absolute()
        self._pages_elsewhere = pages_elsewhere
        self._id = secrets.token_bytes(ID_SIZE)
        self._zero: dict[int, PageRanges] = {}
        self._spaces: list[SpaceInfo] = []
        self._written: list[Path] = []
        self._finished = False
        if os.path.lexists(self._directory):
            raise UsageError(f"{directory} exists already", "name a directory that does not: the dump makes it")
        parent = self._directory.parent
        try:
            self._partial = Path(tempfile.mkdtemp(prefix=f".{self._directory.name}{PARTIAL}", dir=parent))
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, str(error.errno))
            raise CannotRun(
                f"a checkpoint cannot be written to {parent}: {name}: {error.strerror}",
                "name a directory in one that exists and can be written to",
            ) from None

    def write_space(self, space: int, source: PageSource, sent: PageRanges, lazy: PageRanges) -> PageRanges:
        """Write the pages of an address space whose process stands still; those of ``lazy`` that are zero.

        ``lazy`` is empty where the lazy pages are elsewhere. Raises DumpError.
        """
        path = self._partial / pages_name(space)
        fd = self._create(path)
        pages = PageWriter(fd, path, source, sent, lazy)
        try:
            index = pages.write()
        finally:
            pages.close()
            os.close(fd)
        self._write(index_name(space), Kind.INDEX, space, encode(index.pack()))
        self._zero[space] = index.zero
        self._spaces.append(SpaceInfo(space, index.page_bytes, index.zero.total_pages))
        return index.zero

    def finish(self, manifest: Manifest, tree: Tree) -> bytes:
        """Write the rest, make everything durable and give the directory its name; the checkpoint's id.

        Every address space of the tree must have been written. Only when this has returned may the tree be killed.
        Raises DumpError; nothing has the directory's name then.
        """
        tree = self._as_written(tree)
        try:
            # What could not be read again must not be found out after the tree is gone.
            check(tree, manifest)
        except ProtocolError as error:
            raise DumpError(f"the state could not be restored: {error.message}", "this is a bug") from None
        about = About(self._id, time.time_ns(), manifest, self._pages_elsewhere, self._spaces)
        self._write(STATE, Kind.STATE, 0, encode(tree))
        self._write(MANIFEST, Kind.MANIFEST, 0, encode(about))
        for path in (*self._written, self._partial):
            _make_durable(path)
        named = False
        try:
            with uninterrupted():
                self._give_name()
                named = True
        except BaseException:
            # A signal that was held back: whoever is told of it takes the dump for failed.
            if named:
                os.rename(self._directory, self._partial)
            raise
        self._finished = True
        return self._id

    def amend(self, tree: Tree) -> None:
        """Put a state in the place of that of `finish` which differs in what has come since, durably and in one step.

        Raises DumpError; the directory is then to be withdrawn.
        """
        new = self._write(STATE + _NEW, Kind.STATE, 0, encode(self._as_written(tree)))
        _make_durable(new)
        try:
            os.replace(new, self._directory / STATE)
        except OSError as error:
            raise write_failed(new, error, "renaming") from None
        _make_durable(self._directory)

    def abandon(self) -> None:
        """Remove what was written; nothing happens after `finish`. Raises nothing."""
        with contextlib.suppress(Exception):
            shutil.rmtree(self._partial, ignore_errors=True)

    def withdraw(self) -> None:
        """Remove what was written, also after `finish`. Raises nothing."""
        if self._finished:
            with contextlib.suppress(OSError):
                os.rename(self._directory, self._partial)
        self.abandon()

    @property
    def bytes_written(self) -> int:
        """How much the pages take on disk, in bytes."""
        return sum(info.page_bytes for info in self._spaces)

    def _as_written(self, tree: Tree) -> Tree:
        return replace(
            tree,
            processes=[self._without_zeros(process) for process in tree.processes],
            shared_memory=[self._without_zeros_shared(memory) for memory in tree.shared_memory],
        )

    def _without_zeros(self, process: Process) -> Process:
        lazy = PageRanges.unpack(process.memory.lazy).subtract(self._zero[process.space])
        return replace(process, memory=replace(process.memory, lazy=lazy.pack()))

    def _without_zeros_shared(self, memory: SharedMemory) -> SharedMemory:
        return replace(memory, lazy=PageRanges.unpack(memory.lazy).subtract(self._zero[memory.space]).pack())

    def _give_name(self) -> None:
        parent = self._directory.parent
        try:
            rename_new(self._partial, self._directory)
        except OSError as error:
            raise write_failed(self._directory, error, "giving a name to") from None
        try:
            _make_durable(parent)
        except DumpError:
            os.rename(self._directory, self._partial)
            raise

    def _create(self, path: Path) -> int:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise write_failed(path, error, "making") from None
        self._written.append(path)
        return fd

    def _write(self, name: str, kind: Kind, space: int, body: bytes) -> Path:
        path = (self._directory if self._finished else self._partial) / name
        fd = self._create(path)
        try:
            for part in (pack_header(kind, space, self._id, body), body):
                rest = memoryview(part)
                while rest:
                    rest = rest[os.write(fd, rest) :]
        except OSError as error:
            raise write_failed(path, error) from None
        finally:
            os.close(fd)
        return path


def _make_durable(path: Path) -> None:
    """fsync(2) a file or a directory."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise write_failed(path, error, "making durable") from None
