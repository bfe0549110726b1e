"""Check a manifest: everything that would keep the tree from running here, found before anything is frozen there."""

import os
from collections.abc import Iterator

from postcopy.kernel import cpu, procfs, vdso
from postcopy.kernel.elf import build_id
from postcopy.kernel.process_memory import ProcessMemory
from postcopy.state import FileIdentity, Manifest

_CAPABILITY_SYS_ADMIN, _CAPABILITY_CHECKPOINT_RESTORE = 21, 40


def problems(manifest: Manifest, new_pid_namespace: bool) -> list[str]:
    """All reasons why the tree cannot be restored here, each with what to do."""
    return [
        *_pids(manifest, new_pid_namespace),
        *_vdso(manifest),
        *_cpu(manifest),
        *files(manifest.files, frozen=False),
    ]


def files(wanted: list[FileIdentity], frozen: bool) -> Iterator[str]:
    """What is not the same here. Before the freeze, the size of a file that is being written means nothing."""
    for file in {f.path: f for f in wanted}.values():
        try:
            size = os.stat(file.path).st_size
        except OSError as error:
            yield f"file {file.path} is missing here ({error.strerror}): copy it, or share the filesystem"
            continue
        if size != file.size and (frozen or not file.changing):
            yield f"file {file.path} has {size} bytes here and {file.size} at the source: copy it"
        elif file.build_id and build_id(file.path) != file.build_id:
            yield f"file {file.path} is of another build here: install the same package version"


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
    own = next(line for line in procfs.for_each_vma(os.getpid()) if line.name == "[vdso]")
    memory = ProcessMemory(os.getpid())
    try:
        image = memory.read(own.start, own.end - own.start)
    finally:
        memory.close()
    # Behind what is used, a dump that was killed may have left the executor's stub in the source's.
    used = vdso.slack(image).start
    if len(image) != len(manifest.vdso) or image[:used] != manifest.vdso[:used]:
        yield "this kernel's vdso differs from the source's: use the same kernel on both hosts"


def _cpu(manifest: Manifest) -> Iterator[str]:
    size = cpu.xsave_size()
    if size != manifest.xsave_size:
        yield f"the CPU's register state takes {size} bytes here, {manifest.xsave_size} there: use the same CPU model"
