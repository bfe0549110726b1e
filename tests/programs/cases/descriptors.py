"""Open files of every kind that one process can have by itself."""

import errno
import fcntl
import os
from typing import ClassVar

from tests.programs.cases import Case, Snapshot, first_problem, unlike

CONTENT = b"".join(b"line %06d\n" % number for number in range(5000))


class RegularFile(Case):
    """Offset and flags of files opened for reading, writing and both."""

    def setup(self) -> None:
        """Three descriptors of one file, each opened by itself."""
        self.path = self.directory / "regular"
        self.path.write_bytes(CONTENT)
        flags = (os.O_RDONLY, os.O_RDWR | os.O_NONBLOCK, os.O_WRONLY | os.O_SYNC | os.O_NOATIME)
        self.fds = [os.open(self.path, flag) for flag in flags]
        for number, fd in enumerate(self.fds):
            os.lseek(fd, 1200 * (number + 1), os.SEEK_SET)
        self.flags = [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in self.fds]

    def verify(self) -> str | None:
        """Flags, offsets, content; each offset moves by itself."""
        read, both, write = self.fds
        flags = [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in self.fds]
        offsets = [os.lseek(fd, 0, os.SEEK_CUR) for fd in self.fds]
        os.write(write, b"WRITTEN")
        problem = first_problem(
            unlike("flags", self.flags, flags),
            unlike("offsets", [1200, 2400, 3600], offsets),
            unlike("content", CONTENT[1200:1300], os.read(read, 100)),
            unlike("content", CONTENT[2400:2500], os.read(both, 100)),
        )
        return problem or unlike("what was written", b"WRITTEN", self.path.read_bytes()[3600:3607])


class AppendFile(Case):
    """O_APPEND: writes go to the end, wherever the offset is."""

    def setup(self) -> None:
        """Write, then let another description write."""
        self.path = self.directory / "append"
        self.fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(self.fd, b"one,")

    def verify(self) -> str | None:
        """Both texts are there, in order."""
        with open(self.path, "ab") as other:
            other.write(b"two,")
        os.lseek(self.fd, 0, os.SEEK_SET)
        os.write(self.fd, b"three")
        return unlike("file", b"one,two,three", self.path.read_bytes())


class PathDescriptor(Case):
    """O_PATH: names a file, reads nothing."""

    def setup(self) -> None:
        """Open."""
        self.path = self.directory / "path"
        self.path.write_bytes(CONTENT)
        self.fd = os.open(self.path, os.O_PATH)
        self.flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)

    def verify(self) -> str | None:
        """The flags, the file, and that reading is refused."""
        try:
            os.read(self.fd, 1)
        except OSError as error:
            refusal = error.errno
        else:
            return "reading was allowed"
        return first_problem(
            unlike("errno of read", errno.EBADF, refusal),
            unlike("flags", self.flags, fcntl.fcntl(self.fd, fcntl.F_GETFL)),
            unlike("inode", self.path.stat().st_ino, os.fstat(self.fd).st_ino),
        )


class CloseOnExec(Case):
    """FD_CLOEXEC belongs to the descriptor, not to the description."""

    def setup(self) -> None:
        """A pair that shares a description, of which one closes on exec."""
        self.kept = os.open("/dev/null", os.O_RDONLY)
        os.set_inheritable(self.kept, True)
        self.closed = os.dup(self.kept)

    def verify(self) -> str | None:
        """Both flags."""
        return unlike("inheritable", [True, False], [os.get_inheritable(fd) for fd in (self.kept, self.closed)])


class Directory(Case):
    """A directory: openat(2), fchdir(2) and listing work on it."""

    def setup(self) -> None:
        """Open it."""
        self.path = self.directory / "directory"
        self.path.mkdir()
        (self.path / "inside").write_bytes(b"inside")
        self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)

    def verify(self) -> str | None:
        """List it and open what it holds."""
        inside = os.open("inside", os.O_RDONLY, dir_fd=self.fd)
        return first_problem(
            unlike("listing", ["inside"], os.listdir(self.fd)),
            unlike("content", b"inside", os.read(inside, 100)),
        )


class CharacterDevices(Case):
    """/dev/null, /dev/zero, /dev/full and /dev/urandom."""

    DEVICES: ClassVar = {"/dev/null": os.O_RDWR, "/dev/zero": os.O_RDONLY, "/dev/urandom": os.O_RDONLY}

    def setup(self) -> None:
        """Open them."""
        self.fds = {path: os.open(path, flags) for path, flags in self.DEVICES.items()}
        self.flags = {path: fcntl.fcntl(fd, fcntl.F_GETFL) for path, fd in self.fds.items()}

    def verify(self) -> str | None:
        """They are what they were, and do what they do."""
        urandom = self.fds["/dev/urandom"]
        return first_problem(
            unlike("links", list(self.fds), [os.readlink(f"/proc/self/fd/{fd}") for fd in self.fds.values()]),
            unlike("flags", self.flags, {path: fcntl.fcntl(fd, fcntl.F_GETFL) for path, fd in self.fds.items()}),
            unlike(
                "/dev/null", (b"", 5), (os.read(self.fds["/dev/null"], 5), os.write(self.fds["/dev/null"], b"12345"))
            ),
            unlike("/dev/zero", bytes(5), os.read(self.fds["/dev/zero"], 5)),
            None if os.read(urandom, 16) != os.read(urandom, 16) else "/dev/urandom repeats itself",
        )


