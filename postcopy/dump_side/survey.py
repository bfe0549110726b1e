"""The survey: everything that can be found out about a process tree without touching it.

Gathers every reason why the tree cannot be moved, and what the destination must have (the manifest).
"""

import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator

from msgspec import Struct, field

from postcopy import capabilities
from postcopy.dump_side import (
    clocks,
    descriptors,
    epoll,
    filesystem,
    inet_sockets,
    inotify,
    ipc,
    lineage,
    memory,
    namespaces,
    pid_namespaces,
    seccomp,
    sketches,
    smaps,
    timers,
    unix_peers,
)
from postcopy.dump_side.choices import Choices
from postcopy.dump_side.opened import Table, Trusted, common
from postcopy.dump_side.shared_memory import SharedObjects
from postcopy.errors import DumpError, ProblemsError
from postcopy.kernel import cpu, procfs
from postcopy.kernel.elf import build_id
from postcopy.kernel.process_memory import ProcessMemory
from postcopy.state import Draft, FileIdentity, Manifest

log = logging.getLogger("postcopy")

_KERNEL_THREAD = 0x00200000  # PF_KTHREAD, include/linux/sched.h
_LOOKS, _BETWEEN_LOOKS = 4, 0.02


def check_target(pid: int) -> None:
    """That there is a process to move. Raises DumpError with the reason if not."""
    if not procfs.exists(pid):
        raise DumpError(f"there is no process {pid}", "look for its PID with ps or pgrep")
    fields, status = procfs.stat(pid), procfs.status(pid)
    name = fields[2]
    if int(fields[9]) & _KERNEL_THREAD:
        raise DumpError(f"{pid} ({name}) is a kernel thread; only user processes can be moved")
    if int(status["Tgid"]) != pid:
        raise DumpError(f"{pid} is a thread of process {status['Tgid']}", f"name the process: -t {status['Tgid']}")
    if fields[3] in "ZX" and len(procfs.tids(pid)) == 1:
        raise DumpError(f"process {pid} ({name}) is a zombie: it has ended, only its parent has not waited for it")
    if pid in _own_line():
        raise DumpError(f"process {pid} ({name}) is this postcopy itself or one of its parents")
    if int(status["TracerPid"]):
        raise DumpError(
            f"process {pid} ({name}) is traced by process {status['TracerPid']} (a debugger or strace)",
            "detach it there and try again",
        )


def survey(pid: int, choices: Choices | None = None) -> tuple[Manifest, Trusted]:
    """What the destination must have, and what is known not to leave the tree.

    Raises ProblemsError with everything that cannot be moved, DumpError where there is no process to move.
    """
    capabilities.require({"CAP_SYS_ADMIN", "CAP_SYS_PTRACE"})
    try:
        check_target(pid)
        return _survey(pid, choices or Choices())
    except OSError as error:
        if _has_ended(pid):
            raise DumpError(f"process {pid} ended while it was being looked at") from None
        raise DumpError(f"process {pid} cannot be looked at: {error.strerror}") from None


def _survey(pid: int, choices: Choices) -> tuple[Manifest, Trusted]:
    """Look until what is found cannot be a moment's: a child between vfork(2) and its program shares much, and a thread
    in exit(2) has given up what the other threads of its process still have.
    """
    looks = 0
    while True:
        faces = {each: _face(each) for each in (pid, *procfs.descendants(pid))}
        looks += 1
        try:
            return _look(faces, choices)
        except (ProblemsError, OSError) as error:
            in_passing = isinstance(error, ProblemsError) and len(faces) > 1
            if looks == _LOOKS or not (in_passing or any(lineage.is_ending(*each) for each in faces.items())):
                raise
            time.sleep(_BETWEEN_LOOKS)


def _face(pid: int) -> int:
    with contextlib.suppress(OSError):
        return procfs.face(pid)
    return pid


def _look(faces: dict[int, int], choices: Choices) -> tuple[Manifest, Trusted]:
    """``faces``: of each process of the tree, the root first (`procfs.face`)."""
    shared = SharedObjects()
    root, *descendants = faces
    of_root = faces[root]
    level = pid_namespaces.level(procfs.status(root))
    found = _Findings(of_root, Table(frozenset(faces.values()), shared, choices=choices, level=level))
    found.look(of_root)
    found.problems += namespaces.problems_of_member(of_root, of_root)
    for pid in descendants:
        name = _name(pid)
        own = len(found.problems)
        try:
            if not _has_ended(pid):
                found.look(faces[pid])
                found.problems += namespaces.problems_of_member(faces[pid], of_root)
        except OSError:
            if not _has_ended(pid):
                raise
        if _has_ended(pid):
            # What it had, it has no longer.
            del found.problems[own:]
        found.problems[own:] = [f"process {pid} ({name}): {problem}" for problem in found.problems[own:]]
    epoll.complete(found.table, found.problems)
    inotify.complete(found.table, found.problems)
    unix_peers.check(found.table, found.problems)
    alive = [pid for pid in descendants if faces[pid] in found.tids]
    draft, orders = Draft(), dict[int, list[int]]()
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        # Where one of them has ended meanwhile, it is asked again once all of them are frozen.
        sharing = lineage.Sharing({pid: faces[pid] for pid in (root, *alive)})
        found.problems += sharing.problems
        orders = sharing.orders
        kin = lineage.Kin(faces, zombies=set(descendants) - set(alive))
        found.problems += [f"process {pid} ({_name(pid)}): {text}" for pid in alive for text in kin.problems_of(pid)]
        found.problems += [*kin.problems_of(root), *kin.problems(sharing)]
        if len(alive) == len(descendants) and not found.table.pty_numbers:
            draft = sketches.draw((root, *alive), kin, sharing, found.known, found.table, found.vdso)
    inet_sockets.check_loops(found.table, found.problems)
    numbered = ipc.IpcObjects()
    living = [root, *alive]
    numbered.find(living, faces.keys() - {*living}, choices, found.problems, lambda: ipc.waiting(procfs.pids()))
    for each in numbered.doubtful:
        log.warning("%s has been used last by nobody who lives; if the program uses it, it will miss it", each)
    found.problems += shared.problems(set(faces.values()))
    if found.problems:
        raise ProblemsError(found.problems, f"process {root} ({_name(root)}) cannot be moved")
    manifest = Manifest(
        pid=common(found.table, root),
        tids=[tid for tids in found.tids.values() for tid in tids],
        name=_name(root),
        files=list(dict.fromkeys((*found.files.values(), *found.table.needed))),
        vdso=found.vdso,
        xsave_size=cpu.xsave_size(),
        memory_bytes=found.memory_bytes,
        highest_fd=found.highest_fd,
        external=found.table.external,
        shell_job=found.table.has_lent_terminal,
        ptys=list(found.table.pty_numbers),
        unix_names=found.table.unix_names,
        init=level != len(procfs.status(root)["NSpid"].split()) - 1,
        huge_pages=sorted((found.huge_pages + shared.huge_pages).items()),
        core_dumps=any(lineage.left_core_dump(pid) for pid in descendants),
        ipc=numbered.names,
        queues=[each.name for each in found.table.descriptors.queues if each.name],
    )
    alone = found.table.pipe_numbers.keys() | found.table.queue_numbers.keys() | found.table.sockets.keys()
    return manifest, Trusted(
        frozenset(alone),
        shared.keys,
        found.table.found_ranks(),
        found.known,
        found.table.found,
        draft,
        found.table.found_sockets(),
        orders,
    )


