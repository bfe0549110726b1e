"""What a migration tells its user: events, as log lines, as JSON, or as a progress bar on a terminal."""

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import Struct, field, structs

if TYPE_CHECKING:
    from postcopy.check import Finding
    from postcopy.state import Manifest

log = logging.getLogger("postcopy")

MIB = 1024 * 1024
# Tests of what happens when a side dies at a given step let it stop itself there: the name of an event.
PAUSE_AT = "POSTCOPY_PAUSE_AT"


class Reporter(Protocol):
    """Takes events: a name and fields (bytes, nanoseconds, counts, texts)."""

    def event(self, name: str, /, **fields: Any) -> None:
        """Something has happened."""


class Silent:
    """For callers who do not want to be told."""

    def event(self, name: str, /, **fields: Any) -> None:
        """Nothing is done with it."""


_SENTENCES = {
    "listening": "listening at {address}:{port} for a destination of process {pid} ({name})",
    "serving": "serving the checkpoint of process {pid} ({name}) at {address}:{port}",
    "written": "the process is in {directory}, with {bytes} bytes of pages",
    "connected": "connected to {peer} (kernel {kernel})",
    "prepared": "the destination can take it",
    "frozen": "frozen: {threads} threads",
    "state": "state sent, with {boot_bytes} bytes of pages; {lazy_pages} pages stay behind for now",
    "built": "built process {pid}: {threads} threads",
    "filled": "all of its memory is in: {pages} pages",
    "running": "process {pid} runs here now; {lazy_pages} pages are still to come",
    "resumed": "the program runs at the destination; its memory is served from here until the last page is over there",
    "drained": "every page is in",
    "killed": "the source's process {pid} has ended; nothing is left here",
    "exited": "process {pid} ended with status {status}",
}


class Printer:
    """Events for people (log lines, or a progress bar where the output is a terminal) or for programs (JSON)."""

    def __init__(self, as_json: bool, statistics: bool) -> None:
        """``as_json``: one JSON object a line on standard output. ``statistics``: the table at the end in any case."""
        self._json = as_json
        self._statistics = statistics
        self._started = time.monotonic_ns()
        self._bar: _Bar | None = None if as_json or not sys.stderr.isatty() else _Bar()
        self._held: list[tuple[str, dict[str, Any]]] | None = None

    def leave_screen(self) -> None:
        """From here on a terminal's screen is the program's: what happens is shown when that has ended."""
        if sys.stderr.isatty() and not self._json:
            self._held = []

    def event(self, name: str, /, **fields: Any) -> None:
        """Show it."""
        if self._held is None:
            self._show(name, fields)
        elif name == "exited":
            held, self._held = self._held, None
            for each in (*held, (name, fields)):
                self._show(*each)
        elif name != "progress":
            self._held.append((name, fields))
        if name == os.environ.get(PAUSE_AT):
            os.kill(os.getpid(), signal.SIGSTOP)

    def _show(self, name: str, fields: dict[str, Any]) -> None:
        # Where what we say cannot be written, that is no reason to end what we do.
        with contextlib.suppress(OSError):
            self._write(name, fields)

    def _write(self, name: str, fields: dict[str, Any]) -> None:
        if self._json:
            elapsed = (time.monotonic_ns() - self._started) / 1e9
            try:
                print(json.dumps({"event": name, "elapsed_s": round(elapsed, 6), **fields}), flush=True)
            except OSError as error:
                log.warning("standard output takes no more events: %s", error.strerror)
                # What is left in its buffer would make a failure of our end.
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        elif name == "progress":
            if self._bar:
                self._bar.show(fields)
            else:
                log.debug("%s", fields)
        elif name == "statistics":
            self._end_bar()
            self._show_statistics(fields)
        elif name in _SENTENCES:
            if name in ("drained", "exited"):
                self._end_bar()
            log.info(_SENTENCES[name].format_map(fields))

    def _end_bar(self) -> None:
        if self._bar:
            self._bar.end()

    def _show_statistics(self, fields: dict[str, Any]) -> None:
        rows = list(_rows(fields))
        if not sys.stderr.isatty():
            if self._statistics:
                for label, value in rows:
                    print(f"{label:<26} {value}", file=sys.stderr)
            else:
                log.info("; ".join(f"{label} {value}" for label, value in rows))
            return
        from rich.console import Console
        from rich.table import Table

        table = Table(show_header=False, box=None)
        for label, value in rows:
            table.add_row(label, value)
        Console(stderr=True).print(table)


