"""What processes of a tree are to one another: parents, sessions, groups, ends, and what they share."""

import contextlib
import json
import mmap
import os
import resource
import select
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from tests.programs.cases import Case, differences, first_problem, libc, required, syscall, unlike
from tests.programs.cases.identity import prctl

SYS_CLONE, SYS_EXIT = 56, 60
CLONE_FS, CLONE_FILES = 0x200, 0x400
LOW = 1000
CLONE_NEWNS, CLONE_NEWPID, MS_REC, MS_PRIVATE = 0x20000, 0x20000000, 0x4000, 0x40000
PR_SET_PDEATHSIG, PR_GET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 2, 36
SIGSEGV_AND_CORE = 11 | 0x80
ANSWER_SECONDS = 20
WAIT_SECONDS = 10


class Line:
    """A line to another process: two pipes, of which this is one side."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.read_fd, self.write_fd = read_fd, write_fd

    def say(self, what: Any) -> None:
        """One line of JSON."""
        os.write(self.write_fd, json.dumps(what).encode() + b"\n")

    def hear(self) -> Any:
        """Wait for one. Raises TimeoutError, EOFError."""
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([self.read_fd], [], [], ANSWER_SECONDS)[0]:
                raise TimeoutError(f"no answer after {line!r}")
            byte = os.read(self.read_fd, 1)
            if not byte:
                raise EOFError(f"the other side is gone after {line!r}")
            line += byte
        return json.loads(line)

    def wait(self) -> None:
        """Wait for the next word, however long that takes; the process ends where the other side is gone."""
        byte = b""
        while byte != b"\n":
            byte = os.read(self.read_fd, 1)
            if not byte:
                os._exit(0)


class Child(Line):
    """A child process that runs ``body`` with its side of a line, and ends with 0."""

    def __init__(self, body: Callable[[Line], object], *keep: int, make: Callable[[], int] = os.fork) -> None:
        """The child closes every descriptor but the standard streams and those of ``keep``."""
        to_child, from_child = os.pipe(), os.pipe()
        self.pid = make()
        if not self.pid:
            line = Line(to_child[0], from_child[1])
            self._live(body, line, {0, 1, 2, line.read_fd, line.write_fd, *keep})
        os.close(to_child[0])
        os.close(from_child[1])
        super().__init__(from_child[0], to_child[1])

    @staticmethod
    def _live(body: Callable[[Line], object], line: Line, keep: set[int]) -> NoReturn:
        try:
            for fd in [int(name) for name in os.listdir("/proc/self/fd")]:
                if fd not in keep:
                    with contextlib.suppress(OSError):
                        os.close(fd)
            body(line)
            os._exit(0)
        except BaseException as error:
            with contextlib.suppress(OSError):
                line.say(f"{type(error).__name__}: {error}")
            os._exit(99)

    def end(self) -> int:
        """Close the line and wait for the end: the wait status."""
        os.close(self.write_fd)
        return os.waitpid(self.pid, 0)[1]


def relations() -> dict[str, Any]:
    """What a process is to others, as it sees it."""
    with open("/proc/self/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "session": os.getsid(0),
        "group": os.getpgid(0),
        "exit signal": int(fields[35]),
    }


def answering(line: Line) -> None:
    """A body that tells its relations once now and once when it is asked."""
    line.say(relations())
    line.wait()
    line.say(relations())
    line.wait()


def wait_for(condition: Callable[[], bool]) -> bool:
    """Whether it comes true in time."""
    until = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.002)
    return True


class Relations(Case):
    """Case whose processes all tell their relations before and after."""

    def make(self) -> list[Line]:
        """The lines of the processes, each of which answers."""
        raise NotImplementedError

    def setup(self) -> None:
        """Make them and hear what they say."""
        self.lines = self.make()
        self.before = [line.hear() for line in self.lines]

    def verify(self) -> str | None:
        """They say the same."""
        for line in self.lines:
            line.say("again")
        return differences(
            {str(number): told for number, told in enumerate(self.before)},
            {str(number): line.hear() for number, line in enumerate(self.lines)},
        )


class Generations(Relations):
    """Five generations, each process the child of the one before, and each waited for by its parent."""

    DEPTH = 5

    def make(self) -> list[Line]:
        """Each process makes the next and passes on what is said."""
        self.first = Child(lambda line: self._live(line, self.DEPTH))
        return [self.first]

    def _live(self, line: Line, left: int) -> None:
        below = Child(lambda below: self._live(below, left - 1)) if left > 1 else None
        for _ in range(2):
            told = [relations()]
            if below:
                told += below.hear()
            line.say(told)
            line.wait()
            if below:
                below.say("again")
        if below and (status := below.end()):
            line.say(f"child {below.pid} ended with {status}")
        os._exit(left)

    def verify(self) -> str | None:
        """And everyone ends as it should."""
        problem = super().verify()
        os.write(self.first.write_fd, b"\n")
        return problem or unlike("status of the first", self.DEPTH << 8, self.first.end())


class Sessions(Relations):
    """A session with a group of its own in it, and children that were born before their parent left the session."""

    def make(self) -> list[Line]:
        """Four processes below one that makes a session when it has a child already."""
        found: list[Line] = []
        pipes = [(os.pipe(), os.pipe()) for _ in range(5)]
        lines = [Line(down[0], up[1]) for down, up in pipes]
        mine = [Line(up[0], down[1]) for down, up in pipes]
        found += mine

        def leader(_: Line) -> None:
            self._fork(lines[1], lambda: None)
            os.setsid()
            self._fork(lines[2], lambda: os.setpgid(0, 0))
            self._fork(lines[3], lambda: None)
            self._fork(lines[4], os.setsid)
            answering(lines[0])

        self.leader = Child(leader, *(fd for line in lines for fd in (line.read_fd, line.write_fd)))
        return found

    @staticmethod
    def _fork(line: Line, before: Callable[[], object]) -> None:
        if not os.fork():
            before()
            answering(line)
            os._exit(0)


class OrphansOfGoneLeaders(Relations):
    """Orphans with a subreaper as parent: their session's leader is gone, and the leader of a group of theirs."""

    def make(self) -> list[Line]:
        """A reaper, below which a leader makes three processes and ends."""
        pipes = [(os.pipe(), os.pipe()) for _ in range(4)]
        lines = [Line(down[0], up[1]) for down, up in pipes]
        self.reaper = Child(
            lambda _: self._reap(lines), *(fd for line in lines for fd in (line.read_fd, line.write_fd))
        )
        return [Line(up[0], down[1]) for down, up in pipes]

    def _reap(self, lines: list[Line]) -> None:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        leader = os.fork()
        if not leader:
            os.setsid()
            self._orphan(lines[1], 0)
            # A group whose leader ends too; its two members stay.
            group = os.fork()
            if not group:
                signal.pause()
            os.setpgid(group, group)
            self._orphan(lines[2], group)
            self._orphan(lines[3], group)
            os.kill(group, signal.SIGKILL)
            os.waitpid(group, 0)
            os._exit(0)
        os.waitpid(leader, 0)
        answering(lines[0])

    @staticmethod
    def _orphan(line: Line, group: int) -> None:
        joined = os.pipe()
        leader = os.getpid()
        if not os.fork():
            if group:
                os.setpgid(0, group)
            os.write(joined[1], b"j")
            wait_for(lambda: os.getppid() != leader)
            answering(line)
            os._exit(0)
        os.read(joined[0], 1)


