"""The state of a process tree: everything about it except its lazy pages. Plain frozen structs (msgspec), no I/O.

One struct for each kind of resource; the module of the same name in ``dump_side`` collects it and the one in
``restore_side`` rebuilds it. `encode` and `decode` carry any of them through msgpack; `decode` checks every type, so
what comes from outside can at worst be an error.

Structures that only the kernel reads again (register sets, siginfo, sigaction, timer values) stay the bytes that it
gave. Addresses and lengths are bytes unless the name says pages.
"""

import contextlib
from typing import Annotated, Any, TypeVar

import msgpack
import msgspec
from msgspec import Struct, field

from postcopy.errors import ProtocolError
from postcopy.integers import Address, Fd, Pid, Unsigned
from postcopy.ipc_kinds import IpcName, MessageQueue, PosixQueue, QueueName, QueueOpening, SemaphoreSet
from postcopy.kinship import Relative
from postcopy.nesting import PidNamespace
from postcopy.open_kinds import (
    Delivery,
    EndedProcess,
    Epoll,
    EventCounter,
    External,
    Fanotify,
    Ghost,
    GhostOpening,
    Inotify,
    Lock,
    PidDescriptor,
    Pty,
    PtyEnd,
    SignalDescriptor,
    TimerDescriptor,
)
from postcopy.socket_kinds import InetSocket, NetlinkSocket, PacketSocket, SocketDefaults, UnixName, UnixSocket


class FileIdentity(Struct, frozen=True):
    """A file that both hosts must have: absolute path, size in bytes, build id of an ELF object (else empty).

    ``changing``: open for writing at the source, so its size means something only once the tree is frozen. ``kind``:
    file, directory, fifo (that nobody has open), or any (only the name counts). ``locked``: the tree holds locks on it.
    """

    path: str
    size: Unsigned
    build_id: bytes
    changing: bool
    kind: str = "file"
    locked: bool = False

    @classmethod
    def named(cls, path: str, kind: str = "any") -> "FileIdentity":
        """A name that must be there, with nothing said of a content."""
        return cls(path, 0, b"", False, kind)


# -- memory ----------------------------------------------------------------------------------------------------------


class Vma(Struct, frozen=True):
    """One vma: [start, end), PROT_ bits, and what backs it.

    ``backing`` is ``anonymous``, ``stack`` (grows down), ``huge`` (private hugetlb), ``file``, ``object``, ``vvar`` or
    ``vdso``; ``file`` indexes ``Memory.files``, or for an object ``Tree.shared_memory`` (-1: none), ``offset`` is the
    place in it; ``writable``: a shared mapping that mprotect may make so; ``flags`` are the VmFlags that mmap and
    madvise set; ``huge_shift``: of private hugetlb memory, the logarithm of its page size (MAP_HUGE_SHIFT).
    """

    start: Address
    end: Address
    prot: Annotated[int, msgspec.Meta(ge=0, le=7)]
    shared: bool
    backing: str
    file: int
    offset: Unsigned
    writable: bool
    flags: list[str]
    name: str
    huge_shift: Unsigned = 0


class MappedFile(Struct, frozen=True):
    """A file that vmas map; ``writable`` when the mapping must be able to write to it."""

    path: str
    writable: bool


class Memory(Struct, frozen=True):
    """A process's memory: the layout, the mm fields (PR_SET_MM_MAP, prctl(2)), pages sent along and pages left lazy.

    ``sent``, ``lazy``, ``guards``: packed PageRanges; the content of ``sent`` follows the state, in order.
    ``future_locks``: the MCL_ bits that mlockall(2) was told for mappings to come.
    ``auxv``: as ``/proc/PID/auxv``. ``vdso``: its bytes, for comparison.
    """

    vmas: list[Vma]
    files: list[MappedFile]
    exe: str
    start_code: Unsigned
    end_code: Unsigned
    start_data: Unsigned
    end_data: Unsigned
    start_brk: Unsigned
    brk: Unsigned
    start_stack: Unsigned
    arg_start: Unsigned
    arg_end: Unsigned
    env_start: Unsigned
    env_end: Unsigned
    future_locks: Unsigned
    auxv: bytes
    vdso: bytes
    sent: bytes
    lazy: bytes
    guards: bytes


