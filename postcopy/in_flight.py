"""Descriptors on their way in Unix sockets (SCM_RIGHTS, unix(7)): which process makes those that nobody has open."""

from postcopy.state import Tree


def makers(tree: Tree) -> dict[int, int]:
    """For each description that is only on its way: the PID of the process that makes the socket in which it is."""
    descriptions = tree.descriptors.descriptions
    holders: dict[int, int] = {}
    for process in tree.processes:
        for slot in process.slots:
            holders.setdefault(slot.description, process.pid)
    found: dict[int, int] = {}
    carrying = [number for number in holders if 0 <= number < len(descriptions)]
    # What is on its way may be a socket with others on their way.
    for number in carrying:
        unix = descriptions[number].unix
        for message in unix.queue if unix is not None else ():
            for inner in message.rights:
                if inner not in holders and inner not in found and inner < len(descriptions):
                    found[inner] = found.get(number) or (unix.maker if unix is not None else 0) or holders[number]
                    carrying.append(inner)
    return found