class SiblingsSession(Relations):
    """An orphan in the session of a brother who is still there."""

    def make(self) -> list[Line]:
        """The brother forks twice: the orphan goes to the reaper."""
        pipes = [(os.pipe(), os.pipe()) for _ in range(3)]
        lines = [Line(down[0], up[1]) for down, up in pipes]

        def reaper(_: Line) -> None:
            prctl(PR_SET_CHILD_SUBREAPER, 1)
            if not os.fork():
                os.setsid()
                between = os.fork()
                if not between:
                    parent = os.getpid()
                    if not os.fork():
                        wait_for(lambda: os.getppid() != parent)
                        answering(lines[2])
                    os._exit(0)
                os.waitpid(between, 0)
                answering(lines[1])
                os._exit(0)
            answering(lines[0])

        self.reaper = Child(reaper, *(fd for line in lines for fd in (line.read_fd, line.write_fd)))
        return [Line(up[0], down[1]) for down, up in pipes]


class Zombies(Case):
    """Children that have ended, each in its own way, and are still to be waited for; one of them led a group."""

    def setup(self) -> None:
        """Make them and wait until they are zombies."""
        self.made: list[tuple[int, int]] = []
        with open("/proc/sys/kernel/core_pattern") as stream, tempfile.TemporaryDirectory() as directory:
            leaves_core = stream.read()[0] not in "|/@\n"
            for status in (7 << 8, 0, int(signal.SIGKILL), int(signal.SIGTERM), SIGSEGV_AND_CORE)[: 4 + leaves_core]:
                pid = os.fork()
                if not pid:
                    os.setpgid(0, 0)
                    os.chdir(directory)
                    if status == SIGSEGV_AND_CORE:
                        resource.setrlimit(resource.RLIMIT_CORE, (8192, 8192))
                    if status & 0x7F:
                        os.kill(os.getpid(), status & 0x7F)
                    os._exit(status >> 8)
                self.made.append((pid, status))
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        self.leader = self.made[0][0]
        self.member = Child(answering)
        self.member.hear()
        self.member_of_group = Child(self._join)
        self.group = self.member_of_group.hear()["group"]
        self.before = [self._look(pid) for pid, _ in self.made]

    def _join(self, line: Line) -> None:
        os.setpgid(0, self.leader)
        answering(line)

    @staticmethod
    def _look(pid: int) -> list[str]:
        with open(f"/proc/{pid}/stat") as stat:
            head, _, tail = stat.read().rpartition(")")
        fields = tail.split()
        return [head.partition("(")[2], *fields[:4], fields[35]]

    def verify(self) -> str | None:
        """They look as before, and are waited for once, each with its status."""
        problem = first_problem(
            unlike("their looks", self.before, [self._look(pid) for pid, _ in self.made]),
            unlike("the first of the group", self.leader, os.waitpid(-self.leader, os.WNOHANG | os.WUNTRACED)[0]),
        )
        found = [(self.leader, self.made[0][1])] + [os.waitpid(pid, os.WNOHANG) for pid, _ in self.made[1:]]
        self.member_of_group.say("again")
        again = self.member_of_group.hear()["group"]
        return problem or first_problem(
            unlike("statuses", self.made, found), unlike("group", self.leader, again), self._no_more()
        )

    def _no_more(self) -> str | None:
        for pid, _ in self.made:
            with contextlib.suppress(ChildProcessError):
                return f"{pid} is waited for twice: {os.waitpid(pid, os.WNOHANG)}"
        return None


