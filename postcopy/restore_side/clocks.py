"""The clocks that must not run backwards: a time namespace where this host's would, or would jump far ahead."""

import contextlib
import os
import time

from postcopy.kernel import time_namespace
from postcopy.kernel.time_namespace import TimeNamespace
from postcopy.state import Clocks

# A program that stands still for so long need not be told.
_JUMP_NS = 1_000_000_000


class ProgramClocks:
    """How the program's clocks differ from this host's."""

    def __init__(self, wanted: Clocks) -> None:
        """``wanted``: what they show now, or did when the program was stopped."""
        here = _here()
        ahead = wanted.monotonic - here.monotonic, wanted.boottime - here.boottime
        self._ahead = (0, 0) if all(-_JUMP_NS <= each <= 0 for each in ahead) else ahead

    def namespace(self) -> contextlib.AbstractContextManager[None]:
        """Within it children are born that read the program's clocks. Raises OSError."""
        if self._ahead == (0, 0):
            return contextlib.nullcontext()
        ours = time_namespace.offsets(os.getpid())
        return TimeNamespace(ours[0] + self._ahead[0], ours[1] + self._ahead[1])

    def wait_for(self, stopped: Clocks) -> None:
        """Until they show no less than when the program was stopped: the message that told of them took its time."""
        here = _here()
        monotonic, boottime = self._ahead
        behind = max(stopped.monotonic - here.monotonic - monotonic, stopped.boottime - here.boottime - boottime)
        if behind > 0:
            time.sleep(min(behind, _JUMP_NS) / 1e9)


def _here() -> Clocks:
    return Clocks(time.clock_gettime_ns(time.CLOCK_MONOTONIC), time.clock_gettime_ns(time.CLOCK_BOOTTIME))
