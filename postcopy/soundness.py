"""Whether a state makes sense: what is well-typed could still contradict itself or ask for what cannot be.

Everything that comes from outside is checked here before any process is made of it. The tables say what single fields
may hold, the functions what must hold between fields; a new struct of `postcopy.state` gets its lines in the tables
and, where that is not enough, a function in `_CHECKS`. `check` walks the whole state and finds both by type.
"""

import functools
import typing
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import pairwise
from operator import attrgetter
from typing import Any

from msgspec import Struct

from postcopy import ipc_soundness, open_soundness, socket_soundness
from postcopy.errors import ProtocolError
from postcopy.huge_pages import is_lazy, is_lazy_object
from postcopy.kernel.page import ADDRESS_LIMIT, PAGE_SHIFT, PAGE_SIZE, page_up
from postcopy.kinship import Unrelated, check_sharing, plan
from postcopy.nesting import Nesting
from postcopy.page_ranges import PageRange, PageRanges
from postcopy.socket_kinds import SocketChange
from postcopy.state import (
    Attributes,
    Clocks,
    Credentials,
    Description,
    Descriptors,
    Draft,
    FileIdentity,
    Filesystem,
    LateSignal,
    Limits,
    Lineage,
    Manifest,
    MappedFile,
    Memory,
    OpenFile,
    OpenMemory,
    Pipe,
    PipeEnd,
    PosixTimer,
    Process,
    Rseq,
    Scheduling,
    Seccomp,
    SeccompFilter,
    SharedMemory,
    Signals,
    Sleep,
    StandardStream,
    Thread,
    Timers,
    Tree,
    Vma,
    Zombie,
)

_UINT32, _INT64, _UINT64 = range(1 << 32), range(1 << 63), range(1 << 64)
_ADDRESS = range(ADDRESS_LIMIT + 1)
_SIGNAL_OR_NONE = range(65)
_PID_MAX = 1 << 22  # PID_MAX_LIMIT, include/linux/threads.h
_PATH_MAX = 4096
_SIGINFO_SIZE = 128
_SECCOMP_MODE_FILTER = 2
_MOST_MEMORY = 1 << 46  # bytes; what x86-64 with 4-level page tables can address at all
_VMA_NAME, _VMA_FLAGS = range(5 * _PATH_MAX), range(64)
_XSTATE_SIZES = range(576, 16385)  # the legacy area and the header; what PTRACE_GETREGSET is asked for

# Signals that leave a core dump, if nothing else is asked for (signal(7)).
_DUMPING = frozenset({3, 4, 5, 6, 7, 8, 11, 24, 25, 31})
_HUGE_SHIFT = range(64)  # the logarithm of a page size, in 6 bits of the flags of mmap(2)

