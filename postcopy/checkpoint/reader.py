"""Open a checkpoint directory: everything but page data is read and checked before anything is made of it."""

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from postcopy.checkpoint.format import (
    BODY_LIMIT,
    MANIFEST,
    PARTIAL,
    STATE,
    About,
    Index,
    Kind,
    PackedIndex,
    index_name,
    pages_name,
    parse,
    parse_body,
)
from postcopy.checkpoint.page_file import PageFile
from postcopy.errors import CheckpointError, ProtocolError
from postcopy.page_ranges import PageRanges
from postcopy.printable import printable
from postcopy.sent_pages import SentPages
from postcopy.soundness import check
from postcopy.spaces import Space, spaces_of
from postcopy.state import Manifest, Tree


class Checkpoint:
    """A checkpoint that is whole and belongs to this user or root; page data is verified when it is read.

    ``sizes``: of each file, by name (bytes); ``indices``: what lies where in the page files. Several processes may go
    on using it after a fork.
    """

    def __init__(
        self, about: About, tree: Tree, indices: dict[int, Index], pages: dict[int, PageFile], sizes: dict[str, int]
    ) -> None:
        """See `open`."""
        self.id = about.id
        self.about = about
        self.tree = tree
        self.manifest: Manifest = about.manifest
        self.pages_elsewhere = about.pages_elsewhere
        self.indices = indices
        self.sizes = sizes
        self._pages = pages
        self._spaces = spaces_of(tree)
        self._plan = {space.number: PageRanges() if self.pages_elsewhere else space.lazy for space in self._spaces}

    @classmethod
    def open(cls, directory: Path, *, any_host: bool = False) -> "Checkpoint":
        """Read and check everything but page data. ``any_host``: only to look at it, it need not fit this host.

        Raises CheckpointError with the file and the place of what is wrong.
        """
        files = _Directory(directory)
        pages: dict[int, PageFile] = {}
        try:
            checkpoint, body = files.read(MANIFEST, Kind.MANIFEST)
            about = parse_body(files.path(MANIFEST), About, body)
            if about.id != checkpoint:
                raise CheckpointError(f"{files.path(MANIFEST)}: id: is not that of the header")
            if not any_host:
                _check_host(files.path(MANIFEST), about)
            tree = parse_body(files.path(STATE), Tree, files.read(STATE, Kind.STATE, checkpoint=checkpoint)[1])
            try:
                check(tree, about.manifest)
            except ProtocolError as error:
                raise CheckpointError(f"{files.path(STATE)}: {printable(error.message)}") from None
            indices = {space.number: _index(files, checkpoint, about, space) for space in spaces_of(tree)}
            _check_spaces(files.path(MANIFEST), about, indices)
            for space, index in indices.items():
                pages[space] = _page_file(files, space, index)
            return cls(about, tree, indices, pages, files.sizes)
        except BaseException:
            for page_file in pages.values():
                page_file.close()
            raise
        finally:
            files.close()

    def sent_content(self) -> SentPages:
        """The content of the pages that go with the state: `spaces_of` in order, ranges in order. Verified."""
        runs = [(space.number, each.start, each.pages) for space in self._spaces for each in space.sent]
        return SentPages.read(runs, self._pages)

    @property
    def sources(self) -> Mapping[int, PageFile]:
        """Where the pages of each space come from (see `PageSource`); what these raise is a CheckpointError."""
        return self._pages

    def plan(self) -> dict[int, PageRanges]:
        """The lazy pages that are held here, by address space."""
        return dict(self._plan)

    def verified_runs(
        self, space: int, share: int, shares: int, but: PageRanges | None = None
    ) -> Iterator[tuple[int, int, int]]:
        """The lazy pages of ``space``, but those, that fall to worker ``share`` (from 0) of ``shares``: read, verified.

        Each run is its address in the process, the address of its bytes in this process, and its length in bytes. The
        bytes are only good until the next run is asked for. Raises CheckpointError.
        """
        return self._pages[space].verified_runs(self._plan[space].subtract(but or PageRanges()), share, shares)

    def close(self) -> None:
        """Give the files back."""
        for pages in self._pages.values():
            pages.close()


