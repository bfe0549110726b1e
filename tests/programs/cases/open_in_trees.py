"""Open files of every kind that processes of a tree share, or by which one refers to another."""

import fcntl
import json
import os
import pty
import select
import signal
import struct
import termios
from typing import NoReturn

from tests.programs.cases import Case, first_problem, unlike
from tests.programs.cases.events import EndedPidDescriptors, exit_status
from tests.programs.cases.trees import Child, Line

F_GETOWN_EX = 16


class EpollAcross(Case):
    """An epoll instance that parent and child share, with a target that only the child still has."""

    def setup(self) -> None:
        """The parent registers both ends' pipes, and keeps one reading end."""
        self.epoll = select.epoll()
        self.mine, mine_end = os.pipe()
        theirs, self.their_end = os.pipe()
        self.epoll.register(self.mine, select.EPOLLIN)
        self.epoll.register(theirs, select.EPOLLIN | select.EPOLLET)
        self.theirs = theirs
        epoll = self.epoll.fileno()

        def child(line: Line) -> None:
            line.say("there")
            line.wait()
            os.write(mine_end, b"x")
            line.say(sorted(fd for fd, _ in select.epoll.fromfd(epoll).poll(5)))
            line.wait()
            line.say(os.read(theirs, 10).decode())
            line.wait()

        self.child = Child(child, epoll, mine_end, theirs)
        os.close(mine_end)
        os.close(theirs)
        self.child.hear()

    def verify(self) -> str | None:
        """What the child writes both hear; what the parent writes to the child's end is told by the old number."""
        early = self.epoll.poll(0)
        self.child.say("write")
        told = self.child.hear()
        mine = [fd for fd, _ in self.epoll.poll(0)]
        os.read(self.mine, 1)
        os.write(self.their_end, b"y")
        after = [fd for fd, _ in self.epoll.poll(0)]
        self.child.say("read")
        return first_problem(
            unlike("told early", [], early),
            unlike("told to the child", [self.mine], told),
            unlike("told to the parent", [self.mine], mine),
            unlike("told of the child's end", [self.theirs], after),
            unlike("content", "y", self.child.hear()),
        )


class GhostOfTwo(Case):
    """A deleted file that parent and child have open each by itself, and a counter that they share."""

    def setup(self) -> None:
        """Open, fork, open once more, unlink."""
        path = self.directory / "ghost of two"
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT)
        os.write(self.fd, b"before")
        self.event = os.eventfd(7)

        def child(line: Line) -> None:
            apart = os.open(path, os.O_RDWR | os.O_APPEND)
            line.say("there")
            line.wait()
            os.write(apart, b" and after")
            line.say([os.pread(apart, 100, 0).decode(), os.eventfd_read(self.event), os.fstat(apart).st_ino])
            line.wait()

        self.child = Child(child, self.event)
        self.child.hear()
        path.unlink()

    def verify(self) -> str | None:
        """One writes, the other reads."""
        self.child.say("write")
        text, count, inode = self.child.hear()
        os.set_blocking(self.event, False)
        try:
            left = os.eventfd_read(self.event)
        except BlockingIOError:
            left = 0
        return first_problem(
            unlike("child's text", "before and after", text),
            unlike("text", b"before and after", os.pread(self.fd, 100, 0)),
            unlike("inode", os.fstat(self.fd).st_ino, inode),
            unlike("counter", (7, 0), (count, left)),
        )


class OwnersAndPidfds(Case):
    """A pipe whose signals go to a child; pidfds of the child and of its grandparent."""

    SIGNAL = signal.SIGRTMIN + 12

    def setup(self) -> None:
        """The child waits for a signal."""
        self.read_end, self.write_end = os.pipe()
        parent = os.getpid()

        def child(line: Line) -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, {self.SIGNAL})
            up = os.pidfd_open(parent)
            line.say("there")
            line.wait()
            taken = signal.sigtimedwait({self.SIGNAL}, 10)
            signal.pidfd_send_signal(up, 0)
            line.say(taken.si_signo if taken else 0)
            line.wait()

        self.child = Child(child)
        self.child.hear()
        fcntl.fcntl(self.read_end, fcntl.F_SETOWN, self.child.pid)
        fcntl.fcntl(self.read_end, fcntl.F_SETSIG, self.SIGNAL)
        fcntl.fcntl(self.read_end, fcntl.F_SETFL, os.O_ASYNC)
        self.pidfd = os.pidfd_open(self.child.pid)

    def verify(self) -> str | None:
        """Write: the child is told. Then it ends: the pidfd tells."""
        owner = struct.unpack("<ii", fcntl.fcntl(self.read_end, F_GETOWN_EX, bytes(8)))
        self.child.say("wait")
        os.write(self.write_end, b"x")
        heard = self.child.hear()
        alive = select.select([self.pidfd], [], [], 0)[0]
        status = self.child.end()
        return first_problem(
            unlike("owner", (1, self.child.pid), owner),
            unlike("signal", int(self.SIGNAL), heard),
            unlike("ended", [], alive),
            unlike("ended then", ([self.pidfd], 0), (select.select([self.pidfd], [], [], 5)[0], status)),
        )


