"""The command line: options in, exit codes and errors out; no logic of its own."""

import enum
import logging
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from postcopy import __version__, reporting
from postcopy.action_scripts import Action, ActionScripts
from postcopy.deadline import end_on_signals
from postcopy.dump_side.choices import CLOSED, DEFAULT_GHOST_LIMIT, MOVED, REFUSED, Choices
from postcopy.errors import CannotRun, DumpError, PostcopyError, ProblemsError, RestoreError, UsageError
from postcopy.transport import DEFAULT_ADDRESS, DEFAULT_PORT

log = logging.getLogger("postcopy")

DAY = 86400.0

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


class NetworkLockMode(enum.StrEnum):
    """How packets of connections are kept from being answered while the process stands still."""

    nftables = "nftables"
    iptables = "iptables"
    skip = "skip"


Lazy = Annotated[
    bool, typer.Option("--lazy-pages", help="Leave memory behind; fetch it page by page as it is touched.")
]
Address = Annotated[
    str | None, typer.Option("--address", help="Address the source listens at.", show_default=DEFAULT_ADDRESS)
]
Port = Annotated[
    int | None,
    typer.Option("--port", help="TCP port of the source.", show_default=str(DEFAULT_PORT), min=0, max=65535),
]
Directory = Annotated[Path | None, typer.Option("-D", "--images-dir", help="Checkpoint directory.")]
Verbose = Annotated[int, typer.Option("-v", "--verbose", count=True, help="Log the details too.")]
LogFile = Annotated[str | None, typer.Option("-o", "--log-file", help="Log here instead of to standard error.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line and event on standard output.")]
Statistics = Annotated[bool, typer.Option("--display-stats", help="Show the statistics at the end as a table.")]
Timeout = Annotated[
    float,
    typer.Option("--timeout", help="Seconds from freeze to commit, and without a sign of life.", min=0.1, max=DAY),
]


GhostLimit = Annotated[
    int,
    typer.Option("--ghost-limit", help="Bytes of a file without a name that may travel in the stand-still.", min=0),
]
FileLocks = Annotated[
    bool, typer.Option("-l", "--file-locks", help="Move file locks, though somebody may take them meanwhile.")
]


