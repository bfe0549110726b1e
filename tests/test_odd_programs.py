"""Programs of kinds that are rare, each of which a move once broke or passed over in silence."""

import contextlib
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import Pair, Process, postcopy_command, wait_until
from tests.migrate import move

PID = 8100

MOVED = {
    "threads that have dropped every capability from the bound": """
        # More calls a thread than would fit into a page of records.
        bound = [number for number in range(64) if libc.prctl(23, number, 0, 0, 0) == 1]
        for number in bound:
            assert libc.prctl(24, number, 0, 0, 0) == 0
        os.setgroups(range(3000, 3200))
        go_on = threading.Event()
        for _ in range(3):
            threading.Thread(target=go_on.wait).start()
        def verify():
            statuses = [Path(f"/proc/self/task/{tid}/status").read_text() for tid in os.listdir("/proc/self/task")]
            assert len(statuses) == 4
            assert all("CapBnd:\\t0000000000000000" in status for status in statuses)
            assert sorted(os.getgroups()) == list(range(3000, 3200))
            go_on.set()
    """,
    "no large hole left in the address space, and many descriptors": """
        reserve = libc.mmap
        reserve.restype = ctypes.c_void_p
        reserve.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
        # PROT_NONE, private, anonymous, without a reserve; until less than 512 GiB are free anywhere.
        reserved = []
        while (found := reserve(None, 1 << 39, 0, 0x4022, -1, 0)) != ctypes.c_void_p(-1).value:
            reserved.append(found)
        for start in range(1 << 39, 1 << 47, 1 << 39):
            reserve(start, 1 << 39, 0, 0x104022, -1, 0)
        opened = [os.open("/etc/passwd", os.O_RDONLY) for _ in range(3000)]
        def verify():
            assert len(reserved) > 100
            assert all(os.lseek(fd, 0, os.SEEK_CUR) == 0 for fd in opened)
    """,
    "a thread with many pending signals": """
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMIN})
        found, go_on = [], threading.Event()
        def take():
            go_on.wait()
            while signal.sigtimedwait({signal.SIGRTMIN}, 0):
                found.append(1)
        thread = threading.Thread(target=take)
        thread.start()
        for _ in range(60):
            signal.pthread_kill(thread.ident, signal.SIGRTMIN)
        def verify():
            go_on.set()
            thread.join()
            assert len(found) == 60
    """,
    "a thread that waits for a futex with priority inheritance": """
        # The kernel looks at the word before the program does, and cannot wait for a page where it looks.
        memory = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        word = ctypes.c_uint32.from_buffer(memory, 1 << 19)
        word.value = threading.get_native_id()
        results = []
        def lock():
            results.append(libc.syscall(202, ctypes.byref(word), 6 | 128, 0, None, None, 0))
        thread = threading.Thread(target=lock)
        thread.start()
        while not Path(f"/proc/self/task/{thread.native_id}/syscall").read_text().startswith("202 "):
            time.sleep(0.01)
        def verify():
            assert not results
            assert libc.syscall(202, ctypes.byref(word), 7 | 128, 0, None, None, 0) == 0
            thread.join()
            assert results == [0]
    """,
    "thousands of descriptors that look alike": """
        fds = [os.open("/etc/passwd", os.O_RDONLY) for _ in range(3000)]
        twins = [os.dup(fd) for fd in fds[::30]]
        def verify():
            for number, fd in enumerate(fds):
                os.lseek(fd, number, os.SEEK_SET)
            assert [os.lseek(fd, 0, os.SEEK_CUR) for fd in fds] == list(range(3000))
            assert [os.lseek(fd, 0, os.SEEK_CUR) for fd in twins] == list(range(3000))[::30]
    """,
    "ten thousand descriptors of many kinds": """
        resource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000))
        files = [os.open("/etc/passwd", os.O_RDONLY) for _ in range(4000)]
        counters = [os.eventfd(number) for number in range(3000)]
        pipes = [os.pipe() for _ in range(1500)]
        ghosts = [os.open(directory, os.O_TMPFILE | os.O_RDWR) for _ in range(200)]
        epolls = [select.epoll() for _ in range(3)]
        for number, fd in enumerate(counters):
            epolls[number % 3].register(fd, select.EPOLLIN | (select.EPOLLET if number % 2 else 0))
        epolls[0].poll(0)
        for number, fd in enumerate(ghosts):
            os.write(fd, b"%d" % number)
        for number, (_, fd) in enumerate(pipes):
            os.write(fd, b"%d" % number)
        def verify():
            ready = [{fd for fd, _ in epoll.poll(0, 3000)} for epoll in epolls]
            assert ready[0] == {fd for fd in counters[::6]} - {counters[0]}, len(ready[0])
            assert ready[1] | ready[2] == {*counters[1::3], *counters[2::3]}
            assert [os.read(fd, 9) for fd, _ in pipes] == [b"%d" % number for number in range(1500)]
            assert [os.pread(fd, 9, 0) for fd in ghosts] == [b"%d" % number for number in range(200)]
            assert [os.eventfd_read(fd) for fd in counters[1:]] == list(range(1, 3000))
            assert all(os.pread(fd, 4, 0) == b"root" for fd in files)
    """,
    "a program that opens and closes all the time": """
        import random
        rounds, wrong = [0] * 4, []
        def epolls(base):
            event, epoll = os.eventfd(1), select.epoll()
            epoll.register(event, select.EPOLLIN)
            twin = os.dup(event)
            os.close(event)
            assert epoll.poll(0) == [(event, select.EPOLLIN)]
            epoll.close()
            os.close(twin)
        def ghosts(base):
            # Never with a name: what the survey sees of that, the destination must have.
            fd = os.open(directory, os.O_TMPFILE | os.O_RDWR)
            os.write(fd, b"x" * 1000)
            assert os.pread(fd, 2000, 0) == b"x" * 1000
            os.close(fd)
        def pipes(base):
            read_end, write_end = os.pipe()
            os.write(write_end, b"abc")
            assert os.read(read_end, 10) == b"abc"
            os.close(read_end)
            os.close(write_end)
        def others(base):
            for fd in (os.memfd_create("m"), os.open("/proc/self/stat", os.O_RDONLY), os.pidfd_open(os.getpid())):
                os.close(fd)
        def churn(number):
            base = os.path.join(directory, str(number))
            try:
                while True:
                    random.choice([epolls, ghosts, pipes, others])(base)
                    rounds[number] += 1
            except BaseException as error:
                wrong.append(repr(error))
        for number in range(4):
            threading.Thread(target=churn, args=[number], daemon=True).start()
        def verify():
            before = list(rounds)
            end = time.monotonic() + 20
            while not wrong and any(now < then + 10 for now, then in zip(rounds, before)) and time.monotonic() < end:
                time.sleep(0.01)
            assert not wrong and all(now >= then + 10 for now, then in zip(rounds, before)), (wrong, before, rounds)
    """,
    "descriptor numbers up to the highest, with gaps": """
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        numbers = [most - 1, most - 2, most - 5, most // 2, 1000]
        for number in numbers:
            event = os.eventfd(number)
            os.dup2(event, number)
            os.close(event)
        read_end, write_end = os.pipe()
        os.dup2(write_end, most - 4)
        os.close(write_end)
        os.write(most - 4, b"through")
        path = os.path.join(directory, "deleted")
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), most - 3)
        os.write(most - 3, b"deleted")
        os.unlink(path)
        table = set(os.listdir("/proc/self/fd"))
        def verify():
            assert set(os.listdir("/proc/self/fd")) == table
            assert [os.eventfd_read(number) for number in numbers] == numbers
            assert os.read(read_end, 99) == b"through"
            assert os.pread(most - 3, 99, 0) == b"deleted"
    """,
    "a descriptor table of a million numbers with gaps": """
        most = int(Path("/proc/sys/fs/nr_open").read_text())
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        except ValueError:  # without CAP_SYS_RESOURCE no table is as large
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        numbers = [*range(1000, most, 1009), most - 1]
        first, *others = numbers
        os.dup2(os.eventfd(0), first)
        for place, number in enumerate(others):
            fd = os.dup(first) if place % 3 else os.eventfd(number)
            os.dup2(fd, number)
            os.close(fd)
        table = set(os.listdir("/proc/self/fd"))
        def verify():
            assert set(os.listdir("/proc/self/fd")) == table
            os.eventfd_write(first, 1)
            own = [number for place, number in enumerate(others) if place % 3 == 0]
            assert [os.eventfd_read(number) for number in own] == own
            assert os.eventfd_read(others[-1] if (len(others) - 1) % 3 else others[-2]) == 1
            for number in numbers:
                os.close(number)
    """,
    "mapped files with odd names": """
        names = [b"a b", b"new\\nline", b"x (deleted)", b"lit\\\\777x", b"back\\\\slash", b"\\xff\\xfe", b"\\x85"]
        maps = []
        for name in names:
            with open(os.path.join(directory.encode(), name), "w+b") as stream:
                stream.write(name.ljust(8192))
                stream.flush()
                maps.append(mmap.mmap(stream.fileno(), 8192))
        libc.prctl(15, b"odd\\n\\xff)", 0, 0, 0)
        def verify():
            assert [content[:].rstrip() for content in maps] == names
            assert Path("/proc/self/comm").read_bytes() == b"odd\\n\\xff)\\n"
    """,
}

