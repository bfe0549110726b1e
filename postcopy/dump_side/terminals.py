"""The terminal of a shell job: the destination's ``restore`` lends its own standard streams in its place."""

import os
import stat

from postcopy.dump_side.opened import Opened, Refused, Table
from postcopy.kernel import pty
from postcopy.state import Description, StandardStream

_TTY_MAJORS = (4, 5, *range(136, 144))


def collect(table: Table, opened: Opened) -> Description | None:
    """The description of a terminal; None for other kinds."""
    if opened.mode != stat.S_IFCHR or os.major(opened.stat.st_rdev) not in _TTY_MAJORS:
        return None
    another = f"to give it another, --external {opened.link!r} here and --inherit-fd for restore"
    stream = _stream(table, opened)
    if stream is None:
        raise Refused(
            f"{opened.link}: a terminal that is not one of the standard streams cannot be moved yet; {another}"
        )
    if not table.choices.shell_job:
        raise Refused(
            f"{opened.link}: a terminal that others have, too; to give it the one that restore is run at, --shell-job "
            f"(-j) here and for restore; {another}"
        )
    table.has_lent_terminal = True
    return Description(stream=StandardStream(stream, opened.flags, _settings(opened)))


def _stream(table: Table, opened: Opened) -> int | None:
    """Which of the standard streams is the same terminal, if any."""
    if opened.fd <= 2:
        return opened.fd
    device = opened.stat.st_rdev
    try:
        with opened.duplicate() as own:
            device = pty.device(own)
    except OSError:
        pass  # nobody is at its other end any more
    for stream in (0, 1, 2):
        try:
            if os.stat(f"/proc/{table.pid}/fd/{stream}").st_rdev == device:
                return stream
        except OSError:
            continue
    return None


def _settings(opened: Opened) -> bytes:
    try:
        with opened.duplicate() as own:
            return pty.settings(own)
    except OSError:
        return b""
