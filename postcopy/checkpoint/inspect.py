"""Show what is in a checkpoint, without ever running anything of it. Nothing that its files hold reaches the terminal
as it is: all text is made printable, and none of it is markup."""

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree as Branch

from postcopy.checkpoint import open_text
from postcopy.checkpoint.describe import (
    MemoryMap,
    describe,
    handlers,
    name_of,
    pages_text,
    pending,
    protection,
    signals_in,
    size_text,
    taken_at,
    timers,
)
from postcopy.checkpoint.reader import Checkpoint
from postcopy.printable import printable
from postcopy.state import Credentials, Description, Descriptors, Process

# Columns: what a line of the memory map takes at least, and what is no limit, where the output is no terminal.
_NARROWEST, _WIDEST = 120, 8192
_ACCESS = {os.O_RDONLY: "reading", os.O_WRONLY: "writing", os.O_RDWR: "reading and writing"}
_FLAGS = {os.O_APPEND: "append", os.O_NONBLOCK: "nonblock", os.O_DIRECT: "direct", os.O_SYNC: "sync", os.O_PATH: "path"}


def inspect(directory: Path, as_json: bool) -> None:
    """Show the checkpoint on standard output. Raises CheckpointError where it is none, or is damaged."""
    checkpoint = Checkpoint.open(directory, any_host=True)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names may hold what the encoding of the terminal lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _until_nobody_reads():
            if as_json:
                json.dump(describe(checkpoint), sys.stdout, indent=1)
                print(flush=True)
            else:
                _show(checkpoint)
    finally:
        checkpoint.close()


@contextlib.contextmanager
def _until_nobody_reads() -> Iterator[None]:
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would complain once more when it closes its standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show(checkpoint: Checkpoint) -> None:
    console = Console(markup=False, highlight=False, emoji=False)
    if console.is_terminal:
        console.width = max(console.width, _NARROWEST)
        _print(checkpoint, console)
        return
    console.width = _WIDEST
    with console.capture() as captured:
        _print(checkpoint, console)
    for line in captured.get().splitlines():
        print(line.rstrip())


def _print(checkpoint: Checkpoint, console: Console) -> None:
    console.print(_heading(checkpoint))
    console.print(_tree(checkpoint))
    for process in checkpoint.tree.processes:
        console.print()
        console.print(_text(f"process {process.pid} ({name_of(process.threads[0])})", "bold"))
        for part in (
            _about(process),
            _threads(process),
            _signals(process),
            _descriptors(process, checkpoint.tree.descriptors),
            _memory(checkpoint, process),
        ):
            console.print(Padding(part, (1, 0, 0, 2), expand=False))


def _text(text: str, style: str = "") -> Text:
    return Text(printable(text), style)


def _table(*headings: str, right: Iterable[int] = ()) -> Table:
    """A table with a column for each heading; those whose numbers are in ``right`` are flush right."""
    table = Table(box=None, pad_edge=False, show_header=any(headings), header_style="dim")
    for number, heading in enumerate(headings):
        table.add_column(
            heading,
            justify="right" if number in right else "left",
            overflow="fold",
            no_wrap=number < len(headings) - 1,
        )
    return table


def _add(table: Table, *cells: str) -> None:
    table.add_row(*(_text(cell) for cell in cells))


# -- the whole ---------------------------------------------------------------------------------------------------------


def _heading(checkpoint: Checkpoint) -> Table:
    about = checkpoint.about
    table = _table("", "")
    _add(table, "checkpoint", checkpoint.id.hex())
    _add(table, "taken", f"{taken_at(checkpoint).astimezone():%Y-%m-%d %H:%M:%S %z} by postcopy {about.program}")
    _add(table, "host", f"{about.architecture}, kernel {about.kernel}, {len(about.cpu_features)} CPU features")
    _add(table, "size", f"{size_text(sum(checkpoint.sizes.values()))} in {len(checkpoint.sizes)} files")
    if checkpoint.pages_elsewhere:
        _add(table, "pages", "the lazy ones are not here: they stayed with the frozen tree, which serves them")
    return table


def _tree(checkpoint: Checkpoint) -> Branch:
    """The processes as pstree(1) would show them."""
    root = Branch(_text("processes"), hide_root=True)
    branches = {0: root}
    for process in checkpoint.tree.processes:
        threads = len(process.threads)
        more = f", {threads} threads" if threads > 1 else ""
        pages = MemoryMap(checkpoint, process).total()
        text = f"{process.pid} {name_of(process.threads[0])}: {pages_text(pages.exist) or 'no memory'}{more}"
        branches[process.pid] = branches[process.lineage.parent].add(_text(text))
    for zombie in checkpoint.tree.zombies:
        name = zombie.name.decode(errors="surrogateescape")
        branches[zombie.lineage.parent].add(_text(f"{zombie.pid} {name}: zombie"))
    return root


