"""What the process is to the kernel and to others: names, credentials, limits, directories, scheduling."""

import contextlib
import ctypes
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

from tests.programs.cases import (
    Case,
    Snapshot,
    ThreadCase,
    Unsupported,
    differences,
    libc,
    proc_status,
    required,
    syscall,
    unlike,
)

SYS_SETRESUID, SYS_PERSONALITY, SYS_CAPGET, SYS_CAPSET = 117, 135, 125, 126
PR_SET_DUMPABLE, PR_GET_DUMPABLE = 4, 3
PR_CAPBSET_READ, PR_CAPBSET_DROP = 23, 24
PR_GET_SECUREBITS, PR_SET_SECUREBITS = 27, 28
PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS = 38, 39
ADDR_NO_RANDOMIZE, STICKY_TIMEOUTS = 0x0040000, 0x4000000
CAP_SYS_PACCT, CAP_SYS_MODULE, CAP_WAKE_ALARM = 20, 16, 35
LINUX_CAPABILITY_VERSION_3 = 0x20080522
SECBIT_NO_SETUID_FIXUP = 1 << 2


def prctl(option: int, *arguments: int) -> int:
    """prctl(2); raises OSError."""
    padded = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    result: int = libc.prctl(option, *padded)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}, {arguments}): {os.strerror(number)}")
    return result


class ProcessIds(Snapshot):
    """PID, process group and session."""

    def take(self) -> dict[str, object]:
        """As system calls say them."""
        return {"pid": os.getpid(), "pgid": os.getpgid(0), "sid": os.getsid(0), "main tid": threading.get_native_id()}


class CommandLine(Snapshot):
    """The command line and the environment as /proc shows them."""

    def take(self) -> dict[str, object]:
        """Both files."""
        with open("/proc/self/cmdline", "rb") as cmdline, open("/proc/self/environ", "rb") as environ:
            return {"cmdline": cmdline.read(), "environ": environ.read()}


class Comm(Snapshot):
    """The name of the main thread."""

    def arrange(self) -> None:
        """Another than that of the program."""
        with open("/proc/self/comm", "w") as comm:
            comm.write("moving states")

    def take(self) -> dict[str, object]:
        """The name."""
        with open("/proc/self/comm") as comm:
            return {"comm": comm.read()}


class Executable(Snapshot):
    """/proc/self/exe."""

    def take(self) -> dict[str, object]:
        """The link, and the file behind it."""
        status = os.stat("/proc/self/exe")
        return {"exe": os.readlink("/proc/self/exe"), "file": (status.st_dev, status.st_ino)}


class Directories(Snapshot):
    """The working directory, the root and the umask."""

    def arrange(self) -> None:
        """Others than the defaults."""
        where = self.directory / "working directory"
        where.mkdir()
        os.chdir(where)
        os.umask(0o137)

    def take(self) -> dict[str, object]:
        """As /proc says it."""
        links = {link: os.readlink(f"/proc/self/{link}") for link in ("cwd", "root")}
        return {**links, **proc_status("Umask"), "getcwd": os.getcwd()}


class Limits(Snapshot):
    """All sixteen resource limits."""

    def arrange(self) -> None:
        """Lower some, soft and hard."""
        resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 1500))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 4096))
        resource.setrlimit(resource.RLIMIT_CPU, (100_000, 200_000))
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, (1000, 2000))

    def take(self) -> dict[str, object]:
        """Every limit."""
        return {str(number): resource.prlimit(0, number) for number in range(16)}


class Niceness(Snapshot):
    """Nice value, policy and affinity of the main thread."""

    def arrange(self) -> None:
        """A little nicer than the default."""
        os.setpriority(os.PRIO_PROCESS, 0, 3)

    def take(self) -> dict[str, object]:
        """As the kernel says it."""
        return {
            "nice": os.getpriority(os.PRIO_PROCESS, 0),
            "policy": os.sched_getscheduler(0),
            "affinity": os.sched_getaffinity(0),
        }