class SystemV(Struct, frozen=True):
    """What a System V segment has beyond its memory (shmget(2)).

    ``size`` in bytes, of which its memory may have more: whole pages; ``removed``: it ends with its last attachment.
    """

    identifier: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    key: Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)]
    size: Annotated[int, msgspec.Meta(ge=1, lt=1 << 47)]
    removed: bool


class SharedMemory(Struct, frozen=True):
    """Memory with an identity of its own: vmas and descriptors of any process refer to it by its index.

    ``kind``: ``anonymous`` (MAP_SHARED), ``huge`` (the same of hugetlb pages), ``memfd``, ``system_v`` or ``deleted``
    (a mapped file without a name). ``huge_shift`` as of `Vma`; memfds and segments may be of hugetlb pages, too.
    ``inode``: its number at the source; ``name``: a memfd's, or the path that the file had; ``size`` in bytes;
    ``seals``: F_SEAL_ bits. ``space`` numbers it in the page protocol, where addresses are offsets; ``sent`` and
    ``lazy`` as of `Memory`.
    """

    kind: str
    space: Unsigned
    inode: Unsigned
    name: str
    size: Annotated[int, msgspec.Meta(ge=0, lt=1 << 47)]
    mode: Unsigned
    owner: tuple[Unsigned, Unsigned]
    seals: Unsigned
    reserved: bool
    system_v: SystemV | None
    sent: bytes
    lazy: bytes
    huge_shift: Unsigned = 0


# -- what a whole process has ----------------------------------------------------------------------------------------


class Signals(Struct, frozen=True):
    """Signal actions (struct kernel_sigaction, 32 bytes, for signals 1 to 64) and the shared pending queue."""

    actions: list[bytes]
    pending: list[bytes]


class LateSignal(Struct, frozen=True):
    """A signal that came after the state was collected: siginfo (128 bytes), to thread ``tid`` or (0) the process."""

    pid: Pid
    tid: Unsigned
    siginfo: bytes


class PosixTimer(Struct, frozen=True):
    """A timer of timer_create(2): its id, its clock as the kernel keeps it, whom it tells and how (SIGEV_ number).

    ``value`` is what its signal carries; ``tid`` the thread that gets it (0: the process); ``setting`` the interval and
    what is left (struct itimerspec). ``raised``: its signal is queued, and the timer rests until that is taken.
    """

    number: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    clock: Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)]
    notify: Annotated[int, msgspec.Meta(ge=0, le=4)]
    signal: Annotated[int, msgspec.Meta(ge=0, le=64)]
    value: Unsigned
    tid: Unsigned
    setting: bytes
    raised: bool


class Timers(Struct, frozen=True):
    """ITIMER_REAL, ITIMER_VIRTUAL and ITIMER_PROF (struct itimerval, 32 bytes each); POSIX timers by their ids."""

    intervals: list[bytes]
    posix: list[PosixTimer]


class Limits(Struct, frozen=True):
    """Resource limits by RLIMIT_ number: soft and hard, RLIM_INFINITY as 2**64 - 1."""

    limits: list[tuple[Unsigned, Unsigned]]


class Filesystem(Struct, frozen=True):
    """Root, working directory (as the host sees them) and umask."""

    root: str
    cwd: str
    umask: Unsigned


class Attributes(Struct, frozen=True):
    """Single values of a process: prctl(2) settings, personality(2), files of ``/proc/PID``.

    ``membarrier``: the bits of the commands that registered it (membarrier(2)); ``login_uid``: 2**32 - 1 is none.
    """

    dumpable: int
    child_subreaper: bool
    thp_disable: int
    personality: Unsigned
    oom_score_adj: int
    coredump_filter: Unsigned
    login_uid: Unsigned
    membarrier: Unsigned
    memory_merge: bool


class Lineage(Struct, frozen=True):
    """Parent (0: the process is the root), session and process group (0: those from which the root came), exit signal.

    ``foreground``: the group was in the foreground of its terminal.
    """

    parent: Unsigned
    session: Unsigned
    process_group: Unsigned
    exit_signal: Unsigned
    foreground: bool

    def relative(self, pid: int) -> Relative:
        """For `kinship.plan`."""
        return Relative(pid, self.parent, self.session, self.process_group, self.exit_signal)


