"""Pseudoterminals with content that nobody has read yet: typed, or written."""

import errno
import fcntl
import os
import select
import struct
import termios
from collections.abc import Callable
from typing import Any

from tests.programs.cases import Case, first_problem, unlike

_IFLAG, _OFLAG, _LFLAG, _CC = 0, 1, 3, 6
_VEOL2 = 16


class Terminal(Case):
    """Both ends of a terminal; ``arrange`` puts something in."""

    def setup(self) -> None:
        """Open it, and wait until the kernel has looked at what is in it."""
        self.master, self.slave = os.openpty()
        os.set_blocking(self.master, False)
        os.set_blocking(self.slave, False)
        self.arrange()
        self.settle()
        self.settings = termios.tcgetattr(self.master)

    def arrange(self) -> None:
        """Put something in."""
        raise NotImplementedError

    def change(self, changed: Callable[[list[Any]], None]) -> None:
        """Change its settings."""
        settings = termios.tcgetattr(self.master)
        changed(settings)
        termios.tcsetattr(self.master, termios.TCSANOW, settings)

    def settle(self) -> None:
        """Have the kernel look at what was typed: poll(2) waits for that where nothing can be read."""
        select.select([self.slave], [], [], 0)

    def press(self, keys: bytes) -> None:
        """Type something."""
        os.write(self.master, keys)
        self.settle()

    def shown(self) -> bytes:
        """What its master has not read yet."""
        return b"".join(reads(self.master))

    def is_writable(self) -> bool:
        """Whether its slave takes output."""
        return bool(select.select([], [self.slave], [], 0)[1])


def reads(fd: int) -> list[bytes]:
    """What reads give, one after the other."""
    found = []
    while True:
        try:
            found.append(os.read(fd, 65536))
        except BlockingIOError:
            return found
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return [*found, b"hung up"]


def collects_no_lines(settings: list[Any]) -> None:
    """Settings of an editor: every key is read by itself, as it is."""
    settings[_IFLAG] = 0
    settings[_LFLAG] = 0


class TypedLines(Terminal):
    """Lines, ends of file and a line that is being typed, with keys that have lost their meaning."""

    def arrange(self) -> None:
        """^V takes the meaning away, ^D ends a line or the file."""
        self.press(b"one\rtwo\x16\x03 \x16\x16x\x16\n!\nthree\x04\x04half \x16\x04\xff\x01typed")

    def verify(self) -> str | None:
        """The last key can be taken back, with its echo."""
        echo = b"one\r\ntwo^\b^C ^\b^Vx^\b^J!\r\nthreehalf ^\b^D\xff^Atyped"
        lines, shown = reads(self.slave), self.shown()
        self.press(b"\x7fe\n")
        return first_problem(
            unlike("lines", [b"one\n", b"two\x03 \x16x\n!\n", b"three", b""], lines),
            unlike("shown", echo, shown),
            unlike("the last line", [b"half \x04\xff\x01type" + b"e\n"], reads(self.slave)),
            unlike("shown then", b"\b \be\r\n", self.shown()),
            unlike("settings", self.settings, termios.tcgetattr(self.master)),
        )


class HalfOfAKey(Terminal):
    """VLNEXT was typed, and nothing after it."""

    def arrange(self) -> None:
        """One line, and the half of one."""
        self.press(b"one\nhalf\x16")

    def verify(self) -> str | None:
        """The next key has no meaning."""
        lines = reads(self.slave)
        self.press(b"\x04\n")
        return first_problem(unlike("lines", [b"one\n"], lines), unlike("the last", [b"half\x04\n"], reads(self.slave)))


class OwnEndsOfLines(Terminal):
    """Keys of the program's own that end a line (VEOL, VEOL2), one of them where VEOF is elsewhere."""

    def arrange(self) -> None:
        """Type both, with a meaning and without."""

        def changed(settings: list[Any]) -> None:
            keys = settings[_CC]
            keys[termios.VEOL], keys[_VEOL2], keys[termios.VEOF] = b"\x01", b";", b"\x1d"

        self.change(changed)
        self.press(b"a\x01b;c\x16;d\x1de\x16\x01")

    def verify(self) -> str | None:
        """Lines end where they did."""
        lines = reads(self.slave)
        self.press(b";")
        return first_problem(
            unlike("lines", [b"a\x01", b"b;", b"c;d"], lines), unlike("the last", [b"e\x01;"], reads(self.slave))
        )


class TypedKeys(Terminal):
    """Keys of a terminal that collects no lines, and output that is not to be changed once more."""

    def arrange(self) -> None:
        """Every byte; only a read of 255 at least would be told of fewer."""
        os.write(self.slave, b"two\nlines\n")
        self.change(collects_no_lines)
        self.press(bytes(range(256)) * 2)

    def verify(self) -> str | None:
        """The same."""
        return first_problem(
            unlike("keys", bytes(range(256)) * 2, b"".join(reads(self.slave))),
            unlike("shown", b"two\r\nlines\r\n", self.shown()),
            unlike("settings", self.settings, termios.tcgetattr(self.master)),
        )


