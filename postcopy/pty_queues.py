"""What is in a pseudoterminal: taken out of the line discipline, and put in as it was (pty(7), termios(3), n_tty.c).

The kernel shows none of it, so whoever looks takes it out. Both functions want everybody else who has the terminal to
be stopped, packet mode off, and ``slave`` to be a description of their own that does not block.
"""

import fcntl
import os
import select
import struct
import termios
import time
from collections.abc import Iterator

from postcopy.kernel import pty
from postcopy.open_kinds import PtyContent

#: As many bytes can be typed, and not read (N_TTY_BUF_SIZE, less one).
MOST_TYPED = 4095
#: As many can be written, and not read, and a little more (tty_buffer_set_limit in pty.c).
MOST_OUTPUT = 32768
NOT_STOPPED, STOPPED_BY_KEY, STOPPED_BY_CALL = 0, 1, 2

_LFLAG, _CC = 12, 17  # where they are in struct termios2
_VSTOP, _VEOL, _VLNEXT, _VEOL2, _VEOF, _VMIN = 9, 11, 15, 16, 4, 6
_EXTPROC = 0o200000
_STOP_KEY, _NEWLINE = 0x13, 10
_MUCH = 65536
# The kernel's buffers grow by 256 bytes while their sum is below a limit, the last one to this (TTY_BUFFER_PAGE): only
# in such pieces does it take as much again as it gave out.
_PIECE, _LAST_PIECE = 256, 1792
_WAIT = 0.0002  # seconds between two tries, while the kernel moves what was written
_TRIES = 20_000
_LOOK = 0.001  # seconds; the kernel takes microseconds, and does it in one go


def is_canonical(settings: bytes) -> bool:
    """Whether the terminal collects lines."""
    (lflag,) = struct.unpack_from("<I", settings, _LFLAG)
    return bool(lflag & termios.ICANON) and not lflag & _EXTPROC


def is_ready(fd: int, events: int) -> bool:
    """Whether poll(2) tells of one of the events now."""
    poll = select.poll()
    poll.register(fd, events)
    return any(found & events for _, found in poll.poll(0))


def typed(slave: int) -> int:
    """How many bytes can be read, once the kernel has looked at all that it will look at before any are."""
    # poll(2) waits for that only where nothing can be read.
    is_ready(slave, select.POLLIN)
    found, before = pty.unread(slave), -1
    while found != before:
        time.sleep(_LOOK if found else 0)
        found, before = pty.unread(slave), found
    return found


def take(master: int, slave: int, settings: bytes) -> PtyContent:
    """Take out what is in it, and let it run if it was stopped; `put` is then to be called. Raises OSError."""
    output = _drain(master)
    stopped = NOT_STOPPED
    typed, lines = b"", []
    if not is_ready(slave, select.POLLOUT):
        stopped = STOPPED_BY_KEY
        _start(master, settings)
        if not is_ready(slave, select.POLLOUT):
            stopped = STOPPED_BY_CALL
            fcntl.ioctl(slave, termios.TCXONC, termios.TCOON)
            _start(master, settings)
    if is_canonical(settings):
        lines = list(_lines(slave))
        keys = _keys(settings)
        fcntl.ioctl(master, pty.TCSETS2, _plain(settings, oflag=True))
        # It ends the line that is being typed, without being read itself.
        _type(slave, bytes([keys.end]))
        if not is_ready(slave, select.POLLIN):
            # The key before was the one that takes away the meaning of this one, which has become a part of the line.
            _type(slave, bytes([keys.end]))
            typed = os.read(slave, _MUCH)[:-1]
            return PtyContent(output + _drain(master), lines, typed, True, stopped)
        typed = os.read(slave, _MUCH)
    else:
        typed = b"".join(_lines(slave))
    return PtyContent(output + _drain(master), lines, typed, False, stopped)


def put(master: int, slave: int, settings: bytes, content: PtyContent) -> None:
    """Put into an empty terminal, which runs, what is to be in it; its settings become those. Raises OSError."""
    fcntl.ioctl(master, pty.TCSETS2, _plain(settings))
    _write(slave, content.output)
    if content.stopped == STOPPED_BY_KEY:
        # Not later: where the next key has lost its meaning, this would be the one.
        fcntl.ioctl(master, pty.TCSETS2, _plain(settings, stop=_STOP_KEY))
        _type(slave, bytes([_STOP_KEY]))
        fcntl.ioctl(master, pty.TCSETS2, _plain(settings, stop=0))
    if is_canonical(settings):
        keys = _keys(settings)
        for line in content.lines:
            _type(slave, keys.line(line))
        _type(slave, keys.literally(content.typed) + (bytes([keys.next]) if content.literal_next else b""))
    else:
        _type(slave, content.typed[:MOST_TYPED])
    fcntl.ioctl(master, pty.TCSETS2, settings)
    if not is_canonical(settings) and content.typed[MOST_TYPED:]:
        # More than was to be seen, after all: the kernel will look at it again.
        os.write(master, content.typed[MOST_TYPED:])
    if content.stopped == STOPPED_BY_CALL:
        fcntl.ioctl(slave, termios.TCXONC, termios.TCOOFF)


