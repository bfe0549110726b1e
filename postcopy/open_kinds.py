"""Kinds of open file descriptions that are no files with a name, and what any description can have besides.

Part of `postcopy.state`, which see. ``flags`` are the status flags that F_GETFL tells, where F_SETFL can set them.
"""

from msgspec import Struct

from postcopy.integers import Fd, Pid, Unsigned


class EventCounter(Struct, frozen=True):
    """eventfd(2)."""

    count: Unsigned
    semaphore: bool
    flags: Unsigned


class TimerDescriptor(Struct, frozen=True):
    """timerfd_create(2): ``set_with`` are the flags of timerfd_settime; times in nanoseconds.

    ``left`` until the next expiration (0: disarmed), ``at`` the clock's time of it; ``ticks`` that nobody has read yet.
    """

    clock: Unsigned
    set_with: Unsigned
    left: Unsigned
    at: Unsigned
    interval: Unsigned
    ticks: Unsigned
    flags: Unsigned


class SignalDescriptor(Struct, frozen=True):
    """signalfd(2): bit 0 of ``mask`` is signal 1."""

    mask: Unsigned
    flags: Unsigned


class EpollTarget(Struct, frozen=True):
    """What an epoll instance watches: the ``description`` that was registered under number ``fd``.

    ``events`` as ``/proc`` shows them (a one-shot target that has fired has lost all but EPOLLONESHOT and its like).
    ``pending``: if it is ready, the program has yet to be told.
    """

    fd: Fd
    description: Unsigned
    events: Unsigned
    data: Unsigned
    pending: bool


class Epoll(Struct, frozen=True):
    """epoll(7): the targets in the order in which they are registered again."""

    targets: list[EpollTarget]
    flags: Unsigned


class Watch(Struct, frozen=True):
    """One watch of an inotify instance, by its number. ``ghost``: of a file without a name, which this description has
    open; ``path`` was its last name. -1: of the file at ``path``."""

    number: Unsigned
    path: str
    mask: Unsigned
    ghost: int = -1


class Inotify(Struct, frozen=True):
    """inotify(7)."""

    watches: list[Watch]
    flags: Unsigned


class FanotifyMark(Struct, frozen=True):
    """One mark of a fanotify group: on the inode, the mount or the filesystem (``kind``) that ``path`` leads to.

    ``flags``: FAN_MARK_ bits as ``/proc`` shows them; ``ignored``: the events that are left out.
    """

    kind: str
    path: str
    flags: Unsigned
    mask: Unsigned
    ignored: Unsigned


class Fanotify(Struct, frozen=True):
    """fanotify(7): a group made ``made_with`` FAN_ bits, whose events bring files opened with ``event_flags``."""

    made_with: Unsigned
    event_flags: Unsigned
    marks: list[FanotifyMark]
    flags: Unsigned


class PidDescriptor(Struct, frozen=True):
    """pidfd_open(2): of a process (or thread, with PIDFD_THREAD in ``flags``) of the tree; ``pid`` as that sees it."""

    pid: Pid
    flags: Unsigned


class EndedProcess(Struct, frozen=True):
    """A pidfd of a process that has ended and been waited for: ``status`` as wait(2) gave it. ``identity``: which one,
    for several descriptors may stand for the same."""

    identity: Unsigned
    status: Unsigned
    flags: Unsigned


class Extent(Struct, frozen=True):
    """Bytes of a file at ``offset``; what lies between extents is a hole."""

    offset: Unsigned
    content: bytes


class Ghost(Struct, frozen=True):
    """A file without a name that travels whole: deleted, or made by O_TMPFILE.

    ``kind``: regular, directory (empty, as removed ones are) or temporary (O_TMPFILE, with the flags ``made_with``).
    ``directory``: where it is made again; ``name``: its last one. Times in nanoseconds.
    """

    kind: str
    directory: str
    name: str
    mode: Unsigned
    uid: Unsigned
    gid: Unsigned
    times: tuple[int, int]
    size: Unsigned
    extents: list[Extent]
    made_with: Unsigned = 0


class GhostOpening(Struct, frozen=True):
    """An open file description of a ghost; ``ghost`` indexes ``Descriptors.ghosts``."""

    ghost: Unsigned
    flags: Unsigned
    position: Unsigned


class PtyContent(Struct, frozen=True):
    """What is in a pseudoterminal: ``output`` that its master has yet to read, and what is typed for its slave.

    ``lines``: as reads give them, where it collects lines (b"": VEOF alone); ``typed``: the line that is not complete,
    or all that is typed. ``literal_next``: VLNEXT was typed last. ``stopped``: the output, by a key (1) or call (2).
    """

    output: bytes
    lines: list[bytes]
    typed: bytes
    literal_next: bool
    stopped: Unsigned


class Pty(Struct, frozen=True):
    """A pseudoterminal with its master in the tree: ``/dev/pts/INDEX``; struct termios2 and struct winsize.

    ``locked``: its slave cannot be opened yet; ``packets``: TIOCPKT. ``session``: of whose leader it is the controlling
    terminal, ``foreground``: with which process group in front (0: none). ``hung_up``: its slave is open no more.
    """

    index: Unsigned
    settings: bytes
    window: bytes
    locked: bool
    packets: bool
    session: Unsigned
    foreground: Unsigned
    hung_up: bool = False
    content: PtyContent | None = None


class PtyEnd(Struct, frozen=True):
    """One end of a pseudoterminal; ``pty`` indexes ``Descriptors.ptys``."""

    pty: Unsigned
    master: bool
    flags: Unsigned


class External(Struct, frozen=True):
    """Something outside of the tree, as ``/proc/PID/fd`` showed it; ``restore`` is given another in its place."""

    resource: str


class Delivery(Struct, frozen=True):
    """Signal-driven I/O of a description (F_SETOWN_EX, F_SETSIG, O_ASYNC): ``kind`` is F_OWNER_TID, _PID or _PGRP.

    ``owner`` 0: nobody; ``signal`` 0: SIGIO; ``flags``: the other status flags.
    """

    description: Unsigned
    kind: Unsigned
    owner: Unsigned
    signal: Unsigned
    asynchronous: bool
    flags: Unsigned


class Lock(Struct, frozen=True):
    """A lock on the file of a description: ``kind`` is posix, ofd, flock or lease; ``type`` F_RDLCK or F_WRLCK.

    From byte ``start``, ``length`` bytes (0: to the end of the file, wherever that will be). ``owner``: the process
    that has a POSIX lock; the others belong to the description (0).
    """

    description: Unsigned
    owner: Unsigned
    kind: str
    type: Unsigned
    start: Unsigned
    length: Unsigned
