"""Whether what a state says of System V semaphores and message queues makes sense (see `soundness`)."""

from collections.abc import Iterator

from postcopy.state import Tree


def tree(found: Tree) -> Iterator[str]:
    """What contradicts itself, or the rest of a tree."""
    pids = {process.pid for process in found.processes}
    for name, objects in (("semaphores", found.semaphores), ("message_queues", found.message_queues)):
        if len({each.identifier for each in objects}) < len(objects):
            yield f"{name}: an identifier occurs twice"
    for place, each in enumerate(found.semaphores):
        where = f"semaphores[{place}]"
        if len(each.users) != len(each.values):
            yield f"{where}.users: {len(each.users)} of {len(each.values)} semaphores"
        if unknown := {*each.users, *(one.pid for one in each.adjustments)} - pids:
            yield f"{where}.users: {min(unknown)} is none of the processes"
        places = [(one.pid, one.number) for one in each.adjustments]
        if len({*places}) < len(places) or any(number >= len(each.values) for _, number in places):
            yield f"{where}.adjustments: a semaphore that there is not, or one twice"
    for number, description in enumerate(found.descriptors.descriptions):
        opening = description.queue
        if opening is not None and opening.queue >= len(found.descriptors.queues):
            yield f"descriptors.descriptions[{number}].queue: {opening.queue} is none of the queues"
    names = [each.name for each in found.descriptors.queues if each.name]
    if len({*names}) < len(names):
        yield "descriptors.queues: a name occurs twice"
    for place, each_queue in enumerate(found.descriptors.queues):
        most = max((len(message.content) for message in each_queue.messages), default=0)
        if len(each_queue.messages) > each_queue.most or most > each_queue.size:
            yield f"descriptors.queues[{place}].messages: more, or longer ones, than it can have"
    for place, queue in enumerate(found.message_queues):
        if queue.user not in pids:
            yield f"message_queues[{place}].user: {queue.user} is none of the processes"