def _rows(fields: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "standstill_ns" in fields:
        yield "stand-still", f"{fields['standstill_ns'] / 1e6:.1f} ms"
    if "drain_ns" in fields:
        yield "until the last page", f"{fields['drain_ns'] / 1e9:.2f} s"
    if "faults" in fields:
        yield "faults served", f"{fields['faults']}"
        p50, p99, most = (fields[key] / 1e3 for key in ("fault_p50_ns", "fault_p99_ns", "fault_max_ns"))
        yield "fault latency", f"p50 {p50:.0f} µs, p99 {p99:.0f} µs, max {most:.0f} µs"
    for key, label in (("boot", "boot set"), ("demand", "demand"), ("bulk", "bulk"), ("zero", "zero")):
        if f"bytes_{key}" in fields:
            yield f"bytes, {label}", f"{fields[f'bytes_{key}'] / MIB:.1f} MiB"


class _Bar(Struct):
    """A progress bar with pages left, MB/s and faults served."""

    _progress: Any = None
    _task: Any = None
    _total: int = 0
    _last: tuple[float, int] = field(default=(0.0, 0))

    def show(self, fields: dict[str, Any]) -> None:
        left, now = fields["pages_left"], time.monotonic()
        if self._progress is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._total = left
            self._progress = Progress(
                BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True), transient=True
            )
            self._task = self._progress.add_task("", total=max(left, 1))
            self._progress.start()
            self._last = (now, left)
        before, left_before = self._last
        speed = (left_before - left) * 4096 / 1e6 / (now - before) if now > before else 0.0
        text = f"{left} pages left, {max(speed, 0.0):.0f} MB/s, {fields.get('faults', 0)} faults"
        self._progress.update(self._task, completed=self._total - left, description=text)
        self._last = (now, left)

    def end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def show_findings(findings: "list[Finding]", as_json: bool) -> None:
    """What ``postcopy check`` found of this host, on standard output."""
    if as_json:
        for finding in findings:
            print(json.dumps({"event": "finding", **structs.asdict(finding)}))
        return
    for finding in findings:
        word = "ok" if finding.present else "MISSING" if finding.vital else "lacking"
        line = f"{word:<8}{finding.name:<36}{finding.roles:<22}"
        print(line.rstrip() if finding.present else line + finding.cost)


def show_movable(manifest: "Manifest", as_json: bool) -> None:
    """That a process can be moved, and what the destination must have for it."""
    if as_json:
        files = [file.path for file in manifest.files]
        print(json.dumps({"event": "movable", "pid": manifest.pid, "name": manifest.name, "files": files}))
        return
    size = manifest.memory_bytes / MIB
    print(f"process {manifest.pid} ({manifest.name}) can be moved: {len(manifest.tids)} threads, {size:.0f} MiB")
    print("the destination must have these files:")
    for path in sorted({file.path for file in manifest.files}):
        print(f"  {path}")


def configure_logging(verbosity: int, log_file: str | None) -> None:
    """Log to ``log_file``, else to standard error: what happens; with -v the details."""
    handler = logging.FileHandler(log_file) if log_file else logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s postcopy[%(process)d] %(levelname)s %(message)s"))
    # A log that cannot be written to any more is no reason to fall over, nor to say so at every line.
    logging.raiseExceptions = False
    root = logging.getLogger("postcopy")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(logging.DEBUG if verbosity else logging.INFO)


def announce(status_fd: int | None) -> None:
    """Write the one NUL byte that ``--status-fd`` promises, and close the descriptor."""
    if status_fd is not None:
        with contextlib.suppress(OSError):
            os.write(status_fd, b"\0")
            os.close(status_fd)
