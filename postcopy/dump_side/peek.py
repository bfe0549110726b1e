"""Looking into what can only be read by taking it out: by a process of its own, which puts it in again."""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import msgpack

from postcopy import roles
from postcopy.deadline import uninterrupted


def in_peace(look: Callable[[], object], keep: Sequence[int]) -> Any:
    """What ``look`` finds, in a process that has the descriptors ``keep`` and ends in peace when we are killed: what it
    takes out, it is to put in again. As msgpack carries it; None where it has failed."""
    reading, writing = os.pipe()

    def body() -> None:
        found = look()
        with contextlib.suppress(BrokenPipeError), open(writing, "wb") as stream:
            stream.write(msgpack.packb(found))

    # The tree must not run while it is at it.
    with uninterrupted():
        looker = roles.start("postcopy-peek", body, dies_with_parent=False, keep=[*keep, writing])
        os.close(writing)
        with open(reading, "rb") as stream:
            packed = stream.read()
        failed = looker.wait()
    return None if failed or not packed else msgpack.unpackb(packed)
