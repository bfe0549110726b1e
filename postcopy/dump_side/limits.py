"""Resource limits, which the process tells itself: prlimit(2) on a process of another user needs CAP_SYS_RESOURCE."""

import struct

from msgspec import Struct

from postcopy.kernel.batch import Answers, Batch
from postcopy.kernel.calls import call
from postcopy.kernel.pattern import Blank, Pattern
from postcopy.state import Limits

_COUNT = 16  # RLIM_NLIMITS
_RLIMIT = struct.Struct("<QQ")
_READING = Pattern()
for _number in range(_COUNT):
    _READING.add(
        call("prlimit64", 0, _number, 0, Blank(0, _number * _RLIMIT.size)), f"reading resource limit {_number}"
    )


class Question(Struct):
    """Where the answers about the limits will lie."""

    room: int

    @classmethod
    def ask(cls, batch: Batch) -> "Question":
        """Add the calls to a batch of the leader's."""
        room = batch.room(_COUNT * _RLIMIT.size)
        _READING.repeat(batch, [room], None)
        return cls(room)

    def answered(self, answers: Answers) -> Limits:
        """The limits by number."""
        return Limits(list(_RLIMIT.iter_unpack(answers.read(self.room, _COUNT * _RLIMIT.size))))