NetworkLock = Annotated[
    NetworkLockMode, typer.Option(help="How TCP is kept silent while the process stands still; skip: not at all.")
]
TcpEstablished = Annotated[
    bool, typer.Option("--tcp-established", help="Move established TCP connections; their peers see a pause.")
]
TcpClose = Annotated[
    bool, typer.Option("--tcp-close", help="Let established TCP connections end; the program finds them aborted.")
]
UnixOutside = Annotated[
    bool,
    typer.Option("-x", "--ext-unix-sk", help="Connect datagram sockets to the Unix names outside (syslog) there, too."),
]
SysvIpc = Annotated[
    bool,
    typer.Option(
        "--sysv-ipc", help="Move the System V semaphores and message queues that the tree uses: nobody else does."
    ),
]
External = Annotated[
    list[str] | None,
    typer.Option("--external", help="RESOURCE outside of the tree, as /proc/PID/fd shows it; see --inherit-fd."),
]
ShellJob = Annotated[
    bool,
    typer.Option("-j", "--shell-job", help="A job of a shell: the terminal that restore is run at becomes its own."),
]
ActionScript = Annotated[
    list[str] | None,
    typer.Option(
        "--action-script", metavar="PATH", help="Run this program at the points that CRTOOLS_SCRIPT_ACTION names."
    ),
]
_INHERITED = re.compile(r"fd\[(\d+)\]:(.+)", re.DOTALL)


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
    directory: Directory = None,
    leave_running: Annotated[
        bool, typer.Option("-R", "--leave-running", help="Let the process run on once it is in the directory.")
    ] = False,
    leave_stopped: Annotated[
        bool, typer.Option("-s", "--leave-stopped", help="Leave the process stopped once it is in the directory.")
    ] = False,
    address: Address = None,
    port: Port = None,
    timeout: Timeout = 10.0,
    ghost_limit: GhostLimit = DEFAULT_GHOST_LIMIT,
    file_locks: FileLocks = False,
    external: External = None,
    shell_job: ShellJob = False,
    ext_unix_sk: UnixOutside = False,
    sysv_ipc: SysvIpc = False,
    tcp_established: TcpEstablished = False,
    tcp_close: TcpClose = False,
    network_lock: NetworkLock = NetworkLockMode.nftables,
    action_script: ActionScript = None,
    verbose: Verbose = 0,
    log_file: LogFile = None,
    status_fd: Annotated[
        int | None, typer.Option(help="Write a NUL byte here when it listens, or when the directory is written.")
    ] = None,
    as_json: Json = False,
    display_stats: Statistics = False,
) -> None:
    """Freeze a process and give it away: to a destination that comes for it (--lazy-pages), or to a directory (-D).

    With both, the directory holds everything but the lazy pages, which are served from here.
    """
    _begin(verbose, log_file, status_fd)
    _one_of(leave_running, "--leave-running", leave_stopped, "--leave-stopped")
    if (leave_running or leave_stopped) and (lazy_pages or directory is None):
        raise UsageError(
            "a process whose pages are fetched from here can neither run on nor be left stopped",
            "--leave-running and --leave-stopped go with -D DIR, without --lazy-pages",
        )
    from postcopy.dump_side import session

    reporter = reporting.Printer(as_json, display_stats)
    connections = _connections(tcp_established, tcp_close)
    scripts = _scripts(action_script, timeout, directory, DumpError)
    outside = frozenset(external or ())
    choices = Choices(
        ghost_limit, file_locks, outside, connections, network_lock.value, shell_job, scripts, ext_unix_sk, sysv_ipc
    )
    options = session.Options(pid, address or DEFAULT_ADDRESS, DEFAULT_PORT if port is None else port, timeout, choices)

    def listening() -> None:
        reporting.announce(status_fd)
        scripts.run(Action.STATUS_READY, pid)

    if not lazy_pages:
        if directory is None:
            raise UsageError(
                "where to is not said", "postcopy dump --lazy-pages -t PID, or postcopy dump -t PID -D DIR"
            )
        _no_address(address, port, "dump -D DIR without --lazy-pages sends nothing")
        session.dump_to_directory(
            pid, directory, reporter, leave_running=leave_running, leave_stopped=leave_stopped, choices=choices
        )
        reporting.announce(status_fd)
        scripts.report(Action.STATUS_READY, pid)
    elif directory is not None:
        session.dump_state_to_directory(options, directory, reporter, listening)
    else:
        session.dump(options, reporter, listening)