# What a number may be.
_NUMBERS: Mapping[type, Mapping[str, range]] = {
    Attributes: {
        "dumpable": range(3),
        "thp_disable": range(256),
        "personality": _UINT32,
        "oom_score_adj": range(-1000, 1001),
        "coredump_filter": _UINT32,
        "login_uid": _UINT32,
        "membarrier": range(1 << 9),
    },
    Clocks: {"monotonic": _INT64, "boottime": _INT64},
    Credentials: dict.fromkeys(("inheritable", "permitted", "effective", "bounding", "ambient"), _UINT64)
    | {"securebits": _UINT32},
    FileIdentity: {"size": _INT64},
    Filesystem: {"umask": range(0o1000)},
    LateSignal: {"tid": range(_PID_MAX)},
    Lineage: dict.fromkeys(("parent", "session", "process_group"), range(_PID_MAX)) | {"exit_signal": _SIGNAL_OR_NONE},
    Manifest: {"xsave_size": _XSTATE_SIZES, "memory_bytes": range(_MOST_MEMORY + 1)},
    Memory: dict.fromkeys(("start_code", "end_code", "start_data", "end_data", "start_brk", "brk"), _ADDRESS)
    | dict.fromkeys(("start_stack", "arg_start", "arg_end", "env_start", "env_end"), _ADDRESS)
    | {"future_locks": range(7)},
    OpenFile: {"flags": _UINT32, "position": _INT64},
    OpenMemory: {"flags": _UINT32, "position": _INT64},
    Pipe: {"capacity": range(PAGE_SIZE, (1 << 31) + 1)},  # fs/pipe.c, round_pipe_size
    PipeEnd: {"flags": _UINT32},
    PosixTimer: {"value": _UINT64, "tid": range(_PID_MAX)},
    Process: {"space": _UINT32, "stopped_by": _SIGNAL_OR_NONE},
    Rseq: {"pointer": _ADDRESS, "size": range(PAGE_SIZE + 1), "signature": _UINT32},
    Scheduling: {"io_priority": range(1 << 16), "timer_slack": _UINT64},
    SeccompFilter: {"flags": _UINT32},
    SharedMemory: {
        "space": _UINT32,
        "inode": _UINT64,
        "mode": range(0o10000),
        "seals": _UINT32,
        "huge_shift": _HUGE_SHIFT,
    },
    Sleep: {"call": _UINT32, "left": _INT64},
    StandardStream: {"fd": range(3), "flags": _UINT32},
    Thread: {
        "signal_mask": _UINT64,
        "tid_address": _UINT64,
        "robust_list": _UINT64,
        "robust_list_size": range(PAGE_SIZE + 1),
        "parent_death_signal": _SIGNAL_OR_NONE,
    },
    Vma: {"offset": _INT64, "huge_shift": _HUGE_SHIFT},
    Zombie: {"uid": _UINT32, "status": range(1 << 16)},
    **open_soundness.NUMBERS,
    **socket_soundness.NUMBERS,
}

# How long a text, a byte string or a list may be.
_LENGTHS: Mapping[type, Mapping[str, range]] = {
    Credentials: {"groups": range(65537)},  # NGROUPS_MAX
    FileIdentity: {"build_id": range(257)},
    LateSignal: {"siginfo": range(_SIGINFO_SIZE, _SIGINFO_SIZE + 1)},
    Limits: {"limits": range(1, 33)},
    Manifest: {"tids": range(1, _PID_MAX), "name": range(_PATH_MAX), "vdso": range(1 << 20)},
    Memory: {"vmas": range(1, 1 << 24), "auxv": range(_PATH_MAX + 1), "vdso": range(1 << 20)},
    PosixTimer: {"setting": range(32, 33)},  # struct itimerspec
    Process: {"threads": range(1, _PID_MAX)},
    SeccompFilter: {"program": range(8, 8 * 4096 + 1)},  # BPF_MAXINSNS instructions
    SharedMemory: {"name": range(_PATH_MAX)},
    Scheduling: {"attributes": range(48, 257), "affinity": range(1, 8193)},  # NR_CPUS is at most 8192
    Signals: {"actions": range(64, 65)},
    Thread: {
        "name": range(16),  # TASK_COMM_LEN with its NUL
        "registers": range(216, 217),  # struct user_regs_struct
        "xstate": _XSTATE_SIZES,
        "alternate_stack": range(24, 25),  # stack_t
    },
    Timers: {"intervals": range(3, 4), "posix": range(1001)},
    Tree: {"processes": range(1, _PID_MAX)},
    Vma: {"name": _VMA_NAME, "flags": _VMA_FLAGS},
    Zombie: {"name": range(16)},
    **open_soundness.LENGTHS,
    **socket_soundness.LENGTHS,
}

# How long each byte string of a list must be.
_ITEM_LENGTHS: Mapping[type, Mapping[str, int]] = {
    Signals: {"actions": 32, "pending": _SIGINFO_SIZE},
    Thread: {"pending": _SIGINFO_SIZE},
    Timers: {"intervals": 32},
}

