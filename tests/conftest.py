"""What every test gets: a tiny target, no hub, no network but this machine."""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")  # before any import

import ipaddress
import socket
from pathlib import Path

import pytest

from deepspec.stages.common import quiet_environment

quiet_environment()


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny random Llama with tokenizer and template; not to be written to."""
    from tests.tiny import make_target

    return make_target(tmp_path_factory.mktemp("tiny") / "target")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with MLflow's tables and nothing in them, to be copied: making them takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch):
    """Fail a test that reaches for another machine, even if the library that did so swallowed the refusal."""
    reached: list[str] = []
    real = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex")}
    resolve = socket.getaddrinfo

    def refuse(host: object) -> None:
        if not _is_here(host):
            reached.append(str(host))
            raise OSError(f"tests may not reach {host}")

    def guard(name: str):
        def connect(self: socket.socket, address):
            if self.family != socket.AF_UNIX:
                refuse(address[0])
            return real[name](self, address)

        return connect

    def getaddrinfo(host, *args, **options):
        refuse(host)
        return resolve(host, *args, **options)

    for name in real:
        monkeypatch.setattr(socket.socket, name, guard(name))
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield
    assert not reached, f"the test reached for {', '.join(reached)}"


def _is_here(host: object) -> bool:
    if host in (None, "", "localhost", b"localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False
