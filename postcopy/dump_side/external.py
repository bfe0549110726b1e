"""Resources outside of the tree for which ``restore`` is to be given others (``--external``, ``--inherit-fd``)."""

import stat
from collections.abc import Iterator

from postcopy.dump_side.opened import Opened, Table
from postcopy.open_kinds import External
from postcopy.state import Description


def collect(table: Table, opened: Opened) -> Description | None:
    """The description of a resource that the user has named; None for others."""
    for name in _names(opened):
        if name in table.choices.external:
            if name not in table.external:
                table.external.append(name)
            return Description(external=External(name))
    return None


def _names(opened: Opened) -> Iterator[str]:
    """What it may be called: as ``/proc`` shows it; a terminal also as CRIU does."""
    yield opened.link
    if opened.mode == stat.S_IFCHR:
        yield f"tty[{opened.stat.st_rdev:x}:{opened.stat.st_dev:x}]"
