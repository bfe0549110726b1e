"""A program that has one of everything that cannot be moved yet.

Writes the names of what it could make, one a line, to the file it is told, and then waits.
"""

import contextlib
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
import termios
import threading
from collections.abc import Callable
from pathlib import Path

SYS_TIMER_CREATE, SYS_IO_URING_SETUP, SYS_MSEAL = 222, 425, 462
SYS_INOTIFY_INIT1, SYS_FANOTIFY_INIT, SYS_USERFAULTFD = 294, 300, 323
MAP_NORESERVE, CLONE_NEWTIME = 0x4000, 0x80
SYS_CLONE, CLONE_NEWNS, CLONE_VM, CLONE_FS, CLONE_FILES, CLONE_VFORK, CLONE_NEWPID = (
    56,
    0x20000,
    0x100,
    0x200,
    0x400,
    0x4000,
    0x20000000,
)

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
kept: list[object] = []


class Unavailable(Exception):
    """This kernel has no such thing."""


def checked(result: int) -> int:
    """The result of a system call. Raises Unavailable."""
    if result in (-1, None):
        raise Unavailable(os.strerror(ctypes.get_errno()))
    return result


def table_shared_by_grandchildren(directory: Path) -> None:
    if not os.fork():
        if not checked(libc.syscall(SYS_CLONE, CLONE_FILES | signal.SIGCHLD, 0, 0, 0, 0)):
            cloned(CLONE_FILES)
            checked(libc.unshare(CLONE_FILES))
        signal.pause()


def thread_with_a_table(directory: Path) -> None:
    def part() -> None:
        checked(libc.unshare(CLONE_FILES))
        parted.set()
        threading.Event().wait()

    parted = threading.Event()
    threading.Thread(target=part, daemon=True).start()
    parted.wait()


def vfork(directory: Path) -> None:
    if not os.fork():
        cloned(CLONE_VM | CLONE_VFORK)


def pid_namespace(directory: Path) -> None:
    if not os.fork():
        checked(libc.unshare(CLONE_NEWPID))
        signal.pause()


def born_into_a_pid_namespace(directory: Path) -> None:
    if not os.fork():
        checked(libc.unshare(CLONE_NEWPID))
        if os.fork():
            os.fork()
        signal.pause()


def mount_namespace(directory: Path) -> None:
    if not os.fork():
        checked(libc.unshare(CLONE_NEWNS))
        signal.pause()


def cloned(flags: int) -> None:
    if not checked(libc.syscall(SYS_CLONE, flags | signal.SIGCHLD, 0, 0, 0, 0)):
        while True:
            signal.pause()


def tcp_connection(directory: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    kept.append((listener, socket.create_connection(listener.getsockname()), listener.accept()))


def corked_udp(directory: Path) -> None:
    sock = socket.socket(type=socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_UDP, 1, 1)
    sock.sendto(b"to be continued", ("127.0.0.1", 9))
    kept.append(sock)


def netlink_socket(directory: Path) -> None:
    kept.append(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12))


def raw_socket(directory: Path) -> None:
    kept.append(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_IGMP))


def packet_socket(directory: Path) -> None:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sock.bind(("lo", 3))
    sock.setsockopt(263, 18, 4711)  # PACKET_FANOUT
    kept.append(sock)


def unix_socket_held_by_another(directory: Path) -> None:
    here, there = socket.socketpair()
    kept.append((here, there))
    leave_behind(here.fileno())


def waiting(name: str) -> socket.socket:
    """What has connected to a socket that does not accept."""
    listener, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    listener.bind(f"\0immovable {os.getpid()} {name}")
    listener.listen()
    client.connect(listener.getsockname())
    kept.append(listener)
    return client


def unix_not_accepted_and_sent(directory: Path) -> None:
    client = waiting("sent")
    client.send(b"?")
    kept.append(client)


def unix_not_accepted_and_closed(directory: Path) -> None:
    waiting("closed").close()


def unix_not_accepted_of_a_stranger(directory: Path) -> None:
    client = waiting("stranger")
    leave_behind(client.fileno())
    client.close()


