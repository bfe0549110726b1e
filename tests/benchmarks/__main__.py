"""``make bench``: programs are moved between two hosts; what they saw stands beside what the machine can do at best.

Prints one table and writes the same, with every run's own figures, as JSON. Options: ``make bench ARGS=--quick``.
"""

import argparse
import compileall
import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import postcopy
from tests.benchmarks import checkpoints, limits, moves
from tests.benchmarks.report import MIB, Figure, Spread, print_table, write_json
from tests.hosts import Pair
from tests.migrate import MigrationFailed

HERE = Path(__file__).parent
PARTS = ("moves", "trees", "descriptors", "directories")
ORDERS = ("random", "sequential")
STANDSTILL_TARGET = 0.050
RANDOM_TARGET = 3.0
P50_TARGET = 2.5
MEMORY_TARGET = 80 * MIB
WHOLE_TARGET = 1.5
LAZY_TARGET = 0.040
FILES_TARGET, CONNECTIONS_TARGET = 0.500, 0.150
FEW_TARGET, PROGRAMS_TARGET = 0.120, 2.0
# Seconds over which the load of others is taken, before each measurement.
LISTEN = 0.3


@dataclass
class Sizes:
    """MiB of the moved programs, faults of the bare fault; ``huge``, ``served``: MiB of programs in directories.

    ``files``, ``connections``: how many a program has open; ``forks``, ``programs``: processes in a tree; of as many as
    ``forks`` there is one of small programs, too (37 mappings each with the C library of Debian 12).
    """

    small: int
    large: int
    huge: int
    served: int
    faults: int
    files: int
    connections: int
    forks: int
    programs: int


FULL = Sizes(
    small=64, large=1024, huge=4096, served=512, faults=5000, files=10_000, connections=1000, forks=20, programs=500
)
QUICK = Sizes(small=16, large=128, huge=256, served=64, faults=1000, files=1000, connections=100, forks=5, programs=50)


@dataclass
class Measured:
    """What the runs have given: for each name the raw figures, run by run."""

    raw: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def take(self, run: int, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure once; a failed move is told and counted, and the others go on."""
        others = load_of_others()
        began = time.monotonic()
        try:
            figures = measure()
        except (MigrationFailed, OSError, subprocess.TimeoutExpired) as failure:
            self.failures.append(f"run {run}, {name}: {failure}")
            tell(f"  {name} FAILED: {failure}")
            return
        self.raw.setdefault(name, []).append({"run": run, "others_cpus": others, **figures})
        tell(f"  {name}: {time.monotonic() - began:.1f} s")

    def spread(self, name: str, *keys: str) -> Spread | None:
        """Of the figure at the end of these keys, over the runs."""
        values = []
        for figures in self.raw.get(name, []):
            value: Any = figures
            for key in keys:
                value = value[key]
            values.append(value)
        return Spread.of(values) if values else None

    def peak(self, names: Iterable[str], role: str | None = None) -> Spread | None:
        """Of a role's peak memory (of the largest one's without) in these moves of a run, over the runs."""
        peaks: dict[int, int] = {}
        for name in names:
            for figures in self.raw.get(name, []):
                seen = figures["peak_bytes"]
                values = seen.values() if role is None else [seen[role]] if role in seen else []
                for value in values:
                    peaks[figures["run"]] = max(peaks.get(figures["run"], 0), value)
        return Spread.of(list(peaks.values())) if peaks else None

    def pump(self) -> Spread | None:
        """Of the pump's seconds in pieces of the size that is best over all runs, not the luckiest size of each."""
        sizes: dict[int, list[float]] = {}
        for figures in self.raw.get("pump", []):
            for kib, seconds in figures["all"].items():
                sizes.setdefault(kib, []).append(seconds)
        return min(map(Spread.of, sizes.values()), key=lambda spread: spread.median) if sizes else None

    def roles(self) -> list[str]:
        """Every role whose memory has been seen, the known ones first."""
        seen = {role for runs in self.raw.values() for each in runs for role in each.get("peak_bytes", ())}
        known = [role for role in moves.ROLES.values() if role in seen]
        return known + sorted(seen.difference(known))

    def others(self) -> Spread | None:
        """Of the CPUs that others kept busy before each measurement."""
        values = [each["others_cpus"] for runs in self.raw.values() for each in runs]
        return Spread.of(values) if values else None