class NoNewSigchld(Case):
    """A process with a handler for SIGCHLD, with zombies and stopped children: it hears of none of them again."""

    def setup(self) -> None:
        """All of it in a child, so that other cases do not disturb."""
        self.child = Child(self._live)
        self.before = self.child.hear()

    def _live(self, line: Line) -> None:
        count = 0

        def heard(*_: object) -> None:
            nonlocal count
            count += 1

        signal.signal(signal.SIGCHLD, heard)
        for _ in range(3):
            if not os.fork():
                os._exit(3)
        self._stopped = os.fork()
        if not self._stopped:
            while True:
                signal.pause()
        os.kill(self._stopped, signal.SIGSTOP)
        os.waitpid(self._stopped, os.WUNTRACED)
        time.sleep(0.1)
        line.say(count)
        line.wait()
        line.say([count, os.waitpid(self._stopped, os.WUNTRACED | os.WNOHANG)[0]])
        line.wait()
        os.kill(self._stopped, signal.SIGKILL)

    def verify(self) -> str | None:
        """No new signal, and the stop is not told twice."""
        self.child.say("again")
        return unlike("signals and stops", [self.before, 0], self.child.hear())


class StoppedChild(Case):
    """A stopped child stays stopped, and goes on when it is told to."""

    def setup(self) -> None:
        """Stop one."""
        self.child = Child(answering)
        self.child.hear()
        os.kill(self.child.pid, signal.SIGSTOP)
        os.waitpid(self.child.pid, os.WUNTRACED)

    def verify(self) -> str | None:
        """Stopped, then not."""
        self.child.say("again")
        with open(f"/proc/{self.child.pid}/stat") as stat:
            state = stat.read().rpartition(")")[2].split()[0]
        silent = not select.select([self.child.read_fd], [], [], 0.2)[0]
        os.kill(self.child.pid, signal.SIGCONT)
        told = self.child.hear()
        return first_problem(
            unlike("state", "T", state),
            unlike("silent while it is stopped", True, silent),
            unlike("pid", self.child.pid, told["pid"]),
        )