class PidfdOfZombie(Case):
    """A pidfd of a child that has ended, and that nobody has waited for."""

    def setup(self) -> None:
        """The child ends."""
        self.pid = os.fork()
        if not self.pid:
            os._exit(7)
        self.fd = os.pidfd_open(self.pid)
        select.select([self.fd], [], [])

    def verify(self) -> str | None:
        """It is told to have ended; how, when it is waited for."""
        ready = select.select([self.fd], [], [], 0)[0]
        signal.pidfd_send_signal(self.fd, 0)
        end = os.waitid(os.P_PIDFD, self.fd, os.WEXITED)
        if end is None:
            return "it cannot be waited for"
        return first_problem(
            unlike("ended", [self.fd], ready),
            unlike("end", (self.pid, os.CLD_EXITED, 7), (end.si_pid, end.si_code, end.si_status)),
            unlike("status", exit_status(self.fd) and 7 << 8, exit_status(self.fd)),
        )


class TerminalOfChild(Case):
    """A pseudoterminal: the master here, the slave the controlling terminal of a child with two groups."""

    def setup(self) -> None:
        """The child leads a session; a child of its own is in the foreground."""
        self.pid, self.master = pty.fork()
        if not self.pid:
            self.live()
        settings = termios.tcgetattr(self.master)
        settings[3] &= ~(termios.ICANON | termios.ECHO)
        settings[6][termios.VMIN] = 1
        settings[6][termios.VERASE] = b"#"
        termios.tcsetattr(self.master, termios.TCSANOW, settings)
        termios.tcsetwinsize(self.master, (33, 111))
        os.set_blocking(self.master, False)
        self.told = self.ask()
        self.settings = termios.tcgetattr(self.master)

    @staticmethod
    def live() -> NoReturn:
        """The child waits; its own child, in the foreground, answers what it sees of the terminal."""
        os.closerange(3, 4096)
        extra = os.open("/dev/tty", os.O_RDWR)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        signal.signal(signal.SIGINT, lambda number, frame: os.write(1, b"behind\n"))
        if os.fork():
            while True:
                signal.pause()
        os.setpgid(0, 0)
        os.tcsetpgrp(0, os.getpid())
        signal.signal(signal.SIGINT, lambda number, frame: os.write(1, b"in front\n"))
        while os.read(0, 1):
            with open("/proc/self/stat") as stat:
                terminal = stat.read().rpartition(")")[2].split()[4]
            seen = [os.ttyname(0), os.tcgetpgrp(extra), os.getsid(0), terminal, *termios.tcgetwinsize(1)]
            os.write(1, json.dumps(seen).encode() + b"\n")
        os._exit(0)

    def line(self) -> str:
        """A line from the terminal."""
        found = b""
        while not found.endswith(b"\n") and select.select([self.master], [], [], 10)[0]:
            found += os.read(self.master, 1)
        return found.decode().strip()

    def ask(self) -> list[object]:
        """What the child sees."""
        os.write(self.master, b"?")
        seen: list[object] = json.loads(self.line() or "[]")
        return seen

    def verify(self) -> str | None:
        """The same; Ctrl-C goes to the foreground group; the end of the master is the end of the session."""
        problem = first_problem(
            unlike("settings", self.settings, termios.tcgetattr(self.master)),
            unlike("window", (33, 111), termios.tcgetwinsize(self.master)),
            unlike("blocking", False, os.get_blocking(self.master)),
            unlike("name", self.told[0], os.ptsname(self.master) if hasattr(os, "ptsname") else self.told[0]),
            unlike("what the child sees", self.told, self.ask()),
        )
        if problem:
            return problem
        os.write(self.master, b"\x03")
        told = self.line()
        os.close(self.master)
        _, status = os.waitpid(self.pid, 0)
        return first_problem(unlike("Ctrl-C", "in front", told), unlike("end", signal.SIGHUP, os.WTERMSIG(status)))


CASES: tuple[type[Case], ...] = (EpollAcross, GhostOfTwo, OwnersAndPidfds, PidfdOfZombie, EndedPidDescriptors)