@app.command()
def restore(
    lazy_pages: Lazy = False,
    directory: Directory = None,
    address: Address = None,
    port: Port = None,
    timeout: Timeout = 10.0,
    detached: Annotated[
        bool, typer.Option("-d", "--restore-detached", help="End when the program runs; do not stay its parent.")
    ] = False,
    pidfile: Annotated[Path | None, typer.Option(help="Write the PID of the program here.")] = None,
    new_pid_namespace: Annotated[
        bool, typer.Option("--new-pid-namespace", help="Give the program a PID namespace with a /proc of its own.")
    ] = False,
    inherit_fd: Annotated[
        list[str] | None,
        typer.Option("--inherit-fd", help="fd[N]:RESOURCE: open descriptor N in place of what --external named."),
    ] = None,
    root: Annotated[
        Path | None, typer.Option("-r", "--root", help="This directory takes the place of / for the program.")
    ] = None,
    shell_job: ShellJob = False,
    network_lock: NetworkLock = NetworkLockMode.nftables,
    action_script: ActionScript = None,
    background: Annotated[
        BackgroundMode, typer.Option(help="Push the rest at once; only when no page has been asked for; never.")
    ] = BackgroundMode.eager,
    idle_delay: Annotated[
        float, typer.Option(help="Seconds without a fault that count as idle.", min=0.0, max=DAY)
    ] = 5.0,
    wait: Annotated[float, typer.Option(help="Seconds to wait for a source that does not listen yet.", min=0.0)] = 30.0,
    verbose: Verbose = 0,
    log_file: LogFile = None,
    status_fd: Annotated[int | None, typer.Option(help="Write a NUL byte here when the program runs.")] = None,
    as_json: Json = False,
    display_stats: Statistics = False,
) -> None:
    """Take a process over: it runs here at once, its memory follows. Ends with the exit status of the program.

    From a source that listens (--lazy-pages), from a checkpoint directory (-D), or the state from the directory and
    the pages as they are touched (both).
    """
    _begin(verbose, log_file, status_fd)
    if not lazy_pages:
        if directory is None:
            raise UsageError(
                "where from is not said", "postcopy restore --lazy-pages --address A, or postcopy restore -D DIR"
            )
        _no_address(address, port, "restore without --lazy-pages reads all from the directory")
        if background is not BackgroundMode.eager:
            raise UsageError(f"--background {background} is about lazy pages", "add --lazy-pages")
    if pidfile and not os.access(pidfile.parent, os.W_OK):
        raise UsageError(
            f"--pidfile {pidfile} cannot be written", "name a directory that is there and can be written to"
        )
    if root is not None and not root.is_dir():
        raise UsageError(f"--root {root} is no directory")
    from postcopy.checkpoint.reader import Checkpoint
    from postcopy.dump_side.serving import give_here
    from postcopy.restore_side import session
    from postcopy.restore_side.fault_handler import Background
    from postcopy.restore_side.root import Root

    reporter = reporting.Printer(as_json, display_stats)
    checkpoint = channels = between = None
    if directory is not None:
        checkpoint = Checkpoint.open(directory)
        if not checkpoint.pages_elsewhere:
            _no_address(address, port, f"{directory} has all the pages")
            channels, between = give_here(checkpoint, lazy_pages)
        elif not lazy_pages:
            raise UsageError(
                f"{directory} has all but the lazy pages, which the dump that wrote it serves",
                "postcopy restore --lazy-pages -D DIR --address A --port P",
            )

    def running() -> None:
        if between is not None:
            between.wait()
        if shell_job and not detached and log_file is None:
            reporter.leave_screen()
        reporting.announce(status_fd)

    status = session.restore(
        session.Options(
            address=address or DEFAULT_ADDRESS,
            port=DEFAULT_PORT if port is None else port,
            timeout=timeout,
            patience=wait,
            lazy=lazy_pages,
            detach=detached,
            pidfile=pidfile,
            new_pid_namespace=new_pid_namespace,
            inherited=_inherited(inherit_fd or []),
            network_lock=network_lock.value,
            shell_job=shell_job,
            scripts=_scripts(action_script, timeout, directory, RestoreError),
            background=Background(background.value, idle_delay),
            root=Root(os.path.realpath(root or "/")),
        ),
        reporter,
        running,
        checkpoint,
        channels,
    )
    raise typer.Exit(status)


@app.command()
def serve(
    directory: Annotated[Path, typer.Option("-D", "--images-dir", help="Checkpoint directory.")],
    address: Address = None,
    port: Port = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds without a sign of life of a destination.", min=0.1, max=DAY)
    ] = 10.0,
    action_script: ActionScript = None,
    verbose: Verbose = 0,
    log_file: LogFile = None,
    status_fd: Annotated[int | None, typer.Option(help="Write a NUL byte here when it listens.")] = None,
    as_json: Json = False,
    display_stats: Statistics = False,
) -> None:
    """Serve a checkpoint directory, state and pages, to every restore --lazy-pages that comes; until it is ended."""
    _begin(verbose, log_file, status_fd)
    from postcopy.checkpoint.reader import Checkpoint
    from postcopy.dump_side import serving

    checkpoint = Checkpoint.open(directory)
    if checkpoint.pages_elsewhere:
        raise UsageError(
            f"{directory} has all but the lazy pages, which the dump that wrote it serves", "dump without --lazy-pages"
        )
    scripts = _scripts(action_script, timeout, directory, PostcopyError)

    def listening() -> None:
        reporting.announce(status_fd)
        scripts.run(Action.STATUS_READY)

    serving.serve(
        checkpoint,
        serving.Options(address or DEFAULT_ADDRESS, DEFAULT_PORT if port is None else port, timeout),
        reporting.Printer(as_json, display_stats),
        listening,
    )


