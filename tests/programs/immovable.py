"""A program that has one of everything that cannot be moved yet.

Writes the names of what it could make, one a line, to the file it is told, and then waits.
"""

import ctypes
import fcntl
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

SYS_TIMER_CREATE, SYS_SECCOMP, SYS_IO_URING_SETUP, SYS_MSEAL = 222, 317, 425, 462
SYS_INOTIFY_INIT1, SYS_FANOTIFY_INIT, SYS_USERFAULTFD = 294, 300, 323
MAP_HUGETLB = 0x40000
SYS_CLONE, CLONE_VM, CLONE_FS, CLONE_FILES, CLONE_VFORK = 56, 0x100, 0x200, 0x400, 0x4000
PR_SET_NO_NEW_PRIVS = 38

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.shmat.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
kept: list[object] = []


class Unavailable(Exception):
    """This kernel has no such thing."""


def checked(result: int) -> int:
    """The result of a system call. Raises Unavailable."""
    if result in (-1, None):
        raise Unavailable(os.strerror(ctypes.get_errno()))
    return result


def shared_table(directory: Path) -> None:
    cloned(CLONE_FILES)


def shared_places(directory: Path) -> None:
    cloned(CLONE_FS)


def vfork(directory: Path) -> None:
    if not os.fork():
        cloned(CLONE_VM | CLONE_VFORK)


def cloned(flags: int) -> None:
    if not checked(libc.syscall(SYS_CLONE, flags | signal.SIGCHLD, 0, 0, 0, 0)):
        while True:
            signal.pause()


def tcp_socket(directory: Path) -> None:
    kept.append(socket.socket())


def unix_socket(directory: Path) -> None:
    kept.append(socket.socketpair())


def pipe_that_leaves(directory: Path) -> None:
    read_end, write_end = os.pipe()
    subprocess.run(["setsid", "--fork", "sleep", "1000"], stdin=read_end, check=True)
    os.close(read_end)
    kept.append(write_end)


def fifo_that_leaves(directory: Path) -> None:
    os.mkfifo(directory / "fifo")
    both = os.open(directory / "fifo", os.O_RDWR)
    subprocess.run(["setsid", "--fork", "sleep", "1000"], stdin=both, check=True)
    kept.append(both)


def deleted_fifo(directory: Path) -> None:
    os.mkfifo(directory / "fifo-deleted")
    kept.append(os.open(directory / "fifo-deleted", os.O_RDWR))
    (directory / "fifo-deleted").unlink()


def large_deleted_file(directory: Path) -> None:
    path = directory / "open-deleted"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.write(fd, bytes(2 << 20))
    kept.append(fd)
    path.unlink()


def file_with_a_name_elsewhere(directory: Path) -> None:
    (directory / "elsewhere").mkdir()
    path = directory / "linked"
    kept.append(os.open(path, os.O_WRONLY | os.O_CREAT))
    os.link(path, directory / "elsewhere" / "link")
    path.unlink()


def mapped_deleted_file(directory: Path) -> None:
    path = directory / "mapped-deleted"
    path.write_bytes(bytes(4096))
    with open(path, "r+b") as file:
        kept.append(mmap.mmap(file.fileno(), 4096))
    path.unlink()


