"""Files that have no name any more, or never had one; FIFOs, packets, owners, locks; files of /proc."""

import fcntl
import os
import select
import signal
import stat
import struct
from pathlib import Path

from tests.programs.cases import Case, first_problem, libc, unlike

F_GETOWN_EX, F_SETOWN_EX, F_OFD_SETLK, F_SETLEASE, F_GETLEASE = 16, 15, 37, 1024, 1025
F_ADD_SEALS, F_GET_SEALS = 1033, 1034
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE = 1, 2, 4, 8
AT_FDCWD, AT_SYMLINK_FOLLOW = -100, 0x400
HOLE = 8 << 20


def holes_and_data(fd: int, size: int) -> list[int]:
    """Where data begins and ends in turn."""
    found, at = [], 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            break
        found.append(at)
        at = os.lseek(fd, at, os.SEEK_HOLE)
        found.append(at)
    return found


class DeletedFile(Case):
    """A deleted file that is open twice: one file, its content, holes, offsets, flags, mode, owner and times."""

    def setup(self) -> None:
        """A hole between two pieces."""
        path = self.directory / "deleted"
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self.reader = os.open(path, os.O_RDONLY)
        self.name_only = os.open(path, os.O_PATH)
        self.content = os.urandom(100_000)
        os.pwrite(self.fd, b"", 0)
        os.write(self.fd, self.content)
        os.ftruncate(self.fd, HOLE)
        os.write(self.fd, b"the end")
        os.lseek(self.reader, 5, os.SEEK_SET)
        os.fchmod(self.fd, 0o640)
        os.utime(self.fd, ns=(10**18 + 1, 10**18 + 2))
        path.unlink()
        self.before = self.take()

    def take(self) -> list[object]:
        """Everything that can be told."""
        found = os.fstat(self.fd)
        size = found.st_size
        return [
            [stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_nlink, size, found.st_mtime_ns],
            found.st_ino == os.fstat(self.reader).st_ino == os.fstat(self.name_only).st_ino,
            holes_and_data(os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY), size),
            [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (self.fd, self.reader, self.name_only)],
            os.lseek(self.reader, 0, os.SEEK_CUR),
        ]

    def verify(self) -> str | None:
        """The same, and both are one file."""
        problem = unlike("file", self.before, self.take())
        if problem:
            return problem
        right = os.pread(self.reader, 100_000, 0) == self.content
        end = os.pread(self.reader, 100, HOLE)
        os.write(self.fd, b", really")
        return first_problem(
            None if right else "the content differs",
            unlike("end", b"the end", end),
            unlike("what was appended", b"the end, really", os.pread(self.reader, 100, HOLE)),
            unlike("name", False, (self.directory / "deleted").exists()),
        )


class ReplacedFile(Case):
    """A deleted file whose name another one has now; that stays what it is."""

    def setup(self) -> None:
        """Two of one name."""
        self.path = self.directory / "replaced"
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        os.write(self.fd, b"the old one")
        self.path.unlink()
        self.path.write_bytes(b"the new one")

    def verify(self) -> str | None:
        """Both."""
        return first_problem(
            unlike("old", b"the old one", os.pread(self.fd, 100, 0)),
            unlike("new", b"the new one", self.path.read_bytes()),
            unlike("files", ["replaced"], [name for name in os.listdir(self.directory) if "replaced" in name]),
        )


class TemporaryFile(Case):
    """O_TMPFILE: it can still be given a name."""

    def setup(self) -> None:
        """One without a name."""
        self.fd = os.open(self.directory, os.O_TMPFILE | os.O_RDWR, 0o600)
        os.write(self.fd, b"temporary")
        self.flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)

    def verify(self) -> str | None:
        """Name it."""
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        path = self.directory / "named at last"
        source = f"/proc/self/fd/{self.fd}".encode()
        if libc.linkat(AT_FDCWD, source, AT_FDCWD, bytes(path), AT_SYMLINK_FOLLOW):
            return "it cannot be given a name"
        return first_problem(unlike("flags", self.flags, flags), unlike("content", b"temporary", path.read_bytes()))


