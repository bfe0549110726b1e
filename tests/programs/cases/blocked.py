"""System calls that a thread is blocked in while it is moved; each must end as if nothing had been."""

import ctypes
import errno
import os
import select
import struct
import threading
import time

from tests.programs.cases import Case, syscall

SYS_READ, SYS_WRITE, SYS_POLL, SYS_NANOSLEEP, SYS_FUTEX, SYS_CLOCK_NANOSLEEP = 0, 1, 7, 35, 202, 230
SYS_EPOLL_WAIT = 232
FUTEX_WAIT_PRIVATE, FUTEX_WAKE_PRIVATE, FUTEX_WAIT_BITSET_PRIVATE = 128, 129, 137
TIMER_ABSTIME = 1
NANOSECONDS = 1_000_000_000


class Timespec(ctypes.Structure):
    """``struct timespec``."""

    _fields_ = [("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long)]

    @classmethod
    def of(cls, seconds: float) -> "Timespec":
        """From seconds."""
        return cls(*divmod(int(seconds * NANOSECONDS), NANOSECONDS))


class BlockedCase(Case):
    """A thread in one raw system call; ``expected`` is what the call must return."""

    expected = 0
    #: Whether the call ends by its own timeout, ``hold`` seconds after setup.
    timed = False
    #: What is left of some relative timeouts is known to the kernel alone (its restart_block), so they may begin anew
    #: where the thread goes on; never end early.
    may_begin_anew = False

    def call(self) -> int:
        """The call; its result, or the negative errno."""
        raise NotImplementedError

    def release(self) -> None:
        """Make an untimed call end."""

    def outcome(self) -> str | None:
        """What else must be so after the call."""
        return None

    def prepare(self) -> None:
        """What the call needs."""

    def setup(self) -> None:
        """Start the thread and wait until the kernel shows it asleep in the call."""
        self.prepare()
        self.begin = time.monotonic()
        self.thread = threading.Thread(target=self.live, daemon=True)
        self.thread.start()
        while not self.asleep():
            if time.monotonic() > self.begin + 5:
                raise TimeoutError(f"{self.name()} never blocks")
            time.sleep(0.001)

    def asleep(self) -> bool:
        """Whether the thread is in the call, by /proc/…/syscall."""
        tid = self.thread.native_id
        with open(f"/proc/self/task/{tid}/syscall") as current:
            return current.read().split()[0] == str(self.number)

    number = 0

    def live(self) -> None:
        """The thread."""
        self.result = self.call()
        self.end = time.monotonic()

    def verify(self) -> str | None:
        """The call ended when and as it should have."""
        if not self.timed:
            if not self.thread.is_alive():
                return f"ended too early, with {describe(self.result)}"
            self.release()
        self.thread.join(self.hold + 10)
        if self.thread.is_alive():
            return "never ended"
        if self.result != self.expected:
            return f"returned {describe(self.result)}, not {describe(self.expected)}"
        if self.timed:
            if self.moved_at is not None and self.end < self.moved_at:
                return f"ended before the move did: nothing was tried (hold is {self.hold} s)"
            took = self.end - self.begin
            latest = self.begin + self.hold
            if self.may_begin_anew and self.moved_at is not None:
                latest = self.moved_at + self.hold
            if took < self.hold - 0.001 or self.end > latest + 3:
                return f"took {took:.3f} s, not {self.hold} to {latest - self.begin:.3f}"
        return self.outcome()


class Nanosleep(BlockedCase):
    """A relative sleep: restarted through restart_syscall(2)."""

    number = SYS_NANOSLEEP
    timed = True

    def call(self) -> int:
        """Sleep."""
        duration = Timespec.of(self.hold)
        self.rest = Timespec(77, 77)
        return syscall(SYS_NANOSLEEP, ctypes.addressof(duration), ctypes.addressof(self.rest))

    def asleep(self) -> bool:
        """The C library's own waits are futexes, so the number says it."""
        return super().asleep()


class AbsoluteSleep(BlockedCase):
    """A sleep until a point of CLOCK_MONOTONIC: restarted with its arguments."""

    number = SYS_CLOCK_NANOSLEEP
    timed = True

    def call(self) -> int:
        """Sleep."""
        until = Timespec.of(self.begin + self.hold)
        return syscall(SYS_CLOCK_NANOSLEEP, time.CLOCK_MONOTONIC, TIMER_ABSTIME, ctypes.addressof(until), 0)


class FutexWait(BlockedCase):
    """A futex without a timeout."""

    number = SYS_FUTEX
    VALUE = 42

    def prepare(self) -> None:
        """The futex word."""
        self.word = ctypes.c_uint32(self.VALUE)

    def call(self) -> int:
        """Wait."""
        return syscall(SYS_FUTEX, ctypes.addressof(self.word), FUTEX_WAIT_PRIVATE, self.VALUE, 0)

    def asleep(self) -> bool:
        """In this futex, not in one of the interpreter's."""
        with open(f"/proc/self/task/{self.thread.native_id}/syscall") as current:
            words = current.read().split()
        return words[:2] == [str(SYS_FUTEX), hex(ctypes.addressof(self.word))]

    def release(self) -> None:
        """Wake it."""
        self.woken = syscall(SYS_FUTEX, ctypes.addressof(self.word), FUTEX_WAKE_PRIVATE, 10)

    def outcome(self) -> str | None:
        """The kernel must have found exactly this waiter."""
        return None if self.woken == 1 else f"FUTEX_WAKE woke {self.woken}"


class FutexTimeout(FutexWait):
    """A futex with a relative timeout: restarted through restart_syscall(2)."""

    timed = True
    may_begin_anew = True
    expected = -errno.ETIMEDOUT

    def call(self) -> int:
        """Wait."""
        timeout = Timespec.of(self.hold)
        address = ctypes.addressof(self.word)
        return syscall(SYS_FUTEX, address, FUTEX_WAIT_PRIVATE, self.VALUE, ctypes.addressof(timeout))

    def outcome(self) -> str | None:
        """Nothing else."""
        return None


class FutexDeadline(FutexTimeout):
    """A futex with an absolute timeout."""

    may_begin_anew = False

    def call(self) -> int:
        """Wait."""
        until = Timespec.of(self.begin + self.hold)
        arguments = (FUTEX_WAIT_BITSET_PRIVATE, self.VALUE, ctypes.addressof(until), 0, 0xFFFFFFFF)
        return syscall(SYS_FUTEX, ctypes.addressof(self.word), *arguments)


class PollTimeout(BlockedCase):
    """poll(2) with a timeout on an empty pipe: restarted through restart_syscall(2)."""

    number = SYS_POLL
    timed = True
    may_begin_anew = True

    def prepare(self) -> None:
        """The pipe."""
        self.read_fd, self.write_fd = os.pipe()
        self.pollfd = ctypes.create_string_buffer(struct.pack("=ihh", self.read_fd, select.POLLIN, 0), 8)

    def call(self) -> int:
        """Poll."""
        return syscall(SYS_POLL, ctypes.addressof(self.pollfd), 1, int(self.hold * 1000))


class PollForever(PollTimeout):
    """poll(2) without a timeout, ended by what comes through the pipe."""

    timed = False
    expected = 1

    def call(self) -> int:
        """Poll."""
        return syscall(SYS_POLL, ctypes.addressof(self.pollfd), 1, -1)

    def release(self) -> None:
        """Send a byte."""
        os.write(self.write_fd, b"!")

    def outcome(self) -> str | None:
        """The event is the right one."""
        (events,) = struct.unpack_from("=h", self.pollfd, 6)
        return None if events == select.POLLIN else f"events {events:#x}"


class EpollWait(BlockedCase):
    """epoll_wait(2) without a timeout: a stop ends it with EINTR (signal(7)), which the program must not see."""

    number = SYS_EPOLL_WAIT
    expected = 1

    def prepare(self) -> None:
        """An instance with one target."""
        self.epoll = select.epoll()
        self.event = os.eventfd(0)
        self.epoll.register(self.event, select.EPOLLIN)
        self.buffer = ctypes.create_string_buffer(12)

    def call(self) -> int:
        """Wait."""
        return syscall(SYS_EPOLL_WAIT, self.epoll.fileno(), ctypes.addressof(self.buffer), 1, -1)

    def release(self) -> None:
        """Make the target ready."""
        os.eventfd_write(self.event, 1)

    def outcome(self) -> str | None:
        """The event is the right one."""
        # Python leaves the upper half of the data as it finds it.
        event = struct.unpack_from("<Ii", self.buffer)
        return None if event == (select.EPOLLIN, self.event) else f"event {event}"


class PipeRead(BlockedCase):
    """read(2) on an empty pipe of the process itself."""

    number = SYS_READ
    MESSAGE = b"through the pipe"
    expected = len(MESSAGE)

    def prepare(self) -> None:
        """The pipe."""
        self.read_fd, self.write_fd = os.pipe()
        self.buffer = ctypes.create_string_buffer(4096)

    def call(self) -> int:
        """Read."""
        return syscall(SYS_READ, self.read_fd, ctypes.addressof(self.buffer), 4096)

    def release(self) -> None:
        """Write."""
        os.write(self.write_fd, self.MESSAGE)

    def outcome(self) -> str | None:
        """The bytes are those."""
        return None if self.buffer.value == self.MESSAGE else f"read {self.buffer.value!r}"


class PipeWrite(BlockedCase):
    """write(2) into a full pipe of the process itself; part of it has been taken already."""

    number = SYS_WRITE
    SIZE = 300_000
    expected = SIZE

    def prepare(self) -> None:
        """The pipe and what will not fit."""
        self.read_fd, self.write_fd = os.pipe()
        self.content = os.urandom(self.SIZE)

    def call(self) -> int:
        """Write, again for the rest when the kernel reports a part: pipe(7) allows that of an interrupted write."""
        view = ctypes.create_string_buffer(self.content, self.SIZE)
        done = 0
        while done < self.SIZE:
            written = syscall(SYS_WRITE, self.write_fd, ctypes.addressof(view) + done, self.SIZE - done)
            if written < 0:
                return written
            done += written
        return done

    def release(self) -> None:
        """Drain the pipe."""
        self.drained = b""
        while len(self.drained) < self.SIZE and select.select([self.read_fd], [], [], 5)[0]:
            self.drained += os.read(self.read_fd, 65536)

    def outcome(self) -> str | None:
        """Every byte once."""
        return None if self.drained == self.content else f"{len(self.drained)} bytes came, or others than were written"


def describe(result: int) -> str:
    """A result in words."""
    return errno.errorcode.get(-result, str(result)) if result < 0 else str(result)
