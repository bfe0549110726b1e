"""Calls with blanks, and what a batch of calls says of those that were refused."""

import errno
import struct

import pytest

from postcopy.kernel.batch import RECORD_SIZE, Answers, Batch
from postcopy.kernel.calls import call
from postcopy.kernel.pattern import Blank, Pattern

BASE = 1 << 40


def batch() -> Batch:
    """An empty one."""
    return Batch(BASE, 1 << 16)


def answers(of: Batch, *results: int) -> Answers:
    """What it gives back if these are the results."""
    records, top = of.image()
    changed = bytearray(records[: RECORD_SIZE * len(of)])
    for number, result in enumerate(results):
        struct.pack_into("=q", changed, RECORD_SIZE * number + 56, result)
    return Answers.of(of, bytes(changed), top)


def test_blanks_are_filled_in() -> None:
    pattern = Pattern()
    pattern.add(call("bind", 5, Blank(0), 16), "binding {}")
    pattern.add(call("connect", 5, Blank(0, 16), Blank(1)), "connecting {}")
    pattern.add(call("dup3", 5, Blank(2), 0), "placing {}")
    made, wanted = batch(), batch()
    for first, words in ((100, (1000, 16, 7)), (200, (2000, 28, 8))):
        pattern.repeat(made, words, first)
        wanted.add(call("bind", 5, words[0], 16))
        wanted.add(call("connect", 5, words[0] + 16, words[1]))
        wanted.add(call("dup3", 5, words[2], 0))
    assert made.image() == wanted.image()
    assert len(made) == len(wanted) == 6


def test_refusals_name_whom_a_call_was_repeated_for() -> None:
    pattern, made = Pattern(), batch()
    pattern.add(call("bind", 5, Blank(0), 16), "binding {}")
    pattern.add(call("close", 5), "closing {}")
    made.add(call("getpid"))
    for name in ("one", "two"):
        pattern.repeat(made, (64,), name)
    made.add(call("close", 9), "closing the last")
    assert not list(answers(made, -errno.EPERM, 0, 0, 0, 0, 0).refusals())
    found = list(answers(made, 0, 0, -errno.EBADF, -errno.EINVAL, 0, -errno.EIO).refusals())
    assert [(each.name, purpose, number) for each, purpose, number in found] == [
        ("close", "closing one", errno.EBADF),
        ("bind", "binding two", errno.EINVAL),
        ("close", "closing the last", errno.EIO),
    ]
    assert found[1][0].arguments[:3] == (5, 64, 16)


def test_a_call_that_must_take_all_and_takes_less_is_refused() -> None:
    pattern, made = Pattern(), batch()
    pattern.add(call("close", 4), "closing {}")
    pattern.add(call("sendto", 5, Blank(0), Blank(1), 0, 0, 0), "filling {}")
    pattern.must_take(Blank(1))
    made.add(call("getpid"))
    pattern.repeat(made, (64, 100), "one")
    assert not list(answers(made, 1, 0, 100).refusals())
    found = [(purpose, number) for _, purpose, number in answers(made, 1, 0, 99).refusals()]
    assert found == [("filling one, which took 99 bytes and no more", errno.EIO)]


def test_blanks_cannot_be_calculated_with() -> None:
    with pytest.raises(TypeError):
        call("lseek", 3, Blank(0), -1)
