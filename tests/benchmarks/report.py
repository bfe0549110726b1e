"""Figures of several runs, beside limits and targets: as a table, and as JSON."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MIB = 1 << 20

_SHOWN: dict[str, Callable[[float], str]] = {
    "s": lambda value: f"{value:.2f} s",
    "ms": lambda value: f"{value * 1e3:.1f} ms",
    "us": lambda value: f"{value:.0f} µs",
    "B": lambda value: f"{value / MIB:.1f} MiB",
    "CPUs": lambda value: f"{value:.2f} CPUs",
}


@dataclass(frozen=True)
class Spread:
    """The median of the runs that gave this figure, with the smallest and the largest."""

    median: float
    min: float
    max: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """At least one value."""
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Figure:
    """One row. ``unit`` is s, ms (the values are seconds all the same), us, B or CPUs.

    With ``limit``, ``target`` is the largest allowed multiple of the limit's median; else the largest allowed value.
    """

    group: str
    name: str
    unit: str
    spread: Spread
    limit_name: str = ""
    limit: Spread | None = None
    target: float | None = None

    @property
    def ratio(self) -> float | None:
        """The median as a multiple of the limit's median."""
        return self.spread.median / self.limit.median if self.limit else None

    @property
    def reached(self) -> bool | None:
        """Whether the median keeps to the target; None without one."""
        if self.target is None:
            return None
        return (self.spread.median if self.ratio is None else self.ratio) <= self.target

    def show(self, value: float) -> str:
        """A value of this figure for people."""
        return _SHOWN[self.unit](value)

    def as_json(self) -> dict[str, Any]:
        """Everything, computed fields too."""
        return {**dataclasses.asdict(self), "ratio": self.ratio, "reached": self.reached}


def print_table(figures: Iterable[Figure], caption: str) -> None:
    """Print the figures, one section for each group."""
    table = Table(title="postcopy: what a move costs", caption=caption, caption_justify="left")
    for header in ("figure", "median", "min to max", "limit, same runs", "ratio", "target", "reached"):
        table.add_column(header, justify="left" if header in ("figure", "reached") else "right", no_wrap=True)
    group = ""
    for figure in figures:
        if figure.group != group:
            table.add_section()
            group = figure.group
        spread, limit = figure.spread, figure.limit
        target = ""
        if figure.target is not None:
            target = f"≤ {figure.target:g} x" if limit else f"≤ {figure.show(figure.target)}"
        table.add_row(
            figure.name,
            figure.show(spread.median),
            f"{figure.show(spread.min)} to {figure.show(spread.max)}",
            f"{figure.limit_name} {figure.show(limit.median)}" if limit else "",
            f"{figure.ratio:.2f} x" if figure.ratio is not None else "",
            target,
            {None: "", True: "yes", False: "NO"}[figure.reached],
        )
    console = Console()
    # Into a file or a pipe a table goes whole, whatever width is assumed there.
    (console if console.is_terminal else Console(width=160)).print(table)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write it, readable, with the directories above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