# What a number in a list may be.
_ITEM_NUMBERS: Mapping[type, Mapping[str, range]] = {
    Credentials: {"uids": _UINT32, "gids": _UINT32, "groups": _UINT32},
    Scheduling: {"affinity": range(8192)},
    SharedMemory: {"owner": _UINT32},
    **socket_soundness.ITEM_NUMBERS,
}

_CHOICES: Mapping[type, Mapping[str, frozenset[str]]] = {
    FileIdentity: {"kind": frozenset({"file", "directory", "fifo", "any"})},
    OpenFile: {"kind": frozenset({"regular", "directory", "device", "path", "live"})},
    SharedMemory: {"kind": frozenset({"anonymous", "huge", "memfd", "system_v", "deleted"})},
    Vma: {"backing": frozenset({"anonymous", "stack", "huge", "file", "object", "vvar", "vdso"})},
    **open_soundness.CHOICES,
}

_PATHS: Mapping[type, tuple[str, ...]] = {
    FileIdentity: ("path",),
    Filesystem: ("root", "cwd"),
    MappedFile: ("path",),
    Memory: ("exe",),
    OpenFile: ("path",),
    **open_soundness.PATHS,
}

# Backings of memory that userfaultfd fills, and those whose pages are the kernel's.
_LAZY_BACKINGS = frozenset({"anonymous", "stack"})
_KERNEL_BACKINGS = frozenset({"vvar", "vdso"})
_INDEXED_BACKINGS = frozenset({"file", "object"})
# Nothing more is to be asked of these.
_PLAIN_BACKINGS = frozenset({"anonymous"}) | _INDEXED_BACKINGS


def check(tree: Tree, manifest: Manifest, known: Iterable[object] = ()) -> None:
    """Raises ProtocolError with the field, its value and what is wrong with it.

    ``known``: structs in the tree that have been checked already, and lists of these.
    """
    passed = frozenset(map(id, known))
    for name, value in (("manifest", manifest), ("state", tree)):
        if problem := _walk(value, passed):
            raise ProtocolError(f"{name}.{problem}")
    if manifest.pid not in [process.pid for process in tree.processes]:
        raise ProtocolError(f"manifest.pid: {manifest.pid} is none of the state's processes")
    if not manifest.shell_job and any(each.stream for each in tree.descriptors.descriptions):
        raise ProtocolError("state.descriptors: a terminal is to be lent, of which the manifest says nothing")
    # The root was made as the manifest says: were it no init, the numbers of its namespace would be those of others.
    if manifest.init != Nesting(tree.pid_namespaces).is_init(tree.processes[0].pid):
        raise ProtocolError(f"manifest.init: {manifest.init} is not what the state says of the root")


def check_message(name: str, message: Any, passed: Collection[int] = frozenset()) -> None:
    """The same of a single message, a struct, before anything of it is used; ``passed``: the ids of what is known.
    Raises ProtocolError."""
    if problem := _walk(message, passed):
        raise ProtocolError(f"{name}.{problem}")


def prepare() -> None:
    """Find the rules of every type now, which takes milliseconds."""
    remaining: list[Any] = [Manifest, Tree, Draft, SocketChange]
    for kind in remaining:
        hints = _hints(kind)
        remaining += [each for name in _rules(kind).inner for each in _structs(hints[name]) if each not in remaining]


def _walk(value: Any, passed: Collection[int] = frozenset()) -> str:
    """The first problem of a struct and of all that are in it, with its path; empty where there is none.

    ``passed``: what is sound, by its id, and lists of that.
    """
    kind: type = type(value)
    rules = _rules(kind)
    for rule in rules.own:
        for problem in rule(value):
            return problem
    for name in rules.inner:
        inner = getattr(value, name)
        if inner is None:
            continue
        if not isinstance(inner, list):
            if problem := _walk(inner, passed):
                return f"{name}.{problem}"
        elif id(inner) not in passed:
            for number, each in enumerate(inner):
                if each is not None and id(each) not in passed and (problem := _walk(each, passed)):
                    return f"{name}[{number}].{problem}"
    return ""