class BlockedWait(Case):
    """A process that waits for its child while both are moved."""

    def setup(self) -> None:
        """A child that waits for a grandchild."""
        down, up = os.pipe(), os.pipe()
        self.grandchild = Line(up[0], down[1])

        def grandchild(line: Line) -> None:
            line.say("there")
            line.wait()
            os._exit(42)

        def child(line: Line) -> None:
            pid = os.fork()
            if not pid:
                grandchild(Line(down[0], up[1]))
            line.say(pid)
            line.say(list(os.waitpid(pid, 0)))

        self.child = Child(child, down[0], up[1])
        self.pid = self.child.hear()
        self.grandchild.hear()

    def verify(self) -> str | None:
        """It hears of the end."""
        self.grandchild.say("end")
        return unlike("what it waited for", [self.pid, 42 << 8], self.child.hear())


class ExitSignal(Case):
    """A child whose end is told by another signal than SIGCHLD."""

    def setup(self) -> None:
        """Made by clone(2)."""
        self.heard: list[int] = []
        signal.signal(signal.SIGUSR2, lambda number, _: self.heard.append(number))
        self.child = Child(answering, make=lambda: syscall(SYS_CLONE, int(signal.SIGUSR2), 0, 0, 0, 0))
        self.before = self.child.hear()

    def verify(self) -> str | None:
        """The signal is still its own, and comes."""
        self.child.say("again")
        after = self.child.hear()
        heard = list(self.heard)
        os.kill(self.child.pid, signal.SIGKILL)
        wait_for(lambda: bool(self.heard))
        WALL = 0x40000000
        return first_problem(
            differences(self.before, after),
            unlike("signals before the end", [], heard),
            unlike("signals at the end", [signal.SIGUSR2], self.heard),
            unlike("status", signal.SIGKILL, os.waitpid(self.child.pid, WALL)[1]),
        )


class DeathOfParent(Case):
    """A process that gets a signal when its parent ends, and one that goes to a subreaper then."""

    def setup(self) -> None:
        """A reaper, its child, and the child's child."""
        down, up = os.pipe(), os.pipe()
        self.last = Line(up[0], down[1])

        def last(parent: int) -> None:
            line = Line(down[0], up[1])
            heard: list[int] = []
            signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
            prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
            line.say("there")
            line.wait()
            wait_for(lambda: bool(heard) and os.getppid() != parent)
            line.say([heard, os.getppid()])
            os._exit(0)

        def middle() -> None:
            if not os.fork():
                last(os.getppid())
            while True:
                signal.pause()

        def reaper(line: Line) -> None:
            prctl(PR_SET_CHILD_SUBREAPER, 1)
            pid = os.fork()
            if not pid:
                middle()
            line.say(pid)
            line.wait()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            line.say("killed")
            line.wait()

        self.reaper = Child(reaper, down[0], up[1])
        self.reaper.hear()
        self.last.hear()

    def verify(self) -> str | None:
        """The signal comes, and the reaper is its parent."""
        self.last.say("again")
        self.reaper.say("kill")
        self.reaper.hear()
        return unlike("signal and parent", [[signal.SIGUSR1], self.reaper.pid], self.last.hear())


