"""A pool of worker processes that share memory, a lock, a semaphore and a queue, and are kept busy.

Runs until SIGTERM; then checks every result by another way of computing it, and writes ``OK …`` or ``FAIL …`` to the
result file. Every progress line is the number of tasks so far.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable
from multiprocessing import shared_memory
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Lock, Semaphore
from typing import Any, TypeAlias

WORKERS, TASKS_IN_A_ROUND = 4, 100
STEPS, FACTOR, TERM, MODULUS = 1000, 6364136223846793005, 1442695040888963407, 1 << 64
CELLS, COUNTER_BYTES = 4000, 8
SIZE = COUNTER_BYTES + CELLS

Answers: TypeAlias = "Queue[tuple[int, int]]"
Things: TypeAlias = "tuple[Lock, Semaphore, Answers]"
_things: Things
_memory: shared_memory.SharedMemory
_content: memoryview


def start_worker(name: str, things: Things) -> None:
    """Take what the workers share."""
    global _things, _memory, _content
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    _things, _memory = things, shared_memory.SharedMemory(name)
    _content = content(_memory)


def content(memory: shared_memory.SharedMemory) -> memoryview:
    """What is in it, as long as it is not closed."""
    assert memory.buf is not None
    return memory.buf


def work(task: int) -> int:
    """A linear congruential generator, step by step; the result goes three ways."""
    lock, at_most_two, answers = _things
    number = task
    for _ in range(STEPS):
        number = (number * FACTOR + TERM) % MODULUS
    with at_most_two:
        answers.put((task, number))
    with lock:
        count = int.from_bytes(_content[:COUNTER_BYTES], "little") + 1
        _content[:COUNTER_BYTES] = count.to_bytes(COUNTER_BYTES, "little")
        _content[COUNTER_BYTES + task % CELLS] ^= number & 255
    return number


def expected(task: int) -> int:
    """The same result in one step."""
    power = pow(FACTOR, STEPS, (FACTOR - 1) * MODULUS)
    return (task * power + TERM * ((power - 1) // (FACTOR - 1))) % MODULUS


def rounds(run: Callable[[Iterable[int]], Iterable[int]], memory: bytearray, answers: Answers, progress: int) -> str:
    """Keep the pool busy until SIGTERM; ``memory``: what the shared memory must hold then."""
    done = 0
    while signal.SIGTERM not in signal.sigpending():
        tasks = range(done, done + TASKS_IN_A_ROUND)
        wanted = [expected(task) for task in tasks]
        if list(run(tasks)) != wanted:
            return "FAIL results"
        if sorted(answers.get() for _ in tasks) != list(zip(tasks, wanted, strict=True)):
            return "FAIL queue"
        for task, number in zip(tasks, wanted, strict=True):
            memory[COUNTER_BYTES + task % CELLS] ^= number & 255
        done = tasks.stop
        os.write(progress, f"{done}\n".encode())
    memory[:COUNTER_BYTES] = done.to_bytes(COUNTER_BYTES, "little")
    return f"OK {done} tasks"


def main() -> None:
    """Start the pool, keep it busy, check."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--progress", required=True)
    parser.add_argument("--result", required=True)
    parser.add_argument("--start", choices=multiprocessing.get_all_start_methods(), required=True)
    parser.add_argument("--kind", choices=["multiprocessing", "futures"], required=True)
    options = parser.parse_args()
    context: Any = multiprocessing.get_context(options.start)
    progress = os.open(options.progress, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    memory, mirror = shared_memory.SharedMemory(create=True, size=SIZE), bytearray(SIZE)
    things: Things = context.Lock(), context.Semaphore(2), context.Queue()
    arguments: Any = memory.name, things
    # Before any thread is made: pending for all of them, it is seen by `rounds` alone.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        if options.kind == "futures":
            executor = concurrent.futures.ProcessPoolExecutor(WORKERS, context, start_worker, arguments)
            with executor:
                result = rounds(lambda tasks: executor.map(work, tasks), mirror, things[2], progress)
        else:
            with context.Pool(WORKERS, start_worker, arguments) as pool:
                result = rounds(lambda tasks: pool.imap(work, tasks, chunksize=5), mirror, things[2], progress)
                pool.close()
                pool.join()
        if result.startswith("OK") and bytes(content(memory)[:SIZE]) != mirror:
            result = f"FAIL shared memory: {bytes(content(memory)[:SIZE])!r}, not {bytes(mirror)!r}"
    finally:
        memory.close()
        memory.unlink()
    with open(options.result, "w") as stream:
        stream.write(result)
    sys.exit(not result.startswith("OK"))


if __name__ == "__main__":
    main()
