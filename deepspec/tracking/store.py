"""Where history lives: a SQLite file beside the code, or the MLflow server that $MLFLOW_TRACKING_URI names.

The default, `mlruns/`, is no build product: it is ignored by git and kept by `make clean`. A server keeps artifacts
behind its own address, so that every client reads them; a path of one machine in its store is refused.
"""

from __future__ import annotations

import errno
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from deepspec.entry import quiet_environment
from deepspec.errors import DeepSpecError, os_reason

DEFAULT = "sqlite:///mlruns/mlflow.db"
EXPERIMENT = "deepspec"
ADDRESS = "DEEPSPEC_MLFLOW_URL"  # of the server in links, where a browser reaches it by another name
KEY = "deepspec_key"  # the tag by which a second call finds what the first one wrote
_SQLITE = "sqlite:///"
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Store:
    uri: str
    client: MlflowClient
    experiment_id: str

    @property
    def runs(self) -> str:
        """Return the page with all runs; the experiment's own opens MLflow's page for traces."""
        return self.link("experiments", self.experiment_id, "runs")

    def link(self, *parts: str) -> str:
        """Return a page of the server's; of a SQLite store, its file."""
        if _is_server(self.uri):
            seen = os.environ.get(ADDRESS) or self.uri
            return "/".join([f"{seen.rstrip('/')}/#", *parts])
        return os.path.relpath(_database(self.uri))


@contextmanager
def connect() -> Iterator[Store]:
    """Connect to the store for writing. Whatever MLflow refuses in the block is an error of one line.

    Raises:
        DeepSpecError: no server answers, the store is one that we do not write to, or MLflow refused.
    """
    quiet_environment()
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault(
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"
    )  # links of our own lead to the runs
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT
    if _is_server(uri):
        _check_alive(uri)
    elif uri.startswith(_SQLITE):
        _database(uri).parent.mkdir(parents=True, exist_ok=True)
        uri = _SQLITE + str(_database(uri).absolute())  # MLflow keeps connections by their text
    else:
        raise DeepSpecError(
            f"$MLFLOW_TRACKING_URI is {_public(uri)}: name a server (http://host:port) or sqlite:///FILE"
        )
    try:
        mlflow.set_tracking_uri(uri)
        client = MlflowClient(uri)
        experiment = _experiment(client, uri)
        _check_location(experiment, uri)
        yield Store(uri, client, experiment.experiment_id)
    except (MlflowException, SQLAlchemyError) as error:
        raise DeepSpecError(f"MLflow at {_public(uri)}: {_reason(error)}") from error
    except (
        OSError
    ) as error:  # a server that went away, a file that cannot be read; a full disk is told by its name
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise DeepSpecError(f"MLflow at {_public(uri)}: {where}{os_reason(error)}") from error


def _experiment(client: MlflowClient, uri: str) -> Experiment:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        # Our own database gets a folder beside it; a server decides for itself.
        here = None if _is_server(uri) else (_database(uri).parent / "artifacts").as_uri()
        try:
            return client.get_experiment(client.create_experiment(EXPERIMENT, here))
        except MlflowException:  # another process was first
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise DeepSpecError(
            f"experiment {EXPERIMENT!r} was deleted; `mlflow experiments restore -x {found.experiment_id}`"
        )
    return found


def _check_location(experiment: Experiment, uri: str) -> None:
    location = experiment.artifact_location
    if _is_server(uri) and urlsplit(location).scheme in ("", "file"):
        raise DeepSpecError(
            f"the server keeps artifacts of {EXPERIMENT!r} at {location}, a path that only it can read: "
            "start it with --artifacts-destination, and with a new database"
        )


def _check_alive(uri: str) -> None:
    """Check that the server answers: MLflow's own client would try for minutes."""
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_PATIENCE_S).close()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise DeepSpecError(
                f"what answers at {_public(uri)} is no MLflow server (it has no /health); see MLFLOW_TRACKING_URI"
            ) from None
        # Something answers; what it refuses, the first request will say.
    except (OSError, ValueError) as error:
        raise DeepSpecError(
            f"no MLflow server answers at {_public(uri)} ({getattr(error, 'reason', error)}); "
            "start it, or unset MLFLOW_TRACKING_URI for a local file"
        ) from None


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "Invalid Host header" in text:
        return "it refuses this host name; start the server with --allowed-hosts"
    return text[:400]


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def _database(uri: str) -> Path:
    return Path(uri.removeprefix(_SQLITE))


def _public(uri: str) -> str:
    """Return the address without user and password."""
    scheme, _, rest = uri.partition("://")
    return f"{scheme}://{rest.rsplit('@', 1)[-1]}" if rest else uri