REFUSED = {
    "thread .* has a descriptor table of its own": "libc.unshare(0x400)",
    "thread .* lives in another net namespace": "libc.unshare(0x40000000)",
    "it lives in another host name": "main:libc.unshare(0x04000000)",
    "it lives in another network namespace": "main:libc.unshare(0x40000000)",
    "it lives in a mount namespace with other mounts": (
        "main:libc.unshare(0x20000); libc.mount(b'none', b'/', None, 0x44000, None); "
        "libc.mount(b'x', directory.encode(), b'tmpfs', 0, None)"
    ),
}

HEAD = """
import ctypes, mmap, os, resource, select, signal, sys, threading, time
from pathlib import Path
libc = ctypes.CDLL(None, use_errno=True)
directory = sys.argv[1]
"""
TAIL = """
Path(sys.argv[2], "ready").touch()
while not Path(sys.argv[2], "go").exists():
    time.sleep(0.01)
verify()
"""


@contextlib.contextmanager
def started(hosts: Pair, source: str, directory: Path) -> Iterator[Process]:
    """A program on the first host that is ready."""
    (directory / "own").mkdir()
    command = [sys.executable, "-c", source, str(directory / "own"), str(directory)]
    with open(directory / "stderr", "wb") as stderr:
        program = hosts.a.popen(command, pid=PID, stderr=stderr)
    wait_until(lambda: (directory / "ready").exists() or program.poll() is not None, 20, "the program is ready")
    assert program.returncode is None, (directory / "stderr").read_text()
    yield program


