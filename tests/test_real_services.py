"""Real services move with their clients connected, their address with them; the clients check every answer."""

import hashlib
import json
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import DEVICE, Process, Trio, wait_until
from tests.migrate import move

PID = 6200
SECONDS = 60
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


MOVE_ADDRESS = """#!/bin/sh
PATH={path}
case $CRTOOLS_SCRIPT_ACTION in
    network-lock) ip address del {address} dev {device} ;;
    pre-restore|network-unlock) ip address replace {address} dev {device} ;;
esac
"""


@pytest.fixture
def trio() -> Iterator[Trio]:
    """Two hosts and a client's."""
    with Trio() as hosts:
        yield hosts


def program(name: str, package: str) -> str:
    """Where a program is; the test is skipped where it is not installed."""
    found = shutil.which(name, path=PATH)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian package {package})")
    return found


@dataclass
class Service:
    """A service on ``a``, and a client of it on ``c`` that tells ``progress`` and ends with a report."""

    hosts: Trio
    directory: Path
    client: Process
    step: int

    @property
    def progress(self) -> int:
        """How far the slowest connection is."""
        path = self.directory / "progress"
        return int(path.read_text()) if path.exists() else 0

    def goes_on(self) -> None:
        """Every connection gets ``step`` more answers."""
        before = self.progress
        wait_until(
            lambda: self.progress > before + self.step or self.client.poll() is not None,
            SECONDS,
            "every connection goes on",
        )
        assert self.client.poll() is None, self.report()

    def travel(self) -> None:
        """Move from a to b and back, each time with the address."""
        self._travel(by_script=False)

    def travel_by_script(self) -> None:
        """The same, where an action script moves the address."""
        self._travel(by_script=True)

    def _travel(self, by_script: bool) -> None:
        script = self._script() if by_script else []
        source, destination, _ = self.hosts
        for _ in range(2):
            if not by_script:
                self.hosts.add_service(destination)
            migration = move(
                source, destination, PID, dump_options=["--tcp-established", *script], restore_options=script
            )
            self.hosts.check_announced(destination)
            if not by_script:
                self.hosts.remove_service(source)
            migration.wait_drained()
            self.goes_on()
            source, destination = destination, source

    def _script(self) -> list[str]:
        path = self.directory / "move-address"
        path.write_text(MOVE_ADDRESS.format(path=PATH, address=f"{self.hosts.service}/32", device=DEVICE))
        path.chmod(0o755)
        return ["--action-script", str(path)]

    def report(self) -> dict[str, Any]:
        """Let the client come to its end; what it has seen."""
        (self.directory / "stop").touch()
        assert self.client.wait(SECONDS) == 0, (self.directory / "client.err").read_text()
        found: dict[str, Any] = json.loads((self.directory / "report.json").read_text())
        return found


def connect(hosts: Trio, directory: Path, client: list[str], step: int) -> Service:
    """Start a client (a module of `tests.programs` and its arguments); returns when it is busy."""
    with open(directory / "client.err", "wb") as stderr:
        process = hosts.c.popen([sys.executable, "-m", *client], stderr=stderr)
    service = Service(hosts, directory, process, step)
    service.goes_on()
    return service


def listens(hosts: Trio, port: int) -> None:
    """Wait until somebody on ``a`` listens at a port."""
    wait_until(lambda: hosts.a.run(["ss", "-Hltn", f"sport = :{port}"]).stdout, SECONDS, f"port {port} listens")


@pytest.mark.parametrize("append_only", ["no", "yes"])
def test_redis_moves_with_its_address_under_clients_that_check_every_answer(
    trio: Trio, tmp_path: Path, request: pytest.FixtureRequest, append_only: str
) -> None:
    clients = 4
    keys = request.config.getoption("--redis-megabytes") * 1000 // clients
    trio.add_service(trio.a)
    options = ["--bind", trio.service, "--protected-mode", "no", "--dir", str(tmp_path), "--save", "3600", "1000000"]
    command = [program("redis-server", "redis-server"), *options, "--appendonly", append_only, "--logfile", "redis.log"]
    trio.a.popen(command, pid=PID)
    listens(trio, 6379)
    client = ["tests.programs.redis_client", str(tmp_path), str(clients), str(keys), trio.service]
    service = connect(trio, tmp_path, client, 200)
    service.travel_by_script()
    report = service.report()
    assert report["errors"] == []
    print(f"{report['answers']} answers, {report['writes']} acknowledged writes, none of them lost")
    print(f"the longest pause of a connection: {report['longest']:.3f} s")


