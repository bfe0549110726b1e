"""Action scripts: programs of the user's that are run at known points of a dump or a restore.

Names, variables and the meaning of a failure are those that scripts written for CRIU expect; docs/action-scripts.md
says when each point comes.
"""

import contextlib
import enum
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from postcopy import roles
from postcopy.errors import PostcopyError
from postcopy.kernel.poll import readable
from postcopy.kernel.sched import scheduling
from postcopy.printable import printable
from postcopy.roles import Role

log = logging.getLogger("postcopy")

_MOST_OUTPUT = 64 * 1024  # bytes
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM, signal.SIGPIPE, signal.SIGXFSZ)


class Action(enum.StrEnum):
    """The points at which scripts are run."""

    PRE_DUMP = "pre-dump"
    NETWORK_LOCK = "network-lock"
    POST_DUMP = "post-dump"
    STATUS_READY = "status-ready"
    PRE_RESTORE = "pre-restore"
    POST_RESTORE = "post-restore"
    NETWORK_UNLOCK = "network-unlock"
    PRE_RESUME = "pre-resume"
    POST_RESUME = "post-resume"


class ActionScripts(Struct, frozen=True):
    """``paths``: the programs, in the order in which they are run; ``timeout``: seconds for each run.

    ``directory``: the checkpoint directory, if any. ``failure``: what is raised where one of them fails.
    """

    paths: Sequence[str] = ()
    timeout: float = 10.0
    directory: Path | None = None
    failure: type[PostcopyError] = PostcopyError

    def run(self, action: Action, pid: int = 0) -> None:
        """Run all of them to their ends; ``pid``: the root of the tree as this host sees it, once there is one.

        Raises ``failure`` when all have been run and one has not ended with 0.
        """
        failed = [f"{path} {reason}" for path in self.paths if (reason := self._run(path, action, pid))]
        if failed:
            raise self.failure(f"action script at {action}: {'; '.join(failed)}", "its output is in the log")

    def report(self, action: Action, pid: int = 0) -> None:
        """Like `run` where there is no way back: failures are logged."""
        try:
            self.run(action, pid)
        except PostcopyError as error:
            log.error("%s", error.message)

    def _run(self, path: str, action: Action, pid: int) -> str:
        """Run one; how it has failed, if it has."""
        environment = {**os.environ, "CRTOOLS_SCRIPT_ACTION": action}
        if pid:
            environment["CRTOOLS_INIT_PID"] = str(pid)
        if self.directory is not None:
            environment["CRTOOLS_IMAGE_DIR"] = str(self.directory.absolute())
        log.debug("running %s at %s", path, action)
        try:
            # Not a pipe: what a script leaves in the background would keep us waiting for its end.
            output = os.memfd_create("postcopy-script")
        except OSError as error:
            return f"cannot be run: {error.strerror}"
        try:
            script = roles.start(
                "postcopy-script", lambda: _become(path, environment, output), dies_with_parent=True, keep=[output]
            )
            try:
                return _ending(script, self.timeout)
            finally:
                _log_output(path, action, output)
        except OSError as error:
            return f"cannot be run: {error.strerror}"
        finally:
            os.close(output)


def _become(path: str, environment: dict[str, str], output: int) -> None:
    """In a process of its own: what the script begins with is nothing of ours but its output."""
    os.setsid()
    scheduling()
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDONLY)
    for stream, fd in ((0, null), (1, output), (2, output)):
        os.dup2(fd, stream)
    try:
        os.execve(path, [path], environment)
    except OSError as error:
        os.write(2, f"cannot be run: {error.strerror}\n".encode())
        os._exit(127)


def _ending(script: Role, timeout: float) -> str:
    """Wait until it has ended; how it has failed, if it has."""
    ended = False
    try:
        ended = readable(script.pidfd, timeout)
    finally:
        if not ended:
            # Its own session, if it has come so far.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(script.pid, signal.SIGKILL)
            script.kill()
    if not ended:
        return f"took longer than {timeout:g} s and was killed"
    code = script.wait()
    return f"was killed by signal {-code}" if code < 0 else f"ended with status {code}" if code else ""


def _log_output(path: str, action: Action, output: int) -> None:
    size = os.fstat(output).st_size
    text = os.pread(output, _MOST_OUTPUT, max(size - _MOST_OUTPUT, 0)).decode(errors="replace")
    for line in text.splitlines():
        log.info("%s at %s: %s", path, action, printable(line))
