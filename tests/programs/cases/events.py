"""Descriptors that wait for events: eventfd, timerfd, signalfd, epoll, inotify, pidfd."""

import ctypes
import fcntl
import os
import re
import select
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from tests.programs.cases import Case, Snapshot, first_problem, libc, required, syscall, unlike

SYS_TIMERFD_CREATE, SYS_TIMERFD_SETTIME, SYS_TIMERFD_GETTIME = 283, 286, 287
SYS_SIGNALFD4, SYS_INOTIFY_INIT1, SYS_PIDFD_OPEN, SYS_PIDFD_SEND_SIGNAL = 289, 294, 434, 424
TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET = 1, 2
IN_MODIFY, IN_CREATE, IN_DELETE, IN_ONESHOT = 0x2, 0x100, 0x200, 0x80000000
SYS_FANOTIFY_INIT, FAN_NONBLOCK, FAN_REPORT_DFID_NAME = 300, 2, 0xC00
FAN_ACCESS, FAN_MODIFY, FAN_CLOSE_WRITE, FAN_OPEN_EXEC = 0x1, 0x2, 0x8, 0x1000
FAN_ONDIR, FAN_EVENT_ON_CHILD = 0x40000000, 0x08000000
FAN_MARK_ADD, FAN_MARK_MOUNT, FAN_MARK_IGNORED_MASK, FAN_MARK_SURV_MODIFY, FAN_MARK_FILESYSTEM = 1, 16, 32, 64, 256
HOUR = 3600 * 10**9


def flags(fd: int) -> int:
    """The status flags."""
    return fcntl.fcntl(fd, fcntl.F_GETFL)