class _Findings(Struct):
    """What is found of one process after the other; ``tids``: of each its threads, as the tree numbers them."""

    root: int
    table: Table
    problems: list[str] = []
    files: dict[str, FileIdentity] = {}
    checked: memory.Checked = {}
    tids: dict[int, list[int]] = {}
    known: dict[int, smaps.Known] = {}
    huge_pages: Counter[int] = field(default_factory=Counter)
    vdso: bytes = b""
    memory_bytes: int = 0
    highest_fd: int = 0

    def look(self, pid: int) -> None:
        """Add a process; raises OSError."""
        self.known[pid] = smaps.look(pid, self.table.shared, self.checked)
        layout = self.known[pid].layout
        self.problems += [*layout.problems, *lineage.problems(pid), *timers.problems(pid)]
        self.problems += [*clocks.problems(pid, self.root), *seccomp.problems(pid), *_of_process(pid)]
        self.huge_pages += layout.huge_pages
        slots = self.table.slots[pid] = descriptors.collect(self.table, pid, self.problems)
        for tid in (pid, *lineage.with_places_of_their_own(pid, procfs.tids(pid), self.problems)):
            filesystem.collect(tid, self.problems)
        for file in (*_exe(pid, self.problems), *memory.identities(layout, self.files)):
            self.files[file.path] = file
        if not self.vdso:
            self.vdso = _vdso(pid, layout)
        resident = procfs.status(pid).get("VmRSS", "0 kB")
        self.memory_bytes += int(resident.split()[0]) * 1024
        self.highest_fd = max([self.highest_fd, *(slot.fd for slot in slots)])
        self.tids[pid] = list(_common_tids(self.table, pid))


def _vdso(pid: int, layout: memory.Layout) -> bytes:
    reader = ProcessMemory(pid)
    try:
        return reader.read(layout.vdso.start, len(layout.vdso))
    finally:
        reader.close()


def _has_ended(pid: int) -> bool:
    """Whether a process has, or is about to: in exit(2) it gives up what it has before it is seen to be gone."""
    try:
        return all(lineage.is_ending(pid, tid) for tid in procfs.tids(pid))
    except OSError:
        return True


def _name(pid: int) -> str:
    try:
        return procfs.stat(pid)[2]
    except OSError:
        return "?"


def _common_tids(table: Table, pid: int) -> Iterator[int]:
    """The threads as the tree numbers them."""
    for tid in procfs.tids(pid):
        # A thread may end while we look.
        with contextlib.suppress(OSError):
            yield common(table, pid, tid)


def _own_line() -> Iterator[int]:
    """This process and its parents, up to the first outside of our PID namespace."""
    pid = os.getpid()
    while pid > 1:
        yield pid
        pid = int(procfs.stat(pid)[4])


def _exe(pid: int, problems: list[str]) -> list[FileIdentity]:
    path = procfs.link(pid, "exe")
    with contextlib.suppress(OSError):
        if os.path.samestat(os.stat(path), os.stat(f"/proc/{pid}/exe")):
            return [FileIdentity(path, os.stat(path).st_size, build_id(path), changing=False)]
    problems.append(f"its program {path} cannot be found under this name any more")
    return []


def _of_process(pid: int) -> Iterator[str]:
    """What stands in ``status``, and in what namespaces and by what program it runs."""
    status = procfs.status(pid)
    if "shstk" in status.get("x86_Thread_features", ""):
        yield "it uses shadow stacks, which cannot be moved yet"
    if _is_32_bit(pid):
        yield "it is a 32-bit program; only 64-bit programs can be moved"
    with contextlib.suppress(OSError):
        if os.readlink(f"/proc/{pid}/ns/user") != os.readlink("/proc/self/ns/user"):
            yield "it lives in another user namespace, which cannot be moved yet"


def _is_32_bit(pid: int) -> bool:
    with open(f"/proc/{pid}/exe", "rb") as stream:
        return stream.read(5) == b"\x7fELF\x01"
