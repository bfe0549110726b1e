"""System calls by name, to be made by another task: the numbers of x86-64 (``arch/x86/entry/syscalls``)."""

from dataclasses import dataclass

NUMBERS = {
    "read": 0,
    "write": 1,
    "close": 3,
    "poll": 7,
    "lseek": 8,
    "mmap": 9,
    "mprotect": 10,
    "munmap": 11,
    "brk": 12,
    "rt_sigaction": 13,
    "rt_sigprocmask": 14,
    "mremap": 25,
    "madvise": 28,
    "shmget": 29,
    "shmat": 30,
    "shmctl": 31,
    "nanosleep": 35,
    "getitimer": 36,
    "setitimer": 38,
    "wait4": 61,
    "semop": 65,
    "shmdt": 67,
    "fcntl": 72,
    "chdir": 80,
    "umask": 95,
    "ptrace": 101,
    "mlockall": 151,
    "setpgid": 109,
    "setsid": 112,
    "setgroups": 116,
    "setresuid": 117,
    "setresgid": 119,
    "setfsuid": 122,
    "setfsgid": 123,
    "capset": 126,
    "rt_sigqueueinfo": 129,
    "sigaltstack": 131,
    "rt_sigtimedwait": 128,
    "personality": 135,
    "setpriority": 141,
    "mlock2": 325,
    "futex": 202,
    "sched_setaffinity": 203,
    "prctl": 157,
    "arch_prctl": 158,
    "chroot": 161,
    "set_tid_address": 218,
    "restart_syscall": 219,
    "timer_create": 222,
    "timer_settime": 223,
    "timer_gettime": 224,
    "timer_delete": 226,
    "clock_gettime": 228,
    "clock_nanosleep": 230,
    "exit_group": 231,
    "tgkill": 234,
    "semtimedop": 220,
    "waitid": 247,
    "openat": 257,
    "unshare": 272,
    "set_robust_list": 273,
    "get_robust_list": 274,
    "dup3": 292,
    "pipe2": 293,
    "rt_tgsigqueueinfo": 297,
    "prlimit64": 302,
    "setns": 308,
    "process_vm_readv": 310,
    "kcmp": 312,
    "seccomp": 317,
    "sched_setattr": 314,
    "membarrier": 324,
    "sched_getattr": 315,
    "renameat2": 316,
    "execveat": 322,
    "userfaultfd": 323,
    "rseq": 334,
    "pidfd_open": 434,
    "clone3": 435,
    "close_range": 436,
    "pidfd_getfd": 438,
    "ioprio_set": 251,
    "ioprio_get": 252,
}


@dataclass(frozen=True, slots=True)
class Call:
    """One system call: its name, its number and up to six integer arguments."""

    name: str
    number: int
    arguments: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(hex(a) if a > 4096 else str(a) for a in self.arguments)})"


def call(name: str, *arguments: int) -> Call:
    """The system call ``name`` with ``arguments``; negative ones are passed as 64-bit two's complement."""
    return Call(name, NUMBERS[name], tuple([a & 0xFFFF_FFFF_FFFF_FFFF for a in arguments]))