class StandardStreams(Snapshot):
    """Descriptors 0, 1 and 2."""

    def take(self) -> dict[str, object]:
        """What they are, with which flags."""
        return {
            str(fd): (os.readlink(f"/proc/self/fd/{fd}"), fcntl.fcntl(fd, fcntl.F_GETFL), os.get_inheritable(fd))
            for fd in (0, 1, 2)
        }


class SharedDescription(Case):
    """Descriptors made by dup(2), one of a high number: one offset, one set of flags for all of them."""

    HIGH = 777

    def setup(self) -> None:
        """Open once, duplicate twice; and open the same file once more."""
        self.path = self.directory / "duplicated"
        self.path.write_bytes(CONTENT)
        self.first = os.open(self.path, os.O_RDWR)
        self.second = os.dup(self.first)
        os.dup2(self.first, self.HIGH)
        self.apart = os.open(self.path, os.O_RDWR)
        os.lseek(self.first, 500, os.SEEK_SET)

    def verify(self) -> str | None:
        """Move one; set a flag on one."""
        offsets = [os.lseek(fd, 0, os.SEEK_CUR) for fd in (self.first, self.second, self.HIGH, self.apart)]
        os.lseek(self.second, 900, os.SEEK_SET)
        os.set_blocking(self.HIGH, False)
        moved = [os.lseek(fd, 0, os.SEEK_CUR) for fd in (self.first, self.HIGH, self.apart)]
        blocking = [os.get_blocking(fd) for fd in (self.first, self.second, self.apart)]
        return first_problem(
            unlike("offsets", [500, 500, 500, 0], offsets),
            unlike("offsets after one was moved", [900, 900, 0], moved),
            unlike("blocking after one was changed", [False, False, True], blocking),
        )


class Pipe(Case):
    """A pipe with both ends in the process, of another size than the default, with content."""

    SIZE = 256 * 1024

    def setup(self) -> None:
        """Fill it beyond the default size."""
        self.read_fd, self.write_fd = os.pipe()
        fcntl.fcntl(self.write_fd, fcntl.F_SETPIPE_SZ, self.SIZE)
        self.content = os.urandom(150_000)
        assert os.write(self.write_fd, self.content) == len(self.content)

    def verify(self) -> str | None:
        """Size and content; then it works on; then its end is seen."""
        size = fcntl.fcntl(self.read_fd, fcntl.F_GETPIPE_SZ)
        content = b""
        while len(content) < len(self.content):
            content += os.read(self.read_fd, 1 << 20)
        os.write(self.write_fd, b"more")
        more = os.read(self.read_fd, 100)
        os.close(self.write_fd)
        return first_problem(
            unlike("size", self.SIZE, size),
            None if content == self.content else f"content of {len(content)} bytes differs",
            unlike("what came later", b"more", more),
            unlike("the end", b"", os.read(self.read_fd, 100)),
        )


class NonblockingPipe(Case):
    """An empty pipe whose reading end alone is non-blocking, held twice."""

    def setup(self) -> None:
        """Make it."""
        self.read_fd, self.write_fd = os.pipe()
        self.duplicate = os.dup(self.read_fd)
        os.set_blocking(self.read_fd, False)

    def verify(self) -> str | None:
        """Flags, and that an empty pipe says so."""
        blocking = [os.get_blocking(fd) for fd in (self.read_fd, self.duplicate, self.write_fd)]
        try:
            os.read(self.read_fd, 1)
        except BlockingIOError:
            pass
        else:
            return "an empty pipe gave something"
        os.write(self.write_fd, b"x")
        return first_problem(
            unlike("blocking", [False, False, True], blocking), unlike("content", b"x", os.read(self.duplicate, 10))
        )


class BrokenPipe(Case):
    """A pipe whose writing end is closed, with content left; and one whose reading end is closed."""

    def setup(self) -> None:
        """Make both."""
        self.read_fd, write_fd = os.pipe()
        os.write(write_fd, b"the last words")
        os.close(write_fd)
        read_fd, self.write_fd = os.pipe()
        os.close(read_fd)

    def verify(self) -> str | None:
        """The content, then the end; and EPIPE."""
        words = (os.read(self.read_fd, 100), os.read(self.read_fd, 100))
        try:
            os.write(self.write_fd, b"?")
        except BrokenPipeError:
            return unlike("content and end", (b"the last words", b""), words)
        return "writing without a reader was allowed"


class DescriptorTable(Snapshot):
    """Which descriptors there are, and no other."""

    def take(self) -> dict[str, object]:
        """Every descriptor with its target, without the one of the listing."""
        table: dict[str, object] = {}
        for fd in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{fd}")
            except FileNotFoundError:
                continue
            # A pipe or socket has another inode number on another host; a file may be found by another of its names.
            if target.endswith((" (deleted)", "/another link")):
                target = "without this name"
            table[fd] = target.partition("[")[0] if target.startswith(("pipe:", "socket:")) else target
        return table