# -- what each thread has --------------------------------------------------------------------------------------------


class Credentials(Struct, frozen=True):
    """User and group ids (real, effective, saved, filesystem), groups, capability sets as bit masks."""

    uids: tuple[Unsigned, Unsigned, Unsigned, Unsigned]
    gids: tuple[Unsigned, Unsigned, Unsigned, Unsigned]
    groups: list[Unsigned]
    inheritable: Unsigned
    permitted: Unsigned
    effective: Unsigned
    bounding: Unsigned
    ambient: Unsigned
    securebits: Unsigned
    no_new_privs: bool

    @classmethod
    def from_status(cls, status: dict[str, str], securebits: int) -> "Credentials":
        """From the fields of ``/proc/PID/task/TID/status``; the secure bits only the thread itself can tell."""
        uids, gids = (tuple(int(word) for word in status[key].split()) for key in ("Uid", "Gid"))
        return cls(
            uids=(uids[0], uids[1], uids[2], uids[3]),
            gids=(gids[0], gids[1], gids[2], gids[3]),
            groups=[int(word) for word in status["Groups"].split()],
            inheritable=int(status["CapInh"], 16),
            permitted=int(status["CapPrm"], 16),
            effective=int(status["CapEff"], 16),
            bounding=int(status["CapBnd"], 16),
            ambient=int(status["CapAmb"], 16),
            securebits=securebits,
            no_new_privs=status["NoNewPrivs"] == "1",
        )


class Scheduling(Struct, frozen=True):
    """struct sched_attr as sched_getattr(2) gave it, the nice value (which it tells only of normal policies), the CPUs
    of the affinity mask, the I/O priority, the timer slack (ns)."""

    attributes: bytes
    nice: Annotated[int, msgspec.Meta(ge=-20, le=19)]
    affinity: list[Unsigned]
    io_priority: Unsigned
    timer_slack: Unsigned


class SeccompFilter(Struct, frozen=True):
    """A classic BPF program (8 bytes an instruction) and the SECCOMP_FILTER_FLAG_ bits that stay with it."""

    program: bytes
    flags: Unsigned


class Seccomp(Struct, frozen=True):
    """How seccomp(2) confines a thread: SECCOMP_MODE_ (0: not at all), and its filters, oldest first."""

    mode: Annotated[int, msgspec.Meta(ge=0, le=2)]
    filters: list[SeccompFilter]


class Rseq(Struct, frozen=True):
    """The rseq registration; ``pointer`` 0: none."""

    pointer: Unsigned
    size: Unsigned
    signature: Unsigned


class Sleep(Struct, frozen=True):
    """An interrupted call with a relative timeout: its number, and what is left of the time (ns; 0: make it
    again as it was, its timeout is a point in time)."""

    call: Unsigned
    left: Unsigned


class Thread(Struct, frozen=True):
    """One thread. ``registers``: struct user_regs_struct; ``sleep``: the call it is to go on waiting in, if any.

    ``filesystem``: directories and umask that it does not share with its process (unshare(2)).
    """

    tid: Pid
    name: bytes
    registers: bytes
    xstate: bytes
    signal_mask: Unsigned
    pending: list[bytes]
    alternate_stack: bytes
    tid_address: Unsigned
    robust_list: Unsigned
    robust_list_size: Unsigned
    rseq: Rseq
    sleep: Sleep | None
    parent_death_signal: Unsigned
    credentials: Credentials
    seccomp: Seccomp
    scheduling: Scheduling
    filesystem: Filesystem | None = None


# -- descriptors: what is open (a description) and where (a slot) ------------------------------------------------------


class OpenFile(Struct, frozen=True):
    """A regular file, directory or device, or only a path (O_PATH), that is opened again by its path.

    ``flags`` as open(2) takes them; ``position`` in bytes; ``kind``: regular, directory, device, path, or live (a file
    that the kernel writes as it is read; of a process itself with ``/proc/self`` in its path).
    """

    path: str
    flags: Unsigned
    position: Unsigned
    kind: str


class OpenMemory(Struct, frozen=True):
    """A descriptor of a memfd; ``memory`` indexes ``Tree.shared_memory``, ``position`` is in bytes."""

    memory: Unsigned
    flags: Unsigned
    position: Unsigned


