"""What processes share by number, without having it open: System V semaphores and message queues (sysvipc(7))."""

from typing import Annotated, Literal

import msgspec
from msgspec import Struct

from postcopy.integers import Pid, Unsigned

Identifier = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Key = Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)]
Mode = Annotated[int, msgspec.Meta(ge=0, le=0o777)]
Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]  # of a user or a group


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
    """A set of System V semaphores; ``users``: of each the process that has used it last, 0 for one outside."""

    identifier: Identifier
    key: Key
    owner: tuple[Id, Id]
    mode: Mode
    values: Annotated[list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 15)]], msgspec.Meta(min_length=1)]
    users: list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 22)]]
    adjustments: list[Adjustment] = []


class Message(Struct, frozen=True):
    """A message of a System V queue."""

    type: Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
    content: bytes


class MessageQueue(Struct, frozen=True):
    """A System V message queue; ``capacity``: bytes that may wait in it; ``user``: a process that has used it."""

    identifier: Identifier
    key: Key
    owner: tuple[Id, Id]
    mode: Mode
    capacity: Unsigned
    user: Pid
    messages: list[Message] = []
