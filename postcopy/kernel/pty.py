"""pty(7) and ioctl_tty(2): terminals of a program, seen by way of their masters."""

import fcntl
import os
import struct
import termios

TIOCSPTLCK, TIOCGPTLCK, TIOCGPTN = 0x40045431, 0x80045439, 0x80045430
TIOCPKT, TIOCGPKT = 0x5420, 0x80045438
TCGETS2, TCSETS2 = 0x802C542A, 0x402C542B
TIOCSPGRP, TIOCGSID = 0x5410, 0x5429
TIOCGDEV, TIOCGPTPEER = 0x80045432, 0x5441
TIOCGETD, TIOCGEXCL = 0x5424, 0x80045440
SETTINGS_SIZE, WINDOW_SIZE = 44, 8  # struct termios2, struct winsize

_INT = struct.Struct("<i")


def number(master: int, request: int) -> int:
    """What an ioctl that tells an int says of a master; raises OSError."""
    found: int = _INT.unpack(fcntl.ioctl(master, request, bytes(_INT.size)))[0]
    return found


def set_number(master: int, request: int, value: int) -> None:
    """Make an ioctl that takes a pointer to an int; raises OSError."""
    fcntl.ioctl(master, request, _INT.pack(value))


def open_slave(master: int) -> int:
    """A descriptor of its slave, whatever the path of that is; nobody's controlling terminal. Raises OSError."""
    return int(fcntl.ioctl(master, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))


def session(master: int) -> tuple[int, int]:
    """The session whose controlling terminal it is, and its foreground process group; 0 where there is none."""
    try:
        return number(master, TIOCGSID), number(master, termios.TIOCGPGRP)
    except OSError:
        return 0, 0


def settings(terminal: int) -> bytes:
    """The struct termios2 of the terminal."""
    return fcntl.ioctl(terminal, TCGETS2, bytes(SETTINGS_SIZE))


def adopt(terminal: int, wanted: bytes) -> None:
    """Set the modes and characters of a struct termios2; the line's own (speed, parity, discipline) stay."""
    own = settings(terminal)
    # c_iflag, c_oflag, c_cflag, c_lflag, c_line, c_cc, c_ispeed and c_ospeed: include/uapi/asm-generic/termbits.h.
    fcntl.ioctl(terminal, TCSETS2, wanted[:8] + own[8:12] + wanted[12:16] + own[16:17] + wanted[17:36] + own[36:])


def device(terminal: int) -> int:
    """The number of the device behind a terminal, /dev/tty too, as stat(2) shows it."""
    return as_shown(number(terminal, TIOCGDEV))


def as_shown(number: int) -> int:
    """A device number as the kernel shows it to programs outside of stat(2)."""
    # new_encode_dev, include/linux/kdev_t.h
    return os.makedev(number >> 8 & 0xFFF, (number & 0xFF) | (number >> 12 & 0xFFF00))


def window(master: int) -> bytes:
    """The struct winsize of the terminal."""
    return fcntl.ioctl(master, termios.TIOCGWINSZ, bytes(WINDOW_SIZE))


def unread(fd: int) -> int:
    """Bytes that can be read from a master or a slave; of a line that is being typed none."""
    return number(fd, termios.FIONREAD)
