"""Check a manifest: everything that would keep the tree from running here, found before anything is frozen there."""

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from postcopy.kernel import cpu, procfs, vdso
from postcopy.kernel.elf import build_id
from postcopy.kernel.libc import memory_at
from postcopy.restore_side import core_dumps, ipc, mqueues, unix_names
from postcopy.restore_side.job import terminal
from postcopy.restore_side.root import HERE, Root
from postcopy.state import FileIdentity, Manifest

_CAPABILITY_SYS_ADMIN, _CAPABILITY_CHECKPOINT_RESTORE = 21, 40


def problems(
    manifest: Manifest,
    new_pid_namespace: bool,
    inherited: Collection[str] = (),
    shell_job: bool = False,
    root: Root = HERE,
) -> list[str]:
    """All reasons why the tree cannot be restored here, each with what to do.

    ``inherited``: the external resources for which others were given. ``shell_job``: our terminal may be lent.
    ``root``: where its files are.
    """
    with root.entered():
        inside = [
            *_ptys(manifest.ptys),
            *files(manifest.files, frozen=False),
            *unix_names.problems(manifest.unix_names),
        ]
    return [
        *_external(manifest.external, inherited),
        *_proc(root, new_pid_namespace),
        *_terminal(manifest.shell_job, shell_job),
        *_pids(manifest, new_pid_namespace),
        *_vdso(manifest),
        *_cpu(manifest),
        *_huge_pages(manifest.huge_pages),
        *core_dumps.problems(manifest.core_dumps, root),
        *ipc.problems(manifest.ipc),
        *mqueues.problems(manifest.queues),
        *inside,
    ]


def settled(wanted: Iterable[FileIdentity]) -> list[FileIdentity]:
    """Those that need not be looked at again if the source says the same of them once the tree is frozen."""
    return [file for file in wanted if not file.changing or not any(files([file], frozen=True))]


def files(wanted: list[FileIdentity], frozen: bool) -> Iterator[str]:
    """What is not the same here. Before the freeze, the size of a file that is being written means nothing."""
    for file in {(f.path, f.kind): f for f in sorted(wanted, key=lambda f: f.locked)}.values():
        try:
            found = os.stat(file.path) if file.kind == "file" else os.lstat(file.path)
        except OSError as error:
            yield f"file {file.path} is missing here ({error.strerror}): copy it, or share the filesystem"
            continue
        if file.kind in _CHECKS:
            yield from _CHECKS[file.kind](file.path, found, frozen)
            continue
        if file.locked and not frozen:
            yield from _locks(file.path)
        size = found.st_size
        if size != file.size and (frozen or not file.changing):
            yield f"file {file.path} has {size} bytes here and {file.size} at the source: copy it"
        elif file.build_id and build_id(file.path) != file.build_id:
            yield f"file {file.path} is of another build here: install the same package version"


def _external(wanted: Iterable[str], given: Collection[str]) -> Iterator[str]:
    for resource in wanted:
        if resource not in given:
            yield f"nothing is given here for {resource}: --inherit-fd 'fd[N]:{resource}'"


def _proc(root: Root, new_pid_namespace: bool) -> Iterator[str]:
    where = os.path.join(root.path, "proc")
    if root == HERE or root.has_proc(to_be_mounted=new_pid_namespace):
        return
    if new_pid_namespace:
        yield f"{where}, where /proc is to be mounted, is no directory: make it"
    else:
        yield f"{where} is not mounted: mount -t proc proc {where}, or restore with --new-pid-namespace"


def _ptys(wanted: Iterable[int]) -> Iterator[str]:
    for index in wanted:
        if os.path.exists(f"/dev/pts/{index}"):
            yield f"terminal /dev/pts/{index} is taken here: end who has it, or restore where there is another /dev/pts"


def _terminal(wanted: bool, offered: bool) -> Iterator[str]:
    if wanted and not offered:
        yield "it is to have the terminal that restore is run at: add --shell-job (-j)"
    elif wanted and terminal() < 0:
        yield "it is to have the terminal that restore is run at, and there is none among the standard streams here"