def locked_file(directory: Path) -> None:
    fd = os.open(directory / "locked", os.O_WRONLY | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    kept.append(fd)


def file_of_proc(directory: Path) -> None:
    kept.append(os.open("/proc/1/stat", os.O_RDONLY))


def epoll_of_what_left(directory: Path) -> None:
    epoll = select.epoll()
    kept.append(epoll)
    event = os.eventfd(0)
    epoll.register(event, select.EPOLLIN)
    subprocess.run(["setsid", "--fork", "sleep", "1000"], pass_fds=[event], check=True)
    os.close(event)


def inotify_with_events(directory: Path) -> None:
    fd = checked(libc.syscall(SYS_INOTIFY_INIT1, 0))
    checked(libc.inotify_add_watch(fd, bytes(directory), 0x100))
    (directory / "created").touch()
    kept.append(fd)


def inotify_of_deleted(directory: Path) -> None:
    fd = checked(libc.syscall(SYS_INOTIFY_INIT1, 0))
    path = directory / "watched"
    path.touch()
    kept.append(path.open())
    checked(libc.inotify_add_watch(fd, bytes(path), 2))
    path.unlink()
    kept.append(fd)


def fanotify(directory: Path) -> None:
    kept.append(checked(libc.syscall(SYS_FANOTIFY_INIT, 0, 0)))


def pidfd_of_another(directory: Path) -> None:
    kept.append(os.pidfd_open(1))


def pidfd_of_the_dead(directory: Path) -> None:
    process = subprocess.Popen(["true"])
    kept.append(os.pidfd_open(process.pid))
    process.wait()


def owner_outside(directory: Path) -> None:
    pipe = os.pipe()
    fcntl.fcntl(pipe[0], fcntl.F_SETOWN, 1)
    kept.append(pipe)


def io_uring(directory: Path) -> None:
    kept.append(checked(libc.syscall(SYS_IO_URING_SETUP, 4, ctypes.create_string_buffer(120))))


def own_userfaultfd(directory: Path) -> None:
    kept.append(checked(libc.syscall(SYS_USERFAULTFD, 0)))


def terminal(directory: Path) -> None:
    kept.append(os.openpty()[1])


def large_memfd(directory: Path) -> None:
    fd = os.memfd_create("large")
    os.write(fd, bytes(2 << 20))
    kept.append(fd)


def huge_memfd(directory: Path) -> None:
    kept.append(os.memfd_create("huge", os.MFD_HUGETLB))


def memfd(directory: Path) -> None:
    fd = os.memfd_create("immovable")
    os.ftruncate(fd, 4096)
    kept.append(mmap.mmap(fd, 4096))


def shared_anonymous(directory: Path) -> None:
    kept.append(mmap.mmap(-1, 4096))


def system_v(directory: Path) -> None:
    number = checked(libc.shmget(0, 4096, 0o600))
    checked(libc.shmat(number, None, 0))
    libc.shmctl(number, 0, None)


def hugetlb(directory: Path) -> None:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB
    if libc.mmap(None, 2 << 20, 3, flags, -1, 0) == ctypes.c_void_p(-1).value:
        raise Unavailable("no huge pages are reserved")


def sealed(directory: Path) -> None:
    address = libc.mmap(None, 4096, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    checked(libc.syscall(SYS_MSEAL, ctypes.c_void_p(address), ctypes.c_size_t(4096), 0))


def posix_timer(directory: Path) -> None:
    checked(libc.syscall(SYS_TIMER_CREATE, 1, None, ctypes.byref(ctypes.c_int())))


def deleted_directory(directory: Path) -> None:
    (directory / "cwd").mkdir()
    os.chdir(directory / "cwd")
    (directory / "cwd").rmdir()


def seccomp(directory: Path) -> None:
    allow = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000))
    program = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", 1, ctypes.addressof(allow)))
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    checked(libc.syscall(SYS_SECCOMP, 1, 0, program))


#: What is made, and what dump says of it.
KINDS: dict[Callable[[Path], None], str] = {
    shared_table: "share their descriptor table (CLONE_FILES)",
    shared_places: "share their working directory (CLONE_FS)",
    vfork: "share their memory (vfork, CLONE_VM)",
    tcp_socket: "socket:[",
    unix_socket: "socket:[",
    pipe_that_leaves: "holds an end of this pipe too; redirect the stream to a file",
    fifo_that_leaves: "/fifo: process ",
    deleted_fifo: "/fifo-deleted (deleted): the FIFO cannot be found under this name any more",
    large_deleted_file: "its 2097152 bytes would travel while the program stands still; the limit is 1048576",
    file_with_a_name_elsewhere: "/linked (deleted): this name of it was deleted, and no other is in the same directory",
    mapped_deleted_file: "/mapped-deleted (deleted)): the file has been deleted",
    locked_file: "/locked: it has file locks or leases, which somebody else could get while the program moves; to move",
    file_of_proc: "/proc/1/stat: files of other processes",
    epoll_of_what_left: "is not in the descriptor table any more",
    inotify_with_events: "bytes of events are unread, which cannot be moved; let it read them",
    inotify_of_deleted: "inotify: what watch 1 watches",
    fanotify: "[fanotify]: descriptors of this kind cannot be moved yet",
    pidfd_of_another: "[pidfd]: it stands for process 1, which is not moved along",
    pidfd_of_the_dead: "[pidfd]: it stands for a process that has ended",
    owner_outside: "its signals go to 1 (F_SETOWN), which is not moved along",
    large_memfd: "/memfd:large (deleted): its 2097152 bytes would travel",
    huge_memfd: "/memfd:huge (deleted): memfds of huge pages cannot be moved yet",
    io_uring: "anon_inode:[io_uring]: descriptors of this kind cannot be moved yet",
    own_userfaultfd: "anon_inode:[userfaultfd]: descriptors of this kind cannot be moved yet",
    terminal: "a terminal that is not one of the standard streams cannot be moved yet",
    memfd: "memfd memory cannot be moved yet",
    shared_anonymous: "shared anonymous memory cannot be moved yet",
    system_v: "System V shared memory cannot be moved yet",
    hugetlb: "huge pages (hugetlb) cannot be moved yet",
    sealed: "sealed mappings (mseal) cannot be moved yet",
    posix_timer: "it has POSIX timers (timer_create), which cannot be moved yet",
    deleted_directory: "its cwd directory",
    seccomp: "it is confined by seccomp (filter mode)",
}


def main() -> None:
    """Make all of it, say so, wait for SIGTERM."""
    directory, ready = Path(sys.argv[1]), Path(sys.argv[2])
    made = []
    for kind in KINDS:
        try:
            kind(directory)
            made.append(kind.__name__)
        except (Unavailable, OSError) as reason:
            print(f"{kind.__name__}: {reason}", file=sys.stderr)
    Path(f"{ready}.new").write_text("\n".join(made))
    os.rename(f"{ready}.new", ready)
    threading.Event().wait()


if __name__ == "__main__":
    main()