class RemovedDirectory(Case):
    """A directory that was removed, and a file in one."""

    def setup(self) -> None:
        """Remove both."""
        path = self.directory / "removed" / "deeper"
        path.mkdir(parents=True)
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self.file = os.open(path / "file", os.O_RDWR | os.O_CREAT)
        os.write(self.file, b"in a removed directory")
        (path / "file").unlink()
        path.rmdir()
        path.parent.rmdir()

    def verify(self) -> str | None:
        """Nothing can be made in it, and the file is there."""
        try:
            os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=self.fd)
        except FileNotFoundError:
            pass
        else:
            return "a file can be made in a removed directory"
        return first_problem(
            unlike("directory", (True, 0), (stat.S_ISDIR(os.fstat(self.fd).st_mode), len(os.listdir(self.fd)))),
            unlike("file", b"in a removed directory", os.pread(self.file, 100, 0)),
            unlike("names", False, (self.directory / "removed").exists()),
        )


class OtherName(Case):
    """A file that was renamed, and one of whose two names that was deleted by which it was opened."""

    def setup(self) -> None:
        """Rename, link, unlink."""
        first, second = self.directory / "first name", self.directory / "linked"
        self.renamed = os.open(first, os.O_RDWR | os.O_CREAT)
        os.write(self.renamed, b"renamed")
        first.rename(self.directory / "second name")
        self.linked = os.open(second, os.O_RDWR | os.O_CREAT)
        os.write(self.linked, b"linked")
        os.link(second, self.directory / "another link")
        second.unlink()

    def verify(self) -> str | None:
        """They are the files of these names."""
        names = ("second name", "another link")
        return unlike(
            "files",
            [(self.directory / name).stat().st_ino for name in names],
            [os.fstat(fd).st_ino for fd in (self.renamed, self.linked)],
        )