def unix_not_accepted_as_another_user(directory: Path) -> None:
    client = waiting("another user")
    os.fchown(client.fileno(), 1, 1)
    kept.append(client)


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
    path.write_bytes(bytes(4096))
    with path.open("rb") as file:
        libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    checked(libc.inotify_add_watch(fd, bytes(path), 2))
    path.unlink()
    kept.append(fd)


def fanotify_with_events(directory: Path) -> None:
    fd = checked(libc.syscall(SYS_FANOTIFY_INIT, 0, 0))
    checked(libc.fanotify_mark(fd, 1, ctypes.c_uint64(0x08000020), -100, bytes(directory)))  # FAN_OPEN of children
    (directory / "opened").touch()
    kept.append(fd)


def fanotify_that_decides(directory: Path) -> None:
    fd = checked(libc.syscall(SYS_FANOTIFY_INIT, 4, 0))  # FAN_CLASS_CONTENT
    path = directory / "decided"
    path.touch()
    checked(libc.fanotify_mark(fd, 1, ctypes.c_uint64(0x10000), -100, bytes(path)))  # FAN_OPEN_PERM
    kept.append(fd)


def pidfd_of_another(directory: Path) -> None:
    kept.append(os.pidfd_open(1))


def owner_outside(directory: Path) -> None:
    event = os.eventfd(0)
    fcntl.fcntl(event, fcntl.F_SETOWN, 1)
    kept.append(event)


def io_uring(directory: Path) -> None:
    kept.append(checked(libc.syscall(SYS_IO_URING_SETUP, 4, ctypes.create_string_buffer(120))))


def own_userfaultfd(directory: Path) -> None:
    kept.append(checked(libc.syscall(SYS_USERFAULTFD, 0)))


def terminal(directory: Path) -> None:
    master, slave = os.openpty()
    subprocess.run(["setsid", "--fork", "sleep", "1000"], pass_fds=[master], check=True)
    os.close(master)
    kept.append(slave)


def exclusive_terminal(directory: Path) -> None:
    ends = os.openpty()
    fcntl.ioctl(ends[1], termios.TIOCEXCL)
    kept.append(ends)


def terminal_with_a_discipline(directory: Path) -> None:
    ends = os.openpty()
    fcntl.ioctl(ends[0], termios.TIOCSETD, struct.pack("i", 27))  # N_NULL
    kept.append(ends)


def shared_with_a_stranger(directory: Path) -> None:
    kept.append(mmap.mmap(-1, 4096))
    leave_behind()


def leave_behind(*keep: int) -> None:
    """Let a process go on outside of the tree, with nothing open but ``keep``."""
    if not (child := os.fork()):
        if os.fork():
            os._exit(0)
        for fd in range(3, 4096):
            if fd not in keep:
                with contextlib.suppress(OSError):
                    os.close(fd)
        while True:
            signal.pause()
    os.waitpid(child, 0)


def hugetlb(directory: Path) -> None:
    fd = os.memfd_create("huge", os.MFD_HUGETLB)
    map_huge(fd, mmap.MAP_PRIVATE)


def file_of_huge_pages(directory: Path) -> None:
    place = directory / "huge pages"
    place.mkdir()
    subprocess.run(["mount", "-t", "hugetlbfs", "none", place], check=True)
    map_huge(os.open(place / "huge", os.O_CREAT | os.O_RDWR), mmap.MAP_SHARED)


def map_huge(fd: int, flags: int) -> None:
    os.ftruncate(fd, 2 << 20)
    # Nothing is reserved for it, since it is never touched.
    if libc.mmap(None, 2 << 20, 3, flags | MAP_NORESERVE, fd, 0) == ctypes.c_void_p(-1).value:
        raise Unavailable("no huge pages are reserved")
    os.close(fd)