@app.command()
def check(
    pid: Annotated[int | None, typer.Option("-t", "--tree", help="Also whether this process can be moved.")] = None,
    ghost_limit: GhostLimit = DEFAULT_GHOST_LIMIT,
    file_locks: FileLocks = False,
    external: External = None,
    shell_job: ShellJob = False,
    ext_unix_sk: UnixOutside = False,
    sysv_ipc: SysvIpc = False,
    tcp_established: TcpEstablished = False,
    tcp_close: TcpClose = False,
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

        connections = _connections(tcp_established, tcp_close)
        choices = Choices(
            ghost_limit,
            file_locks,
            frozenset(external or ()),
            connections,
            shell_job=shell_job,
            unix_outside=ext_unix_sk,
            sysv_ipc=sysv_ipc,
        )
        manifest, _ = survey(pid, choices)
        reporting.show_movable(manifest, as_json)


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint directory.")],
    verbose: Verbose = 0,
    as_json: Annotated[bool, typer.Option("--json", help="All of it, as one JSON object.")] = False,
) -> None:
    """Show what is in a checkpoint directory. Runs nothing of it."""
    reporting.configure_logging(verbose, None)
    from postcopy.checkpoint.inspect import inspect as show

    show(directory, as_json)


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


def _scripts(
    given: list[str] | None, timeout: float, directory: Path | None, failure: type[PostcopyError]
) -> ActionScripts:
    """The action scripts, which must be there before anything is begun."""
    paths = []
    for each in given or []:
        path = shutil.which(each)
        if path is None:
            raise UsageError(f"--action-script {each} is no program that can be run", "give its path; chmod +x")
        paths.append(os.path.abspath(path))
    return ActionScripts(paths, timeout, directory, failure)


def _inherited(given: list[str]) -> dict[str, int]:
    """The descriptors of ours that take the place of external resources."""
    found: dict[str, int] = {}
    for each in given:
        match = _INHERITED.fullmatch(each)
        if match is None:
            raise UsageError(f"--inherit-fd {each} is not of the form fd[N]:RESOURCE")
        number, resource = int(match[1]), match[2]
        try:
            os.fstat(number)
        except (OSError, OverflowError):
            raise UsageError(f"--inherit-fd {each}: {number} is not an open descriptor") from None
        if resource in found:
            raise UsageError(f"--inherit-fd {each}: there are two for {resource}")
        found[resource] = number
    return found


def _connections(tcp_established: bool, tcp_close: bool) -> str:
    """What becomes of established TCP connections."""
    _one_of(tcp_established, "--tcp-established", tcp_close, "--tcp-close")
    return MOVED if tcp_established else CLOSED if tcp_close else REFUSED


def _one_of(one: bool, name: str, other: bool, other_name: str) -> None:
    if one and other:
        raise UsageError(f"{name} and {other_name} cannot both be", "choose one of them")


def _no_address(address: str | None, port: int | None, why: str) -> None:
    if address is not None or port is not None:
        raise UsageError(f"{why}: there is nothing to connect", "leave --address and --port out")


def _complete_streams() -> None:
    """Where a standard stream is closed, no descriptor of ours may get its number."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    # None, where it was closed.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def main() -> None:
    """The entry point: errors of ours become a line and an exit code."""
    _complete_streams()
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