def test_go_program_moves_under_clients_that_check_every_answer(trio: Trio, tmp_path: Path) -> None:
    trio.add_service(trio.a)
    options = ["--addr", trio.service, "--jetstream", "--store_dir", str(tmp_path), "--log", str(tmp_path / "log")]
    trio.a.popen([program("nats-server", "nats-server"), *options], pid=PID)
    listens(trio, 4222)
    client = ["tests.programs.nats_client", str(tmp_path), "4", "10000", trio.service]
    service = connect(trio, tmp_path, client, 100)
    service.travel()
    report = service.report()
    assert report["errors"] == []
    print(f"{report['answers']} answers; the longest pause of a connection: {report['longest']:.3f} s")


NGINX = """
worker_processes 3;
daemon off;
pid {directory}/nginx.pid;
error_log {directory}/error.log notice;
events {{ worker_connections 256; }}
http {{
    access_log {directory}/access.log;
    keepalive_requests 1000000;
    sendfile on;
    proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi; uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi; client_body_temp_path {directory}/body;
    limit_conn_zone $binary_remote_addr zone=counted:1m;
    server {{
        listen {address}:8080 backlog=64;
        root {directory}/files;
        limit_conn counted 100;
    }}
}}
"""


def test_nginx_moves_with_its_workers_under_downloads(trio: Trio, tmp_path: Path) -> None:
    nginx = program("nginx", "nginx-light")
    trio.add_service(trio.a)
    # The workers run as another user, who cannot look into tmp_path.
    with tempfile.TemporaryDirectory(prefix="postcopy-nginx-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        (directory / "files").mkdir()
        sums = {}
        for number, size in enumerate((100, 5_000, 70_000, 1_000_000, 3_000_000)):
            content = random.Random(number).randbytes(size)
            (directory / "files" / f"{number}").write_bytes(content)
            sums[f"{number}"] = hashlib.sha256(content).hexdigest()
        (tmp_path / "sums.json").write_text(json.dumps(sums))
        (directory / "nginx.conf").write_text(NGINX.format(directory=directory, address=trio.service))
        with open(tmp_path / "nginx.err", "wb") as stderr:
            trio.a.popen([nginx, "-c", f"{directory}/nginx.conf"], pid=PID, stderr=stderr)
        listens(trio, 8080)
        service = connect(trio, tmp_path, ["tests.programs.http_client", str(tmp_path), "6", trio.service], 5)
        service.travel()
        report = service.report()
        assert report["errors"] == []
        print(f"{report['answers']} files; the longest pause of a connection: {report['longest']:.3f} s")
        # The master still has its workers: told to, it ends them and itself.
        trio.a.kill(PID, signal.SIGQUIT)
        wait_until(lambda: not trio.a.alive(PID), SECONDS, "nginx ends")
        log = (directory / "error.log").read_text()
        assert [line for line in log.splitlines() if "[notice]" not in line] == []


def test_asyncio_server_moves_with_its_clients_and_children(trio: Trio, tmp_path: Path) -> None:
    trio.add_service(trio.a)
    command = [sys.executable, "-m", "tests.programs.asyncio_service", str(tmp_path), trio.service]
    with open(tmp_path / "server.err", "wb") as stderr:
        trio.a.popen(command, pid=PID, stderr=stderr)
    listens(trio, 7100)
    service = connect(trio, tmp_path, ["tests.programs.line_client", str(tmp_path), "5", trio.service], 20)
    service.travel()
    before = int((tmp_path / "local").read_text())
    wait_until(lambda: int((tmp_path / "local").read_text()) > before + 20, SECONDS, "the local clients go on")
    report = service.report()
    assert report["errors"] == []
    assert not (tmp_path / "failed").exists()
    print(f"{report['answers']} answers; the longest pause of a connection: {report['longest']:.3f} s")