class _keys:
    """What to type so that lines come out as they were: everything literal but what ends them."""

    def __init__(self, settings: bytes) -> None:
        self._ends = {_NEWLINE, *(settings[_CC + which] for which in (_VEOL, _VEOL2))} - {0}
        self.end, self.next = (key for key, _ in zip(_unlike(self._ends), range(2), strict=False))

    def literally(self, text: bytes) -> bytes:
        """None of it is to have a meaning."""
        special = {*self._ends, self.end, self.next}
        return b"".join(bytes([self.next, byte] if byte in special else [byte]) for byte in text)

    def line(self, text: bytes) -> bytes:
        """A line as read(2) gives it: without a character that ends it, it was ended by VEOF."""
        if text and text[-1] in self._ends:
            return self.literally(text[:-1]) + text[-1:]
        return self.literally(text) + bytes([self.end])


def _unlike(others: set[int]) -> Iterator[int]:
    return (key for key in range(1, 256) if key not in others)


def _plain(settings: bytes, oflag: bool = False, stop: int | None = None) -> bytes:
    """The settings without any meaning of what is typed or written, but for `_keys` where it collects lines.

    What makes the kernel forget lines when it changes stays (ICANON, EXTPROC). ``oflag``: output as it was. ``stop``:
    IXON with this key (0: none): without IXON the kernel would start the output again.
    """
    (lflag,) = struct.unpack_from("<I", settings, _LFLAG)
    lflag &= termios.ICANON | _EXTPROC
    cc = bytearray(19)
    cc[_VMIN] = 1
    if is_canonical(settings):
        lflag |= termios.IEXTEN
        keys = _keys(settings)
        cc[_VEOF], cc[_VLNEXT] = keys.end, keys.next
        cc[_VEOL], cc[_VEOL2] = settings[_CC + _VEOL], settings[_CC + _VEOL2]
    cc[_VSTOP] = stop or 0
    iflag = struct.pack("<I", 0 if stop is None else termios.IXON)
    return (
        iflag
        + (settings[4:8] if oflag else bytes(4))
        + settings[8:12]
        + struct.pack("<I", lflag)
        + (settings[16:17] + bytes(cc) + settings[36:])
    )


def _start(master: int, settings: bytes) -> None:
    """Start output that was stopped by a key, and have the kernel send the echoes for which there was no room."""
    # n_tty_set_termios: where IXON is taken away.
    (iflag,) = struct.unpack_from("<I", settings)
    for changed in (iflag | termios.IXON, iflag & ~termios.IXON):
        fcntl.ioctl(master, pty.TCSETS2, struct.pack("<I", changed) + settings[4:])


def _drain(master: int) -> bytes:
    pieces = []
    # The description is the program's: it may block.
    while is_ready(master, select.POLLIN):
        try:
            pieces.append(os.read(master, _MUCH))
        except OSError:
            break  # EIO: it is empty, and the slave was never open
    return b"".join(pieces)


def _lines(slave: int) -> Iterator[bytes]:
    """What can be read, as reads give it: of a terminal that collects lines one at a time, and b"" for VEOF alone."""
    canonical = is_canonical(pty.settings(slave))
    while True:
        try:
            found = os.read(slave, _MUCH)
        except BlockingIOError:
            return
        if not found and not canonical:
            return  # VMIN 0: there is nothing
        yield found


def _type(slave: int, keys: bytes) -> None:
    """Type at it. Not by way of the master: what is written there is looked at later, by settings that have changed."""
    for key in keys:
        fcntl.ioctl(slave, termios.TIOCSTI, bytes([key]))


def _write(slave: int, output: bytes) -> None:
    at, tries = 0, 0
    while at < len(output):
        left = len(output) - at
        length = min(_PIECE, left - _LAST_PIECE) if left > _LAST_PIECE else left
        try:
            at += os.write(slave, output[at : at + length])
        except BlockingIOError:
            tries += 1
            if tries > _TRIES:
                raise
            time.sleep(_WAIT)