def sealed(directory: Path) -> None:
    address = libc.mmap(None, 4096, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    checked(libc.syscall(SYS_MSEAL, ctypes.c_void_p(address), ctypes.c_size_t(4096), 0))


def posix_timer_of_some_thread(directory: Path) -> None:
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    checked(libc.syscall(SYS_TIMER_CREATE, 3, None, ctypes.byref(ctypes.c_int())))


def deleted_directory(directory: Path) -> None:
    (directory / "cwd").mkdir()
    os.chdir(directory / "cwd")
    (directory / "cwd").rmdir()


def time_namespace_for_children(directory: Path) -> None:
    checked(libc.unshare(CLONE_NEWTIME))


def time_namespace_of_a_child(directory: Path) -> None:
    if not os.fork():
        while True:
            signal.pause()


#: What is made, and what dump says of it.
KINDS: dict[Callable[[Path], None], str] = {
    table_shared_by_grandchildren: "shares its descriptor table with",
    thread_with_a_table: "has a descriptor table of its own (unshare), which cannot be moved yet",
    vfork: "share their memory (vfork, CLONE_VM)",
    pid_namespace: "its children will live in a PID namespace that nobody is in yet (unshare)",
    born_into_a_pid_namespace: "is in another PID namespace than its parent, and not its init",
    mount_namespace: "it lives in another mnt namespace than the root of the tree",
    tcp_connection: "can be moved with --tcp-established, or closed with --tcp-close",
    corked_udp: "a UDP packet is begun in it (UDP_CORK, MSG_MORE), which cannot be read",
    netlink_socket: "a netlink socket (protocol 12) cannot be moved yet",
    raw_socket: "a raw IGMP socket, which may route multicast, cannot be moved yet",
    packet_socket: "a packet socket that shares its packets with others (PACKET_FANOUT) cannot be moved yet",
    unix_socket_held_by_another: "holds this socket too, which cannot be moved yet",
    unix_not_accepted_and_sent: "its connection has not been accepted, and it has sent something",
    unix_not_accepted_and_closed: "a connection waits to be accepted whose other end has been closed",
    unix_not_accepted_of_a_stranger: "a connection waits to be accepted that process ",
    unix_not_accepted_as_another_user: "has not been accepted, and may have been made as another user",
    pipe_that_leaves: "holds an end of this pipe too; redirect the stream to a file",
    fifo_that_leaves: "/fifo: process ",
    deleted_fifo: "/fifo-deleted (deleted): the FIFO cannot be found under this name any more",
    large_deleted_file: "its 2097152 bytes would travel while the program stands still; the limit is 1048576",
    file_with_a_name_elsewhere: "/linked (deleted): this name of it was deleted, and no other is in the same directory",
    locked_file: "/locked: it has file locks or leases, which somebody else could get while the program moves; to move",
    file_of_proc: "/proc/1/stat: files of other processes",
    epoll_of_what_left: "is not in the descriptor table any more",
    inotify_with_events: "bytes of events are unread, which cannot be moved; let it read them",
    inotify_of_deleted: "inotify: what watch 1 watches",
    fanotify_with_events: "[fanotify]: events are unread, which cannot be moved",
    fanotify_that_decides: "[fanotify]: it decides what others may do (permission events)",
    pidfd_of_another: "[pidfd]: it stands for process 1, which is not moved along",
    owner_outside: "its signals go to 1 (F_SETOWN), which is not moved along",
    io_uring: "anon_inode:[io_uring]: descriptors of this kind cannot be moved yet",
    own_userfaultfd: "anon_inode:[userfaultfd]: descriptors of this kind cannot be moved yet",
    exclusive_terminal: "it is exclusive (TIOCEXCL), which cannot be moved yet",
    terminal_with_a_discipline: "it has another line discipline (27), which cannot be moved yet",
    terminal: "a terminal that is not one of the standard streams cannot be moved yet",
    shared_with_a_stranger: "is shared with process",
    hugetlb: "private mappings of huge pages (hugetlb) of a memfd cannot be moved",
    file_of_huge_pages: "files of huge pages (hugetlbfs) cannot be moved",
    sealed: "sealed mappings (mseal) cannot be moved yet",
    posix_timer_of_some_thread: "POSIX timer 0 runs by CLOCK_THREAD_CPUTIME_ID",
    deleted_directory: "its cwd directory",
    time_namespace_for_children: "its children will live in another time namespace (unshare)",
    time_namespace_of_a_child: "lives in another time namespace than process",
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
