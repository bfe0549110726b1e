"""Single values of a process: prctl(2) settings, personality(2), and files of ``/proc/PID``."""

from dataclasses import dataclass

from postcopy.kernel import procfs
from postcopy.kernel.calls import call
from postcopy.kernel.executor import Answers, Batch
from postcopy.kernel.prctl import (
    PR_GET_CHILD_SUBREAPER,
    PR_GET_DUMPABLE,
    PR_GET_THP_DISABLE,
)
from postcopy.state import Attributes


@dataclass
class Question:
    """Which calls of the batch tell what."""

    dumpable: int
    thp_disable: int
    subreaper: int

    @classmethod
    def ask(cls, batch: Batch) -> "Question":
        """Add the calls to a batch of the leader's."""
        subreaper = batch.room(4)
        batch.add(call("prctl", PR_GET_CHILD_SUBREAPER, subreaper), "reading the child-subreaper attribute")
        return cls(
            dumpable=batch.add(call("prctl", PR_GET_DUMPABLE), "reading the dumpable attribute"),
            thp_disable=batch.add(call("prctl", PR_GET_THP_DISABLE, 0, 0, 0, 0), "reading the THP attribute"),
            subreaper=subreaper,
        )

    def answered(self, answers: Answers, pid: int) -> Attributes:
        """The attributes of the frozen process ``pid``."""
        return Attributes(
            dumpable=answers.value(self.dumpable),
            thp_disable=answers.value(self.thp_disable),
            child_subreaper=any(answers.read(self.subreaper, 4)),
            personality=int(procfs.read(pid, "personality"), 16),
            oom_score_adj=int(procfs.read(pid, "oom_score_adj")),
            coredump_filter=int(procfs.read(pid, "coredump_filter") or b"0", 16),
        )