class _Rules(Struct, frozen=True):
    """What is looked at in a struct: rules of its own, and the fields that hold structs or lists of them."""

    own: tuple[Callable[[Any], Iterable[str]], ...]
    inner: tuple[str, ...]


@functools.cache
def _rules(kind: type) -> _Rules:
    own: list[Callable[[Any], Iterable[str]]]
    own = [functools.partial(rule, table[kind]) for rule, table in _TABLES if kind in table]
    own += [_CHECKS[kind]] if kind in _CHECKS else []
    included = socket_soundness.INCLUDED.get(kind, ())
    fields = (
        name
        for name, hint in _hints(kind).items()
        if name not in included and any(_is_looked_at(each) for each in _structs(hint))
    )
    return _Rules(tuple(own), tuple(fields))


def _is_looked_at(kind: Any) -> bool:
    rules = _rules(kind)
    return bool(rules.own or rules.inner)


def _hints(kind: Any) -> dict[str, Any]:
    found: dict[str, Any] = kind.__annotations__
    # That resolves forward references, and takes ten times as long.
    return typing.get_type_hints(kind) if any(isinstance(each, str) for each in found.values()) else found


def _structs(hint: Any) -> Iterator[type[Struct]]:
    """Those of which a field of this type may hold some."""
    if isinstance(hint, type) and issubclass(hint, Struct):
        yield hint
    for each in typing.get_args(hint):
        yield from _structs(each)


def _numbers(table: Mapping[str, range], value: Any) -> Iterable[str]:
    for name, allowed in table.items():
        if (number := getattr(value, name)) not in allowed:
            return (f"{name}: {number} is not within {_text(allowed)}",)
    return ()


def _lengths(table: Mapping[str, range], value: Any) -> Iterable[str]:
    for name, allowed in table.items():
        if (length := len(getattr(value, name))) not in allowed:
            return (f"{name}: a length of {length} is not within {_text(allowed)}",)
    return ()


def _item_lengths(table: Mapping[str, int], value: Any) -> Iterable[str]:
    for name, wanted in table.items():
        for at, item in enumerate(getattr(value, name)):
            if len(item) != wanted:
                return (f"{name}[{at}]: {len(item)} bytes; it must have {wanted}",)
    return ()


def _item_numbers(table: Mapping[str, range], value: Any) -> Iterable[str]:
    for name, allowed in table.items():
        for at, number in enumerate(getattr(value, name)):
            if number not in allowed:
                return (f"{name}[{at}]: {number} is not within {_text(allowed)}",)
    return ()


def _choices(table: Mapping[str, frozenset[str]], value: Any) -> Iterable[str]:
    for name, choices in table.items():
        if (choice := getattr(value, name)) not in choices:
            return (f"{name}: {choice[:80]!r} is none of {', '.join(sorted(choices))}",)
    return ()


def _paths(table: Iterable[str], value: Any) -> Iterable[str]:
    return [problem for name in table for problem in _path(name, getattr(value, name))]


_TABLES: tuple[tuple[Callable[[Any, Any], Iterable[str]], Mapping[type, Any]], ...] = (
    (_numbers, _NUMBERS),
    (_lengths, _LENGTHS),
    (_item_lengths, _ITEM_LENGTHS),
    (_item_numbers, _ITEM_NUMBERS),
    (_choices, _CHOICES),
    (_paths, _PATHS),
)


def _text(allowed: range) -> str:
    return f"{allowed.start} to {allowed.stop - 1}"


def _path(name: str, path: str) -> Iterable[str]:
    if path.startswith("/") and "\0" not in path and len(path) < _PATH_MAX:
        return ()
    return (f"{name}: {path[:80]!r} is not an absolute path of less than {_PATH_MAX} characters",)


def _repeated(values: Iterable[int]) -> Iterator[int]:
    seen: set[int] = set()
    for value in values:
        if value in seen:
            yield value
        seen.add(value)


# -- what must hold between fields -------------------------------------------------------------------------------------


