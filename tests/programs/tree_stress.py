#!/usr/bin/env python3
"""A tree of processes that change their memory, and what they share, at random, and check every byte they read.

The root keeps as many workers alive as it is told; each lives for some hundred operations and then ends, executes this
program anew, or makes its own successor. A worker does what the threads of `layout_stress` do to memory of its own, and
more: guard regions, memory that a child does not get or gets empty, stacks that grow, reserves of terabytes. It shares
memory of every kind with the others (`tree_areas`) and passes messages round in a ring of pipes.

The file READY tells that all workers are at work; once there is a file STOP each worker checks all that it has and
ends, and RESULT says what was found. Exit status: 0 nothing was wrong, 1 something was.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import faulthandler
import json
import mmap
import os
import random
import resource
import signal
import struct
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from tests.programs.layout_stress import (
    CHILD_OPERATIONS,
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_PRIVATE,
    PAGE,
    PROT_NONE,
    PROT_READ_WRITE,
    Actor,
    Broken,
    Region,
    World,
    copy_in,
    mix_seed,
    page_bytes,
    sys_madvise,
    sys_mmap,
    sys_mprotect,
    sys_munmap,
    sys_pwrite,
)
from tests.programs.tree_areas import Area

MADV_DONTNEED, MADV_DONTFORK, MADV_DOFORK, MADV_WIPEONFORK, MADV_KEEPONFORK = 4, 10, 11, 18, 19
MADV_GUARD_INSTALL, MADV_GUARD_REMOVE = 102, 103
MAP_GROWSDOWN, MAP_NORESERVE = 0x100, 0x4000
PR_SET_CHILD_SUBREAPER = 36
STACK_GAP = 256 * PAGE  # which the kernel leaves below what grows downwards
RESERVE = 1 << 40  # bytes
SLOT = 1 << 30  # bytes between what is in use of the reserve
SLOTS = 8
MESSAGE = struct.Struct("<QQ")
COPIES = 32  # of the pair in a message: 512 bytes, less than PIPE_BUF
AREAS = {"anonymous": 1024, "memfd": 1024, "segment": 1024, "deleted file": 128, "file": 64}
HUGE_AREAS = {"huge anonymous": 1024, "huge memfd": 1024, "huge private": 1024}

TREE_OPERATIONS = {
    **CHILD_OPERATIONS,
    "op_fork": 3, "op_reap": 2, "op_spawn": 1,
    "op_guard": 3, "op_unguard": 3, "op_wipe": 2, "op_hide": 2, "op_give_again": 2, "op_stack": 2, "op_commit": 4,
    "op_area_look": 40, "op_area_write": 20, "op_area_punch": 3, "op_area_layout": 5,
    "op_pass_on": 25,
}  # fmt: skip
OF_CHILDREN = {**CHILD_OPERATIONS, "op_area_look": 10, "op_unguard": 2}


class Board:
    """Numbers in shared memory, eight for each worker."""

    STOP, SENT, RECEIVED, BEATS, LIFE = range(5)

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = memoryview(mmap.mmap(fd, PAGE)).cast("Q")

    def get(self, worker: int, what: int) -> int:
        """One number."""
        return self._memory[worker * 8 + what]

    def set(self, worker: int, what: int, value: int) -> None:
        """Of the worker whose number it is alone."""
        self._memory[worker * 8 + what] = value


class Worker(Actor):
    """One process of the tree in one of its lives."""

    def __init__(self, world: World, number: int, tree: Tree, life: int) -> None:
        super().__init__(world, number, world.options.pages)
        self.random = random.Random(f"{world.options.seed}/{number}/{life}")
        self.child_operations = OF_CHILDREN
        self.tag = self.random.randrange(1, 1 << 15)
        world.moved.set()
        self.tree = tree
        self.life = life
        self.guarded: list[Region] = []
        self.reserve: dict[int, Region] = {}
        self.own = [range(number, area.pages, world.options.workers) for area in tree.areas]

    def _file(self, purpose: str) -> str:
        # The same in each life: a file that is gone when the destination looks for it would be missed there.
        return f"{self.world.options.scratch}/tree-stress-{self.number}-{purpose}"

    # Memory that children see otherwise

    def inherit(self) -> None:
        """What a forked child has of it."""
        super().inherit()
        self.regions = [region for region in self.regions if region.kind != "hidden"]
        self.reserve = {}
        for region in self.regions:
            if region.kind == "wiped":
                region.put(0, [0] * region.pages)

    def _whole(self, kind: str) -> Region | None:
        """Part of an anonymous region with all its pages here, which gets another kind."""
        region = self.carve("anonymous", suitable=lambda region: region.writable)
        if region is not None:
            self.unlock(region)
            region.check()
            self.note(f"{kind}:", region)
            region.kind = kind
        return region

    def op_wipe(self) -> None:
        if region := self._whole("wiped"):
            sys_madvise(region.address, region.length, MADV_WIPEONFORK)
            # It may have moved in between: what is missing when that is said would come to a child all the same.
            region.check()

    def op_hide(self) -> None:
        if region := self._whole("hidden"):
            sys_madvise(region.address, region.length, MADV_DONTFORK)

    def op_give_again(self) -> None:
        if region := self.pick("wiped", "hidden"):
            advice = MADV_KEEPONFORK if region.kind == "wiped" else MADV_DOFORK
            sys_madvise(region.address, region.length, advice)
            region.kind = "anonymous"

    # Guard regions

    def op_guard(self) -> None:
        region = self._whole("guard")
        if region is None:
            return
        # It may move in between: what is missing when that is said would come all the same.
        sys_madvise(region.address, region.length, MADV_DONTNEED)
        region.put(0, [0] * region.pages)
        try:
            sys_madvise(region.address, region.length, MADV_GUARD_INSTALL)
        except OSError as error:
            if error.errno != errno.EINVAL:  # before Linux 6.13
                raise
            region.kind = "anonymous"
            return
        self.regions.remove(region)
        self.guarded.append(region)

    def op_unguard(self) -> None:
        if not self.guarded:
            return
        region = self.guarded.pop(self.random.randrange(len(self.guarded)))
        self.note("no guard any more:", region)
        self._guard_holds(region)
        sys_madvise(region.address, region.length, MADV_GUARD_REMOVE)
        region.kind = "anonymous"
        region.check()
        self.regions.append(region)

    def _guard_holds(self, region: Region) -> None:
        for page in {0, region.pages - 1, self.random.randrange(region.pages)}:
            self._expect_error(errno.EFAULT, sys_pwrite, self.scratch, region.at(page), 16, 0)

    # A stack that grows, and a reserve

    def op_stack(self) -> None:
        """Touch pages below memory that grows downwards; make it first, in a hole that is large enough."""
        region = self.pick("stack")
        if region is None or region.pages > 512:
            if region is not None:
                region.check()
                sys_munmap(region.address, region.length)
                self.regions.remove(region)
            hole = 1024 * PAGE
            address = sys_mmap(0, hole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
            sys_munmap(address, hole)
            flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED
            sys_mmap(address + hole - 4 * PAGE, 4 * PAGE, PROT_READ_WRITE, flags, -1, 0)
            region = Region("stack", address + hole - 4 * PAGE, [0] * 4)
            self.write(region, 0, 4)
            self.regions.append(region)
            return
        more = self.random.randint(1, 40)
        token = self.token()
        self.note(f"{more} pages more", region)
        lowest, page = region.address - more * PAGE, page_bytes(token)
        if _free_below(region.address) < STACK_GAP + (more + 1) * PAGE:
            return
        # At once: whatever Python allocates may be mapped in the hole.
        copy_in(lowest, page)
        region.address = lowest
        region.contents[:0] = [token] + [0] * (more - 1)
        region.freed = {page + more for page in region.freed}
        region.check()

    def op_commit(self) -> None:
        """Take pages of the reserve into use, or give them back."""
        slot = self.random.randrange(SLOTS)
        address = self.base + slot * SLOT
        region = self.reserve.pop(slot, None)
        if region is not None:
            self.note("given back:", region)
            region.check()
            self.regions.remove(region)
            sys_madvise(address, region.length, MADV_DONTNEED)
            sys_mprotect(address, region.length, PROT_NONE)
            return
        region = self.reserve[slot] = Region("committed", address, [0] * self.random.randint(1, 200))
        self.note("taken into use:", region)
        sys_mprotect(address, region.length, PROT_READ_WRITE)
        region.check()
        self.write(region, *self.span(region, 64))
        self.regions.append(region)

    # What is shared

    def _any_area(self) -> Area:
        return self.random.choice([area for area in self.tree.areas if area.address])

    def op_area_look(self) -> None:
        area = self._any_area()
        start, by_descriptor = self.random.randrange(area.pages), self.random.random() < 0.3
        for page in range(start, min(start + self.random.randint(1, 6), area.pages)):
            area.look(page, by_descriptor)
            self.counts["shared pages checked"] += 1

    def op_area_write(self) -> None:
        area = self._any_area()
        page = self.random.choice(self.own[area.number])
        self.note(f"write page {page} of area {area.number} ({area.kind})")
        area.write(page, self.random)

    def op_area_punch(self) -> None:
        area = self._any_area()
        if area.has_holes:
            page = self.random.choice(self.own[area.number])
            self.note(f"MADV_REMOVE of page {page} of area {area.number} ({area.kind})")
            area.punch(page)

    def op_area_layout(self) -> None:
        area = self._any_area()
        how = self.random.choice(("drop", "move", "map again"))
        self.note(f"{how} area {area.number} ({area.kind})")
        if how == "drop" and not area.is_private:
            area.drop(self.random)
        elif (how == "move" and area.kind != "segment") or (area.is_huge and area.is_anonymous):
            area.move()
        else:
            area.map_again()
        for _ in range(4):
            self.op_area_look()

    def op_pass_on(self) -> None:
        """A message to the next worker, and one from the worker before, if there is one."""
        board, pipes = self.tree.board, self.tree.pipes
        serial = board.get(self.number, Board.SENT) + 1
        with contextlib.suppress(BlockingIOError):
            os.write(pipes[(self.number + 1) % len(pipes)][1], MESSAGE.pack(self.number, serial) * COPIES)
            board.set(self.number, Board.SENT, serial)
        with contextlib.suppress(BlockingIOError):
            message = os.read(pipes[self.number][0], MESSAGE.size * COPIES)
            serial = board.get(self.number, Board.RECEIVED) + 1
            sender = (self.number - 1) % len(pipes)
            if message != MESSAGE.pack(sender, serial) * COPIES:
                raise Broken("a message is not the next one", expected=[sender, serial], seen=message[:32].hex())
            board.set(self.number, Board.RECEIVED, serial)
            self.counts["messages"] += 1

    # The course of things

    def live(self) -> NoReturn:
        """A whole life."""
        options, board = self.world.options, self.tree.board
        status = 1
        try:
            faulthandler.enable()
            faulthandler.register(signal.SIGALRM, file=sys.stderr, all_threads=True, chain=True)
            self.base = sys_mmap(0, RESERVE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
            for area, own in zip(self.tree.areas, self.own, strict=True):
                if area.address:
                    area.take_over(own)
            self.fill()
            left = self.random.randint(100, 1500)
            while left > 0 and not board.get(0, Board.STOP):
                signal.alarm(int(options.hang_seconds))
                self._steps(TREE_OPERATIONS, 20)
                left -= 20
                board.set(self.number, Board.BEATS, board.get(self.number, Board.BEATS) + 1)
                time.sleep(self.random.choice((0, 0, 0.001, 0.003)))
            self.end_of_life()
            if not board.get(0, Board.STOP) and self.random.random() < 0.4:
                self.tree.execute_again(self)
            status = 0
        except BaseException as error:
            Path(f"{options.result}.failure-{os.getpid()}").write_text(json.dumps(self.report(error), indent=1))
        finally:
            os._exit(status)

    def end_of_life(self) -> None:
        """Everything is looked at once more."""
        while self.guarded:
            self.op_unguard()
        self.finish()
        for area, own in zip(self.tree.areas, self.own, strict=True):
            for page in own if area.address else ():
                area.check_own(page)
        self.counts["lives"] += 1
        self.counts["steps"] += self.steps
        line = json.dumps(self.counts) + "\n"
        with open(f"{self.world.options.result}.counts", "a") as stream:
            stream.write(line)

    def report(self, error: BaseException) -> dict[str, Any]:
        """With the life."""
        return {**super().report(error), "life": self.life}


def _free_below(address: int) -> int:
    """Bytes between a mapping and the one below it."""
    before, maps = "", Path("/proc/self/maps").read_text()
    while before != maps:
        # A move between two pieces of what is read leaves them from two hosts.
        before, maps = maps, Path("/proc/self/maps").read_text()
    below = 0
    for line in maps.splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start >= address:
            break
        below = end
    return address - below


class Tree:
    """What all processes have: the areas, the board, the ring of pipes; and who makes new ones."""

    def __init__(self, options: argparse.Namespace, areas: list[Area], board: Board, pipes: list[list[int]]) -> None:
        self.options = options
        self.areas = areas
        self.board = board
        self.pipes = pipes

    @classmethod
    def new(cls, options: argparse.Namespace) -> Tree:
        """Of the root."""
        scratch = Path(options.scratch)
        kinds = {**AREAS, **(HUGE_AREAS if options.huge else {})}
        areas = [Area.make(number, kind, pages, scratch) for number, (kind, pages) in enumerate(kinds.items())]
        fd = os.memfd_create("board", 0)
        os.ftruncate(fd, PAGE)
        pipes = [list(os.pipe()) for _ in range(options.workers)]
        os.set_inheritable(fd, True)
        for end in (end for pipe in pipes for end in pipe):
            os.set_inheritable(end, True)
            os.set_blocking(end, False)
        return cls(options, areas, Board(fd), pipes)

    def fork(self, number: int, life: int) -> int:
        """A new worker; its PID."""
        pid = os.fork()
        if pid == 0:
            Worker(World(self.options), number, self, life).live()
        return pid

    def execute_again(self, worker: Worker) -> NoReturn:
        """Go on as another program, with nothing but descriptors; anonymous memory that is shared is lost with it."""
        signal.alarm(0)
        handed = {
            "worker": worker.number,
            "life": worker.life + 1000,
            "board": self.board.fd,
            "pipes": self.pipes,
            "areas": [[area.number, area.kind, area.pages, area.fd, area.segment, area.seen] for area in self.areas],
        }
        fd = os.memfd_create("handed on", 0)
        os.write(fd, json.dumps(handed).encode())
        os.lseek(fd, 0, os.SEEK_SET)
        os.set_inheritable(fd, True)
        os.execv(
            sys.executable, [sys.executable, "-m", "tests.programs.tree_stress", *sys.argv[1:], "--go-on", str(fd)]
        )

    @classmethod
    def go_on(cls, options: argparse.Namespace) -> NoReturn:
        """After execve."""
        with open(options.go_on) as stream:
            handed = json.load(stream)
        areas = []
        for number, kind, pages, fd, segment, seen in handed["areas"]:
            area = Area(number, kind, pages, fd, segment, 0, seen)
            if not area.is_anonymous:
                area.attach()
            areas.append(area)
        # The descriptor that was handed on is in the arguments, which go on to the next life.
        del sys.argv[-2:]
        tree = cls(options, areas, Board(handed["board"]), handed["pipes"])
        Worker(World(options), handed["worker"], tree, handed["life"]).live()


def root(options: argparse.Namespace) -> int:
    """Keep the workers alive until told to stop; the exit status."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    tree = Tree.new(options)
    workers = {tree.fork(number, 0): number for number in range(options.workers)}
    lives = 0
    announced = stopping = False
    counts: Counter[str] = Counter()
    failures: list[Any] = []
    while workers:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid:
            number = workers.pop(pid, None)
            counts["workers that ended" if number is not None else "orphans that ended"] += 1
            if status:
                failures.append({"pid": pid, "worker": number, "status": os.waitstatus_to_exitcode(status)})
                break
            if number is not None and not stopping:
                lives += 1
                workers[tree.fork(number, lives)] = number
            continue
        if not announced and all(tree.board.get(number, Board.BEATS) for number in range(options.workers)):
            Path(options.ready).touch()
            announced = True
        if not stopping and os.path.exists(options.stop):
            tree.board.set(0, Board.STOP, 1)
            stopping = True
        for area in tree.areas:
            area.look(random.randrange(area.pages))
        time.sleep(0.002)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    for area in tree.areas:
        if not failures:
            for page in range(area.pages):
                area.look(page)
                area.check_own(page)
        area.remove()
    publish(options, counts, failures)
    return 1 if failures else 0


