"""Resources outside of the tree for which ``restore`` is to be given others (``--external``, ``--inherit-fd``)."""

from postcopy.dump_side.opened import Opened, Table
from postcopy.open_kinds import External
from postcopy.state import Description


def collect(table: Table, opened: Opened) -> Description | None:
    """The description of a resource that the user has named; None for others."""
    if opened.link not in table.choices.external:
        return None
    if opened.link not in table.external:
        table.external.append(opened.link)
    return Description(external=External(opened.link))
