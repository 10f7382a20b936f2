"""The services of docker/compose.yaml as plain processes of this machine: `make up`, `make down`, `make status`.

    python -m flows.services up|down|status [--home DIR]

PostgreSQL (where its programs are found, else SQLite), the Prefect server with a worker, and the MLflow server, all on
the loopback address. Everything they keep, their logs and process ids are under `.deepspec/services`.
`DEEPSPEC_PREFECT_PORT`, `DEEPSPEC_MLFLOW_PORT`, `DEEPSPEC_POSTGRES_PORT` and `DEEPSPEC_WORKER_PORT` choose the ports.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deepspec.entry import TELEMETRY_OFF, guarded
from deepspec.errors import DeepSpecError, os_reason
from deepspec.files import write_json
from flows import postgres
from flows.command import python_path
from flows.process import Process
from flows.setup import POOL, ROOT
from flows.workspace import uncommitted

HOST = "127.0.0.1"
PORTS = {"prefect": 4200, "mlflow": 5000, "postgres": 5433, "worker": 4201}
CHOSEN = "ports.json"
ROOM = 500 << 20  # bytes that a database, artifacts and logs want to begin with
START_S = 180.0
Database = Callable[[str, str, str], str]


@dataclass(frozen=True)
class Places:
    """Where the services keep things and listen."""

    home: Path
    ports: dict[str, int]

    @classmethod
    def of(cls, home: Path, environ: Mapping[str, str] = os.environ) -> Places:
        """Ports are those of the environment, else those of the last `up` here.

        Raises:
            DeepSpecError: a port that is no number.
        """
        home = home.resolve()
        return cls(home, {name: _port(environ, name, _remembered(home)) for name in PORTS})

    def url(self, name: str) -> str:
        return f"http://{HOST}:{self.ports[name]}"

    @property
    def client(self) -> dict[str, str]:
        """What a flow, `deepspec track` or a shell needs to find the servers."""
        return {"PREFECT_API_URL": f"{self.url('prefect')}/api", "MLFLOW_TRACKING_URI": self.url("mlflow")}


def _remembered(home: Path) -> dict[str, int]:
    try:
        found = json.loads((home / CHOSEN).read_text())
        return {name: int(found[name]) for name in PORTS}
    except (OSError, ValueError, KeyError, TypeError):
        return PORTS


def _port(environ: Mapping[str, str], name: str, remembered: Mapping[str, int] = PORTS) -> int:
    key = f"DEEPSPEC_{name.upper()}_PORT"
    chosen = environ.get(key) or str(remembered[name])
    if not (chosen.isdigit() and 0 < int(chosen) < 65536):
        raise DeepSpecError(f"{key}={chosen}: not a port")
    return int(chosen)


@dataclass(frozen=True)
class Service:
    name: str
    command: list[str]
    healthy: Callable[[], bool]
    environment: dict[str, str] = field(default_factory=dict)


def servers(places: Places, database: Database) -> list[Service]:
    """The command lines of the two servers. docker/compose.yaml has the same with the network's names.

    Args:
        database: name, driver for PostgreSQL, driver for SQLite → SQLAlchemy's URL.
    """
    home, port = places.home, {name: str(number) for name, number in places.ports.items()}
    names = ",".join(f"{host}:{port['mlflow']}" for host in ("localhost", HOST))
    artifacts = (home / "mlflow-artifacts").as_uri()
    return [
        Service(
            "prefect",
            [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", port["prefect"]],
            answers(f"{places.url('prefect')}/api/ready"),
            {
                "PREFECT_SERVER_DATABASE_CONNECTION_URL": database("prefect", "asyncpg", "aiosqlite"),
                # Leases in memory would be lost with the server, and their slots taken for good.
                "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
                "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            },
        ),
        Service(
            "mlflow",
            [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", port["mlflow"], "--workers", "1",
             "--artifacts-destination", artifacts, "--serve-artifacts", "--allowed-hosts", names],
            answers(f"{places.url('mlflow')}/health"),
            {
                "MLFLOW_BACKEND_STORE_URI": database("mlflow", "psycopg", "pysqlite"),
                # Seven processes that evaluate traces, 1.4 GB of memory: there are none here.
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            },
        ),
    ]  # fmt: skip


def worker(places: Places) -> Service:
    return Service(
        "worker",
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process",
         "--name", "local", "--with-healthcheck"],
        answers(f"{places.url('worker')}/health"),
        {"PREFECT_WORKER_WEBSERVER_HOST": HOST, "PREFECT_WORKER_WEBSERVER_PORT": str(places.ports["worker"])},
    )  # fmt: skip


def up(places: Places) -> None:
    """Start what does not run yet and wait until it answers.

    What this call started is stopped again if it does not come to an end.

    Raises:
        DeepSpecError: the folder cannot be written, a port is taken, or a service ended before it answered.
    """
    _make_room(places.home)
    was_up = postgres.runs(places.home / "postgres")
    started: list[Process] = []
    try:
        database, store = database_of(places)
        print(f"store: {store}", flush=True)
        _start(places, servers(places, database), started)
        done = subprocess.run([sys.executable, "-m", "flows.setup"], cwd=ROOT, env=_environment(places))
        if done.returncode:
            raise DeepSpecError("the Prefect server was not set up; see the lines above")
        _start(places, [worker(places)], started)
    except BaseException:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()
        if not was_up:
            postgres.stop(places.home / "postgres")
        raise
    write_json(places.home / CHOSEN, places.ports)
    print(f"Prefect  {places.url('prefect')}\nMLflow   {places.url('mlflow')}")
    if said := uncommitted(ROOT):
        print(f"note: {said}")
    print("For a shell:", *(f"export {key}={value}" for key, value in places.client.items()), sep="\n  ")


def down(places: Places) -> None:
    """Stop everything, the worker first; what runs in it is told to stop and goes on in the next run."""
    for names in (("worker",), ("mlflow", "prefect")):
        found = [Process(places.home, name) for name in names]
        stopped = [process.name for process in found if process.terminate()]
        for process in found:
            process.wait()
        print(*(f"{name}: stopped\n" for name in stopped), sep="", end="")
    if postgres.stop(places.home / "postgres"):
        print("postgres: stopped")


def status(places: Places) -> bool:
    """Print what runs; whether all of it does."""
    found = {service.name: service.healthy for service in [*servers(places, lambda *_: ""), worker(places)]}
    well = True
    if (places.home / "postgres/PG_VERSION").exists():
        well = postgres.runs(places.home / "postgres")
        print(f"{'postgres':10}{'up' if well else 'down':17}{HOST}:{places.ports['postgres']}")
    for name, healthy in found.items():
        pid = Process(places.home, name).pid()
        said = "down" if pid is None else "up" if healthy() else "does not answer"
        well = well and said == "up"
        print(f"{name:10}{said:17}{places.url(name)}")
    return well


def _make_room(home: Path) -> None:
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            pass
        free = shutil.disk_usage(home).free
    except OSError as error:
        raise DeepSpecError(f"{home}: cannot be written: {os_reason(error)}; choose another --home") from None
    if free < ROOM:
        raise DeepSpecError(
            f"{home}: {free >> 20} MB are free on its disk, and the services want {ROOM >> 20} to begin with"
        )


def _start(places: Places, services: list[Service], started: list[Process]) -> None:
    """Start them together, then wait for each; what was started goes into `started`."""
    for service in services:
        process = Process(places.home, service.name)
        if process.pid() is None:
            check_port(places, service.name)
            process.start(service.command, ROOT, _environment(places) | service.environment)
            started.append(process)
    deadline = time.monotonic() + START_S
    for service in services:
        process = Process(places.home, service.name)
        while not service.healthy():
            if process.pid() is None:
                raise DeepSpecError(f"{service.name} ended: {process.last_line()}; see {process.log}")
            if time.monotonic() > deadline:
                raise DeepSpecError(
                    f"{service.name} does not answer after {START_S:.0f} s; see {process.log}"
                )
            time.sleep(0.3)


def _environment(places: Places) -> dict[str, str]:
    return os.environ | TELEMETRY_OFF | places.client | {
        "PREFECT_HOME": str(places.home / "prefect"),
        "PYTHONPATH": python_path(ROOT),
    }  # fmt: skip


def database_of(places: Places) -> tuple[Database, str]:
    """Database URLs by name, and in words what stands behind them. What was chosen first stays: it has the history.

    Raises:
        DeepSpecError: that was PostgreSQL, which is not there any more.
    """
    home, port = places.home, places.ports["postgres"]
    missing = postgres.unusable(home / "postgres")
    if missing and (home / "postgres/PG_VERSION").exists():
        raise DeepSpecError(f"{home / 'postgres'} has the history of runs, but {missing}")
    if missing is None and not (home / "mlflow.db").exists():
        if not postgres.runs(home / "postgres"):
            check_port(places, "postgres")
        login = postgres.start(home / "postgres", HOST, port, ("prefect", "mlflow"))
        where = f"{login}@{HOST}:{port}"
        return (lambda name, driver, _: f"postgresql+{driver}://{where}/{name}"), f"PostgreSQL on port {port}"
    return (
        lambda name, _, driver: f"sqlite+{driver}:///{home / name}.db"
    ), f"SQLite ({missing or 'as before'})"


def check_port(places: Places, name: str) -> None:
    """Refuse a port that another program listens on.

    Raises:
        DeepSpecError: with the setting that names another.
    """
    port = places.ports[name]
    with socket.socket() as probe:
        if probe.connect_ex((HOST, port)) == 0:
            key = f"DEEPSPEC_{name.upper()}_PORT"
            raise DeepSpecError(
                f"port {port}, for {name}, is taken by another program; set {key} to a free one"
            )


def answers(url: str) -> Callable[[], bool]:
    def ask() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                return reply.status == 200
        except (urllib.error.URLError, OSError):
            return False

    return ask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("up", "down", "status"))
    parser.add_argument("--home", type=Path, default=ROOT / ".deepspec/services", help="default: %(default)s")
    flags = parser.parse_args()
    action = {"up": up, "down": down, "status": status}[flags.action]
    found: list[bool | None] = []
    failed = guarded(lambda: found.append(action(Places.of(flags.home))))
    raise SystemExit(failed or int(found == [False]))


if __name__ == "__main__":
    main()