def tell(text: str) -> None:
    """A line on how far it is."""
    print(text, file=sys.stderr, flush=True)


def bare_fault_on_one_cpu(faults: int) -> dict[str, float]:
    """The bare fault without the wake-up of an idle CPU, which in a virtual machine can be most of it."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        return limits.bare_fault(faults)
    finally:
        os.sched_setaffinity(0, allowed)


def load_of_others() -> float:
    """How many CPUs are busy while nothing of ours runs."""

    def ticks() -> tuple[int, int]:
        numbers = [int(number) for number in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        # proc(5): user nice system idle iowait irq softirq steal.
        return sum(numbers), numbers[3] + numbers[4]

    total, idle = ticks()
    time.sleep(LISTEN)
    total_after, idle_after = ticks()
    busy = 1 - (idle_after - idle) / max(total_after - total, 1)
    return busy * (os.cpu_count() or 1)


def measure(runs: int, sizes: Sizes, parts: Sequence[str]) -> Measured:
    """All runs. The limits are taken within each, so that other load falls on them and on the moves alike."""
    measured = Measured()
    with Pair() as hosts:
        for run in range(1, runs + 1):
            tell(f"run {run} of {runs}")
            if "moves" in parts:
                measure_moves(run, measured, hosts, sizes)
            if "trees" in parts:
                measured.take(run, "few", partial(moves.with_children, hosts, "programs", sizes.forks))
                measured.take(run, "forks", partial(moves.with_children, hosts, "forks", sizes.forks))
                measured.take(run, "programs", partial(moves.with_children, hosts, "programs", sizes.programs))
            if "descriptors" in parts:
                measured.take(run, "files", partial(moves.with_files, hosts, sizes.files))
                measured.take(run, "connections", partial(moves.with_connections, sizes.connections))
            if "directories" in parts:
                measure_directories(run, measured, hosts, sizes)
    return measured


def measure_moves(run: int, measured: Measured, hosts: Pair, sizes: Sizes) -> None:
    """One run of what goes from host to host."""
    for mib in (sizes.small, sizes.large):
        measured.take(run, f"still {mib}", partial(moves.standing_still, hosts, mib))
    measured.take(run, "pump", partial(limits.pump, sizes.large * MIB, rounds=1))
    measured.take(run, "bare", partial(limits.bare_fault, sizes.faults))
    measured.take(run, "bare on one", partial(bare_fault_on_one_cpu, sizes.faults))
    for order in ORDERS:
        measured.take(run, order, partial(moves.touching, hosts, sizes.large, order))


def measure_directories(run: int, measured: Measured, hosts: Pair, sizes: Sizes) -> None:
    """One run of what goes to a directory and comes from it."""
    measured.take(run, "whole", partial(checkpoints.whole, hosts, sizes.large))
    for mib in (sizes.small, sizes.large):
        measured.take(run, f"left {mib}", partial(checkpoints.left_running, hosts, mib))
    for mib in (sizes.small, sizes.huge):
        measured.take(run, f"lazy {mib}", partial(checkpoints.lazy, hosts, mib))
    measured.take(run, "many", partial(checkpoints.many, hosts, sizes.served))


def size_of(mib: int) -> str:
    """For people."""
    return f"{mib} MiB" if mib < 1024 else f"{mib // 1024} GiB"


def row(
    group: str,
    name: str,
    unit: str,
    found: Spread | None,
    *,
    limit: tuple[str, Spread | None] = ("", None),
    target: float | None = None,
) -> Iterator[Figure]:
    """One row, if it has been measured."""
    if found is not None:
        yield Figure(group, name, unit, found, limit[0], limit[1], target)


def rows_of_checkpoints(measured: Measured, sizes: Sizes) -> Iterator[Figure]:
    """What goes to directories and comes from them."""
    spread = measured.spread
    large = size_of(sizes.large)
    write = ("plain write", spread("whole", "plain_write_seconds"))
    read = ("read, fresh memory", spread("whole", "plain_read_seconds"))
    found = spread("whole", "dump_seconds")
    yield from row("directory", f"dump to a tmpfs, {large}", "s", found, limit=write, target=WHOLE_TARGET)
    yield from row("directory", "  of it, until it is written", "s", spread("whole", "dump_still_seconds"), limit=write)
    yield from row("directory", "  the whole command", "s", spread("whole", "dump_command_seconds"), limit=write)
    found = spread("whole", "restore_seconds")
    yield from row("directory", f"eager restore, {large}", "s", found, limit=read, target=WHOLE_TARGET)
    yield from row("directory", "  the whole command", "s", spread("whole", "restore_command_seconds"), limit=read)
    for mib in (sizes.small, sizes.large):
        found = spread(f"left {mib}", "seen_seconds")
        yield from row("directory", f"stand-still, dump -R, {size_of(mib)}", "ms", found)
    for mib in (sizes.small, sizes.huge):
        name = f"lazy {mib}"
        found = spread(name, "seconds")
        yield from row("lazy", f"lazy restore runs, {size_of(mib)}", "ms", found, target=LAZY_TARGET)
        yield from row("lazy", "  the whole command", "ms", spread(name, "command_seconds"))
    together = f"{checkpoints.AT_ONCE} restores of {size_of(sizes.served)} at once"
    target = checkpoints.AT_ONCE * MEMORY_TARGET
    found = spread("many", "peak_bytes_together")
    yield from row("many", f"{together}, peak PSS together", "B", found, target=target)
    yield from row("many", f"{together}, until the last page", "s", spread("many", "seconds"))


def rows_of_many(measured: Measured, sizes: Sizes) -> Iterator[Figure]:
    """Trees of many processes, and programs that have much open."""
    for name, text, target in (
        ("few", f"{sizes.forks} small processes", FEW_TARGET),
        ("forks", f"{sizes.forks} copies of a Python program", None),
        ("programs", f"{sizes.programs} small processes", PROGRAMS_TARGET),
        ("files", f"{sizes.files} open files", FILES_TARGET),
        ("connections", f"{sizes.connections} TCP connections", CONNECTIONS_TARGET),
    ):
        found = measured.spread(name, "seen_seconds")
        yield from row("many", f"stand-still, {text}", "ms", found, target=target)


def rows(measured: Measured, sizes: Sizes) -> Iterator[Figure]:
    """The rows; what has not been measured has none."""
    spread = measured.spread
    pump = measured.pump()
    large = size_of(sizes.large)

    for mib, target in ((sizes.small, None), (sizes.large, STANDSTILL_TARGET)):
        still = f"still {mib}"
        yield from row("still", f"stand-still, {size_of(mib)}", "ms", spread(still, "seen_seconds"), target=target)
        yield from row("still", "  as dump says", "ms", spread(still, "standstill_seconds"))
        yield from row("still", "  the largest gap before the move", "ms", spread(still, "quiet_seconds"))
    for order in ORDERS:
        touched = spread(order, "program", "seconds")
        target = RANDOM_TARGET if order == "random" else None
        yield from row("touch", f"touching {large}, {order}", "s", touched, limit=("pump", pump), target=target)
        yield from row("touch", "  the loop alone", "s", spread(order, "program", "loop_seconds"))
    p50 = spread("random", "program", "p50")
    median = ("bare fault", spread("bare", "median_us"))
    yield from row("fault", "fault p50, random", "us", p50, limit=median, target=P50_TARGET)
    pinned = ("bare, on one CPU", spread("bare on one", "median_us"))
    yield from row("fault", "  beside a steadier limit", "us", p50, limit=pinned)
    rare = ("bare fault p99", spread("bare", "p99_us"))
    yield from row("fault", "fault p99, random", "us", spread("random", "program", "p99"), limit=rare)
    yield from row("fault", "fault p99.9, random", "us", spread("random", "program", "p99.9"))
    yield from row("fault", "fault max, random", "us", spread("random", "program", "max"))
    still = f"still {sizes.large}"
    for name, while_ in ((still, "nothing touched"), *((order, f"{order} touching") for order in ORDERS)):
        drained = spread(name, "drain_seconds")
        yield from row("drain", f"last page in, {large}, {while_}", "s", drained, limit=("pump", pump))
    for role in measured.roles():
        found = measured.peak((still, *ORDERS), role)
        yield from row("memory", f"peak RSS, {large}, {role}", "B", found, target=MEMORY_TARGET)
    largest = measured.peak([f"still {sizes.small}"])
    yield from row("memory", f"peak RSS, {sizes.small} MiB, the largest of all", "B", largest, target=MEMORY_TARGET)
    yield from rows_of_many(measured, sizes)
    yield from rows_of_checkpoints(measured, sizes)
    yield from row("others", "other work just before each measurement", "CPUs", measured.others())


def revision() -> str:
    """The commit of this checkout, and whether it has been changed since."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, cwd=HERE, check=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.decode().strip()


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    models = [line.split(": ", 1)[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpus": os.cpu_count(),
        "cpu_model": models[0] if models else "unknown",
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MIB,
        "python": platform.python_version(),
        "transparent_hugepages": Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip(),
    }


def main() -> int:
    """Measure, print, write; 0 if every move went well, whatever it took."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--runs", type=int, default=None, help="runs of everything (5; with --quick 1)")
    parser.add_argument("--only", choices=PARTS, help="measure this part alone")
    parser.add_argument("--quick", action="store_true", help="one run, smaller sizes: the targets are not meant for it")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="directory for the JSON file")
    options = parser.parse_args()
    if os.geteuid() != 0:
        tell("make bench: root is needed, to make the two hosts and to move a process")
        return 1
    runs = max(options.runs if options.runs is not None else 1 if options.quick else 5, 1)
    sizes = QUICK if options.quick else FULL
    # As it is where it has been installed, even if this environment keeps Python from caching what it compiles.
    compileall.compile_dir(Path(postcopy.__file__).parent, quiet=2)
    began = datetime.datetime.now(datetime.UTC)
    measured = measure(runs, sizes, [options.only] if options.only else PARTS)
    figures = list(rows(measured, sizes))
    facts = machine()
    where = f"kernel {facts['kernel']}, {facts['cpus']} CPUs ({facts['cpu_model']}), Python {facts['python']}"
    caption = f"{runs} run{'s' if runs > 1 else ''}; {where}"
    if options.quick:
        caption += "\nA quick look at smaller sizes: the targets are meant for 1 GiB."
    if measured.failures:
        caption += f"\n{len(measured.failures)} of the moves FAILED; they are in no figure."
    print_table(figures, caption)
    path = options.output / f"{began:%Y%m%dT%H%M%S}.json"
    content = {
        "began": began.isoformat(timespec="seconds"),
        "revision": revision(),
        "machine": facts,
        "runs": runs,
        "quick": options.quick,
        "figures": [figure.as_json() for figure in figures],
        "failures": measured.failures,
        "raw": measured.raw,
    }
    write_json(path, content)
    print(f"written to {path}")
    return 1 if measured.failures else 0


if __name__ == "__main__":
    sys.exit(main())
