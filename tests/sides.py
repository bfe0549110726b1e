"""One command of a migration at work in a test host: its events, its log, its end."""

import dataclasses
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from postcopy.reporting import PAUSE_AT
from tests.hosts import Host, Process, postcopy_command, wait_until

SECONDS = 20


@dataclasses.dataclass
class Side:
    """One command at work, and what it says."""

    process: Process
    errors: Path

    @classmethod
    def start(
        cls, host: Host, errors: Path, arguments: Sequence[str], *, pause: str | None = None, wrap: Sequence[str] = ()
    ) -> "Side":
        """Start it, with its log in ``errors`` and its events beside that.

        ``pause``: the event at which it stops itself. ``wrap``: what comes before the command.
        """
        environment = {**os.environ, PAUSE_AT: pause} if pause else None
        with open(errors, "wb") as stderr, open(errors.with_suffix(".out"), "wb") as stdout:
            argv = [*wrap, *postcopy_command(), *arguments, "--json"]
            return cls(host.popen(argv, stdout=stdout, stderr=stderr, env=environment), errors)

    @property
    def text(self) -> str:
        """What it has logged."""
        return self.errors.read_text()

    @property
    def events(self) -> list[dict[str, Any]]:
        """What it has told so far."""
        # The last line may be half written.
        return [json.loads(line) for line in self.errors.with_suffix(".out").read_text().split("\n")[:-1]]

    def last(self, name: str) -> dict[str, Any]:
        """The latest event of this name; empty when there was none."""
        return next((event for event in reversed(self.events) if event["event"] == name), {})

    def await_event(self, name: str) -> None:
        """Wait until it tells of an event."""
        wait_until(lambda: self.last(name) or self.process.poll() is not None, SECONDS, f"event {name}")
        assert self.last(name), f"ended with {self.process.poll()}: {self.text}"

    def await_pause(self, step: str) -> None:
        """Wait until it has stopped itself at the step it was told."""
        host, pid = self.process.host, self.process.pid
        wait_until(
            lambda: host.proc_state(pid) == "T" or self.process.poll() is not None, SECONDS, f"the pause at {step}"
        )
        assert self.process.poll() is None, f"ended before {step} with {self.process.returncode}: {self.text}"

    def ends(self, *codes: int, seconds: float = SECONDS) -> int:
        """It ends in time, with one of these exit codes and one error in its log, and no traceback."""
        code = self._ends_with(codes, seconds)
        said = [line for line in self.text.splitlines() if f"[{self.process.pid}] ERROR" in line]
        errors = [line for line in said if "what to do" not in line]
        assert len(errors) == 1, self.text
        return code

    def ends_with_error(self, *codes: int, seconds: float = SECONDS) -> int:
        """The same where several of its processes have something to say."""
        code = self._ends_with(codes, seconds)
        assert "ERROR" in self.text, self.text
        return code

    def ends_well(self, seconds: float = SECONDS) -> None:
        """It ends in time, with 0."""
        self._ends_with((0,), seconds)

    def _ends_with(self, codes: tuple[int, ...], seconds: float) -> int:
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.process} does not end: {self.text}")
        assert code in codes, f"{code}: {self.text}"
        assert "Traceback" not in self.text, self.text
        assert "bug" not in self.text, self.text
        return code