def _tree(tree: Tree) -> Iterator[str]:
    if not tree.processes:
        return
    tids = [thread.tid for process in tree.processes for thread in process.threads]
    for tid in _repeated([*tids, *(zombie.pid for zombie in tree.zombies)]):
        yield f"processes: tid {tid} occurs twice"
    nesting = Nesting(tree.pid_namespaces)
    members = {member.pid for member in tree.members}
    if problems := list(nesting.problems(members)):
        yield from problems
        return
    try:
        makings = plan(member.lineage.relative(member.pid) for member in tree.members)
        nesting.check(makings)
        for name in ("table_of", "places_of"):
            owners = {each.pid: getattr(each, name) for each in tree.processes if getattr(each, name)}
            check_sharing(makings, owners, "descriptor table" if name == "table_of" else "working directory")
            yield from _owners(tree, name, owners)
    except Unrelated as reason:
        yield f"processes: {reason}"
    if tree.processes[0].lineage.parent:
        yield f"processes[0].lineage.parent: {tree.processes[0].lineage.parent}; the first must be the root"
    count = len(tree.descriptors.descriptions)
    for process in tree.processes:
        for slot in process.slots:
            if not 0 <= slot.description < count:
                yield f"processes: descriptor {slot.fd} of {process.pid} is none of the {count} descriptions"
    spaces = [*(process.space for process in tree.processes), *(memory.space for memory in tree.shared_memory)]
    yield from open_soundness.tree(tree)
    yield from socket_soundness.tree(tree)
    yield from ipc_soundness.tree(tree)
    for space in _repeated(spaces):
        yield f"processes: space {space} occurs twice"
    yield from _references_to_memory(tree)


def _owners(tree: Tree, name: str, owners: Mapping[int, int]) -> Iterator[str]:
    """What processes share by clone(2) is that of one before them which has it for itself."""
    before: set[int] = set()
    for place, process in enumerate(tree.processes):
        owner = owners.get(process.pid, 0)
        if owner and (owner not in before or owner in owners):
            yield f"processes[{place}].{name}: {owner} is none before it that has its own"
        if name == "table_of" and owner and process.slots:
            yield f"processes[{place}].slots: {len(process.slots)} of them, where those of process {owner} count"
        before.add(process.pid)


def _references_to_memory(tree: Tree) -> Iterator[str]:
    count = len(tree.shared_memory)
    for place, process in enumerate(tree.processes):
        for number, vma in enumerate(process.memory.vmas):
            if vma.backing == "object" and not 0 <= vma.file < count:
                where = f"processes[{place}].memory.vmas[{number}].file"
                yield f"{where}: {vma.file} is none of the {count} shared memories"
    for number, description in enumerate(tree.descriptors.descriptions):
        if description.memory is not None and not description.memory.memory < count:
            where = f"descriptors.descriptions[{number}].memory.memory"
            yield f"{where}: {description.memory.memory} is none of the {count} shared memories"


def _draft(draft: Draft) -> Iterator[str]:
    for pid in _repeated(sketch.pid for sketch in draft.processes):
        yield f"processes: pid {pid} occurs twice"
    for place, sketch in enumerate(draft.processes):
        if any(vma.backing == "object" for vma in sketch.memory.vmas):
            yield f"processes[{place}].memory.vmas: a draft has no memory with an identity"
        for slot in sketch.slots:
            if not 0 <= slot.description < len(draft.descriptions):
                yield f"processes[{place}].slots: descriptor {slot.fd} is none of the descriptions"
        for fd in _repeated(slot.fd for slot in sketch.slots):
            yield f"processes[{place}].slots: descriptor {fd} occurs twice"
    for number, description in enumerate(draft.descriptions):
        if description is not None and description.file is None:
            yield f"descriptions[{number}]: only files can be opened before the state is known"


