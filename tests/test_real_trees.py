"""Real process trees and runtimes under load, moved there and back: make with its compilers, process pools, Node."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import Host, Pair, wait_until
from tests.migrate import Migration
from tests.test_real_programs import PID, PROGRAMS, end_of, grows_by, travel

SOURCES = 160
MAKEFILE = """\
# Two makes: the inner one gets its jobs by the pipe of the outer.
all:
\t$(MAKE) program
program: {objects}
\tgcc -o $@ $^
%.o: %.c
\tgcc -O1 -pipe -c -o $@ $<
"""
SOURCE = """\
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
{functions}
int unit{number}(int x)
{{
    char text[64];
    snprintf(text, sizeof text, "%d", {calls});
    return atoi(text) + (int)strlen(text);
}}
"""
FUNCTION = (
    "static int step{step}(int x) {{ for (int i = 0; i < {step}; i++) x = x * {factor} + (x >> {shift}); return x; }}"
)


def needs(*programs: str) -> None:
    """Skip the test where one of them is not installed."""
    if missing := [program for program in programs if shutil.which(program) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")


def write_sources(directory: Path) -> None:
    """A program of many files, of which each object depends on what is in its source."""
    directory.mkdir()
    for number in range(SOURCES):
        steps = range(1, 8)
        functions = [FUNCTION.format(step=step, factor=2 * number + step, shift=number % 5 + 1) for step in steps]
        calls = " ^ ".join(f"step{step}(x + {number})" for step in steps)
        text = SOURCE.format(functions="\n".join(functions), number=number, calls=calls)
        (directory / f"unit{number}.c").write_text(text)
    declarations = "".join(f"int unit{number}(int);\n" for number in range(SOURCES))
    calls = "".join(f"    x ^= unit{number}(x);\n" for number in range(SOURCES))
    main = f'#include <stdio.h>\n{declarations}int main(void)\n{{\n    int x = 1;\n{calls}    printf("%d\\n", x);\n}}\n'
    (directory / "main.c").write_text(main)
    objects = " ".join(f"unit{number}.o" for number in range(SOURCES))
    (directory / "Makefile").write_text(MAKEFILE.format(objects=f"{objects} main.o"))


def products(directory: Path) -> dict[str, bytes]:
    """What make has made."""
    made = [path for path in directory.iterdir() if path.suffix in (".o", "")]
    return {path.name: path.read_bytes() for path in made if path.name != "Makefile"}


def test_make_and_its_compilers_make_the_same(hosts: Pair, tmp_path: Path) -> None:
    needs("make", "gcc")
    directory, other, log = tmp_path / "moved", tmp_path / "unmoved", tmp_path / "log"
    write_sources(directory)
    shutil.copytree(directory, other)
    with open(log, "wb") as output:
        hosts.a.popen(["make", "-j4"], pid=PID, cwd=directory, stdout=output, stderr=output)
    shares: Iterator[float] = iter([0.15, 0.45])

    def build_some(host: Host) -> None:
        wanted = next(shares) * SOURCES
        built = lambda: len(list(directory.glob("*.o"))) >= wanted or not host.alive(PID)  # noqa: E731
        wait_until(built, 60, f"{wanted} objects are there")

    last = travel(hosts, PID, 2, build_some)
    assert moved_processes(last) > 2, "make had no compilers when it was moved"
    assert end_of(last) == 0, log.read_text()
    said = log.read_text()
    assert "jobserver" not in said and "warning" not in said, said
    subprocess.run(["make", "-s", "-j2"], cwd=other, check=True, timeout=120)
    moved, unmoved = products(directory), products(other)
    assert moved.keys() == unmoved.keys()
    assert [name for name in moved if moved[name] != unmoved[name]] == []
    assert len(moved) == SOURCES + 2


def moved_processes(migration: Migration) -> int:
    """How many processes a move has frozen."""
    (count,) = [event["processes"] for event in migration.dump_events if event["event"] == "frozen"]
    return int(count)


def survives(hosts: Pair, directory: Path, command: list[str], moves: int) -> Migration:
    """Start a program that checks itself, move it under load, end it and read what it found."""
    progress, result, errors = directory / "progress", directory / "result", directory / "stderr"
    with open(errors, "wb") as stderr:
        words = [word.format(progress=progress, result=result) for word in command]
        hosts.a.popen(words, pid=PID, stderr=stderr)
    last = travel(hosts, PID, moves, lambda host: grows_by(progress, 5, host))
    grows_by(progress, 10, last.destination)
    last.destination.kill(PID, signal.SIGTERM)
    status = end_of(last)
    assert result.exists(), f"ended with {status}: {errors.read_text()}"
    assert (status, result.read_text()[:3]) == (0, "OK "), result.read_text()
    assert errors.read_text() == ""
    return last


@pytest.mark.parametrize(
    ("kind", "start", "moves"),
    [("multiprocessing", "fork", 1), ("futures", "spawn", 2), ("multiprocessing", "forkserver", 1)],
)
def test_pool_of_processes_goes_on_working(hosts: Pair, tmp_path: Path, kind: str, start: str, moves: int) -> None:
    command = [sys.executable, str(PROGRAMS / "pool_load.py"), "--kind", kind, "--start", start]
    last = survives(hosts, tmp_path, [*command, "--progress", "{progress}", "--result", "{result}"], moves)
    assert moved_processes(last) >= 5, "the workers were not moved"


def test_node_goes_on_working(hosts: Pair, tmp_path: Path) -> None:
    needs("node")
    survives(hosts, tmp_path, ["node", str(PROGRAMS / "churn.js"), "{progress}", "{result}"], moves=2)
