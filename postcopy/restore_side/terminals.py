"""A terminal among the standard streams: ``restore`` lends its own stream in its place."""

from typing import TYPE_CHECKING

from postcopy.state import Slot, StandardStream

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan


def rebuild(plan: "Plan", slot: Slot, stream: StandardStream) -> None:
    """Add the calls that give ``slot`` the stream."""
    plan.duplicate(plan.streams[stream.fd], slot.fd, slot.close_on_exec, f"lending standard stream {stream.fd}")