class PipeEnd(Struct, frozen=True):
    """One end of a pipe with both ends in the tree; ``pipe`` indexes ``Descriptors.pipes``."""

    pipe: int
    flags: Unsigned


class StandardStream(Struct, frozen=True):
    """A terminal that the process has not for itself: the destination's ``restore`` lends its own standard stream.

    ``settings``: struct termios2; empty for a terminal that was lost.
    """

    fd: Fd
    flags: Unsigned
    settings: bytes = b""


class Pipe(Struct, frozen=True):
    """What is in a pipe, and its capacity (bytes).

    ``packets``: the lengths of the packets that the content is made of; empty for a stream. ``path``: the name of a
    FIFO; empty for a pipe without one. ``untouched``: a FIFO that has had no writer since its readers opened it.
    """

    content: bytes
    capacity: Unsigned
    packets: list[Unsigned] = []
    path: str = ""
    untouched: bool = False


class Description(Struct, frozen=True, omit_defaults=True):
    """One open file description: exactly one of the kinds."""

    file: OpenFile | None = None
    pipe: PipeEnd | None = None
    stream: StandardStream | None = None
    memory: OpenMemory | None = None
    ghost: GhostOpening | None = None
    event_counter: EventCounter | None = None
    timer: TimerDescriptor | None = None
    signals: SignalDescriptor | None = None
    epoll: Epoll | None = None
    inotify: Inotify | None = None
    fanotify: Fanotify | None = None
    process: PidDescriptor | None = None
    ended: EndedProcess | None = None
    external: External | None = None
    terminal: PtyEnd | None = None
    unix: UnixSocket | None = None
    inet: InetSocket | None = None
    netlink: NetlinkSocket | None = None
    packet: PacketSocket | None = None
    queue: QueueOpening | None = None


class Slot(Struct, frozen=True):
    """One entry of a descriptor table: ``description`` indexes ``Descriptors.descriptions``."""

    fd: Fd
    close_on_exec: bool
    description: int


class Descriptors(Struct, frozen=True):
    """What the descriptor tables of a tree refer to, the pipes between them, and the files without a name.

    A description that several processes have is built by the first of them that has it.
    """

    descriptions: list[Description]
    pipes: list[Pipe]
    ghosts: list[Ghost] = []
    deliveries: list[Delivery] = []
    locks: list[Lock] = []
    ptys: list[Pty] = []
    socket_defaults: list[SocketDefaults] = []
    queues: list[PosixQueue] = []


# -- the whole -------------------------------------------------------------------------------------------------------


class Process(Struct, frozen=True):
    """One process; ``space`` numbers its address space in the page protocol; threads[0] is the leader.

    ``stopped_by``: the signal of the job-control stop that it is in, 0 for none; ``stop_told``: its parent has waited
    for that. ``leader_ended``: the leader has, with this status as wait(2) gives it, while the other threads go on.
    ``table_of``, ``places_of``: the process before it with which it shares its descriptor table, which stands there
    alone, or its directories and umask (clone(2), CLONE_FILES and CLONE_FS); 0 for its own.
    """

    pid: Pid
    space: Unsigned
    threads: list[Thread]
    memory: Memory
    signals: Signals
    timers: Timers
    limits: Limits
    filesystem: Filesystem
    attributes: Attributes
    lineage: Lineage
    slots: list[Slot]
    stopped_by: Unsigned
    stop_told: bool
    leader_ended: Unsigned | None = None
    table_of: Unsigned = 0
    places_of: Unsigned = 0


class Zombie(Struct, frozen=True):
    """A process that has ended, for which its parent has not waited yet; ``status`` as wait(2) gives it."""

    pid: Pid
    lineage: Lineage
    name: bytes
    uid: Unsigned
    status: Unsigned


Member = Process | Zombie


class Clocks(Struct, frozen=True):
    """CLOCK_MONOTONIC and CLOCK_BOOTTIME as the program reads them (ns)."""

    monotonic: Unsigned
    boottime: Unsigned


