"""The plan by which a tree's parents, sessions and groups come to be again, followed step by step as a kernel would."""

import random
from dataclasses import dataclass

import pytest

from postcopy.kinship import OUTSIDE, Making, Relative, Unrelated, joining, plan

SIGCHLD = 17


def relative(pid: int, parent: int, session: int = 0, group: int = 0, exit_signal: int = SIGCHLD) -> Relative:
    """A process."""
    return Relative(pid, parent, session, group, exit_signal)


@dataclass
class Task:
    """What the kernel knows of a process."""

    parent: int
    session: int
    group: int


class World:
    """The little of fork(2), setsid(2) and setpgid(2) that matters here, with the errors of the kernel."""

    def __init__(self, makings: dict[int, Making]) -> None:
        root = next(iter(makings))
        self.tasks = {root: Task(0, OUTSIDE, OUTSIDE)}
        for pid, making in makings.items():
            self._act(pid, making)
        for making in joining(makings):
            task, group = self.tasks[making.relative.pid], making.relative.group
            assert [each.session for each in self.tasks.values() if each.group == group][:1] == [task.session]
            assert task.session != making.relative.pid
            task.group = group
        for pid, making in makings.items():
            if not making.lasting:
                assert not any(task.parent == pid for task in self.tasks.values())
                del self.tasks[pid]

    def _act(self, pid: int, making: Making) -> None:
        task = self.tasks[pid]
        self._fork(making.early, pid, task)
        if making.makes_session:
            assert task.group != pid
            task.session = task.group = pid
        self._fork(making.middle, pid, task)
        if making.makes_group:
            assert task.session != pid
            task.group = pid
        self._fork(making.late, pid, task)
        self._fork(making.siblings, task.parent, task)

    def _fork(self, pids: list[int], parent: int, maker: Task) -> None:
        for pid in pids:
            assert pid not in self.tasks
            self.tasks[pid] = Task(parent, maker.session, maker.group)


def follow(relatives: list[Relative]) -> None:
    """The plan leads to just these relations."""
    world = World(plan(relatives))
    found = {pid: (task.parent, task.session, task.group) for pid, task in world.tasks.items()}
    assert found == {each.pid: (each.parent, each.session, each.group) for each in relatives}


def test_root_alone() -> None:
    follow([relative(10, 0)])
    follow([relative(10, 0, 10, 10)])
    follow([relative(10, 0, 0, 10)])


def test_child_that_was_born_before_its_parent_left_the_session() -> None:
    follow([relative(10, 0, 10, 10), relative(11, 10), relative(12, 10, 10, 10), relative(13, 11, 13, 13)])


def test_child_in_the_group_from_outside_below_a_leader() -> None:
    follow([relative(10, 0, 0, 10), relative(11, 10, 0, 10), relative(12, 11, 0, 0), relative(13, 12, 0, 11)][:3])


def test_parent_in_the_group_of_its_child() -> None:
    follow([relative(10, 0, 10, 10), relative(11, 10, 10, 12), relative(12, 11, 10, 12)])


def test_leader_that_has_left_its_group() -> None:
    follow([relative(10, 0, 10, 10), relative(11, 10, 10, 10), relative(12, 11, 10, 11)])


def test_gone_leaders_of_session_and_group() -> None:
    follow([relative(10, 0, 10, 10), relative(11, 10, 7, 7), relative(12, 10, 7, 8), relative(13, 12, 7, 8)])


def test_orphan_in_the_session_of_a_brother() -> None:
    follow([relative(10, 0), relative(11, 10, 11, 11), relative(12, 10, 11, 11), relative(13, 10, 11, 13)])


@pytest.mark.parametrize(
    ("relatives", "expected"),
    [
        ([relative(10, 0), relative(11, 0)], "2 processes without a parent"),
        ([relative(10, 0), relative(11, 12), relative(12, 11)], "not a descendant"),
        ([relative(10, 0), relative(11, 10), relative(12, 11, 12, 12), relative(13, 10, 12, 12)], "is in session 12"),
        ([relative(10, 0, 10, 10), relative(11, 10, 10, 0)], "group from outside"),
        ([relative(10, 0, 10, 10), relative(11, 10, 11, 11), relative(12, 10, 10, 11)], "group of another session"),
    ],
)
def test_what_cannot_be_planned_is_said(relatives: list[Relative], expected: str) -> None:
    with pytest.raises(Unrelated, match=expected):
        plan(relatives)


def grown(seed: int) -> list[Relative]:
    """A tree that has come to be by forks, setsid, setpgid, and ends that leave orphans to the root."""
    chance = random.Random(seed)
    tasks = {100: Task(0, OUTSIDE, OUTSIDE)}
    for _ in range(chance.randrange(60)):
        pid = chance.choice(list(tasks))
        task = tasks[pid]
        what = chance.random()
        if what < 0.6:
            new = chance.choice([p for p in range(101, 200) if p not in tasks and not _in_use(tasks, p)])
            tasks[new] = Task(pid, task.session, task.group)
        elif what < 0.72 and task.group != pid:
            task.session = task.group = pid
        elif what < 0.85 and task.session != pid:
            groups = [t.group for t in tasks.values() if t.session == task.session and t.group != OUTSIDE]
            task.group = chance.choice([pid, *groups])
        elif pid != 100:
            del tasks[pid]
            for orphan in tasks.values():
                if orphan.parent == pid:
                    orphan.parent = 100
    return [relative(pid, task.parent, task.session, task.group) for pid, task in tasks.items()]


def _in_use(tasks: dict[int, Task], pid: int) -> bool:
    return any(pid in (task.session, task.group) for task in tasks.values())


def test_trees_that_have_grown_by_chance_are_planned_or_refused() -> None:
    refused = 0
    for seed in range(1000):
        relatives = grown(seed)
        try:
            makings = plan(relatives)
        except Unrelated:
            refused += 1
            continue
        world = World(makings)
        found = {pid: (task.parent, task.session, task.group) for pid, task in world.tasks.items()}
        assert found == {each.pid: (each.parent, each.session, each.group) for each in relatives}, f"seed {seed}"
    assert refused < 100
