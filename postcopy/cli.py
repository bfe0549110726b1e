"""The command line: options in, exit codes and errors out; no logic of its own."""

import enum
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from postcopy import __version__, reporting
from postcopy.deadline import end_on_signals
from postcopy.errors import CannotRun, PostcopyError, ProblemsError, UsageError
from postcopy.transport import DEFAULT_PORT

log = logging.getLogger("postcopy")

app = typer.Typer(
    name="postcopy",
    help="Move running processes to another host: they run there before their memory has arrived.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class BackgroundMode(enum.StrEnum):
    """When pages are pushed that nobody has asked for yet."""

    eager = "eager"
    idle = "idle"
    off = "off"


Lazy = Annotated[
    bool, typer.Option("--lazy-pages", help="Leave memory behind; fetch it page by page as it is touched.")
]
Address = Annotated[str, typer.Option("--address", help="Address the source listens at.")]
Port = Annotated[int, typer.Option("--port", help="TCP port of the source.", min=0, max=65535)]
Verbose = Annotated[int, typer.Option("-v", "--verbose", count=True, help="Log the details too.")]
LogFile = Annotated[str | None, typer.Option("-o", "--log-file", help="Log here instead of to standard error.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line and event on standard output.")]
Statistics = Annotated[bool, typer.Option("--display-stats", help="Show the statistics at the end as a table.")]
Timeout = Annotated[
    float, typer.Option("--timeout", help="Seconds from freeze to commit, and without a sign of life.", min=0.1)
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"postcopy {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Post-copy live migration of ordinary Linux processes: one command a side."""


@app.command()
def dump(
    pid: Annotated[int, typer.Option("-t", "--tree", help="PID of the process to move.", min=1)],
    lazy_pages: Lazy = False,
    address: Address = "127.0.0.1",
    port: Port = DEFAULT_PORT,
    timeout: Timeout = 10.0,
    verbose: Verbose = 0,
    log_file: LogFile = None,
    status_fd: Annotated[int | None, typer.Option(help="Write a NUL byte here when it listens.")] = None,
    as_json: Json = False,
    display_stats: Statistics = False,
) -> None:
    """Hand a process over: listen for a destination, freeze the process, serve its memory until all of it is there."""
    _begin(verbose, log_file, status_fd)
    _need_lazy(lazy_pages, "dump")
    from postcopy.dump_side import session

    session.dump(
        session.Options(pid=pid, address=address, port=port, timeout=timeout),
        reporting.Printer(as_json, display_stats),
        lambda: reporting.announce(status_fd),
    )


@app.command()
def restore(
    lazy_pages: Lazy = False,
    address: Address = "127.0.0.1",
    port: Port = DEFAULT_PORT,
    timeout: Timeout = 10.0,
    detached: Annotated[
        bool, typer.Option("-d", "--restore-detached", help="End when the program runs; do not stay its parent.")
    ] = False,
    pidfile: Annotated[Path | None, typer.Option(help="Write the PID of the program here.")] = None,
    new_pid_namespace: Annotated[
        bool, typer.Option("--new-pid-namespace", help="Give the program a PID namespace with a /proc of its own.")
    ] = False,
    background: Annotated[
        BackgroundMode, typer.Option(help="Push the rest at once; only when no page has been asked for; never.")
    ] = BackgroundMode.eager,
    idle_delay: Annotated[float, typer.Option(help="Seconds without a fault that count as idle.", min=0.0)] = 5.0,
    wait: Annotated[float, typer.Option(help="Seconds to wait for a source that does not listen yet.", min=0.0)] = 30.0,
    verbose: Verbose = 0,
    log_file: LogFile = None,
    status_fd: Annotated[int | None, typer.Option(help="Write a NUL byte here when the program runs.")] = None,
    as_json: Json = False,
    display_stats: Statistics = False,
) -> None:
    """Take a process over: it runs here at once, its memory follows. Ends with the exit status of the program."""
    _begin(verbose, log_file, status_fd)
    _need_lazy(lazy_pages, "restore")
    if pidfile and not os.access(pidfile.parent, os.W_OK):
        raise UsageError(
            f"--pidfile {pidfile} cannot be written", "name a directory that is there and can be written to"
        )
    from postcopy.restore_side import session
    from postcopy.restore_side.fault_handler import Background

    status = session.restore(
        session.Options(
            address=address,
            port=port,
            timeout=timeout,
            patience=wait,
            detach=detached,
            pidfile=pidfile,
            new_pid_namespace=new_pid_namespace,
            background=Background(background.value, idle_delay),
        ),
        reporting.Printer(as_json, display_stats),
        lambda: reporting.announce(status_fd),
    )
    raise typer.Exit(status)


@app.command()
def check(
    pid: Annotated[int | None, typer.Option("-t", "--tree", help="Also whether this process can be moved.")] = None,
    verbose: Verbose = 0,
    as_json: Json = False,
) -> None:
    """Say whether this host can be a source and a destination, and whether a process can be moved. Touches nothing."""
    reporting.configure_logging(verbose, None)
    from postcopy import check as checks

    findings = checks.host()
    reporting.show_findings(findings, as_json)
    if any(finding.vital and not finding.present for finding in findings):
        raise CannotRun("this host cannot play every role: see what is missing above")
    if pid is not None:
        from postcopy.dump_side.survey import survey

        manifest, _ = survey(pid)
        reporting.show_movable(manifest, as_json)


def _begin(verbosity: int, log_file: str | None, status_fd: int | None) -> None:
    """Log, end on signals, and refuse descriptors and files that are not there before anything is begun."""
    try:
        reporting.configure_logging(verbosity, log_file)
    except OSError as error:
        raise UsageError(f"cannot log to {log_file}: {error.strerror}") from None
    end_on_signals()
    if status_fd is not None:
        try:
            os.fstat(status_fd)
        except OSError:
            raise UsageError(f"--status-fd {status_fd} is not an open descriptor") from None


def _need_lazy(lazy_pages: bool, command: str) -> None:
    if not lazy_pages:
        raise UsageError(
            f"{command} without --lazy-pages needs a checkpoint directory, which is not there yet",
            f"postcopy {command} --lazy-pages",
        )


def main() -> None:
    """The entry point: errors of ours become a line and an exit code."""
    try:
        app()
    except ProblemsError as error:
        log.error("%s:", error.where)
        for problem in error.problems:
            log.error("  - %s", problem)
        sys.exit(error.exit_code)
    except PostcopyError as error:
        log.error("%s", error.message)
        if error.hint:
            log.error("what to do: %s", error.hint)
        sys.exit(error.exit_code)
    except OSError as error:
        log.error("%s", error)
        log.debug("where it happened:", exc_info=True)
        sys.exit(PostcopyError.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