@pytest.mark.parametrize("source", MOVED.values(), ids=MOVED)
@pytest.mark.parametrize("moves", [0, 2], ids=["unmoved", "there-and-back"])
def test_program_goes_on_as_if_nothing_had_happened(hosts: Pair, tmp_path: Path, moves: int, source: str) -> None:
    with started(hosts, HEAD + textwrap.dedent(source) + TAIL, tmp_path) as program:
        end = program
        source_host, destination = hosts.a, hosts.b
        for _ in range(moves):
            migration = move(source_host, destination, PID)
            migration.wait_drained()
            assert migration.restore is not None
            end = migration.restore
            source_host, destination = destination, source_host
        (tmp_path / "go").touch()
        assert end.wait(20) == 0, (tmp_path / "stderr").read_text()


@pytest.mark.parametrize(("problem", "does"), REFUSED.items(), ids=list(REFUSED))
def test_what_a_thread_or_program_has_for_itself_is_refused(
    hosts: Pair, tmp_path: Path, problem: str, does: str
) -> None:
    if does.startswith("main:"):
        body = does.removeprefix("main:")
    else:
        body = (
            "done = threading.Event()\n"
            f"def body():\n    {does}\n    done.set()\n    time.sleep(60)\n"
            "threading.Thread(target=body, daemon=True).start()\ndone.wait()"
        )
    with started(hosts, f"{HEAD}{body}\nverify = lambda: None{TAIL}", tmp_path) as program:
        command = [*postcopy_command(), "dump", "--lazy-pages", "-t", str(PID)]
        result = hosts.a.run(command, timeout=20)
        assert result.returncode == 5, result.stderr.decode()

        assert re.search(problem, result.stderr.decode()), result.stderr.decode()
        (tmp_path / "go").touch()
        assert program.wait(20) == 0