def field(fd: int, name: str) -> str:
    """A field of a descriptor's fdinfo."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return value.strip()
    raise AssertionError(f"no {name}")


class EventCounters(Case):
    """eventfd: counters, beyond 32 bits too, semaphores, flags."""

    def setup(self) -> None:
        """Four of them."""
        self.empty = os.eventfd(0, os.EFD_NONBLOCK)
        self.counter = os.eventfd(5)
        self.large = os.eventfd(0)
        os.eventfd_write(self.large, (1 << 64) - 2)
        self.semaphore = os.eventfd(3, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.flags = [flags(fd) for fd in (self.empty, self.counter, self.large, self.semaphore)]

    def verify(self) -> str | None:
        """What they hold, and how it is read."""
        found = [flags(fd) for fd in (self.empty, self.counter, self.large, self.semaphore)]
        try:
            os.eventfd_read(self.empty)
        except BlockingIOError:
            pass
        else:
            return "an empty counter gave something"
        return first_problem(
            unlike("flags", self.flags, found),
            unlike("counter", 5, os.eventfd_read(self.counter)),
            unlike("large counter", (1 << 64) - 2, os.eventfd_read(self.large)),
            unlike("semaphore", [1, 1, 1], [os.eventfd_read(self.semaphore) for _ in range(3)]),
        )


class TimerDescriptors(Case):
    """timerfd: clocks, intervals, what is left, expirations that nobody has read, the flags of setting."""

    def make(self, clock: int, how: int, value: int, interval: int, nonblock: int = 0) -> int:
        """A timer that is set (ns)."""
        fd = required(syscall(SYS_TIMERFD_CREATE, clock, nonblock), "timerfd_create")
        self.set(fd, how, value, interval)
        return fd

    @staticmethod
    def set(fd: int, how: int, value: int, interval: int) -> None:
        """Set a timer (ns)."""
        setting = struct.pack("<4q", *divmod(interval, 10**9), *divmod(value, 10**9))
        if libc.syscall(SYS_TIMERFD_SETTIME, fd, how, setting, None):
            raise OSError("timerfd_settime")

    @staticmethod
    def get(fd: int) -> tuple[int, int]:
        """Interval and what is left (ns)."""
        buffer = bytearray(32)
        view = (ctypes.c_char * 32).from_buffer(buffer)
        assert libc.syscall(SYS_TIMERFD_GETTIME, fd, view) == 0
        one, one_ns, left, left_ns = struct.unpack("<4q", buffer)
        return one * 10**9 + one_ns, left * 10**9 + left_ns

    def setup(self) -> None:
        """One of each."""
        self.began = time.monotonic_ns()
        self.relative = self.make(time.CLOCK_MONOTONIC, 0, HOUR, 0, os.O_NONBLOCK)
        self.periodic = self.make(time.CLOCK_BOOTTIME, 0, HOUR, 7_000_000_001)
        self.deadline = time.time_ns() + HOUR
        wall_flags = TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET
        self.wall = self.make(time.CLOCK_REALTIME, wall_flags, self.deadline, 5 * 10**9)
        self.absolute = self.make(time.CLOCK_MONOTONIC, TFD_TIMER_ABSTIME, time.monotonic_ns() + HOUR, 0)
        self.disarmed = self.make(time.CLOCK_MONOTONIC, 0, 0, 0)
        self.fired = self.make(time.CLOCK_MONOTONIC, 0, 1000, 0)
        self.running = self.make(time.CLOCK_MONOTONIC, 0, 10**6, 10**6, os.O_NONBLOCK)
        select.select([self.fired], [], [])
        while self.get(self.running) and int(field(self.running, "ticks")) < 5:
            pass
        self.all = (self.relative, self.periodic, self.wall, self.absolute, self.disarmed, self.fired, self.running)
        self.shown = [(flags(fd), field(fd, "clockid"), field(fd, "settime flags")) for fd in self.all]

    def verify(self) -> str | None:
        """Clocks and flags, what is left, and what is read."""
        shown = [(flags(fd), field(fd, "clockid"), field(fd, "settime flags")) for fd in self.all]
        elapsed = time.monotonic_ns() - self.began
        earliest = time.time_ns()
        deadline = earliest + self.get(self.wall)[1]
        # It may take a while to be asked; a stand-still is longer than what is allowed beside that.
        drift = max(deadline - self.deadline, self.deadline - deadline - (time.time_ns() - earliest), 0)
        left = {name: self.get(getattr(self, name))[1] for name in ("relative", "periodic", "absolute")}
        odd = {name: value for name, value in left.items() if not HOUR - elapsed - 10**7 <= value <= HOUR}
        ready = select.select([self.fired, self.disarmed], [], [], 0)[0]
        ticks = struct.unpack("<Q", os.read(self.running, 8))[0]
        # Not while it stood still; but each since then.
        least = (time.monotonic() - self.moved_at) * 1000 - 100 if self.moved_at else 5
        problem = first_problem(
            unlike("flags, clocks, settime flags", self.shown, shown),
            f"left of an hour after {elapsed / 1e9:.1f} s: {odd}" if odd else None,
            None if drift < 10**7 else f"the wall-clock deadline has moved by {drift} ns",
            unlike("interval", (7_000_000_001, 5 * 10**9), (self.get(self.periodic)[0], self.get(self.wall)[0])),
            unlike("disarmed", (0, 0), self.get(self.disarmed)),
            unlike("ready", [self.fired], ready),
            unlike("expirations", 1, struct.unpack("<Q", os.read(self.fired, 8))[0]),
            None if max(5, least) <= ticks <= elapsed / 10**6 + 5 else f"{ticks} expirations, {least} expected",
        )
        if problem:
            return problem
        self.set(self.disarmed, 0, 1000, 0)
        return unlike("a timer set now", 1, struct.unpack("<Q", os.read(self.disarmed, 8))[0])


class SignalDescriptor(Case):
    """signalfd: its mask."""

    SIGNAL = signal.SIGRTMIN + 11

    def setup(self) -> None:
        """Two signals."""
        mask = struct.pack("<Q", 1 << self.SIGNAL - 1 | 1 << signal.SIGUSR2 - 1)
        self.fd = libc.syscall(SYS_SIGNALFD4, -1, mask, 8, os.O_NONBLOCK)
        self.shown = flags(self.fd), field(self.fd, "sigmask")

    def verify(self) -> str | None:
        """It is readable when its signal is pending."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {self.SIGNAL})
        os.kill(os.getpid(), self.SIGNAL)
        problem = unlike("flags and mask", self.shown, (flags(self.fd), field(self.fd, "sigmask")))
        taken = struct.unpack_from("<I", os.read(self.fd, 128))[0]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {self.SIGNAL})
        return problem or unlike("signal", self.SIGNAL, taken)