class MemoryFiles(Case):
    """memfd: content, holes, seals, name; opened once more for reading only."""

    def setup(self) -> None:
        """One with seals, one without, one that must not be sealed."""
        self.sealed = os.memfd_create("sealed and delivered", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.write(self.sealed, b"sealed")
        os.lseek(self.sealed, 2, os.SEEK_SET)
        self.reader = os.open(f"/proc/self/fd/{self.sealed}", os.O_RDONLY)
        fcntl.fcntl(self.sealed, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)
        self.open = os.memfd_create("open", os.MFD_ALLOW_SEALING)
        os.pwrite(self.open, b"behind a hole", HOLE)
        self.plain = os.memfd_create("plain", 0)
        os.fchmod(self.plain, 0o600)
        self.before = self.take()

    def take(self) -> list[object]:
        """Everything that can be told."""
        fds = (self.sealed, self.reader, self.open, self.plain)
        return [
            [os.readlink(f"/proc/self/fd/{fd}") for fd in fds],
            [fcntl.fcntl(fd, F_GET_SEALS) for fd in fds],
            [(os.fstat(fd).st_size, os.fstat(fd).st_mode) for fd in fds],
            [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in fds],
            [os.lseek(fd, 0, os.SEEK_CUR) for fd in fds],
            holes_and_data(os.dup(os.open(f"/proc/self/fd/{self.open}", os.O_RDONLY)), HOLE + 13),
            os.fstat(self.sealed).st_ino == os.fstat(self.reader).st_ino,
        ]

    def verify(self) -> str | None:
        """The same; what is sealed cannot be changed."""
        problem = unlike("memfds", self.before, self.take())
        try:
            os.pwrite(self.sealed, b"x", 0)
        except PermissionError:
            pass
        else:
            return "a sealed file was written"
        return first_problem(
            problem,
            unlike("content", b"sealed", os.pread(self.reader, 10, 0)),
            unlike("content", b"behind a hole", os.pread(self.open, 100, HOLE)),
        )


class PacketPipe(Case):
    """A pipe of packets: each read gives one of those that were written."""

    def setup(self) -> None:
        """Three packets, one longer than a page; and a single one."""
        self.read_end, self.write_end = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
        self.packets = [b"one", b"two" * 100, os.urandom(5000)]
        for packet in self.packets:
            os.write(self.write_end, packet)
        self.other_read, self.other_write = os.pipe2(os.O_DIRECT)
        os.write(self.other_write, b"alone")
        self.flags = [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (self.read_end, self.write_end, self.other_write)]

    def verify(self) -> str | None:
        """Packet by packet."""
        flags = [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (self.read_end, self.write_end, self.other_write)]
        os.write(self.write_end, b"later")
        os.write(self.other_write, b"together")
        one, two, long = self.packets
        expected = [one, two, long[:4096], long[4096:], b"later"]
        return first_problem(
            unlike("flags", self.flags, flags),
            unlike("packets", expected, [os.read(self.read_end, 1 << 16) for _ in expected]),
            unlike("packets", [b"alone", b"together"], [os.read(self.other_read, 100) for _ in range(2)]),
        )


class SignalDrivenPipe(Case):
    """O_ASYNC: the owner gets the chosen signal; an owner without O_ASYNC is kept, too."""

    SIGNAL = signal.SIGRTMIN + 13

    def setup(self) -> None:
        """A pipe that tells, and one that could."""
        self.read_end, self.write_end = os.pipe()
        fcntl.fcntl(self.read_end, F_SETOWN_EX, struct.pack("<ii", 1, os.getpid()))
        fcntl.fcntl(self.read_end, fcntl.F_SETSIG, self.SIGNAL)
        fcntl.fcntl(self.read_end, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
        self.quiet = os.pipe()[0]
        fcntl.fcntl(self.quiet, fcntl.F_SETOWN, os.getpid())
        self.before = self.take()

    def take(self) -> list[object]:
        """Flags, owners, signals."""
        return [
            (
                fcntl.fcntl(fd, fcntl.F_GETFL),
                struct.unpack("<ii", fcntl.fcntl(fd, F_GETOWN_EX, bytes(8))),
                fcntl.fcntl(fd, fcntl.F_GETSIG),
            )
            for fd in (self.read_end, self.quiet)
        ]

    def verify(self) -> str | None:
        """Write, and take the signal."""
        problem = unlike("owners", self.before, self.take())
        signal.pthread_sigmask(signal.SIG_BLOCK, {self.SIGNAL})
        early = self.SIGNAL in signal.sigpending()
        os.write(self.write_end, b"x")
        taken = signal.sigtimedwait({self.SIGNAL}, 5)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {self.SIGNAL})
        fd = None if taken is None else taken.si_signo
        return first_problem(problem, unlike("signal of nobody", False, early), unlike("signal", int(self.SIGNAL), fd))


class ProcFiles(Case):
    """Files of /proc: the process's own, and what every host has."""

    PATHS = ("self/status", "self/task", "self/oom_score_adj", "sys/kernel/pid_max", "meminfo")

    def setup(self) -> None:
        """Open them."""
        self.paths = [f"/proc/{path}" for path in self.PATHS]
        self.paths[1] += f"/{os.getpid()}/comm"
        self.fds = [os.open(path, os.O_RDONLY) for path in self.paths]
        os.read(self.fds[0], 10)
        self.fd_directory = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)

    def verify(self) -> str | None:
        """They tell of this process."""
        texts = [os.pread(fd, 4096, 0).decode() for fd in self.fds]
        return first_problem(
            unlike("offset", 10, os.lseek(self.fds[0], 0, os.SEEK_CUR)),
            unlike("comm", Path("/proc/self/comm").read_text(), texts[1]),
            None if f"\nPid:\t{os.getpid()}\n" in texts[0] else "status is of another process",
            unlike("pid_max", Path("/proc/sys/kernel/pid_max").read_text(), texts[3]),
            None if str(self.fd_directory) in os.listdir(self.fd_directory) else "fd is not its own",
        )


class SilentReader(Case):
    """poll(2) on the reading end of a pipe whose writer is there, and on one whose writer is gone."""

    def setup(self) -> None:
        """Both."""
        self.silent, self.writer = os.pipe()
        self.ended, writer = os.pipe()
        os.close(writer)

    def verify(self) -> str | None:
        """Only one has ended."""
        poll = select.poll()
        poll.register(self.silent, select.POLLIN)
        poll.register(self.ended, select.POLLIN)
        return unlike("events", [(self.ended, select.POLLHUP)], poll.poll(0))


