"""One exception tree: what failed, why, and what to do about it.

Every error a user can cause or meet is a `PostcopyError`; the command line prints it without a traceback and ends
with its exit code.
"""


class PostcopyError(Exception):
    """Something failed in a way that can be told: ``message`` says what and where, ``hint`` what to do."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(PostcopyError):
    """The command line asks for something that cannot be."""

    exit_code = 2


class DumpError(PostcopyError):
    """The source failed before commit; the program runs on there."""

    exit_code = 3


class RestoreError(PostcopyError):
    """The destination failed before commit; nothing is left there and the program runs on at the source."""

    exit_code = 4


class ProblemsError(PostcopyError):
    """The survey or the destination found what cannot be moved; nothing was frozen."""

    exit_code = 5

    def __init__(self, problems: list[str], where: str) -> None:
        super().__init__(f"{where}: " + "; ".join(problems))
        self.problems = problems
        self.where = where


class ProtocolError(PostcopyError):
    """The other side sent what the protocol does not allow, or is of another version."""

    exit_code = 6


class ConnectionLost(PostcopyError):
    """The other side is gone."""

    exit_code = 7


class LostAfterCommit(PostcopyError):
    """The migration failed after commit: the program may run nowhere, but never twice."""

    exit_code = 8


class CannotRun(PostcopyError):
    """This host or this user lacks what the command needs."""

    exit_code = 9


class CheckpointError(PostcopyError):
    """A checkpoint directory is damaged, incomplete, not this user's, or not for this host; nothing was made of it."""

    exit_code = 12
