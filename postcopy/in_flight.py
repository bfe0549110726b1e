"""Descriptors on their way in Unix sockets (SCM_RIGHTS, unix(7)): which process makes those that nobody has open."""

from postcopy.state import Description, Tree

# Complete once they are made, whatever number they have.
_KINDS = ("file", "pipe", "event_counter", "memory", "ghost", "unix", "process", "ended")


def can_be_made(description: Description) -> bool:
    """Whether it can be made without being in any table."""
    return any(getattr(description, kind) is not None for kind in _KINDS)


def makers(tree: Tree) -> dict[int, int]:
    """For each description that is only on its way: the PID of the process that makes it, which is the first that has
    the socket in which it is, but for pairs of sockets that have a maker of their own."""
    descriptions = tree.descriptors.descriptions
    holders: dict[int, int] = {}
    for process in tree.processes:
        for slot in process.slots:
            if slot.description < len(descriptions):
                holders.setdefault(slot.description, process.pid)
    found: dict[int, int] = {}
    carrying = list(holders)
    # What is on its way may be a socket with others on their way.
    for number in carrying:
        unix = descriptions[number].unix
        for message in unix.queue if unix is not None else ():
            for inner in message.rights:
                if inner not in holders and inner < len(descriptions):
                    holders[inner] = holders[number]
                    own = descriptions[inner].unix
                    found[inner] = (own.maker if own is not None else 0) or holders[number]
                    carrying.append(inner)
    return found