def _manifest(manifest: Manifest) -> Iterator[str]:
    for tid in _repeated(manifest.tids):
        yield f"tids: {tid} occurs twice"
    for shift, count in manifest.huge_pages:
        if shift not in _HUGE_SHIFT or count << shift > _MOST_MEMORY:
            yield f"huge_pages: {count} pages of 2 to the power of {shift} bytes are not what any host has"


def _process(process: Process) -> Iterator[str]:
    if process.threads and process.threads[0].tid != process.pid:
        yield f"threads[0].tid: {process.threads[0].tid} is not the pid {process.pid}"
    if process.leader_ended is not None and (process.leader_ended not in range(0, 1 << 16, 1 << 8)):
        yield f"leader_ended: {process.leader_ended:#x} is not how a thread ends"
    if process.leader_ended is not None and len(process.threads) < 2:
        yield "leader_ended: no thread goes on"
    for fd in _repeated(slot.fd for slot in process.slots):
        yield f"slots: descriptor {fd} occurs twice"


def _vma(vma: Vma) -> Iterable[str]:
    # There are thousands of them, and nearly all pass.
    sound = vma.start < vma.end and not (vma.start | vma.end | vma.offset) % PAGE_SIZE and not vma.huge_shift
    plain = vma.backing in _PLAIN_BACKINGS and (vma.file == -1 or vma.backing in _INDEXED_BACKINGS)
    return () if sound and plain and all(len(flag) == 2 for flag in vma.flags) else _wrong_with(vma)


def _wrong_with(vma: Vma) -> Iterator[str]:
    if not vma.start < vma.end:
        yield f"end: {vma.end:#x} is not behind start {vma.start:#x}"
    for name, value in (("start", vma.start), ("end", vma.end), ("offset", vma.offset)):
        if value % PAGE_SIZE:
            yield f"{name}: {value:#x} is no page boundary"
    yield from _huge(vma.huge_shift, vma.backing, (vma.start, vma.end))
    if vma.backing not in _INDEXED_BACKINGS and vma.file != -1:
        yield f"file: {vma.file} given for a backing that is {vma.backing}"
    if vma.backing in _KERNEL_BACKINGS | {"stack"} and vma.shared:
        yield f"shared: a backing that is {vma.backing} is never shared"
    for flag in vma.flags:
        if len(flag) != 2:
            yield f"flags: {flag[:80]!r} is none"


def _memory(memory: Memory) -> Iterator[str]:
    for number, (before, vma) in enumerate(pairwise(memory.vmas), start=1):
        if vma.start < before.end:
            yield f"vmas[{number}].start: {vma.start:#x} is before the end of the one before it, {before.end:#x}"
            return
    for number, vma in enumerate(memory.vmas):
        if vma.backing == "file" and not 0 <= vma.file < len(memory.files):
            yield f"vmas[{number}].file: {vma.file} is none of the {len(memory.files)} files"
    yield from _vdso(memory)
    yield from _pages(memory)
    if len(memory.auxv) % 16:
        yield f"auxv: {len(memory.auxv)} bytes are no whole entries"


def _vdso(memory: Memory) -> Iterator[str]:
    sizes = [vma.end - vma.start for vma in memory.vmas if vma.backing == "vdso"]
    if len(sizes) != 1:
        yield f"vmas: {len(sizes)} of them are the vdso"
    elif len(memory.vdso) != sizes[0]:
        yield f"vdso: {len(memory.vdso)} bytes for a mapping of {sizes[0]}"


def _pages(memory: Memory) -> Iterator[str]:
    """Sent and lazy pages and guards: each where it can be, and no page twice."""
    sets: dict[str, PageRanges] = {}
    for name in ("sent", "lazy", "guards"):
        try:
            sets[name] = PageRanges.unpack(getattr(memory, name))
        except ProtocolError as error:
            yield f"{name}: {error.message}"
            return
    for name, can_have in (("lazy", _can_be_lazy), ("sent", _has_pages), ("guards", _has_pages)):
        for start, end in _outside(sets[name], memory.vmas, can_have):
            yield f"{name}: {start:#x}-{end:#x} is outside of the mappings that can have such pages"
    for name, other in (("lazy", "sent"), ("guards", "sent"), ("guards", "lazy")):
        for both in _common(sets[name], sets[other]):
            yield f"{name}: {both.start:#x}-{both.end:#x} is in {other} as well"
    for vma in filter(is_lazy, memory.vmas):
        yield from _whole(sets["lazy"].clip(vma.start, vma.end), vma.huge_shift)
    total = sum(each.total_pages for each in sets.values()) * PAGE_SIZE
    if total > _MOST_MEMORY:
        yield f"lazy: {total} bytes of memory are more than any host has"