class _Directory:
    """The files of a checkpoint directory, none of which anybody else but root can have written."""

    def __init__(self, directory: Path) -> None:
        self.sizes: dict[str, int] = {}
        self._directory = directory
        name = directory.absolute().name
        if name.startswith(".") and PARTIAL in name:
            raise CheckpointError(
                f"{directory} is what a dump has left that did not come to its end",
                "the program was not ended by that dump; remove the directory",
            )
        try:
            self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if os.path.islink(directory):
                raise CheckpointError(f"{directory} is a symbolic link", "name the directory itself") from None
            raise CheckpointError(f"{directory}: {error.strerror}") from None
        try:
            _check_owner(str(directory), os.fstat(self._fd))
        except CheckpointError:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._fd)

    def path(self, name: str) -> str:
        return str(self._directory / name)

    def open(self, name: str) -> tuple[int, int]:
        """A file's descriptor and size (bytes)."""
        path = self.path(name)
        try:
            # O_NONBLOCK: opening a FIFO would wait for a writer.
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise CheckpointError(f"{path} is missing: {self._directory} is no whole checkpoint") from None
            if error.errno == errno.ELOOP:
                raise CheckpointError(f"{path} is a symbolic link") from None
            raise CheckpointError(f"{path}: {error.strerror}") from None
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(f"{path} is not a regular file")
            _check_owner(path, found)
        except CheckpointError:
            os.close(fd)
            raise
        self.sizes[name] = found.st_size
        return fd, found.st_size

    def read(self, name: str, kind: Kind, space: int = 0, checkpoint: bytes = b"") -> tuple[bytes, memoryview]:
        """The checkpoint id and the body of a file with a header; the id must be ``checkpoint`` where that is given."""
        path = self.path(name)
        fd, size = self.open(name)
        with open(fd, "rb") as stream:
            if size > BODY_LIMIT:
                raise CheckpointError(f"{path}: {size} bytes are more than any checkpoint has there ({BODY_LIMIT})")
            try:
                content = stream.read()
            except OSError as error:
                raise CheckpointError(f"{path}: {error.strerror}") from None
        found, body = parse(path, content, kind, space)
        if checkpoint and found != checkpoint:
            raise CheckpointError(f"{path}: byte 24: this belongs to another checkpoint ({found.hex()})")
        return found, body


def _check_owner(path: str, found: os.stat_result) -> None:
    """That nobody else can have put something there, which would run with our privileges."""
    if found.st_uid not in (0, os.geteuid()):
        raise CheckpointError(f"{path} belongs to user {found.st_uid}, who could have put anything there")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CheckpointError(
            f"{path} can be written by others than its owner, who could have put anything there",
            "a checkpoint directory has mode 0700 and its files 0600",
        )


def _check_host(path: str, about: About) -> None:
    mine = About(b"", 0, about.manifest, False, [])
    if about.architecture != mine.architecture:
        raise CheckpointError(
            f"{path}: architecture: {printable(about.architecture)}; this host's is {mine.architecture}"
        )
    if about.page_size != mine.page_size:
        raise CheckpointError(f"{path}: page_size: {about.page_size} bytes; this host's is {mine.page_size}")
    if missing := sorted(set(about.cpu_features) - set(mine.cpu_features)):
        lacking = printable(" ".join(missing))
        raise CheckpointError(f"{path}: cpu_features: this host's CPU lacks what the program may use: {lacking}")


def _index(files: _Directory, checkpoint: bytes, about: About, space: Space) -> Index:
    """Which pages of an address space are held, and that they are those that the state names."""
    name = index_name(space.number)
    _, body = files.read(name, Kind.INDEX, space.number, checkpoint)
    try:
        index = Index.unpack(parse_body(files.path(name), PackedIndex, body))
    except ProtocolError as error:
        raise CheckpointError(f"{files.path(name)}: {error.message}") from None
    expected = [*space.sent] if about.pages_elsewhere else [*space.sent, *space.lazy]
    if index.held != PageRanges.from_pairs((each.start, each.end) for each in expected):
        raise CheckpointError(f"{files.path(name)}: held: not the pages that {STATE} names for {space.owner}")
    return index


def _check_spaces(path: str, about: About, indices: dict[int, Index]) -> None:
    """That the manifest says of the page files what their indices say."""
    said = sorted((info.space, info.page_bytes, info.zero_pages) for info in about.spaces)
    found = sorted((space, index.page_bytes, index.zero.total_pages) for space, index in indices.items())
    if said != found:
        raise CheckpointError(f"{path}: spaces: these are not the address spaces of {STATE} and their indices")


def _page_file(files: _Directory, space: int, index: Index) -> PageFile:
    name = pages_name(space)
    fd, size = files.open(name)
    if size != index.page_bytes:
        os.close(fd)
        what = "cut off" if size < index.page_bytes else "longer than it was"
        raise CheckpointError(
            f"{files.path(name)}: {what}: byte {min(size, index.page_bytes)}: "
            f"it has {size} bytes, and {index_name(space)} names {index.page_bytes}"
        )
    os.set_blocking(fd, True)
    return PageFile(fd, files.path(name), index)
