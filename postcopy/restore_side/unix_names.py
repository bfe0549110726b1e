"""The names of Unix sockets in the filesystem.

They must not touch what lies there before commit: on a shared filesystem that is the source's socket. So the new
process binds inside a root directory made for that one socket, where the name is free; `settle` moves the file to its
place. getsockname(2) tells what bind(2) was given, wherever the file is.
"""

import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence

from postcopy.errors import RestoreError
from postcopy.kernel import sock_diag
from postcopy.restore_side.leftovers import Leftovers
from postcopy.socket_kinds import UnixName, UnixSocket

log = logging.getLogger("postcopy")


def problems(names: Sequence[UnixName]) -> Iterator[str]:
    """Names that cannot be had here, before anything is frozen."""
    if not names:
        return
    there = {(one.name, one.kind): one for one in sock_diag.unix_sockets().values() if one.name}
    bound = {one.vfs for one in there.values()}
    abstract = {name for name, _ in there}
    for each in names:
        text = os.fsdecode(each.name.rstrip(b"\0").replace(b"\0", b"@"))
        if each.name.startswith(b"\0"):
            if each.name in abstract:
                yield f"the name {text} of a Unix socket is taken here: end the program that has it"
        elif each.place:
            yield from _problems_of_place(each.place, bound)


def _problems_of_place(place: str, bound: set[tuple[int, int] | None]) -> Iterator[str]:
    try:
        file = os.lstat(place)
    except FileNotFoundError:
        if not os.path.isdir(os.path.dirname(place)):
            yield f"directory {os.path.dirname(place)}, for a Unix socket, is missing here: make it"
        return
    except OSError as error:
        yield f"the Unix socket {place} cannot be looked at here: {error.strerror}"
        return
    if not stat.S_ISSOCK(file.st_mode):
        yield f"the name {place} of a Unix socket is taken here by a file that is none: move it away"
    elif (file.st_ino & 0xFFFF_FFFF, file.st_dev) in bound:
        yield f"the name {place} of a Unix socket is taken here: end the program that has it"


def prepare(sockets: Sequence[UnixSocket], leftovers: Leftovers) -> None:
    """Make the root directories. Raises RestoreError."""
    if reasons := list(problems([UnixName(one.name, one.place) for one in sockets if has_path(one)])):
        raise RestoreError("; ".join(reasons))
    for one in filter(has_path, sockets):
        root = root_of(one)
        try:
            shutil.rmtree(root, ignore_errors=True)
            leftovers.directory(root)
            os.mkdir(root, 0o700)
            for directory in _directories(one):
                os.makedirs(root + directory, exist_ok=True)
        except OSError as error:
            raise RestoreError(f"making directory {root} for a Unix socket: {error.strerror}") from None


def settle(sockets: Sequence[UnixSocket]) -> None:
    """After commit: move each file to its place. What the system refuses is logged: there is no way back."""
    for one in filter(has_path, sockets):
        file = root_of(one) + _inside(one)
        try:
            if one.place:
                os.chown(file, *one.file_owner)
                os.chmod(file, one.mode)
                os.rename(file, one.place)
        except OSError as error:
            log.error("the program runs, but its Unix socket %s could not be put there: %s", one.place, error.strerror)
    clear_away(sockets)


def clear_away(sockets: Sequence[UnixSocket]) -> None:
    """Remove the root directories."""
    for one in filter(has_path, sockets):
        shutil.rmtree(root_of(one), ignore_errors=True)


def has_path(one: UnixSocket) -> bool:
    return bool(one.name) and not one.name.startswith(b"\0")


def root_of(one: UnixSocket) -> str:
    """On the filesystem where the file is to lie, so that it can be moved there in one step."""
    directory = os.path.dirname(one.place) if one.place else tempfile.gettempdir()
    return os.path.join(directory, f".postcopy-{os.getpid()}-{one.socket.inode}")


def _steps(one: UnixSocket) -> Iterator[list[str]]:
    """The way to the file from its root, as the kernel goes: ``..`` in a root directory is that directory."""
    at: list[str] = []
    for name in os.fsdecode(one.name.rstrip(b"\0")).split("/"):
        if name == "..":
            at = at[:-1]
        elif name not in ("", "."):
            at = [*at, name]
        yield at


def _directories(one: UnixSocket) -> list[str]:
    return ["/" + "/".join(step) for step in list(_steps(one))[:-1]]


def _inside(one: UnixSocket) -> str:
    return "/" + "/".join(list(_steps(one))[-1])
