"""Resources that ``restore`` was given in place of what the program had outside of its tree (``--inherit-fd``)."""

from typing import TYPE_CHECKING

from postcopy.open_kinds import External
from postcopy.state import Slot

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan


def rebuild(plan: "Plan", slot: Slot, state: External) -> None:
    """Add the calls that give ``slot`` the descriptor. Raises ValueError where none was given."""
    if state.resource not in plan.inherited:
        raise ValueError(f"nothing was given for {state.resource} (--inherit-fd)")
    purpose = f"lending what was given for {state.resource}"
    plan.duplicate(plan.inherited[state.resource], slot.fd, slot.close_on_exec, purpose)