class SharedOffset(Case):
    """A file that was opened before the fork: one offset, one set of flags; under other numbers too."""

    def setup(self) -> None:
        """Open, fork, move the offset in the child."""
        path = self.directory / "inherited"
        path.write_bytes(b"0123456789" * 100)
        self.fd = os.open(path, os.O_RDWR)

        def child(line: Line) -> None:
            os.dup2(self.fd, 333)
            apart = os.open(path, os.O_RDWR)
            os.close(self.fd)
            os.lseek(333, 100, os.SEEK_SET)
            line.say("there")
            line.wait()
            before = os.lseek(333, 0, os.SEEK_CUR)
            os.lseek(333, 700, os.SEEK_SET)
            os.set_blocking(333, False)
            line.say([before, os.lseek(apart, 0, os.SEEK_CUR)])
            line.wait()

        self.child = Child(child, self.fd)
        self.child.hear()

    def verify(self) -> str | None:
        """Move it in the parent and in the child."""
        before = os.lseek(self.fd, 0, os.SEEK_CUR)
        os.lseek(self.fd, 200, os.SEEK_SET)
        self.child.say("again")
        told = self.child.hear()
        return first_problem(
            unlike("offset", 100, before),
            unlike("offset in the child, and apart", [200, 0], told),
            unlike("offset after the child's", 700, os.lseek(self.fd, 0, os.SEEK_CUR)),
            unlike("blocking", False, os.get_blocking(self.fd)),
        )


class PipesBetween(Case):
    """A pipe with content from one child to another, held by nobody else; one from the parent; one without a reader."""

    def setup(self) -> None:
        """Two children, three pipes."""
        full, busy, broken = os.pipe(), os.pipe(), os.pipe()
        self.content = os.urandom(50_000)

        def writer(line: Line) -> None:
            os.write(full[1], self.content)
            line.say("there")
            line.wait()
            os.write(full[1], b"more")
            try:
                os.write(broken[1], b"?")
                line.say("writing without a reader was allowed")
            except BrokenPipeError:
                line.say(None)

        def reader(line: Line) -> None:
            line.say("there")
            line.wait()
            content = b""
            while piece := os.read(full[0], 4096):
                content += piece
            line.say(content == self.content + b"more")
            line.say(os.read(busy[0], 100).decode())
            line.wait()

        self.writer = Child(writer, full[1], broken[1])
        self.reader = Child(reader, full[0], busy[0])
        for fd in (*full, *broken):
            os.close(fd)
        self.busy = busy
        self.writer.hear()
        self.reader.hear()

    def verify(self) -> str | None:
        """All content, in order, then the end."""
        self.writer.say("again")
        problem = self.writer.hear()
        os.waitpid(self.writer.pid, 0)
        self.reader.say("again")
        complete = self.reader.hear()
        os.write(self.busy[1], b"late")
        return first_problem(problem, unlike("content", True, complete), unlike("late", "late", self.reader.hear()))


class PairsBetween(Case):
    """Unix pairs made before the fork: one end in a child; the two ends in two children, and one of these twice."""

    def setup(self) -> None:
        """Two children, a child of the first, two pairs; something is queued in each direction."""
        self.ours, theirs = socket.socketpair()
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.send(b"to the child")

        def first(line: Line) -> None:
            theirs.send(b"from the child")
            grandchild = Child(second, theirs.fileno())
            grandchild.hear()
            one.send(b"between")
            line.say("there")
            line.wait()
            grandchild.say("again")
            line.say([grandchild.hear(), maker_of(one), one.recv(100).decode()])
            line.wait()

        def second(line: Line) -> None:
            line.say("there")
            line.wait()
            told = [maker_of(theirs), theirs.recv(100).decode()]
            theirs.send(b", and later")
            line.say(told)
            line.wait()

        def third(line: Line) -> None:
            other.send(b"back")
            line.say("there")
            line.wait()
            line.say([maker_of(other), other.recv(100).decode()])
            line.wait()

        self.first = Child(first, theirs.fileno(), one.fileno())
        self.third = Child(third, other.fileno())
        for end in (theirs, one, other):
            end.close()
        self.first.hear()
        self.third.hear()

    def verify(self) -> str | None:
        """What was queued has come; each end is told who made it."""
        own = os.getpid()
        self.first.say("again")
        of_first = self.first.hear()
        self.third.say("again")
        of_third = self.third.hear()
        return first_problem(
            unlike("told by the first and its child", [[own, "to the child"], own, "back"], of_first),
            unlike("told by the third", [own, "between"], of_third),
            unlike("maker of our own end", own, maker_of(self.ours)),
            unlike("what came", b"from the child, and later", self.ours.recv(100)),
        )