class Tree(Struct, frozen=True):
    """A process tree, frozen; the root is the first, and every process comes after its parent.

    ``descriptors`` is what the entries of all descriptor tables refer to, ``shared_memory`` what vmas and descriptors
    do; ``late_signals``: those of a tree that was written down; ``clocks``: when it was frozen; ``pid_namespaces``:
    those that the tree has made, outer ones first.
    """

    processes: list[Process]
    zombies: list[Zombie]
    descriptors: Descriptors
    files: list[FileIdentity]
    late_signals: list[LateSignal] = []
    shared_memory: list[SharedMemory] = []
    clocks: Clocks = field(default_factory=lambda: Clocks(0, 0))
    pid_namespaces: list[PidNamespace] = []
    semaphores: list[SemaphoreSet] = []
    message_queues: list[MessageQueue] = []

    @property
    def members(self) -> list[Member]:
        """Processes and zombies."""
        return [*self.processes, *self.zombies]


class Sketch(Struct, frozen=True):
    """What can be seen of a process while it runs: born of whom, laid out how. ``memory`` is without pages.

    ``threads``: how many; ``slots``: of `Draft.descriptions`; ``table_of``, ``places_of``: as of `Process`.
    """

    pid: Pid
    threads: Annotated[int, msgspec.Meta(ge=1, le=1 << 22)]
    memory: Memory
    lineage: Lineage
    slots: list[Slot]
    table_of: Unsigned = 0
    places_of: Unsigned = 0


class Draft(Struct, frozen=True):
    """A tree as it is seen to run, for the destination to begin with: most of it is the same once it is frozen.

    ``processes`` as of `Tree`; none where nothing is to be begun. ``descriptions``: of files that can be opened before
    the state is known, None for all others.
    """

    processes: list[Sketch] = []
    descriptions: list[Description | None] = []


class Manifest(Struct, frozen=True):
    """What the survey found before anything is frozen: what the destination must have.

    ``external``: resources in whose place ``restore`` must be given others; ``ptys``: numbers of pseudoterminals;
    ``shell_job``: ``restore`` must lend its terminal; ``init``: the root is the init of a PID namespace of its own.
    ``huge_pages``: how many hugetlb pages it takes, by their size (the logarithm). ``core_dumps``: a zombie left one.
    ``ipc``: System V objects that are moved; ``queues``: names of POSIX message queues.
    """

    tids: list[Pid]
    pid: Pid
    name: str
    files: list[FileIdentity]
    vdso: bytes
    xsave_size: Unsigned
    memory_bytes: Unsigned
    highest_fd: Fd
    external: list[str] = []
    ptys: list[Unsigned] = []
    shell_job: bool = False
    unix_names: list[UnixName] = []
    init: bool = False
    huge_pages: list[tuple[Unsigned, Unsigned]] = []
    core_dumps: bool = False
    ipc: list[IpcName] = []
    queues: list[QueueName] = []


T = TypeVar("T")


def encode(value: Any) -> bytes:
    """Any of the structs as msgpack."""
    try:
        return msgspec.msgpack.encode(value)
    except UnicodeEncodeError:
        # Lone surrogates in paths are how os.fsdecode keeps bytes that are not UTF-8.
        plain = msgspec.to_builtins(value, builtin_types=(bytes,))
        packed: bytes = msgpack.packb(plain, unicode_errors="surrogateescape")
        return packed


def decode(kind: type[T], content: bytes | memoryview) -> T:
    """Back from `encode`. Raises ProtocolError, whatever the bytes are."""
    try:
        try:
            return msgspec.msgpack.decode(content, type=kind)
        except UnicodeDecodeError:
            plain = msgpack.unpackb(content, unicode_errors="surrogateescape", strict_map_key=False)
            return msgspec.convert(plain, kind)
    except (msgspec.MsgspecError, msgpack.UnpackException) as error:
        raise ProtocolError(f"not a {kind.__name__}: {error}") from None
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        # Both raise these for bad UTF-8, keys that cannot be one, times out of range, depth and announced lengths.
        raise ProtocolError(f"not a {kind.__name__}: {error}") from None


def prepare_to_decode(kind: type[Any]) -> None:
    """Make what `decode` makes of a type when it first meets it, which takes milliseconds."""
    with contextlib.suppress(msgspec.MsgspecError):
        msgspec.convert(None, kind)