class Credentials(Snapshot):
    """User and group IDs, each of the four different; supplementary groups; capability sets and securebits.

    Set up before there are threads: to the kernel, credentials belong to a thread.
    """

    def arrange(self) -> None:
        """Effective root, so that the other cases can go on; all else unusual."""
        prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP)
        prctl(PR_CAPBSET_DROP, CAP_SYS_MODULE)
        os.setgroups([7, 4242, 100_000])
        os.setresgid(1001, 1002, 1003)
        os.setresuid(1001, 0, 1003)
        self.drop_capabilities()

    def drop_capabilities(self) -> None:
        """One capability leaves all sets, one the effective set only, one becomes inheritable."""
        header = (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0)
        data = (ctypes.c_uint32 * 6)()
        addresses = (ctypes.addressof(header), ctypes.addressof(data))
        required(syscall(SYS_CAPGET, *addresses), "capget")
        # Three words (effective, permitted, inheritable) for capabilities 0 to 31, then three for 32 and up.
        gone, idle = 1 << CAP_SYS_MODULE, 1 << CAP_SYS_PACCT
        data[0] &= ~(gone | idle) & 0xFFFFFFFF
        data[1] &= ~gone & 0xFFFFFFFF
        data[5] |= 1 << (CAP_WAKE_ALARM - 32) & data[4]
        required(syscall(SYS_CAPSET, *addresses), "capset")

    def take(self) -> dict[str, Any]:
        """From /proc and prctl."""
        fields = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
        return {**proc_status(*fields), "securebits": prctl(PR_GET_SECUREBITS)}


class Unprivileged(Snapshot):
    """An ordinary user without any capability, as a service runs; dumpable, as every program is that was started so."""

    user: ClassVar[int]

    def arrange(self) -> None:
        """Leave root for good."""
        os.setgroups([self.user])
        os.setresgid(self.user, self.user, self.user)
        os.setresuid(self.user, self.user, self.user)
        prctl(PR_SET_DUMPABLE, 1)

    def take(self) -> dict[str, Any]:
        """From /proc and prctl; and that root's files are closed to it."""
        fields = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
        return {
            **proc_status(*fields),
            "dumpable": prctl(PR_GET_DUMPABLE),
            "may read /etc/shadow": os.access("/etc/shadow", os.R_OK),
            "may make itself root": self.may_become_root(),
        }

    def may_become_root(self) -> bool:
        """Whether setresuid(2) to 0 is allowed: the raw call, since the C library's interrupts every thread."""
        return syscall(SYS_SETRESUID, 0, 0, 0) == 0


class Dumpable(Snapshot):
    """Not dumpable, which keeps other users out of /proc/PID and out of ptrace."""

    def arrange(self) -> None:
        """Other than the default."""
        prctl(PR_SET_DUMPABLE, 0)

    def take(self) -> dict[str, object]:
        """As prctl says it."""
        return {"dumpable": prctl(PR_GET_DUMPABLE)}


class NoNewPrivileges(Snapshot):
    """no_new_privs, set in all threads since it is set before there are any."""

    def arrange(self) -> None:
        """Set it."""
        prctl(PR_SET_NO_NEW_PRIVS, 1)

    def take(self) -> dict[str, object]:
        """As prctl says it."""
        return {"no_new_privs": prctl(PR_GET_NO_NEW_PRIVS)}


class Personality(Snapshot):
    """The execution domain: two flags that change nothing for a program that runs already."""

    def arrange(self) -> None:
        """Set them."""
        required(syscall(SYS_PERSONALITY, ADDR_NO_RANDOMIZE | STICKY_TIMEOUTS), "personality")

    def take(self) -> dict[str, object]:
        """The flags."""
        return {"personality": syscall(SYS_PERSONALITY, 0xFFFFFFFF)}


class Clocks(Case):
    """The monotonic clock goes forward, through the vdso and through the system call, at the same pace."""

    SYS_CLOCK_GETTIME = 228

    def setup(self) -> None:
        """Read it."""
        self.before = time.monotonic_ns()

    def verify(self) -> str | None:
        """Read it both ways."""
        where = (ctypes.c_long * 2)()
        through_vdso = time.monotonic_ns()
        required(syscall(self.SYS_CLOCK_GETTIME, time.CLOCK_MONOTONIC, ctypes.addressof(where)), "clock_gettime")
        through_call = where[0] * 1_000_000_000 + where[1]
        if not self.before <= through_vdso <= through_call <= through_vdso + 1_000_000_000:
            return f"{self.before}, {through_vdso} (vdso) and {through_call} (call) are out of order"
        return None


class Subprocess(Case):
    """fork(2), exec and wait work."""

    def setup(self) -> None:
        """Nothing."""

    def verify(self) -> str | None:
        """Run a program."""
        child = os.posix_spawn(sys.executable, [sys.executable, "-I", "-S", "-c", "raise SystemExit(7)"], {})
        _, status = os.waitpid(child, 0)
        return unlike("exit status of a child", 7, os.waitstatus_to_exitcode(status))