class KeysOfPrompt(Terminal):
    """Keys that were typed ahead at a prompt which reads them one by one, with signals from the keyboard."""

    def arrange(self) -> None:
        """ICRNL and echo are on."""

        def changed(settings: list[Any]) -> None:
            settings[_LFLAG] &= ~termios.ICANON

        self.change(changed)
        self.press(b"make\r\x7f")

    def verify(self) -> str | None:
        """Nothing is echoed twice."""
        return first_problem(
            unlike("keys", b"make\n\x7f", b"".join(reads(self.slave))), unlike("shown", b"make\r\n^?", self.shown())
        )


class StoppedOutput(Terminal):
    """Somebody has typed ^S."""

    def arrange(self) -> None:
        """Something was shown before; a key is typed after."""
        os.write(self.slave, b"before\n")
        self.press(b"\x13k")

    def verify(self) -> str | None:
        """It is stopped until ^Q."""
        stopped = not self.is_writable()
        shown = self.shown()
        self.press(b"\x11")
        return first_problem(
            unlike("stopped", True, stopped),
            unlike("shown", b"before\r\n", shown[:8]),
            unlike("writable", True, self.is_writable()),
        )


class SuspendedOutput(Terminal):
    """The program has called tcflow(3)."""

    def arrange(self) -> None:
        """Something was shown before."""
        os.write(self.slave, b"before\n")
        termios.tcflow(self.slave, termios.TCOOFF)

    def verify(self) -> str | None:
        """No key starts it, the program does."""
        self.press(b"\x11")
        stopped = not self.is_writable()
        termios.tcflow(self.slave, termios.TCOON)
        return first_problem(
            unlike("stopped", True, stopped),
            unlike("shown", b"before\r\n", self.shown()),
            unlike("writable", True, self.is_writable()),
        )


class FullTerminal(Terminal):
    """As much output as it takes, and the echo of a key for which there was no room."""

    def arrange(self) -> None:
        """Write pieces of every size."""
        self.change(lambda settings: settings.__setitem__(_OFLAG, 0))
        self.written = b""
        number = 0
        while self.is_writable():
            number += 1
            piece = os.urandom(1 + number * 617 % 2500)
            try:
                self.written += piece[: os.write(self.slave, piece)]
            except BlockingIOError:
                break
        self.press(b"k")

    def verify(self) -> str | None:
        """All of it is read, in order."""
        shown = self.shown()
        self.press(b"\n")
        return first_problem(
            unlike("length", len(self.written), len(shown.removesuffix(b"k"))),
            unlike("the same", True, shown.startswith(self.written)),
            unlike("keys", [b"k\n"], reads(self.slave)),
        )


class PacketMode(Terminal):
    """The master is told which kind of news each read brings (TIOCPKT)."""

    _TIOCPKT = 0x5420

    def arrange(self) -> None:
        """Output and a line that is being typed."""
        fcntl.ioctl(self.master, self._TIOCPKT, struct.pack("i", 1))
        os.write(self.slave, b"shown")
        self.press(b"half")

    def verify(self) -> str | None:
        """Output comes with a zero, and there is no other news."""
        shown = reads(self.master)
        self.press(b"\n")
        return first_problem(
            unlike("shown", (0, b"shownhalf"), (shown[0][0], b"".join(each[1:] for each in shown))),
            unlike("news", {0}, {each[0] for each in shown}),
            unlike("keys", [b"half\n"], reads(self.slave)),
        )


class ClosedTerminal(Terminal):
    """Its slave has written something, and is open no more."""

    def arrange(self) -> None:
        """What was typed is there for who opens it again."""
        self.path = os.ttyname(self.slave)
        os.write(self.slave, b"bye\n")
        self.press(b"unread\n")

    def setup(self) -> None:
        """Close it in the end."""
        super().setup()
        os.close(self.slave)

    def verify(self) -> str | None:
        """The master reads what was written, and then of the end."""
        shown = reads(self.master)
        self.slave = os.open(self.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        return first_problem(
            unlike("shown", b"bye\r\nunread\r\nhung up", b"".join(shown)),
            unlike("keys", [b"unread\n"], reads(self.slave)),
        )


CASES: tuple[type[Case], ...] = (
    TypedLines,
    HalfOfAKey,
    OwnEndsOfLines,
    TypedKeys,
    KeysOfPrompt,
    StoppedOutput,
    SuspendedOutput,
    FullTerminal,
    PacketMode,
    ClosedTerminal,
)
