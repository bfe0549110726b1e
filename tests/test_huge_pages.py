"""hugetlb memory moves where the destination has the pages for it, and is refused where it has not."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import Pair
from tests.migrate import MigrationFailed
from tests.programs.cases.shared_memory import HugeFiles, HugePages
from tests.test_states import run_program

NUMBER = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


@contextlib.contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """So many hugetlb pages on this machine, and so on both hosts together."""
    if not NUMBER.exists():
        pytest.skip("this kernel has no hugetlb pages of 2 MiB")
    before = NUMBER.read_text()
    try:
        NUMBER.write_text(str(count))
        if int(NUMBER.read_text()) < count:
            pytest.skip(f"the kernel gives only {NUMBER.read_text().strip()} of {count} hugetlb pages")
        yield
    finally:
        NUMBER.write_text(before)


def test_huge_pages_move_there_and_back(hosts: Pair, tmp_path: Path) -> None:
    with huge_pages(4 * HugePages.PAGES):
        assert run_program(hosts, tmp_path, 2, "--only", HugePages.name()) == {HugePages.name(): None}


def test_files_of_huge_pages_move_there_and_back(hosts: Pair, tmp_path: Path) -> None:
    with huge_pages(2 * HugeFiles.PAGES + 2):
        assert run_program(hosts, tmp_path, 2, "--only", HugeFiles.name()) == {HugeFiles.name(): None}


def test_too_few_huge_pages_are_refused_before_the_freeze(hosts: Pair, tmp_path: Path) -> None:
    with huge_pages(4 * HugePages.PAGES - 2), pytest.raises(MigrationFailed) as refusal:
        run_program(hosts, tmp_path, 1, "--only", HugePages.name())
    assert "6 hugetlb pages of 2048 KiB are needed here, 2 more than are free: raise /sys/kernel" in str(refusal.value)
    assert '"frozen"' not in str(refusal.value)
