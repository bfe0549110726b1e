"""Calls of our own, many in one go."""

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from postcopy.kernel import own_calls
from postcopy.kernel.calls import call
from postcopy.kernel.own_calls import KEPT, OwnCalls


@pytest.fixture(params=["code", "one by one"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With code of ours, and without."""
    if request.param == "one by one":
        monkeypatch.setattr(own_calls, "_maker", lambda: (own_calls.one_by_one, None))


@pytest.mark.usefixtures("by")
def test_a_list_is_made_again_with_what_has_been_changed(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(f"{name} file")
    directory = os.open(tmp_path, os.O_PATH)
    calls = OwnCalls(4096)
    path, content = calls.place(b"one\0"), calls.room(16)
    opened = calls.add(call("openat", directory, path, os.O_RDONLY), keep=True)
    read = calls.add(call("pread64", KEPT, content, 16, 4))
    refused = calls.add(call("pread64", KEPT, content, 16, -1))
    closed = calls.add(call("close", KEPT))
    try:
        for name, offset in (("one", 4), ("two", 0)):
            calls.write(path, name.encode())
            calls.change(read, 4, offset)
            calls.make()
            assert calls.result(opened) > directory
            wanted = f"{name} file".encode()
            assert calls.read(content, 16) == wanted[offset:].ljust(16, b"\0")
            results = (len(wanted) - offset, -errno.EINVAL, 0)
            assert tuple(map(calls.result, (read, refused, closed))) == results
            assert calls.results(read, 3) == b"".join(each.to_bytes(8, "little", signed=True) for each in results)
        calls.write(path, b"none")
        calls.make()
        assert calls.result(opened) == -errno.ENOENT
        assert calls.result(read) == calls.result(closed) == -errno.EBADF
    finally:
        os.close(directory)


@pytest.mark.usefixtures("by")
def test_what_is_kept_at_the_beginning_is_given() -> None:
    calls = OwnCalls(512)
    calls.add(call("close", KEPT))
    read_end, write_end = os.pipe()
    calls.make(read_end)
    assert calls.result(0) == 0
    with pytest.raises(BrokenPipeError):
        os.write(write_end, b"x")
    os.close(write_end)


def test_where_no_code_can_be_written_they_are_made_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(mmap, "mmap", refuses)
    made: tuple[Callable[[int, int], None], object] = own_calls._maker.__wrapped__()
    assert made == (own_calls.one_by_one, None)
