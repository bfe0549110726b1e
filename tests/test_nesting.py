"""PID namespaces that a tree has made: numbers at each level, who can make whom, what contradicts itself."""

import pytest
from msgspec import structs

from postcopy.kinship import Relative, Unrelated, plan
from postcopy.nesting import COMMON, Nesting, PidNamespace

OUTER = PidNamespace(
    11, COMMON, [(11, 1), (12, 2), (13, 3), (14, 4)], awaited_by=[10], mounted_for=[10, 11, 12, 13, 14]
)
INNER = PidNamespace(13, 11, [(13, 1), (14, 2)], awaited_by=[], mounted_for=[])
PIDS = (10, 11, 12, 13, 14)
PARENTS = {10: 0, 11: 10, 12: 11, 13: 12, 14: 13}


def check(nesting: Nesting, parents: dict[int, int], group: int = 0) -> None:
    """Plan a tree of these processes."""
    nesting.check(plan(Relative(pid, parent, 0, group if pid != 10 else 0, 17) for pid, parent in parents.items()))


def test_numbers_of_each_level() -> None:
    nesting = Nesting([OUTER, INNER])
    assert [nesting.numbers(pid) for pid in PIDS] == [[10], [1, 11], [2, 12], [1, 3, 13], [2, 4, 14]]
    assert [nesting.seen(14, observer) for observer in PIDS] == [14, 4, 4, 2, 2]
    assert nesting.seen(12, 13) == nesting.seen(10, 11) == 0


def test_tree_in_which_each_init_is_made_by_its_parent() -> None:
    check(Nesting([OUTER, INNER]), PARENTS)


@pytest.mark.parametrize(
    ("parents", "reason"),
    [
        ({**PARENTS, 12: 10}, "12 is in another PID namespace than its parent"),
        ({**PARENTS, 13: 10}, "13 is in another PID namespace than its parent"),
        ({**PARENTS, 15: 11}, "15 is in another PID namespace than its parent"),
    ],
)
def test_process_that_nobody_can_make(parents: dict[int, int], reason: str) -> None:
    with pytest.raises(Unrelated, match=reason):
        check(Nesting([OUTER, INNER]), parents)


def test_mount_namespace_that_its_maker_has_not_begun() -> None:
    nesting = Nesting([structs.replace(OUTER, mounted_for=[11, 14]), INNER])
    with pytest.raises(Unrelated, match="12 is in another mount namespace than process 11"):
        check(nesting, PARENTS)


def test_proc_that_nobody_can_mount() -> None:
    with pytest.raises(Unrelated, match="nobody in the PID namespace of process 11 has its /proc"):
        check(Nesting([structs.replace(OUTER, mounted_for=[10]), INNER]), {10: 0})


@pytest.mark.parametrize(
    ("namespaces", "problem"),
    [
        ([INNER, OUTER], "parent: 11 is the init of none before it"),
        ([OUTER, OUTER], "init: 11 is no process, or has another one"),
        ([structs.replace(OUTER, init=99)], "init: 99 is no process"),
        ([structs.replace(OUTER, names=[(11, 1), (12, 1)])], "names: a number occurs twice"),
        ([structs.replace(OUTER, names=[(12, 1)])], "names: the init 11 is not called 1"),
        ([OUTER, structs.replace(INNER, names=[(13, 1), (10, 2)])], "names: somebody in it has no name"),
        ([structs.replace(OUTER, mounted_for=[99])], "mounted_for: 99 is no process"),
        ([OUTER, structs.replace(INNER, awaited_by=[10])], "in the awaited_by of two"),
        ([OUTER, structs.replace(INNER, awaited_by=[12, 11])], None),
        ([structs.replace(OUTER, awaited_by=[12])], "process 12 awaits children in a namespace that is not"),
    ],
)
def test_namespaces_that_contradict_themselves(namespaces: list[PidNamespace], problem: str | None) -> None:
    found = list(Nesting(namespaces).problems(PIDS))
    assert (problem is None and not found) or (problem and any(problem in each for each in found)), found
