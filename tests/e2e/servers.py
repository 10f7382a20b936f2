"""Real Prefect and MLflow servers for the tests, started as `make up` starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.services import Places
from tests.e2e.clone import ROOT
from tests.network import GUARD, REACHED


class Servers:
    """Servers of their own in `home`; flows run by `run`, `start` or a deployment work under `home/runs`."""

    def __init__(self, home: Path) -> None:
        ports = free_ports(4)
        keys = ("prefect", "mlflow", "postgres", "worker")
        chosen = {f"DEEPSPEC_{key.upper()}_PORT": str(port) for key, port in zip(keys, ports, strict=True)}
        self.home = home
        self.places = Places.of(home / "services", chosen)
        self.environment = os.environ | chosen | self.places.client | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, GUARD))),
            REACHED: str(home / "reached"),
            "DEEPSPEC_RUNS": str(home / "runs"),
            "PREFECT_HOME": str(home / "client"),
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }  # fmt: skip

    def services(self, action: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "flows.services", action, "--home", str(self.places.home)],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert action == "status" or done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, flow: str = "pipeline", **parameters: Any) -> subprocess.Popen:
        """A flow in a process of its own, as a worker runs it."""
        code = f"from flows.{flow} import {flow}; {flow}(return_state=True, **{parameters!r})"
        return subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, flow: str = "pipeline", **parameters: Any) -> str:
        """Run a flow to its end; what it logged."""
        return self.start(flow, **parameters).communicate(timeout=300)[0]

    def ask(self, path: str, body: dict | None = None) -> Any:
        """The Prefect API: GET, or POST with a body."""
        request = urllib.request.Request(
            f"{self.places.client['PREFECT_API_URL']}/{path}",
            None if body is None else json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.load(reply)

    def flow_runs(self, **conditions: Any) -> list[dict]:
        """Those that have begun, newest first."""
        begun = {"flow_runs": {"start_time": {"is_null_": False}}}
        return self.ask("flow_runs/filter", {"sort": "START_TIME_DESC", **begun, **conditions})

    def tasks(self, run: dict) -> dict[str, dict]:
        """The task runs of a flow run by their names."""
        found = self.ask("task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
        return {task["name"]: task for task in found}

    def artifacts(self, run: dict) -> dict[str, dict]:
        found = self.ask("artifacts/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
        return {artifact["key"]: artifact for artifact in found}

    def log(self, run: dict) -> str:
        return "\n".join(
            line["message"]
            for line in self.ask("logs/filter", {"logs": {"flow_run_id": {"any_": [run["id"]]}}})
        )


@contextmanager
def servers(home: Path) -> Iterator[Servers]:
    started = Servers(home)
    try:
        started.services("up")
        yield started
    finally:
        started.services("down")
    reached = home / "reached"
    assert not reached.exists(), f"a server or a flow reached for {reached.read_text()}"


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.3)
    return found
