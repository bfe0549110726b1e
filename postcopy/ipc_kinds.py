"""System V semaphores and message queues (sysvipc(7)), which nobody has open, and POSIX message queues."""

from typing import Annotated, Literal

import msgspec
from msgspec import Struct

from postcopy.integers import Pid, Unsigned, Unsigned31, Unsigned32

Identifier = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Key = Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)]
Mode = Annotated[int, msgspec.Meta(ge=0, le=0o777)]
Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]  # of a user or a group
QueueName = Annotated[str, msgspec.Meta(pattern=r"\A[^/\x00]*\Z", max_length=255)]


class IpcName(Struct, frozen=True):
    """How processes find it; ``kind``: ``sem`` or ``msg``; ``key``: 0 for one that has none (IPC_PRIVATE)."""

    kind: Literal["sem", "msg"]
    identifier: Identifier
    key: Key


class Adjustment(Struct, frozen=True):
    """What is added to a semaphore when a process ends (semop(2), SEM_UNDO)."""

    pid: Pid
    number: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
    amount: Annotated[int, msgspec.Meta(ge=-(1 << 15), lt=1 << 15)]


class SemaphoreSet(Struct, frozen=True):
    """A set of System V semaphores.

    ``creator``, ``owner``: user and group. ``users``: of each semaphore the process that is to have used it last.
    """

    identifier: Identifier
    key: Key
    creator: tuple[Id, Id]
    owner: tuple[Id, Id]
    mode: Mode
    values: Annotated[list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 15)]], msgspec.Meta(min_length=1)]
    users: list[Pid]
    adjustments: list[Adjustment] = []


class Message(Struct, frozen=True):
    """A message of a System V queue."""

    type: Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
    content: bytes


class QueuedMessage(Struct, frozen=True):
    """A message of a POSIX queue."""

    priority: Annotated[int, msgspec.Meta(ge=0, lt=1 << 15)]  # MQ_PRIO_MAX
    content: bytes


class PosixQueue(Struct, frozen=True):
    """A POSIX message queue (mq_overview(7)).

    ``name``: without a slash; empty where it has been unlinked. ``most``: messages, ``size``: bytes of each, at most.
    ``messages``: in the order in which they will be received.
    """

    name: QueueName
    owner: tuple[Id, Id]
    mode: Mode
    most: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
    size: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
    messages: list[QueuedMessage] = []


class QueueOpening(Struct, frozen=True):
    """A message queue descriptor; ``queue`` indexes ``Descriptors.queues``."""

    queue: Unsigned31
    flags: Unsigned32


class MessageQueue(Struct, frozen=True):
    """A System V message queue; ``capacity``: bytes that may wait in it; ``user``: who is to have used it last."""

    identifier: Identifier
    key: Key
    creator: tuple[Id, Id]
    owner: tuple[Id, Id]
    mode: Mode
    capacity: Unsigned
    user: Pid
    messages: list[Message] = []
