"""Resource limits, which the process tells itself: prlimit(2) on a process of another user needs CAP_SYS_RESOURCE."""

import struct

from msgspec import Struct

from postcopy.kernel.batch import Answers, Batch
from postcopy.kernel.calls import call
from postcopy.state import Limits

_COUNT = 16  # RLIM_NLIMITS
_RLIMIT = struct.Struct("<QQ")


class Question(Struct):
    """Where the answers about the limits will lie."""

    rooms: list[int]

    @classmethod
    def ask(cls, batch: Batch) -> "Question":
        """Add the calls to a batch of the leader's."""
        rooms = [batch.room(_RLIMIT.size) for _ in range(_COUNT)]
        for number, room in enumerate(rooms):
            batch.add(call("prlimit64", 0, number, 0, room), f"reading resource limit {number}")
        return cls(rooms)

    def answered(self, answers: Answers) -> Limits:
        """The limits by number."""
        return Limits([_RLIMIT.unpack(answers.read(room, _RLIMIT.size)) for room in self.rooms])
