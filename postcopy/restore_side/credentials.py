"""Credentials of a thread. Every thread has its own; the raw system calls change just the caller's."""

import struct

from postcopy.kernel.batch import RECORD_SIZE, Batch
from postcopy.kernel.calls import call
from postcopy.kernel.prctl import (
    PR_CAP_AMBIENT,
    PR_CAP_AMBIENT_RAISE,
    PR_CAPBSET_DROP,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_SECUREBITS,
)
from postcopy.state import Credentials

_SECBIT_NO_SETUID_FIXUP, _SECBIT_KEEP_CAPS = 1 << 2, 1 << 4
_CAPABILITY_VERSION_3 = 0x20080522
_CAPABILITIES = 64
_FIXED_ROOM = 1024
_SETPCAP = 1 << 8


def room(state: Credentials, current: Credentials) -> int:
    """How many bytes of a batch `rebuild` takes at most."""
    changes = (current.bounding & ~state.bounding).bit_count() + state.ambient.bit_count()
    return _FIXED_ROOM + RECORD_SIZE * changes + 4 * len(state.groups)


def rebuild(state: Credentials, current: Credentials, batch: Batch) -> None:
    """Add the calls that turn ``current``, those of ``restore``, into ``state``; none where they are the same."""
    if state == current:
        return
    changes_ids = (state.uids, state.gids, state.groups) != (current.uids, current.gids, current.groups)
    if changes_ids:
        # With this bit the capabilities stay while the ids change.
        made = call("prctl", PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP)
        batch.add(made, "keeping capabilities while the ids change")
        groups = struct.pack(f"<{len(state.groups)}I", *state.groups)
        batch.add(call("setgroups", len(state.groups), batch.place(groups)), "setting the groups")
        batch.add(call("setresgid", *state.gids[:3]), "setting the group ids")
        batch.add(call("setfsgid", state.gids[3]), "setting the filesystem group id")
        batch.add(call("setresuid", *state.uids[:3]), "setting the user ids")
        batch.add(call("setfsuid", state.uids[3]), "setting the filesystem user id")
    for capability in range(_CAPABILITIES):
        if current.bounding >> capability & 1 and not state.bounding >> capability & 1:
            batch.add(call("prctl", PR_CAPBSET_DROP, capability), f"dropping capability {capability} from the bound")
    # The secure bits need CAP_SETPCAP, so that is the last to go.
    for_now = state.permitted | current.permitted & _SETPCAP
    _set_capabilities(batch, for_now, for_now, state.inheritable | state.ambient)
    for capability in range(_CAPABILITIES):
        if state.ambient >> capability & 1:
            made = call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0)
            batch.add(made, f"raising ambient capability {capability}")
    if changes_ids or state.securebits != current.securebits:
        batch.add(call("prctl", PR_SET_SECUREBITS, state.securebits), "setting the secure bits")
    _set_capabilities(batch, state.permitted, state.effective, state.inheritable)
    if state.no_new_privs:
        batch.add(call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "setting no_new_privs")


def _set_capabilities(batch: Batch, permitted: int, effective: int, inheritable: int) -> None:
    header = batch.place(struct.pack("<Ii", _CAPABILITY_VERSION_3, 0))
    words = [w >> shift & 0xFFFF_FFFF for shift in (0, 32) for w in (effective, permitted, inheritable)]
    batch.add(call("capset", header, batch.place(struct.pack("<6I", *words))), "setting the capabilities")