class NamedFifos(Case):
    """FIFOs: both ends in the process, with content; a reader that no writer has come to yet."""

    def setup(self) -> None:
        """Three FIFOs."""
        paths = [self.directory / f"fifo {number}" for number in range(3)]
        for path in paths:
            if not path.exists():
                os.mkfifo(path)
        self.reader = os.open(paths[0], os.O_RDONLY | os.O_NONBLOCK)
        self.writer = os.open(paths[0], os.O_WRONLY)
        os.set_blocking(self.reader, True)
        os.write(self.writer, b"in the FIFO")
        self.both = os.open(paths[1], os.O_RDWR)
        os.write(self.both, b"for both")
        self.strict = os.open(paths[1], os.O_RDWR | os.O_NOFOLLOW)
        self.path = paths[2]
        self.lonely = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        self.fds = (self.reader, self.writer, self.both, self.lonely)
        self.before = self.take()

    def take(self) -> list[object]:
        """Names, flags, what poll says."""
        poll = select.poll()
        for fd in self.fds:
            poll.register(fd, select.POLLIN | select.POLLOUT)
        return [
            [os.readlink(f"/proc/self/fd/{fd}") for fd in self.fds],
            [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in self.fds],
            sorted(poll.poll(0)),
        ]

    def verify(self) -> str | None:
        """The content, and that a writer is told of its reader."""
        problem = unlike("FIFOs", self.before, self.take())
        if problem:
            return problem
        late = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
        os.write(late, b"late")
        return unlike(
            "content",
            [b"in the FIFO", b"for both", b"late"],
            [os.read(fd, 100) for fd in (self.reader, self.strict, self.lonely)],
        )


class FileLocks(Case):
    """POSIX, OFD and flock locks and leases, with their ranges."""

    SIGNAL = signal.SIGRTMIN + 14

    def setup(self) -> None:
        """One of each, on files of their own."""
        self.fds = {}
        for name in ("posix", "ofd", "flock", "lease"):
            path = self.directory / f"locked {name}"
            path.write_bytes(bytes(100))
            self.fds[name] = os.open(path, os.O_RDWR if name != "lease" else os.O_RDONLY)
        fcntl.lockf(self.fds["posix"], fcntl.LOCK_EX, 10, 5)
        fcntl.lockf(self.fds["posix"], fcntl.LOCK_SH, 0, 50)
        part = struct.pack("<hh4xqqi4x", fcntl.F_WRLCK, 0, 7, 3, 0)
        fcntl.fcntl(self.fds["ofd"], F_OFD_SETLK, part)
        fcntl.flock(self.fds["flock"], fcntl.LOCK_SH)
        fcntl.fcntl(self.fds["lease"], fcntl.F_SETSIG, self.SIGNAL)
        fcntl.fcntl(self.fds["lease"], F_SETLEASE, fcntl.F_RDLCK)
        self.before = self.take()

    def take(self) -> dict[str, list[list[str]]]:
        """The locks of each, but for their numbers and their files' numbers."""
        found = {}
        for name, fd in self.fds.items():
            lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
            words = [line.split() for line in lines if line.startswith("lock:")]
            found[name] = sorted([*each[2:6], *each[7:]] for each in words)
        return found

    def verify(self) -> str | None:
        """What is shown, and that others cannot have them."""
        problem = unlike("locks", self.before, self.take())
        other = os.open(self.directory / "locked flock", os.O_RDWR)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            return problem or "a second lock was given"
        signal.pthread_sigmask(signal.SIG_BLOCK, {self.SIGNAL})
        try:
            os.open(self.directory / "locked lease", os.O_WRONLY | os.O_NONBLOCK)
        except BlockingIOError:
            pass
        else:
            return problem or "the lease held nobody up"
        taken = signal.sigtimedwait({self.SIGNAL}, 5)
        fcntl.fcntl(self.fds["lease"], F_SETLEASE, fcntl.F_UNLCK)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {self.SIGNAL})
        return problem or (None if taken else "the holder of the lease was not told")