class EpollTargets(Case):
    """epoll: events and data of each target, nested instances, an instance without targets."""

    def setup(self) -> None:
        """A pipe with content, a silent one, an eventfd, an epoll within."""
        self.outer, self.inner, self.nothing = select.epoll(), select.epoll(), select.epoll()
        self.loud, loud_end = os.pipe()
        os.write(loud_end, b"x")
        self.silent, self.silent_end = os.pipe()
        self.event = os.eventfd(0)
        self.outer.register(self.loud, select.EPOLLIN)
        self.outer.register(self.silent, select.EPOLLIN | select.EPOLLRDHUP)
        self.outer.register(self.inner.fileno(), select.EPOLLIN)
        self.inner.register(self.event, select.EPOLLIN)
        self.shown = [self.targets(each) for each in (self.outer, self.inner, self.nothing)]

    @staticmethod
    def targets(epoll: select.epoll) -> set[str]:
        """Number, events and data of the targets."""
        lines = Path(f"/proc/self/fdinfo/{epoll.fileno()}").read_text().splitlines()
        return {line.partition(" pos:")[0] for line in lines if line.startswith("tfd:")}

    def verify(self) -> str | None:
        """What is shown; what is told before and after something happens."""
        shown = [self.targets(each) for each in (self.outer, self.inner, self.nothing)]
        before = self.outer.poll(0)
        os.write(self.silent_end, b"y")
        os.eventfd_write(self.event, 1)
        after = {fd for fd, _ in self.outer.poll(0)}
        return first_problem(
            unlike("targets", self.shown, shown),
            unlike("ready", [(self.loud, select.EPOLLIN)], before),
            unlike("ready then", {self.loud, self.silent, self.inner.fileno()}, after),
            unlike("inner", [(self.event, select.EPOLLIN)], self.inner.poll(0)),
        )


class EpollEdges(Case):
    """Edge-triggered and one-shot targets: an event that was not told is told, once; others not again."""

    def setup(self) -> None:
        """Of each kind one that has been told of, and one that has not."""
        self.told, self.untold = select.epoll(), select.epoll()
        self.events = [os.eventfd(1) for _ in range(2)]
        self.read_end, self.write_end = os.pipe()
        for epoll in (self.told, self.untold):
            epoll.register(self.events[0], select.EPOLLIN | select.EPOLLET)
            epoll.register(self.events[1], select.EPOLLIN | select.EPOLLONESHOT)
            epoll.register(self.read_end, select.EPOLLIN | select.EPOLLET)
        assert len(self.told.poll(0)) == 2
        self.shown = EpollTargets.targets(self.told)

    def verify(self) -> str | None:
        """What is told at once, and what after it happens again."""
        shown = EpollTargets.targets(self.told)
        told, untold = self.told.poll(0), sorted(self.untold.poll(0))
        again = self.untold.poll(0)
        for event in self.events:
            os.eventfd_write(event, 1)
        os.write(self.write_end, b"x")
        edges = sorted(fd for fd, _ in self.told.poll(0))
        self.told.modify(self.events[1], select.EPOLLIN | select.EPOLLONESHOT)
        rearmed = [fd for fd, _ in self.told.poll(0)]
        return first_problem(
            unlike("targets", self.shown, shown),
            unlike("told before", [], told),
            unlike("not told before", [(fd, select.EPOLLIN) for fd in sorted(self.events)], untold),
            unlike("told twice", [], again),
            unlike("new edges", sorted([self.events[0], self.read_end]), edges),
            unlike("one shot, armed again", [self.events[1]], rearmed),
        )


class EpollOfClosedNumbers(Case):
    """Targets whose number was closed or is something else now, while a duplicate keeps them."""

    def setup(self) -> None:
        """Three pipes under one number after the other; only the last still has it."""
        self.epoll = select.epoll()
        self.ends, self.kept = [], []
        number = os.dup(0)
        for _ in range(3):
            read_end, write_end = os.pipe()
            os.dup2(read_end, number)
            self.epoll.register(number, select.EPOLLIN)
            self.ends.append(write_end)
            self.kept.append(read_end)
        self.gone = os.dup(self.kept[0])
        self.epoll.register(self.gone, select.EPOLLIN)
        os.close(self.gone)
        self.number = number
        os.dup2(0, number)
        self.shown = sorted(EpollTargets.targets(self.epoll))

    def verify(self) -> str | None:
        """Each is told by its old number, and the numbers are what they were."""
        problem = unlike("targets", self.shown, sorted(EpollTargets.targets(self.epoll)))
        if problem:
            return problem
        told = []
        for end, kept in zip(self.ends, self.kept, strict=True):
            os.write(end, b"x")
            told.append(sorted(fd for fd, _ in self.epoll.poll(0)))
            os.read(kept, 1)
        return first_problem(
            unlike("told", [sorted([self.number, self.gone]), [self.number], [self.number]], told),
            unlike("number", os.readlink("/proc/self/fd/0"), os.readlink(f"/proc/self/fd/{self.number}")),
        )


