"""postcopy inspect: what is in a checkpoint, and that nothing hostile in it reaches the terminal."""

import io
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from postcopy.checkpoint.format import About, Kind, pack_header, parse, parse_body
from postcopy.checkpoint.inspect import inspect
from postcopy.kernel.page import PAGE_SIZE
from postcopy.page_ranges import PageRanges
from postcopy.printable import printable
from postcopy.state import Descriptors, Process, Tree, encode
from tests.checkpoints import Taken, running, take
from tests.hosts import postcopy_command

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="stopping and reading a process takes root")

# Clears the screen, sets the title, turns the writing round, rings; and what rich would take for markup or a link.
HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e\r\n\b\x7f[red]x[/red][link=http://x]:smile:\udcff"
CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Taken:
    """A checkpoint that no test changes."""
    directory = tmp_path_factory.mktemp("taken")
    with running(directory) as program:
        return take(program.pid, directory / "checkpoint")


@pytest.fixture
def copy(taken: Taken, tmp_path: Path) -> Path:
    """A copy to do something to."""
    return Path(shutil.copytree(taken.directory, tmp_path / "copy"))


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``postcopy inspect``."""
    command = [*postcopy_command(), "inspect", *map(str, arguments)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, encoding="latin-1", timeout=60, env=environment)


def shown(directory: Path, as_json: bool = False) -> str:
    """What it shows."""
    with redirect_stdout(io.StringIO()) as output:
        inspect(directory, as_json)
    return output.getvalue()


def as_json(directory: Path) -> Any:
    """What it says as JSON."""
    return json.loads(shown(directory, as_json=True))


def change_state(
    directory: Path,
    change: Callable[[Process], Process],
    change_opened: Callable[[Descriptors], Descriptors] = lambda opened: opened,
) -> None:
    """Write another state, with the right checksum."""
    path = directory / "state"
    checkpoint, body = parse(str(path), path.read_bytes(), Kind.STATE)
    tree = parse_body(str(path), Tree, body)
    processes = [change(process) for process in tree.processes]
    content = encode(replace(tree, processes=processes, descriptors=change_opened(tree.descriptors)))
    path.write_bytes(pack_header(Kind.STATE, 0, checkpoint, content) + content)


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_tree_threads_descriptors_signals_and_credentials_are_shown(taken: Taken) -> None:
    text = shown(taken.directory)
    (process,) = taken.tree.processes
    name = process.threads[0].name.decode()
    files = taken.directory.parent
    assert taken.id.hex() in text
    assert re.search(rf"^{process.pid} {name}: .* MiB, 2 threads$", text, re.MULTILINE)
    for thread in process.threads:
        assert re.search(rf"^ *{thread.tid} +{name} +-?\d+  SIGUSR2", text, re.MULTILINE)
    assert re.search(r"SIGUSR1 +handler at 0x", text)
    assert re.search(r"SIGPIPE +ignored", text)
    assert re.search(rf"pending +SIGUSR2 from process {process.pid} \(user 0\)", text)
    assert re.search(r"0 +device +/dev/null, for reading", text)
    assert re.search(rf"1 +regular +{files}/output, for writing, at byte", text)
    assert re.search(rf"2 +regular +{files}/output, .*the same as descriptor 1\)", text)
    assert re.search(r"credentials +user 0, group 0", text)
    assert re.search(rf"program +{os.path.realpath(sys.executable)}", text)


def test_each_mapping_says_how_much_of_it_exists_is_zero_and_lazy(taken: Taken) -> None:
    (process,) = as_json(taken.directory)["processes"]
    left = taken.lazy.subtract(taken.zero)
    for vma in process["memory"]["vmas"]:
        counts = [ranges.clip(vma["start"], vma["end"]).total_pages for ranges in (taken.zero, left, taken.sent)]
        assert [vma["pages"][name] for name in ("zero", "lazy", "sent")] == counts
        assert vma["pages"]["exist"] == sum(counts)
    total = process["memory"]["pages"]
    assert (total["lazy"], total["zero"], total["sent"]) == (
        left.total_pages,
        taken.zero.total_pages,
        taken.sent.total_pages,
    )
    mapped = next(v for v in process["memory"]["vmas"] if v["name"].endswith("/mapped"))
    assert mapped["pages"] == {"exist": 22, "zero": 0, "lazy": 0, "sent": 22}
    line = next(line for line in shown(taken.directory).splitlines() if line.endswith("/mapped"))
    assert re.fullmatch(rf" *{mapped['start']:x}-{mapped['end']:x} +256 KiB +rw-p +88 KiB +88 KiB +/.*/mapped", line)


def test_json_gives_all_of_the_state(taken: Taken) -> None:
    found = as_json(taken.directory)
    (process,), (described,) = taken.tree.processes, found["processes"]
    assert found["id"] == taken.id.hex()
    assert found["sizes"] == {entry.name: entry.stat().st_size for entry in taken.directory.iterdir()}
    assert found["manifest"]["tids"] == taken.manifest.tids
    assert len(found["files"]) == len(taken.tree.files)
    assert len(found["descriptors"]["descriptions"]) == len(taken.tree.descriptors.descriptions)
    for field in ("threads", "memory", "signals", "timers", "limits", "filesystem", "slots", "stopped_by"):
        assert field in described
    first = described["threads"][0]
    assert set(first["registers"]) >= {"rip", "rsp", "orig_rax"}
    assert first["xstate"] == process.threads[0].xstate.hex()
    assert first["blocked_signals"] == ["SIGUSR2"]
    assert PageRanges.from_pairs(described["memory"]["lazy"]) == taken.lazy.subtract(taken.zero)


def test_lazy_pages_that_are_elsewhere_are_said_to_be(tmp_path: Path) -> None:
    with running(tmp_path, pages=64) as program:
        elsewhere = take(program.pid, tmp_path / "checkpoint", pages_elsewhere=True)
    assert "stayed with the frozen tree" in shown(elsewhere.directory)
    found = as_json(elsewhere.directory)
    assert found["pages_elsewhere"] is True
    assert found["processes"][0]["memory"]["pages"]["lazy"] == elsewhere.lazy.total_pages
    assert found["sizes"]["pages-0"] == elsewhere.sent.total_pages * PAGE_SIZE


def test_checkpoint_of_another_host_can_be_looked_at(copy: Path) -> None:
    path = copy / "manifest"
    checkpoint, body = parse(str(path), path.read_bytes(), Kind.MANIFEST)
    content = encode(replace(parse_body(str(path), About, body), architecture="m68k", cpu_features=["vampire"]))
    path.write_bytes(pack_header(Kind.MANIFEST, 0, checkpoint, content) + content)
    assert "m68k" in shown(copy)


def test_narrow_terminal(taken: Taken) -> None:
    text = on_terminal(taken.directory, columns=40)
    assert "/mapped" in text
    assert "Traceback" not in text


def on_terminal(directory: Path, columns: int = 200) -> str:
    """What it writes to a terminal."""
    leader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (50, columns))
    command = [*postcopy_command(), "inspect", str(directory)]
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, env={**os.environ, "TERM": "xterm"}) as process:
        os.close(terminal)
        content = b""
        try:
            while more := os.read(leader, 65536):
                content += more
        except OSError:
            pass  # EIO: nobody has the terminal open any more
        finally:
            os.close(leader)
        assert process.wait(60) == 0
    return content.decode()


def test_reader_that_goes_away_is_no_error(taken: Taken) -> None:
    command = [*postcopy_command(), "inspect", str(taken.directory), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0


# -- what is not -------------------------------------------------------------------------------------------------------


def hostile(process: Process) -> Process:
    """The state with such names wherever there are names."""
    memory, path = process.memory, "/" + HOSTILE
    return replace(
        process,
        threads=[replace(each, name=HOSTILE.encode(errors="surrogateescape")[:15]) for each in process.threads],
        memory=replace(
            memory,
            exe=path,
            vmas=[replace(vma, name=HOSTILE, flags=["\x1b["]) for vma in memory.vmas],
            files=[replace(each, path=path) for each in memory.files],
        ),
        filesystem=replace(process.filesystem, cwd=path, root=path),
    )


def hostile_files(table: Descriptors) -> Descriptors:
    """The same of what is open."""
    path = "/" + HOSTILE
    named = [replace(each, file=each.file and replace(each.file, path=path)) for each in table.descriptions]
    return replace(table, descriptions=named)


def test_hostile_names_do_not_reach_the_terminal(copy: Path) -> None:
    change_state(copy, hostile, hostile_files)
    for arguments in ([copy], [copy, "--json"]):
        result = run(*arguments)
        assert (result.returncode, result.stderr) == (0, "")
        assert not CONTROLS.search(result.stdout)
    text = shown(copy)
    assert r"\x1b[2J\x1b]0;owned\x07\x9b31m\u202e\r\n\x08\x7f[red]x[/red][link=http://x]:smile:\udcff" in text
    described = as_json(copy)["processes"][0]
    assert {vma["name"] for vma in described["memory"]["vmas"]} == {HOSTILE}


def test_on_a_terminal_only_our_own_escape_sequences_arrive(copy: Path) -> None:
    change_state(copy, hostile, hostile_files)
    text = on_terminal(copy)
    assert r"\x1b[2J" in text
    own = re.sub("\x1b\\[[0-9;]*m|\r\n", "", text)
    assert not CONTROLS.search(own)
    assert "\x1b]" not in text


def test_text_of_a_terminal_that_is_not_utf_8(copy: Path) -> None:
    change_state(copy, lambda process: replace(process, filesystem=replace(process.filesystem, cwd="/ünï/文")))
    result = run(copy, PYTHONIOENCODING="latin-1:strict")
    assert result.returncode == 0
    assert r"/ünï/\u6587" in result.stdout


def test_errors_hold_no_escape_sequences_either(copy: Path) -> None:
    change_state(copy, lambda process: replace(process, filesystem=replace(process.filesystem, cwd=HOSTILE)))
    result = run(copy)
    assert result.returncode == 12
    assert not CONTROLS.search(result.stderr)
    assert "Traceback" not in result.stderr
    assert f"{copy}/state: state.processes[0].filesystem.cwd: " in result.stderr


@pytest.mark.parametrize("name", ["manifest", "state", "pages-0.index"])
def test_damage_is_named(copy: Path, name: str) -> None:
    path = copy / name
    content = path.read_bytes()
    path.write_bytes(content[:200] + struct.pack("B", content[200] ^ 1) + content[201:])
    result = run(copy)
    assert (result.returncode, result.stdout) == (12, "")
    assert f"ERROR {path}: bytes 0 to " in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "missing"):
        result = run(directory)
        assert result.returncode == 12
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("text", "expected"), [("a b", "a b"), ("ä文", "ä文"), ("\x1b\n\u2028\u200f", r"\x1b\n\u2028\u200f")]
)
def test_printable(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_directory_that_may_not_be_read_is_told(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    argv = ["setpriv", "--reuid", "65534", "--clear-groups", *postcopy_command(), "inspect", str(closed / "checkpoint")]
    result = subprocess.run(argv, capture_output=True, timeout=20)
    assert result.returncode == 12, result.stderr
    assert b"Permission denied" in result.stderr
