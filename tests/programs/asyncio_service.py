"""A server on asyncio, with children: ``... -m tests.programs.asyncio_service DIRECTORY ADDRESS``.

Each line that comes to port 7100 goes through a child (cat(1)) and back, with how many lines the connection has sent
and how often a timerfd has expired. Besides, clients in the same process ask the same over ``DIRECTORY/service.sock``,
a child is asked over a Unix pair, and one over pipes at which a thread waits.
``DIRECTORY/failed`` has what went wrong with these; ``DIRECTORY/local`` how many answers they have had.
"""

import asyncio
import ctypes
import os
import socket
import struct
import subprocess
import sys
import time
import traceback
from pathlib import Path

PORT = 7100
_TICK = 10_000_000  # nanoseconds
_LIMIT = 1 << 20


def timer() -> int:
    """A timerfd that expires again and again."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC))
    if fd < 0 or libc.timerfd_settime(fd, 0, struct.pack("=4q", 0, _TICK, 0, _TICK), None):
        raise OSError(ctypes.get_errno(), "timerfd")
    return fd


class Service:
    """The server, and what is behind it."""

    def __init__(self, directory: Path, address: str) -> None:
        self.directory, self.address = directory, address
        self.ticks = 0
        self.local = 0
        self.paired = 0

    async def run(self) -> None:
        """Serve until killed; ends when something goes wrong."""
        clock = timer()
        asyncio.get_running_loop().add_reader(clock, self._tick, clock)
        pipe = asyncio.subprocess.PIPE
        self.children = [
            await asyncio.create_subprocess_exec("cat", stdin=pipe, stdout=pipe, limit=_LIMIT) for _ in range(2)
        ]
        self.locks = [asyncio.Lock() for _ in self.children]
        self.piped = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        path = str(self.directory / "service.sock")
        async with (
            await asyncio.start_server(self._serve, self.address, PORT, limit=_LIMIT),
            await asyncio.start_unix_server(self._serve, path, limit=_LIMIT),
            asyncio.TaskGroup() as group,
        ):
            for number in range(3):
                group.create_task(self._ask(path, number))
            group.create_task(self._ask_piped())
            group.create_task(self._ask_by_pair())
            for child in self.children:
                group.create_task(self._watch(child))

    def _tick(self, clock: int) -> None:
        self.ticks += int.from_bytes(os.read(clock, 8), sys.byteorder)

    async def _ask_by_pair(self) -> None:
        """A child whose standard streams are one end of a Unix pair."""
        ours, theirs = socket.socketpair()
        with theirs:
            await asyncio.create_subprocess_exec("cat", stdin=theirs.fileno(), stdout=theirs.fileno())
        reader, writer = await asyncio.open_connection(sock=ours)
        count = 0
        while True:
            count += 1
            asked = b"pair-%d\n" % count
            writer.write(asked)
            answer = await reader.readline()
            if answer != asked:
                raise RuntimeError(f"{asked!r} was answered by {answer!r}")
            self.paired = count
            await asyncio.sleep(0)

    async def _watch(self, child: asyncio.subprocess.Process) -> None:
        raise RuntimeError(f"a child has ended with {await child.wait()}")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        count = 0
        while line := await reader.readline():
            count += 1
            which = count % len(self.children)
            child = self.children[which]
            assert child.stdin and child.stdout
            async with self.locks[which]:
                child.stdin.write(line)
                await child.stdin.drain()
                answer = await child.stdout.readline()
            writer.write(b"%b %d %d\n" % (answer.rstrip(), count, self.ticks))
            await writer.drain()
        writer.close()

    async def _ask(self, path: str, number: int) -> None:
        reader, writer = await asyncio.open_unix_connection(path, limit=_LIMIT)
        count = 0
        while True:
            count += 1
            asked = b"local-%d-%d" % (number, count)
            writer.write(asked + b"\n")
            answer = await reader.readline()
            text, told, _ = answer.split()
            if (text, int(told)) != (asked, count):
                raise RuntimeError(f"{asked!r} was answered by {answer!r}")
            self.local += 1

    async def _ask_piped(self) -> None:
        """From the executor's thread: it waits in read(2)."""
        count = 0
        while True:
            count += 1
            asked = b"piped-%d\n" % count
            answer = await asyncio.to_thread(self._through_pipe, asked)
            if answer != asked:
                raise RuntimeError(f"{asked!r} was answered by {answer!r}")
            (self.directory / "local.new").write_text(f"{min(count, self.local, self.paired, self.ticks)}")
            os.replace(self.directory / "local.new", self.directory / "local")

    def _through_pipe(self, asked: bytes) -> bytes:
        assert self.piped.stdin and self.piped.stdout
        self.piped.stdin.write(asked)
        return self.piped.stdout.readline()


def main() -> None:
    """Serve."""
    directory = Path(sys.argv[1])
    try:
        asyncio.run(Service(directory, sys.argv[2]).run())
    except BaseException:
        (directory / "failed").write_text(traceback.format_exc())
        raise


if __name__ == "__main__":
    main()