def publish(options: argparse.Namespace, counts: Counter[str], failures: list[Any]) -> None:
    """The result."""
    path = Path(options.result)
    for report in sorted(path.parent.glob(f"{path.name}.failure-*")) + sorted(path.parent.glob(f"{path.name}.child-*")):
        failures.append(json.loads(report.read_text()))
    with contextlib.suppress(FileNotFoundError):
        for line in Path(f"{options.result}.counts").read_text().splitlines():
            counts.update(json.loads(line))
    draft = path.with_name(path.name + ".part")
    result = {"ok": not failures, "seed": options.seed, "failures": failures, "counts": dict(sorted(counts.items()))}
    draft.write_text(json.dumps(result, indent=1) + "\n")
    draft.rename(path)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", default="0", help="any string")
    parser.add_argument("--huge", action="store_true", help="areas of hugetlb pages, too")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--pages", type=int, default=1500, help="of each worker's own memory, about")
    for name in ("result", "ready", "stop"):
        parser.add_argument(f"--{name}", required=True, metavar="FILE")
    parser.add_argument("--hang-seconds", type=float, default=60)
    parser.add_argument("--without", type=lambda names: names.split(","), default=[], metavar="OPERATIONS")
    parser.add_argument("--maps", action="store_true", help="put /proc/self/maps into a failure's report")
    parser.add_argument("--sabotage", choices=("lost", "revived", "exchanged", "byte"), help="must fail then")
    parser.add_argument("--go-on", type=int, default=-1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.scratch = str(Path(options.result).resolve().parent)
    return options


def main() -> int:
    """Root, or a worker that has executed this."""
    options = parse_options()
    mix_seed(options.seed)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most))
    if options.go_on >= 0:
        Tree.go_on(options)
    try:
        return root(options)
    except Exception as error:
        details = error.details if isinstance(error, Broken) else {}
        publish(options, Counter(), [{"what": str(error), **details, "traceback": traceback.format_exception(error)}])
        return 1


if __name__ == "__main__":
    sys.exit(main())
