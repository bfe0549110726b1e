"""A dict of a million entries that four threads keep changing, under a running checksum.

Runs until SIGTERM or for ``--operations``; then recomputes the checksum from the entries and writes ``OK …`` or
``FAIL …`` to the result file. Every progress line is the number of operations so far.
"""

import argparse
import os
import random
import signal
import struct
import sys
import threading
import zlib

MASK = (1 << 64) - 1
PROGRESS_EVERY = 5000
HEAD = struct.Struct("=QIQ")


class Churn:
    """The dict, its checksum and the counts, all changed under one lock."""

    def __init__(self, entries: int, threads: int, operations: int | None, progress_fd: int) -> None:
        self.entries: dict[int, bytes] = {}
        self.checksum = 0
        self.done = 0
        self.counts = [0] * threads
        self.limit = operations
        self.lock = threading.Lock()
        self.finished = threading.Event()
        self.progress_fd = progress_fd
        self.next_key = entries
        for key in range(entries):
            self.put(key, make_value(key, 0, 0, key % 50))

    def put(self, key: int, value: bytes) -> None:
        """Set an entry, and move the checksum along."""
        old = self.entries.get(key)
        if old is not None:
            self.checksum -= term(key, old)
        self.entries[key] = value
        self.checksum = (self.checksum + term(key, value)) & MASK

    def remove(self, key: int) -> None:
        """Remove an entry, and move the checksum along."""
        self.checksum = (self.checksum - term(key, self.entries.pop(key))) & MASK

    def work(self, number: int) -> None:
        """One thread: change values, and replace entries, all over the dict."""
        choose = random.Random(number)
        while not self.finished.is_set():
            with self.lock:
                operation = self.counts[number] + 1
                key = choose.randrange(self.next_key)
                if key not in self.entries:
                    key = self.next_key
                    self.next_key += 1
                elif operation % 3 == 0:
                    self.remove(key)
                    key = self.next_key
                    self.next_key += 1
                self.put(key, make_value(key, number, operation, choose.randrange(60)))
                self.counts[number] = operation
                self.done += 1
                if self.done % PROGRESS_EVERY == 0:
                    os.write(self.progress_fd, f"{self.done}\n".encode())
                if self.limit is not None and self.done >= self.limit:
                    self.finished.set()

    def problems(self) -> list[str]:
        """What is wrong with the entries, recomputed from scratch."""
        found = []
        checksum = 0
        latest = [0] * len(self.counts)
        for key, value in self.entries.items():
            checksum += term(key, value)
            owner, number, operation = HEAD.unpack_from(value)
            if owner != key or value[HEAD.size :] != bytes([operation % 251]) * (len(value) - HEAD.size):
                found.append(f"entry {key} holds a value of {owner}")
            # Iterating reads the entries alone; only looking them up reads the hash table too.
            if self.entries.get(key) is not value:
                found.append(f"entry {key} is not where its hash says")
            latest[number] = max(latest[number], operation)
        if checksum & MASK != self.checksum:
            found.append(f"checksum is {self.checksum:016x}, recomputed {checksum & MASK:016x}")
        if sum(self.counts) != self.done:
            found.append(f"{self.done} operations, the threads counted {self.counts}")
        for number, (operation, count) in enumerate(zip(latest, self.counts, strict=True)):
            # Another thread may have replaced the last few, but never an operation that was not made yet.
            if operation > count:
                found.append(f"thread {number} counted {count} operations, but an entry is of {operation}")
        return found


def make_value(key: int, number: int, operation: int, padding: int) -> bytes:
    """A value that says where it belongs; its length changes, so that the heap is churned too."""
    return HEAD.pack(key, number, operation) + bytes([operation % 251]) * padding


def term(key: int, value: bytes) -> int:
    """What an entry adds to the checksum."""
    return (key * 0x9E3779B97F4A7C15) ^ (zlib.crc32(value) << 24)


def main() -> int:
    """Build, churn until told to stop, verify."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--progress", required=True)
    parser.add_argument("--result", required=True)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--operations", type=int)
    options = parser.parse_args()

    stop_signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    progress_fd = os.open(options.progress, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    churn = Churn(options.entries, options.threads, options.operations, progress_fd)
    threads = [threading.Thread(target=churn.work, args=(number,)) for number in range(options.threads)]
    for thread in threads:
        thread.start()
    if options.operations is None:
        signal.sigwait(stop_signals)
        churn.finished.set()
    for thread in threads:
        thread.join()

    problems = churn.problems()
    with open(options.result, "w") as result:
        result.write("FAIL " if problems else "OK ")
        result.write(f"operations={churn.done} entries={len(churn.entries)} checksum={churn.checksum:016x}\n")
        result.writelines(f"{problem}\n" for problem in problems[:50])
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
