"""How processes of ours that work together tell the one that started them why one of them failed."""

import os
import signal
from collections.abc import Callable

import msgpack

from postcopy import errors
from postcopy.errors import PostcopyError
from postcopy.kernel.poll import readable

_LIMIT = 4096  # PIPE_BUF: written whole or not at all


class Trouble:
    """Made before the processes are forked; each runs its work by `telling`."""

    def __init__(self) -> None:
        # pipe(2), "O_DIRECT": each message stays one, though several processes fail at once.
        self._read, self._write = os.pipe2(os.O_DIRECT | os.O_CLOEXEC)

    def close(self) -> None:
        """Give the descriptors back."""
        os.close(self._read)
        os.close(self._write)

    def telling(self, body: Callable[[], None]) -> Callable[[], None]:
        """A body for `roles.start` that does ``body``; an error of ours in it is told instead of logged."""

        def told() -> None:
            try:
                body()
            except PostcopyError as error:
                text = [type(error).__name__, error.message[:500], error.hint[:250]]
                os.write(self._write, msgpack.packb(text, unicode_errors="surrogateescape"))
                os._exit(error.exit_code)

        return told

    def of(self, code: int, what: str, otherwise: type[PostcopyError]) -> PostcopyError:
        """The error that was told first; where none was, that ``what`` ended with ``code`` (see `Role.wait`)."""
        if readable(self._read):
            kind, message, hint = msgpack.unpackb(os.read(self._read, _LIMIT), unicode_errors="surrogateescape")
            made: PostcopyError = getattr(errors, kind, otherwise)(message, hint)
            return made
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return otherwise(f"{what}: a process of ours {how}")
