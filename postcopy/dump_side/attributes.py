"""Single values of a process: prctl(2) settings, personality(2), and files of ``/proc/PID``."""

from msgspec import Struct

from postcopy.kernel import membarrier, procfs
from postcopy.kernel.batch import Answers, Batch
from postcopy.kernel.calls import call
from postcopy.kernel.prctl import (
    PR_GET_CHILD_SUBREAPER,
    PR_GET_DUMPABLE,
    PR_GET_MEMORY_MERGE,
    PR_GET_THP_DISABLE,
)
from postcopy.state import Attributes

NO_LOGIN = 0xFFFF_FFFF


class Seen(Struct, frozen=True):
    """What files of ``/proc`` tell."""

    personality: int
    oom_score_adj: int
    coredump_filter: int
    login_uid: int


def see(pid: int) -> Seen:
    """That of a process. Raises OSError."""
    return Seen(
        personality=int(procfs.read(pid, "personality"), 16),
        oom_score_adj=int(procfs.read(pid, "oom_score_adj")),
        coredump_filter=int(procfs.read(pid, "coredump_filter") or b"0", 16),
        login_uid=_login_uid(pid),
    )


class Question(Struct):
    """Which calls of the batch tell what."""

    dumpable: int
    thp_disable: int
    subreaper: int
    membarrier: int
    memory_merge: int

    @classmethod
    def ask(cls, batch: Batch) -> "Question":
        """Add the calls to a batch of the leader's."""
        subreaper = batch.room(4)
        batch.add(call("prctl", PR_GET_CHILD_SUBREAPER, subreaper), "reading the child-subreaper attribute")
        return cls(
            dumpable=batch.add(call("prctl", PR_GET_DUMPABLE), "reading the dumpable attribute"),
            thp_disable=batch.add(call("prctl", PR_GET_THP_DISABLE, 0, 0, 0, 0), "reading the THP attribute"),
            subreaper=subreaper,
            # Without a purpose: kernels that lack them refuse.
            membarrier=batch.add(call("membarrier", membarrier.GET_REGISTRATIONS, 0, 0)),
            memory_merge=batch.add(call("prctl", PR_GET_MEMORY_MERGE, 0, 0, 0, 0)),
        )

    def answered(self, answers: Answers, seen: Seen) -> Attributes:
        """The attributes of the frozen process."""
        registered = answers.value(self.membarrier)
        return Attributes(
            dumpable=answers.value(self.dumpable),
            thp_disable=answers.value(self.thp_disable),
            child_subreaper=any(answers.read(self.subreaper, 4)),
            personality=seen.personality,
            oom_score_adj=seen.oom_score_adj,
            coredump_filter=seen.coredump_filter,
            login_uid=seen.login_uid,
            # Where the kernel does not tell: to be registered without need costs next to nothing.
            membarrier=registered & membarrier.ALL_REGISTRATIONS if registered >= 0 else membarrier.ALL_REGISTRATIONS,
            memory_merge=answers.value(self.memory_merge) == 1,
        )


def _login_uid(pid: int) -> int:
    try:
        return int(procfs.read(pid, "loginuid"))
    except FileNotFoundError:
        return NO_LOGIN  # a kernel without CONFIG_AUDIT