# -- one process -------------------------------------------------------------------------------------------------------


def _about(process: Process) -> Table:
    table = _table("", "")
    _add(table, "program", process.memory.exe)
    _add(table, "directory", process.filesystem.cwd)
    if process.filesystem.root != "/":
        _add(table, "root", process.filesystem.root)
    _add(table, "umask", f"{process.filesystem.umask:03o}")
    _add(table, "credentials", _credentials(process.threads[0].credentials))
    for timer in timers(process.timers):
        _add(table, "timer", timer)
    if process.stopped_by:
        _add(table, "stopped by", signals_in(1 << (process.stopped_by - 1))[0])
    return table


def _credentials(of: Credentials) -> str:
    text = f"user {_ids(of.uids)}, group {_ids(of.gids)}, groups {' '.join(map(str, of.groups)) or 'none'}"
    text += f"; capabilities: effective {of.effective:#x}, permitted {of.permitted:#x}, bounding {of.bounding:#x}"
    text += f", inheritable {of.inheritable:#x}" if of.inheritable else ""
    text += f", ambient {of.ambient:#x}" if of.ambient else ""
    text += f"; secure bits {of.securebits:#x}" if of.securebits else ""
    return text + ("; no new privileges" if of.no_new_privs else "")


def _ids(ids: tuple[int, int, int, int]) -> str:
    real, effective, saved, filesystem = ids
    if len(set(ids)) == 1:
        return str(real)
    return f"{real} (effective {effective}, saved {saved}, filesystem {filesystem})"


def _threads(process: Process) -> Table:
    table = _table("thread", "name", "nice", "blocked signals", "pending signals, credentials of its own", right=(2,))
    leader = process.threads[0].credentials
    for thread in process.threads:
        own = "" if thread.credentials == leader else _credentials(thread.credentials)
        waiting = ", ".join(pending(thread))
        blocked = " ".join(signals_in(thread.signal_mask)) or "none"
        blocked = "all" if thread.signal_mask == (1 << 64) - 1 else blocked
        nice = str(thread.scheduling.nice)
        _add(table, str(thread.tid), name_of(thread), nice, blocked, "; ".join(filter(None, (waiting, own))))
    return table


def _signals(process: Process) -> Table:
    table = _table("signal", "what happens")
    for name, text, _ in handlers(process.signals):
        _add(table, name, text if text == "ignored" else f"handler at {text}")
    for waiting in pending(process.signals):
        _add(table, "pending", waiting)
    if not table.row_count:
        _add(table, "all", "default")
    return table


def _descriptors(process: Process, table: Descriptors) -> Table:
    shown = _table("descriptor", "kind", "what", right=(0,))
    first: dict[int, int] = {}
    for slot in process.slots:
        kind, text = _description(table.descriptions[slot.description], table)
        shared = first.setdefault(slot.description, slot.fd)
        text += f" (the same as descriptor {shared})" if shared != slot.fd else ""
        _add(shown, str(slot.fd), kind, text + (", closed by exec" if slot.close_on_exec else ""))
    if not process.slots:
        _add(shown, "none", "", "")
    return shown


def _description(of: Description, table: Descriptors) -> tuple[str, str]:
    if of.file is not None:
        return of.file.kind, f"{of.file.path}, {_opened(of.file.flags)}, at byte {of.file.position}"
    if of.pipe is not None:
        pipe = table.pipes[of.pipe.pipe]
        inside = f"{len(pipe.content)} of {pipe.capacity} bytes in it"
        name = f"FIFO {pipe.path}" if pipe.path else f"number {of.pipe.pipe}"
        return "pipe", f"{name}, {_opened(of.pipe.flags)}, {inside}"
    if of.stream is not None:
        return "terminal", f"standard stream {of.stream.fd} of whoever restores it"
    return open_text.describe(of, table)


def _opened(flags: int) -> str:
    words = [
        _ACCESS.get(flags & os.O_ACCMODE, "nothing"),
        *(word for bit, word in _FLAGS.items() if flags & bit == bit),
    ]
    return "for " + ", ".join(words)


def _memory(checkpoint: Checkpoint, process: Process) -> Table:
    memory = MemoryMap(checkpoint, process)
    table = _table("address", "size", "", "exists", "zero", "lazy", "sent", "mapping", right=(1, 3, 4, 5, 6))
    for vma in memory.vmas:
        pages = memory.of(vma.start, vma.end)
        amounts = [pages_text(count) for count in (pages.exist, pages.zero, pages.lazy, pages.sent)]
        place = f"{vma.start:012x}-{vma.end:012x}"
        _add(table, place, size_text(vma.end - vma.start), protection(vma), *amounts, vma.name)
    total = memory.total()
    amounts = [pages_text(count) for count in (total.exist, total.zero, total.lazy, total.sent)]
    _add(table, "total", size_text(sum(vma.end - vma.start for vma in memory.vmas)), "", *amounts, "")
    return table