def _directory(path: str, found: os.stat_result, frozen: bool) -> Iterator[str]:
    if not stat.S_ISDIR(found.st_mode):
        yield f"{path} is no directory here"


def _fifo(path: str, found: os.stat_result, frozen: bool) -> Iterator[str]:
    if not stat.S_ISFIFO(found.st_mode):
        yield f"{path} is no FIFO here: make it with mkfifo"
    elif not frozen and _is_in_use(path):
        yield f"FIFO {path} is open here, or the filesystem is shared and on the same machine as the source's"


def _is_in_use(path: str) -> bool:
    """Whether anybody has the FIFO open: with a writer it has no end, and without a reader it cannot be written."""
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if os.read(reader, 1):
            return True
    except BlockingIOError:
        return True
    finally:
        os.close(reader)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        return error.errno != errno.ENXIO
    return True


def _locks(path: str) -> Iterator[str]:
    """Whether anybody here has a lock; on a shared filesystem that may be the program itself, at the source."""
    own = -1
    try:
        # Without O_NONBLOCK it would wait for the end of a lease, 45 s (lease-break-time, proc_sys_fs(5)).
        own = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        asked = struct.pack("<hh4xqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
        fcntl.fcntl(own, _F_OFD_SETLK, asked)
    except BlockingIOError:
        yield (
            f"file {path} is locked here; where that is the program's own lock at the source, on a shared filesystem, "
            "it cannot be moved"
        )
    finally:
        if own >= 0:
            os.close(own)


_F_OFD_SETLK = 37
_CHECKS: dict[str, Callable[[str, os.stat_result, bool], Iterator[str]]] = {
    "directory": _directory,
    "fifo": _fifo,
    "any": lambda path, found, frozen: iter(()),
}


def _pids(manifest: Manifest, new_pid_namespace: bool) -> Iterator[str]:
    if new_pid_namespace:
        return
    with open("/proc/sys/kernel/pid_max") as stream:
        most = int(stream.read())
    for tid in manifest.tids:
        kind = "PID" if tid == manifest.pid else "TID"
        if tid >= most:
            yield f"{kind} {tid} is above this host's pid_max of {most}: raise kernel.pid_max"
        elif procfs.exists(tid):
            yield f"{kind} {tid} is taken here: end that process, or restore with --new-pid-namespace"


def _vdso(manifest: Manifest) -> Iterator[str]:
    lines = procfs.read(os.getpid(), "maps").splitlines()
    own = next(procfs.parse_maps(next(line for line in lines if line.endswith(b"[vdso]"))))
    image = bytes(memory_at(own.start, own.end - own.start))
    # Behind what is used, a dump that was killed may have left the executor's stub in the source's.
    used = vdso.slack(image).start
    if len(image) != len(manifest.vdso) or image[:used] != manifest.vdso[:used]:
        yield "this kernel's vdso differs from the source's: use the same kernel on both hosts"


def _cpu(manifest: Manifest) -> Iterator[str]:
    size = cpu.xsave_size()
    if size != manifest.xsave_size:
        yield f"the CPU's register state takes {size} bytes here, {manifest.xsave_size} there: use the same CPU model"


def _huge_pages(wanted: Iterable[tuple[int, int]]) -> Iterator[str]:
    """Whether so many hugetlb pages can be had (Documentation/admin-guide/mm/hugetlbpage.rst)."""
    for shift, count in wanted:
        pool = f"/sys/kernel/mm/hugepages/hugepages-{(1 << shift) >> 10}kB"
        try:
            free, reserved, most_surplus, surplus = (
                int(Path(pool, name).read_text())
                for name in ("free_hugepages", "resv_hugepages", "nr_overcommit_hugepages", "surplus_hugepages")
            )
        except OSError:
            yield f"there are no hugetlb pages of {(1 << shift) >> 10} KiB here"
            continue
        missing = count - (free - reserved) - max(most_surplus - surplus, 0)
        if missing > 0:
            yield (
                f"{count} hugetlb pages of {(1 << shift) >> 10} KiB are needed here, {missing} more than are free: "
                f"raise {pool}/nr_hugepages"
            )