class RightsBetween(Case):
    """Descriptors on their way to a child, of which nobody but we has the other ends."""

    def setup(self) -> None:
        """Send one end of a pipe, and of a pair that carries a descriptor itself; keep the others."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def child(line: Line) -> None:
            line.wait()
            _, (pipe, end), _, _ = socket.recv_fds(theirs, 100, 10)
            received = socket.socket(fileno=end)
            content, (inner,), _, _ = socket.recv_fds(received, 100, 10)
            received.send(os.read(pipe, 100) + content + os.read(inner, 100))
            line.say("sent")
            line.wait()

        self.child = Child(child, theirs.fileno())
        theirs.close()
        self.kept, given = socket.socketpair()
        read_end, self.write_end = os.pipe()
        inner, other = os.pipe()
        os.write(self.write_end, b"pipe ")
        os.write(other, b"inner")
        socket.send_fds(self.kept, [b"pair "], [inner])
        socket.send_fds(ours, [b"!"], [read_end, given.fileno()])
        for fd in (read_end, inner, other):
            os.close(fd)
        given.close()
        self.ours = ours

    def verify(self) -> str | None:
        """It has received all of it."""
        self.child.say("receive")
        self.child.hear()
        return unlike("what came back", b"pipe pair inner", self.kept.recv(100))


def maker_of(end: socket.socket) -> int:
    """SO_PEERCRED's process."""
    return int(struct.unpack("=iII", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


class OwnMemory(Case):
    """What a child has written since the fork is its own; what it has not is as its parent had it."""

    PAGES = 64

    def setup(self) -> None:
        """Fork with memory, then write in both."""
        memory = mmap.mmap(-1, self.PAGES * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for page in range(self.PAGES):
            memory[page * mmap.PAGESIZE] = page
        self.memory = memory

        def child(line: Line) -> None:
            memory[mmap.PAGESIZE] = 201
            line.say("there")
            line.wait()
            line.say([memory[page * mmap.PAGESIZE] for page in range(self.PAGES)])
            line.wait()

        self.child = Child(child)
        self.child.hear()
        memory[2 * mmap.PAGESIZE] = 202

    def verify(self) -> str | None:
        """Both."""
        self.child.say("again")
        own = [self.memory[page * mmap.PAGESIZE] for page in range(self.PAGES)]
        expected = list(range(self.PAGES))
        return first_problem(
            unlike("of the child", [0, 201, *expected[2:]], self.child.hear()),
            unlike("of the parent", [0, 1, 202, *expected[3:]], own),
        )


class ThreadsOfChild(Case):
    """A child with threads, each with its TID."""

    def setup(self) -> None:
        """Three of them, which wait."""
        self.child = Child(self._live)
        self.before = self.child.hear()

    def _live(self, line: Line) -> None:
        ask = threading.Event()
        tids: list[int] = []
        answers: list[int] = []

        def thread() -> None:
            tids.append(threading.get_native_id())
            ask.wait()
            answers.append(libc.syscall(186))

        threads = [threading.Thread(target=thread) for _ in range(3)]
        for each in threads:
            each.start()
        wait_for(lambda: len(tids) == len(threads))
        line.say(sorted(tids))
        line.wait()
        ask.set()
        for each in threads:
            each.join()
        line.say(sorted(answers))
        line.wait()

    def verify(self) -> str | None:
        """The same TIDs."""
        self.child.say("again")
        return unlike("TIDs", self.before, self.child.hear())


class Credentials(Case):
    """A child of another user, with its own limits, below a parent that keeps its own."""

    def setup(self) -> None:
        """Become somebody else."""

        def child(line: Line) -> None:
            os.setgroups([4321])
            os.setresgid(4322, 4322, 4322)
            os.setresuid(4323, 4323, 4323)
            for _ in range(2):
                line.say([os.getresuid(), os.getresgid(), os.getgroups()])
                line.wait()

        self.child = Child(child)
        self.before = self.child.hear()

    def verify(self) -> str | None:
        """Both."""
        self.child.say("again")
        return first_problem(
            unlike("of the child", self.before, self.child.hear()), unlike("of the parent", 0, os.getuid())
        )


class OwnPidNamespace(Case):
    """A PID namespace that a child has made, with its own ``/proc``: an init, what is below it, one more level."""

    def setup(self) -> None:
        """The child unshares; its child is the init, which mounts ``/proc`` and has children."""
        self.inherited = os.open(self.directory, os.O_RDONLY)
        self.outer = Child(self._unshare, self.inherited)
        self.before = self.outer.hear()

    def _unshare(self, line: Line) -> None:
        required(libc.unshare(CLONE_NEWPID | CLONE_NEWNS), "unshare")
        required(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None), "mount")
        init = Child(self._be_init, self.inherited)
        while True:
            view = init.hear()
            # One more, which is born where the others live, where numbers are low.
            told, tell = os.pipe()
            if not (pid := os.fork()):
                os.write(tell, b"low" if os.getpid() < LOW else b"high")
                os._exit(0)
            os.waitpid(pid, 0)
            line.say([view, os.read(told, 10).decode()])
            line.wait()
            init.say("again")

    def _be_init(self, line: Line) -> None:
        required(libc.mount(b"proc", b"/proc", b"proc", 0, None), "mount")
        below = [Child(answering), Child(self._nest), Child(self._outlive_leader)]
        zombie = os.fork()
        if not zombie:
            os._exit(33)
        os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        stat = open("/proc/self/stat")  # noqa: SIM115
        while True:
            stat.seek(0)
            told = [child.hear() for child in below]
            seen = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
            tids = sorted(os.listdir("/proc/self/task"))
            inode = os.fstat(self.inherited).st_ino
            line.say([relations(), told, seen, tids, stat.read().split()[0], inode, os.listdir("/proc/self/fd") != []])
            line.wait()
            for child in below:
                child.say("again")

    @staticmethod
    def _outlive_leader(line: Line) -> None:
        leader = os.fork()
        if not leader:
            signal.pause()
        os.setpgid(leader, leader)
        os.setpgid(0, leader)
        os.kill(leader, signal.SIGKILL)
        os.waitpid(leader, 0)
        answering(line)

    def _nest(self, line: Line) -> None:
        required(libc.unshare(CLONE_NEWPID), "unshare")
        inner = Child(lambda inner: answering(inner))
        while True:
            line.say([relations(), inner.hear()])
            line.wait()
            inner.say("again")

    def verify(self) -> str | None:
        """All of them see what they saw, and further children of the first are born there."""
        self.outer.say("again")
        return unlike("view from within", self.before, self.outer.hear())


class EndedLeader(Case):
    """A child whose main thread has ended while another goes on."""

    def setup(self) -> None:
        """A thread answers; the main thread ends, and no other."""
        self.child = Child(self._live)
        self.before = self.child.hear()

    def _live(self, line: Line) -> NoReturn:
        threading.Thread(target=self._go_on, args=(line,)).start()
        libc.syscall(SYS_EXIT, 7)
        raise AssertionError("the main thread has not ended")

    @staticmethod
    def _go_on(line: Line) -> None:
        def leader() -> list[str]:
            with open(f"/proc/self/task/{os.getpid()}/stat") as stat:
                fields = stat.read().rpartition(")")[2].split()
            return [fields[0], fields[49]]

        wait_for(lambda: leader()[0] == "Z")
        grandchild = Child(answering)
        for _ in range(2):
            wait_for(lambda: leader()[0] == "Z")
            tasks = sorted(os.listdir("/proc/self/task"))
            line.say(
                [
                    threading.get_native_id(),
                    os.getpid(),
                    tasks,
                    leader(),
                    os.listdir("/proc/thread-self/fd"),
                    grandchild.hear(),
                ]
            )
            line.wait()
            grandchild.say("again")
        libc.syscall(SYS_EXIT, 5)

    def verify(self) -> str | None:
        """The same, and the end."""
        self.child.say("again")
        told = self.child.hear()
        self.child.say("end")
        status = os.waitpid(self.child.pid, 0)[1]
        return first_problem(unlike("view", self.before, told), unlike("status", 5 << 8, status))


class SharedTable(Case):
    """A descriptor table that a child, its child and a brother have together, made by clone(2); the parent has not."""

    def setup(self) -> None:
        """The first child shares with those that it makes."""
        self.first = Child(self._live)
        self.before = self.first.hear()

    def _live(self, line: Line) -> None:
        os.chdir(self.directory)
        there = os.getcwd()
        write_end = os.pipe()[1]
        below, brother = self._clone(CLONE_FILES), self._clone(CLONE_FILES | CLONE_FS)
        for _ in range(2):
            line.say([below.hear(), brother.hear(), os.getcwd(), there])
            line.wait()
            there = os.getcwd()
            below.say("again")
            brother.say("again")
            # Opened by one, there in all; and the directory, which the brother alone shares.
            below.hear()
            brother.hear()
            os.dup2(write_end, 55)
            os.chdir("/usr")
            os.umask(0o027)
            below.say("look")
            brother.say("look")

    def _clone(self, flags: int) -> Line:
        """A process that shares, with a line to it, all of which is in the shared table."""
        down, up = os.pipe(), os.pipe()
        if not syscall(SYS_CLONE, flags | signal.SIGCHLD, 0, 0, 0, 0):
            try:
                prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                self._below(Line(down[0], up[1]))
            finally:
                os._exit(99)
        return Line(up[0], down[1])

    @staticmethod
    def _below(line: Line) -> None:
        while True:
            umask = os.umask(0)
            os.umask(umask)
            link = os.readlink("/proc/self/fd/55") if os.path.lexists("/proc/self/fd/55") else "none"
            line.say([os.getcwd(), umask, link, relations()])
            line.wait()
            line.say("yes")
            line.wait()

    def verify(self) -> str | None:
        """What one has opened, the others have; where one goes, the brother is."""
        self.first.say("again")
        below, brother, own, there = self.first.hear()
        expected = ["/usr", 0o027, below[2]]
        return first_problem(
            unlike("directory of the first before", str(self.directory), there),
            unlike("directory of the first", "/usr", own),
            unlike("what the brother has", expected, brother[:3]),
            unlike("whether the other has the descriptor", True, below[2].startswith("pipe:")),
            unlike("directory of the other", self.before[0][:2], below[:2]),
            unlike("relations", [each[3] for each in self.before[:2]], [below[3], brother[3]]),
        )


class ThreadWithPlaces(Case):
    """A thread with a working directory and umask of its own, in a child."""

    def setup(self) -> None:
        """It unshares and goes elsewhere."""
        self.child = Child(self._live)
        self.before = self.child.hear()

    def _live(self, line: Line) -> None:
        parted, asked, told = threading.Event(), threading.Event(), threading.Event()
        answer: list[str] = []

        def live() -> None:
            required(libc.unshare(CLONE_FS), "unshare")
            os.chdir("/usr")
            os.umask(0o055)
            parted.set()
            asked.wait()
            answer.extend([os.getcwd(), str(os.umask(0))])
            told.set()

        threading.Thread(target=live, daemon=True).start()
        parted.wait()
        line.say([os.getcwd(), os.umask(0o022)])
        line.wait()
        asked.set()
        told.wait()
        line.say([os.getcwd(), os.umask(0o022), answer])
        line.wait()

    def verify(self) -> str | None:
        """Both are where they were."""
        self.child.say("again")
        return unlike("directories", [self.before[0], 0o022, ["/usr", str(0o055)]], self.child.hear())


CASES: tuple[type[Case], ...] = (
    Generations,
    Sessions,
    OrphansOfGoneLeaders,
    SiblingsSession,
    Zombies,
    NoNewSigchld,
    StoppedChild,
    BlockedWait,
    ExitSignal,
    DeathOfParent,
    SharedOffset,
    PipesBetween,
    PairsBetween,
    RightsBetween,
    OwnMemory,
    ThreadsOfChild,
    Credentials,
    OwnPidNamespace,
    EndedLeader,
    SharedTable,
    ThreadWithPlaces,
)