class Attributes(Snapshot):
    """What prctl(2), membarrier(2), ioprio_set(2) and files of /proc set of a process: each other than the default."""

    SYS_IOPRIO_SET, SYS_IOPRIO_GET, SYS_MEMBARRIER = 251, 252, 324
    PR_SET_TIMERSLACK, PR_GET_TIMERSLACK, PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 29, 30, 36, 37
    REGISTER_PRIVATE_EXPEDITED, REGISTER_GLOBAL_EXPEDITED, GET_REGISTRATIONS = 1 << 4, 1 << 2, 1 << 9
    FILES: ClassVar = {"oom_score_adj": "321", "coredump_filter": "0x5d", "loginuid": "4321"}

    def arrange(self) -> None:
        """Set them; what this kernel or user may not is left alone."""
        for name, value in self.FILES.items():
            with contextlib.suppress(OSError):
                Path(f"/proc/self/{name}").write_text(value)
        prctl(self.PR_SET_TIMERSLACK, 123_456)
        prctl(self.PR_SET_CHILD_SUBREAPER, 1)
        syscall(self.SYS_IOPRIO_SET, 1, 0, 2 << 13 | 6)
        for command in (self.REGISTER_PRIVATE_EXPEDITED, self.REGISTER_GLOBAL_EXPEDITED):
            syscall(self.SYS_MEMBARRIER, command, 0, 0)

    def take(self) -> dict[str, object]:
        """All of them."""
        subreaper = ctypes.c_int()
        prctl(self.PR_GET_CHILD_SUBREAPER, ctypes.addressof(subreaper))
        files = {name: Path(f"/proc/self/{name}") for name in self.FILES}
        return {
            **{name: path.read_text() for name, path in files.items() if path.exists()},
            "timer slack": prctl(self.PR_GET_TIMERSLACK),
            "subreaper": subreaper.value,
            "I/O priority": syscall(self.SYS_IOPRIO_GET, 1, 0),
            "membarrier": syscall(self.SYS_MEMBARRIER, self.GET_REGISTRATIONS, 0, 0),
        }


class NoHugePages(Snapshot):
    """Transparent huge pages switched off for the whole process."""

    PR_SET_THP_DISABLE, PR_GET_THP_DISABLE = 41, 42

    def arrange(self) -> None:
        """Switch them off."""
        prctl(self.PR_SET_THP_DISABLE, 1)

    def take(self) -> dict[str, object]:
        """As prctl says it."""
        return {"THP": prctl(self.PR_GET_THP_DISABLE)}


class ThreadCredentials(ThreadCase):
    """Credentials of one thread alone, with an ambient capability and securebits that keep capabilities."""

    SYS_SETRESGID, SYS_SETGROUPS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 119, 116, 47, 2
    SECBIT_KEEP_CAPS = 1 << 4
    FIELDS = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")

    def prepare(self) -> None:
        """By the raw calls, which change just the caller."""
        header = (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0)
        data = (ctypes.c_uint32 * 6)()
        addresses = (ctypes.addressof(header), ctypes.addressof(data))
        required(syscall(SYS_CAPGET, *addresses), "capget")
        data[2] |= 1 << CAP_SYS_PACCT & data[1]
        required(syscall(SYS_CAPSET, *addresses), "capset")
        prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP | self.SECBIT_KEEP_CAPS)
        groups = (ctypes.c_uint32 * 2)(77, 78)
        required(syscall(self.SYS_SETGROUPS, 2, ctypes.addressof(groups)), "setgroups")
        required(syscall(self.SYS_SETRESGID, 2004, 2005, 2006), "setresgid")
        required(syscall(SYS_SETRESUID, 2001, 2002, 2003), "setresuid")
        prctl(self.PR_CAP_AMBIENT, self.PR_CAP_AMBIENT_RAISE, CAP_SYS_PACCT)
        self.before = self.take()

    def take(self) -> dict[str, object]:
        """Of the calling thread."""
        own: dict[str, object] = dict(proc_status(*self.FIELDS, task=str(threading.get_native_id())))
        return own | {"securebits": prctl(PR_GET_SECUREBITS), "keepcaps": prctl(7)}

    def check(self) -> str | None:
        """The same, and unlike those of the process."""
        process = proc_status(*self.FIELDS)
        if process == {field: self.before[field] for field in self.FIELDS}:
            return "they were those of the process"
        return differences(self.before, self.take())


class ParentDeathSignal(Snapshot):
    """The signal for the death of the parent: none."""

    PR_GET_PDEATHSIG = 2

    def take(self) -> dict[str, object]:
        """As prctl says it."""
        where = ctypes.c_int()
        if libc.prctl(self.PR_GET_PDEATHSIG, ctypes.byref(where), 0, 0, 0):
            raise Unsupported("PR_GET_PDEATHSIG")
        return {"signal": where.value, "SIGCHLD pending": signal.SIGCHLD in signal.sigpending()}
