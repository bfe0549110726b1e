"""A time limit on a piece of work that may block in the kernel: SIGALRM ends it with an error of ours."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from postcopy.errors import PostcopyError


class Interrupted(PostcopyError):
    """The user, or a service manager, asked for the end by a signal."""

    exit_code = 130


class TookTooLong(PostcopyError):
    """The time limit from freeze to commit has passed."""

    exit_code = 11


@contextlib.contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """Raise TookTooLong out of whatever blocks inside when ``seconds`` have passed."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TookTooLong(f"{what} took longer than {seconds:g} s", "allow more with --timeout")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def end_on_signals() -> None:
    """Let SIGTERM and SIGINT end the work in order, by an error that undoes what has been done."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"ended by {signal.Signals(number).name}")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)


def disregard_signals() -> None:
    """What was asked for has been done; a signal that comes, or was held back, no longer makes a failure of it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold signals back while a step must be done whole or not at all."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