def _common(one: PageRanges, other: PageRanges) -> Iterable[PageRange]:
    rest = one.subtract(other)
    return one.subtract(rest) if rest.total_pages != one.total_pages else ()


def _has_pages(vma: Vma) -> bool:
    return vma.backing not in _KERNEL_BACKINGS


def _can_be_lazy(vma: Vma) -> bool:
    return (vma.backing in _LAZY_BACKINGS and "wf" not in vma.flags) or is_lazy(vma)


def _outside(pages: PageRanges, vmas: list[Vma], can_have: Callable[[Vma], bool]) -> Iterator[tuple[int, int]]:
    """The parts of ``pages`` that are in none of the mappings, which are in order, or in one of another kind."""
    starts = [vma.start for vma in vmas]
    for start, end in pages:
        at = bisect_right(starts, start) - 1
        while start < end:
            if at >= 0 and start < vmas[at].end:
                until = min(vmas[at].end, end)
                if not can_have(vmas[at]):
                    yield start, until
            else:
                until = min(starts[at + 1], end) if at + 1 < len(starts) else end
                yield start, until
            start, at = until, at + (at + 1 < len(starts) and starts[at + 1] == until)


def _huge(shift: int, kind: str, places: Iterable[int]) -> Iterator[str]:
    """hugetlb memory, and no other, has a size of pages; it consists of whole ones."""
    if (kind == "huge") != (shift > PAGE_SHIFT):
        yield f"huge_shift: {shift} for memory that is {kind}"
    elif kind == "huge" and any(place % (1 << shift) for place in places):
        yield f"huge_shift: memory that is not made of whole pages of {1 << shift} bytes"


def _whole(lazy: PageRanges, shift: int) -> Iterator[str]:
    for each in lazy:
        if (each.start | each.end) % (1 << shift):
            yield f"lazy: {each.start:#x}-{each.end:#x} is not made of whole pages of {1 << shift} bytes"


def _shared_memory(memory: SharedMemory) -> Iterator[str]:
    if (memory.kind == "system_v") != (memory.system_v is not None):
        yield f"system_v: does not fit memory of kind {memory.kind}"
    # memfds and segments may be of hugetlb pages; then they are judged as what always is.
    may_be = memory.kind in ("memfd", "system_v") and memory.huge_shift
    yield from _huge(memory.huge_shift, "huge" if may_be else memory.kind, (memory.size,))
    if memory.system_v is not None:
        rounded = -memory.system_v.size % (1 << memory.huge_shift) if memory.huge_shift else 0
        if memory.system_v.size + rounded != memory.size:
            yield f"system_v.size: {memory.system_v.size} bytes in memory of {memory.size}"
    if "\0" in memory.name:
        yield f"name: {memory.name[:80]!r} has a NUL"
    sets: dict[str, PageRanges] = {}
    for name in ("sent", "lazy"):
        try:
            sets[name] = PageRanges.unpack(getattr(memory, name))
        except ProtocolError as error:
            yield f"{name}: {error.message}"
            return
        for each in sets[name]:
            if each.end > page_up(memory.size):
                yield f"{name}: {each.start:#x}-{each.end:#x} is behind the end, {memory.size:#x}"
    for both in _common(sets["lazy"], sets["sent"]):
        yield f"lazy: {both.start:#x}-{both.end:#x} is in sent as well"
    if is_lazy_object(memory):
        yield from _whole(sets["lazy"], memory.huge_shift)


