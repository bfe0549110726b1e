"""A terminal among the standard streams: the destination's ``restore`` lends its own stream in its place."""

import os
import stat

from postcopy.dump_side.opened import Opened, Refused, Table
from postcopy.state import Description, StandardStream

_TTY_MAJORS = (4, 5, *range(136, 144))


def collect(table: Table, opened: Opened) -> Description | None:
    """The description of a terminal; None for other kinds."""
    if opened.mode != stat.S_IFCHR or os.major(opened.stat.st_rdev) not in _TTY_MAJORS:
        return None
    if opened.fd <= 2:
        return Description(stream=StandardStream(opened.fd, opened.flags))
    for stream in (0, 1, 2):
        try:
            if os.stat(f"/proc/{table.pid}/fd/{stream}").st_rdev == opened.stat.st_rdev:
                return Description(stream=StandardStream(stream, opened.flags))
        except OSError:
            continue
    raise Refused(
        f"{opened.link}: a terminal that is not one of the standard streams cannot be moved yet; to give it another, "
        f"--external {opened.link} here and --inherit-fd 'fd[N]:{opened.link}' for restore"
    )
