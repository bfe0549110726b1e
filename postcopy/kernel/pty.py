"""pty(7) and ioctl_tty(2): terminals of a program, seen by way of their masters."""

import fcntl
import struct
import termios

TIOCSPTLCK, TIOCGPTLCK, TIOCGPTN = 0x40045431, 0x80045439, 0x80045430
TIOCPKT, TIOCGPKT = 0x5420, 0x80045438
TCGETS2, TCSETS2 = 0x802C542A, 0x402C542B
TIOCSPGRP, TIOCGSID = 0x5410, 0x5429
SETTINGS_SIZE, WINDOW_SIZE = 44, 8  # struct termios2, struct winsize

_INT = struct.Struct("<i")


def number(master: int, request: int) -> int:
    """What an ioctl that tells an int says of a master; raises OSError."""
    found: int = _INT.unpack(fcntl.ioctl(master, request, bytes(_INT.size)))[0]
    return found


def set_number(master: int, request: int, value: int) -> None:
    """Make an ioctl that takes a pointer to an int; raises OSError."""
    fcntl.ioctl(master, request, _INT.pack(value))


def session(master: int) -> tuple[int, int]:
    """The session whose controlling terminal it is, and its foreground process group; 0 where there is none."""
    try:
        return number(master, TIOCGSID), number(master, termios.TIOCGPGRP)
    except OSError:
        return 0, 0


def settings(master: int) -> bytes:
    """The struct termios2 of the terminal."""
    return fcntl.ioctl(master, TCGETS2, bytes(SETTINGS_SIZE))


def window(master: int) -> bytes:
    """The struct winsize of the terminal."""
    return fcntl.ioctl(master, termios.TIOCGWINSZ, bytes(WINDOW_SIZE))


def unread(fd: int) -> int:
    """Bytes that can be read from a master or a slave; of a line that is being typed none."""
    return number(fd, termios.FIONREAD)