class InotifyWatches(Case):
    """inotify: watches with their numbers and masks, also after one was removed."""

    def setup(self) -> None:
        """Three watches, the second removed."""
        self.fd = required(syscall(SYS_INOTIFY_INIT1, os.O_NONBLOCK), "inotify_init1")
        self.paths = [self.directory / f"watched {number}" for number in range(3)]
        masks = (IN_CREATE, IN_CREATE, IN_CREATE | IN_DELETE | IN_ONESHOT)
        for path, mask in zip(self.paths, masks, strict=True):
            path.mkdir()
            libc.inotify_add_watch(self.fd, bytes(path), mask)
        libc.inotify_rm_watch(self.fd, 2)
        os.read(self.fd, 4096)
        self.shown = self.watches()

    def watches(self) -> set[tuple[str, ...]]:
        """Number, file and mask of each."""
        lines = Path(f"/proc/self/fdinfo/{self.fd}").read_text().splitlines()
        return {tuple(line.split()[1:5]) for line in lines if line.startswith("inotify ")}

    def verify(self) -> str | None:
        """What is shown; then what happens is told under the right number."""
        shown = self.watches()
        try:
            early = os.read(self.fd, 4096)
        except BlockingIOError:
            early = b""
        for path in self.paths:
            (path / "new").touch()
        events = os.read(self.fd, 4096)
        numbers = []
        while events:
            number, mask, _, length = struct.unpack_from("<iIII", events)
            numbers.append((number, mask))
            events = events[16 + length :]
        return first_problem(
            unlike("watches", self.shown, shown),
            unlike("events of nobody", b"", early),
            unlike("events", [(1, IN_CREATE), (3, IN_CREATE), (3, 0x8000)], numbers),
        )


class InotifyOfDeleted(Case):
    """inotify: watches of an open file whose name was deleted, between two of others."""

    def setup(self) -> None:
        """Three files, of which the second is deleted."""
        self.inotify = required(syscall(SYS_INOTIFY_INIT1, os.O_NONBLOCK), "inotify_init1")
        self.files = []
        for number in range(3):
            path = self.directory / f"watched file {number}"
            self.files.append(os.open(path, os.O_RDWR | os.O_CREAT))
            libc.inotify_add_watch(self.inotify, bytes(path), IN_MODIFY)
        (self.directory / "watched file 1").unlink()

    def verify(self) -> str | None:
        """What is written is told under the right number, and nothing else."""
        for file in self.files:
            os.write(file, b"x")
        events = os.read(self.inotify, 4096)
        told = [struct.unpack_from("<iI", events, place) for place in range(0, len(events), 16)]
        return unlike("events", [(number, IN_MODIFY) for number in (1, 2, 3)], told)


class FanotifyGroups(Case):
    """fanotify: groups of both kinds of reports, marks on files, directories, a mount and a filesystem, what is left
    out of them."""

    def setup(self) -> None:
        """Mark; read what comes."""
        self.path = self.directory / "watched by fanotify"
        self.path.mkdir()
        file = self.path / "file"
        file.touch()
        flags = os.O_RDONLY | os.O_CLOEXEC
        self.plain = required(syscall(SYS_FANOTIFY_INIT, FAN_NONBLOCK, flags), "fanotify_init")
        self.names = required(syscall(SYS_FANOTIFY_INIT, FAN_NONBLOCK | FAN_REPORT_DFID_NAME, 0), "fanotify_init")
        self.mark(self.plain, FAN_MARK_ADD, FAN_CLOSE_WRITE | FAN_EVENT_ON_CHILD, self.path)
        self.mark(self.plain, FAN_MARK_ADD, FAN_ACCESS, file)
        self.mark(self.plain, FAN_MARK_ADD | FAN_MARK_IGNORED_MASK | FAN_MARK_SURV_MODIFY, FAN_MODIFY, file)
        self.mark(self.plain, FAN_MARK_ADD | FAN_MARK_MOUNT, FAN_OPEN_EXEC, Path("/dev"))
        self.mark(self.plain, FAN_MARK_ADD | FAN_MARK_FILESYSTEM, FAN_OPEN_EXEC, Path("/dev/shm"))
        self.mark(self.names, FAN_MARK_ADD, IN_CREATE | IN_DELETE | FAN_ONDIR, self.path)
        self.before = self.shown()

    @staticmethod
    def mark(group: int, how: int, mask: int, path: Path) -> None:
        """fanotify_mark(2)."""
        if libc.fanotify_mark(group, how, ctypes.c_uint64(mask), -100, bytes(path)):
            raise OSError(ctypes.get_errno(), f"fanotify_mark of {path}")

    def shown(self) -> list[object]:
        """What the kernel shows of both: marks on mounts and filesystems by what they are for alone."""
        found: list[object] = []
        for fd in (self.plain, self.names):
            lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
            marks = [line for line in lines if line.startswith("fanotify")]
            found += [flags(fd), sorted(re.sub(r"(sdev|mnt_id):\w+ ", r"\1 ", line) for line in marks)]
        return found

    def verify(self) -> str | None:
        """The same is shown; a file is written and read, another made: that is told, and nothing else."""
        after = self.shown()
        (self.path / "file").write_bytes(b"x")
        masks = [event_masks(self.plain)]
        (self.path / "file").read_bytes()
        (self.path / "new").mkdir()
        masks += [event_masks(fd) for fd in (self.plain, self.names)]
        return first_problem(
            unlike("what is shown", self.before, after),
            unlike("events", [[FAN_CLOSE_WRITE], [FAN_ACCESS], [IN_CREATE | FAN_ONDIR]], masks),
        )