def _seccomp(seccomp: Seccomp) -> Iterator[str]:
    if seccomp.filters and seccomp.mode != _SECCOMP_MODE_FILTER:
        yield f"filters: {len(seccomp.filters)} of them in mode {seccomp.mode}"
    for number, each in enumerate(seccomp.filters):
        if len(each.program) % 8:
            yield f"filters[{number}].program: {len(each.program)} bytes are no whole instructions"


def _timers(timers: Timers) -> Iterator[str]:
    for number in _repeated(timer.number for timer in timers.posix):
        yield f"posix: timer {number} occurs twice"


def _siginfos(of: Signals | Thread) -> Iterator[str]:
    for number, siginfo in enumerate(of.pending):
        yield from _siginfo(f"pending[{number}]", siginfo)


def _late_signal(late: LateSignal) -> Iterator[str]:
    yield from _siginfo("siginfo", late.siginfo)


def _siginfo(name: str, siginfo: bytes) -> Iterator[str]:
    signal = int.from_bytes(siginfo[:4], "little", signed=True)
    if not 1 <= signal <= 64:
        yield f"{name}: there is no signal {signal}"


def _thread(thread: Thread) -> Iterator[str]:
    yield from _siginfos(thread)
    yield from _name(thread)


def _name(of: Thread | Zombie) -> Iterator[str]:
    if b"\0" in of.name:
        yield f"name: {of.name!r} has a NUL"


def _zombie(zombie: Zombie) -> Iterator[str]:
    yield from _name(zombie)
    number, dumped = zombie.status & 0x7F, zombie.status & 0x80
    wrong = number > 64 or number in open_soundness.NOT_ENDING or (dumped and number not in _DUMPING)
    if wrong or (number and zombie.status >> 8):
        yield f"status: {zombie.status:#x} is not how a process ends"


def _limits(limits: Limits) -> Iterator[str]:
    for number, (soft, hard) in enumerate(limits.limits):
        if not 0 <= soft <= hard < 1 << 64:
            yield f"limits[{number}]: soft {soft} and hard {hard}"


_kinds_of = attrgetter(*Description.__struct_fields__)


def _description(description: Description) -> Iterator[str]:
    values = _kinds_of(description)
    if len(values) - values.count(None) != 1:
        kinds = [name for name in description.__struct_fields__ if getattr(description, name) is not None]
        yield f"kind: {' and '.join(kinds) or 'none'} where exactly one is due"


def _descriptors(table: Descriptors) -> Iterator[str]:
    for number, description in enumerate(table.descriptions):
        end = description.pipe
        if end is not None and not 0 <= end.pipe < len(table.pipes):
            yield f"descriptions[{number}].pipe.pipe: {end.pipe} is none of the {len(table.pipes)} pipes"


def _pipe(pipe: Pipe) -> Iterator[str]:
    if len(pipe.content) > pipe.capacity:
        yield f"content: {len(pipe.content)} bytes in a pipe of {pipe.capacity}"
    if pipe.packets and (sum(pipe.packets) != len(pipe.content) or not all(pipe.packets)):
        yield f"packets: of {sum(pipe.packets)} bytes, where the content has {len(pipe.content)}"
    if pipe.path:
        yield from _path("path", pipe.path)


_CHECKS: Mapping[type, Callable[[Any], Iterable[str]]] = {
    Description: _description,
    Descriptors: _descriptors,
    Draft: _draft,
    LateSignal: _late_signal,
    Limits: _limits,
    Manifest: _manifest,
    Memory: _memory,
    Pipe: _pipe,
    Process: _process,
    Seccomp: _seccomp,
    SharedMemory: _shared_memory,
    Signals: _siginfos,
    Thread: _thread,
    Timers: _timers,
    Tree: _tree,
    Vma: _vma,
    Zombie: _zombie,
    **open_soundness.CHECKS,
    **socket_soundness.CHECKS,
}
