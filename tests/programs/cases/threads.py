"""Threads: their number, names, local storage, stacks, and what the kernel keeps for each."""

import ctypes
import os
import threading

from tests.programs.cases import (
    Case,
    ThreadCase,
    Unsupported,
    differences,
    first_problem,
    libc,
    proc_status,
    required,
    syscall,
    unlike,
)

SYS_GETTID, SYS_GETCPU, SYS_GET_ROBUST_LIST, SYS_RSEQ = 186, 309, 274, 334
PR_GET_TID_ADDRESS = 40
RSEQ_SIGNATURE = 0x53053053
EBUSY = 16

libc.pthread_self.restype = ctypes.c_ulong


class Threads(Case):
    """Two hundred threads, each with its name, its thread-local value and its identity."""

    COUNT = 200

    def setup(self) -> None:
        """Start them and wait until each has made its state."""
        self.local = threading.local()
        self.asked = threading.Event()
        self.problems: dict[int, str | None] = {}
        started = threading.Barrier(self.COUNT + 1)
        previous = threading.stack_size(256 * 1024)
        self.threads = [
            threading.Thread(target=self.live, args=(number, started), daemon=True) for number in range(self.COUNT)
        ]
        for thread in self.threads:
            thread.start()
        threading.stack_size(previous)
        started.wait()

    def live(self, number: int, started: threading.Barrier) -> None:
        """One thread."""
        with open(f"/proc/self/task/{threading.get_native_id()}/comm", "w") as comm:
            comm.write(f"case-{number}")
        self.local.value = os.urandom(16)
        before = (self.local.value, self.identity())
        started.wait()
        self.asked.wait()
        after = (self.local.value, self.identity())
        self.problems[number] = unlike(f"thread {number}", before, after)

    def identity(self) -> tuple[str, int, int]:
        """The name, the TID and the thread pointer of the calling thread."""
        tid = syscall(SYS_GETTID)
        with open(f"/proc/self/task/{tid}/comm") as comm:
            return comm.read(), tid, libc.pthread_self()

    def verify(self) -> str | None:
        """Every thread must answer, and find itself unchanged."""
        alive = len(os.listdir("/proc/self/task"))
        self.asked.set()
        for thread in self.threads:
            thread.join(10)
        silent = self.COUNT - len(self.problems)
        if silent:
            return f"{silent} of {self.COUNT} threads gave no answer ({alive} tasks in /proc)"
        return first_problem(*self.problems.values())


class NewThreads(Case):
    """The process can still start and join threads: stacks, guard pages and TIDs are free as the C library thinks."""

    def setup(self) -> None:
        """Leave stacks in the C library's cache."""
        self.start_and_join()

    def start_and_join(self) -> int:
        """Start eight threads and join them."""
        answers: list[int] = []
        threads = [threading.Thread(target=lambda: answers.append(syscall(SYS_GETTID))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        return len(answers)

    def verify(self) -> str | None:
        """Once more."""
        return unlike("threads that ran", 8, self.start_and_join())


class TidAddress(ThreadCase):
    """Where the kernel clears the TID at a thread's end, which pthread_join waits for."""

    def prepare(self) -> None:
        """Remember the address."""
        self.before = self.address()

    def address(self) -> int:
        """The clear_child_tid address of the calling thread."""
        where = ctypes.c_ulong()
        if libc.prctl(PR_GET_TID_ADDRESS, ctypes.byref(where), 0, 0, 0):
            raise Unsupported("PR_GET_TID_ADDRESS")
        return where.value

    def check(self) -> str | None:
        """The same address."""
        return unlike("clear_child_tid", hex(self.before), hex(self.address()))


class RobustList(ThreadCase):
    """The list of robust mutexes that the kernel walks at a thread's end."""

    def prepare(self) -> None:
        """Remember head and length."""
        self.before = self.registered()

    def registered(self) -> tuple[int, int]:
        """Head and length of the calling thread's list."""
        head, length = ctypes.c_ulong(), ctypes.c_ulong()
        required(syscall(SYS_GET_ROBUST_LIST, 0, ctypes.addressof(head), ctypes.addressof(length)), "get_robust_list")
        return head.value, length.value

    def check(self) -> str | None:
        """The same."""
        return unlike("robust list", self.before, self.registered())


class RestartableSequences(ThreadCase):
    """The rseq area is registered: the kernel refuses to register it twice, and keeps its CPU number true."""

    def prepare(self) -> None:
        """Find the area that the C library registered."""
        try:
            offset = ctypes.c_ssize_t.in_dll(libc, "__rseq_offset").value
            size = ctypes.c_uint.in_dll(libc, "__rseq_size").value
        except ValueError as error:
            raise Unsupported("a C library without rseq") from error
        if not size:
            raise Unsupported("rseq is switched off")
        self.area = libc.pthread_self() + offset
        if problem := self.check():
            raise Unsupported(problem)

    def check(self) -> str | None:
        """Registered, and in use."""
        result = syscall(SYS_RSEQ, self.area, 32, 0, RSEQ_SIGNATURE)
        if result != -EBUSY:
            return f"registering the rseq area again gave {result}, not EBUSY"
        for cpu in os.sched_getaffinity(0):
            os.sched_setaffinity(0, {cpu})
            # cpu_id is the second word of struct rseq.
            shown = ctypes.c_uint.from_address(self.area + 4).value
            if shown != cpu:
                return f"rseq says CPU {shown} on CPU {cpu}"
        return None


class Scheduling(ThreadCase):
    """Nice value, affinity, policy and priority of a thread, other than those of the process."""

    def prepare(self) -> None:
        """Change all of them for this thread alone."""
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cpus[-1:])
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, 0, 7)
        self.before = self.take()

    def take(self) -> dict[str, object]:
        """As the kernel says it now."""
        return {
            "affinity": os.sched_getaffinity(0),
            "policy": os.sched_getscheduler(0),
            "priority": os.sched_getparam(0).sched_priority,
            "nice": os.getpriority(os.PRIO_PROCESS, 0),
        }

    def check(self) -> str | None:
        """The same."""
        return differences(self.before, self.take())


class RealTimeScheduling(Scheduling):
    """A real-time policy, with the flag that children do not get it."""

    def prepare(self) -> None:
        """Become a SCHED_RR thread."""
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(3))
        self.before = self.take()


class ThreadCapabilities(ThreadCase):
    """The credentials of a thread are as those of the process."""

    FIELDS = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "SigBlk")

    def prepare(self) -> None:
        """Remember."""
        self.before = proc_status(*self.FIELDS, task=str(threading.get_native_id()))

    def check(self) -> str | None:
        """The same."""
        return differences(dict(self.before), dict(proc_status(*self.FIELDS, task=str(threading.get_native_id()))))