def event_masks(group: int) -> list[int]:
    """What a fanotify group has been told."""
    content, found = os.read(group, 4096), []
    while content:
        length, mask, fd = struct.unpack_from("=I4xQi", content)
        found.append(mask)
        if fd >= 0:
            os.close(fd)
        content = content[length:]
    return found


class PidDescriptors(Case):
    """pidfd: of the process itself, and of its main thread as a thread."""

    def setup(self) -> None:
        """Open them."""
        self.fd = os.pidfd_open(os.getpid())
        self.nonblock = required(syscall(SYS_PIDFD_OPEN, os.getpid(), os.O_NONBLOCK), "pidfd_open")
        self.thread = syscall(SYS_PIDFD_OPEN, os.getpid(), os.O_EXCL)
        self.fds = [fd for fd in (self.fd, self.nonblock, self.thread) if fd >= 0]
        self.shown = [(flags(fd), field(fd, "Pid")) for fd in self.fds]

    def verify(self) -> str | None:
        """It is alive, and is us."""
        signal.pidfd_send_signal(self.fd, 0)
        return first_problem(
            unlike("flags and PIDs", self.shown, [(flags(fd), field(fd, "Pid")) for fd in self.fds]),
            unlike("ended", [], select.select(self.fds, [], [], 0)[0]),
        )


PIDFD_GET_INFO, PIDFD_INFO_EXIT = 0xC048_FF0B, 8


def exit_status(fd: int) -> int | None:
    """What PIDFD_GET_INFO tells of the end; None where it tells nothing of it."""
    info = bytearray(struct.pack("=Q64x", PIDFD_INFO_EXIT))
    try:
        fcntl.ioctl(fd, PIDFD_GET_INFO, info)
    except OSError:
        return None
    mask, status = struct.unpack_from("=Q52xi", info)
    return int(status) if mask & PIDFD_INFO_EXIT else None


class EndedPidDescriptors(Snapshot):
    """pidfds of processes that have ended and been waited for; two of them of the same."""

    def arrange(self) -> None:
        """Children that exit, and one that is killed."""
        self.fds: list[int] = []
        for status in (7, 0, -signal.SIGTERM):
            if not (pid := os.fork()):
                end(status)
            self.fds.append(os.pidfd_open(pid))
            if status == 7:
                self.fds.append(required(syscall(SYS_PIDFD_OPEN, pid, os.O_NONBLOCK), "pidfd_open"))
                self.fds += [fd for fd in [syscall(SYS_PIDFD_OPEN, pid, os.O_EXCL)] if fd >= 0]
            os.waitpid(pid, 0)

    def take(self) -> dict[str, Any]:
        """All that can be known of them."""
        inodes = [os.fstat(fd).st_ino for fd in self.fds]
        return {
            "which are the same": [inodes.index(inode) for inode in inodes],
            **{f"pidfd {number}": self.told(fd) for number, fd in enumerate(self.fds)},
        }

    @staticmethod
    def told(fd: int) -> list[object]:
        """What each call tells of one."""
        poll = select.poll()
        poll.register(fd, 0xFFFF)
        found: list[object] = [flags(fd), field(fd, "Pid"), [event for _, event in poll.poll(0)], exit_status(fd)]
        asks: tuple[Callable[[], object], ...] = (
            lambda: signal.pidfd_send_signal(fd, 0),
            lambda: os.waitid(os.P_PIDFD, fd, os.WEXITED),
        )
        for ask in asks:
            try:
                found.append(ask())
            except OSError as error:
                found.append(error.errno)
        return found


def end(status: int) -> NoReturn:
    """Exit with it, or die of a signal."""
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        os.kill(os.getpid(), -status)
    os._exit(status)
