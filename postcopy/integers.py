"""Integers as they may stand in a state: what is out of range is an error when a message is decoded."""

from typing import Annotated

import msgspec

Unsigned = Annotated[int, msgspec.Meta(ge=0)]
Address = Annotated[int, msgspec.Meta(ge=0, lt=1 << 47)]
Fd = Annotated[int, msgspec.Meta(ge=0, lt=1 << 30)]
Unsigned16 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
Unsigned31 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Unsigned32 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
Pid = Annotated[int, msgspec.Meta(gt=0, lt=1 << 22)]
