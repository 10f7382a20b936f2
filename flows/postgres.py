"""A PostgreSQL of our own: a cluster in a folder, on the loopback address, with a password nobody else can read."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import subprocess
from pathlib import Path

from deepspec.errors import DeepSpecError

USER = "deepspec"
SYSTEM_USER = "postgres"  # the server refuses to run as root


DEBIAN = Path("/usr/lib/postgresql")


def binaries(folder: Path) -> Path | None:
    """Where initdb and pg_ctl are: Debian's of the version that made the cluster in `folder`, else those on PATH, else
    Debian's newest."""
    made = folder / "PG_VERSION"
    places = [DEBIAN / made.read_text().strip() / "bin"] if made.exists() else []
    found = shutil.which("initdb")
    places += [Path(found).resolve().parent] if found else []
    places += sorted(DEBIAN.glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    return next((place for place in places if (place / "pg_ctl").exists()), None)


def unusable(folder: Path) -> str | None:
    """Why there is no PostgreSQL to be had in `folder`, or None."""
    if binaries(folder) is None:
        return "PostgreSQL is not installed"
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "psycopg is not installed"
    if os.geteuid() == 0:
        try:
            pwd.getpwnam(SYSTEM_USER)
        except KeyError:
            return f"no user {SYSTEM_USER}, and PostgreSQL does not run as root"
        above = next(path for path in folder.parents if path.exists())
        reach = subprocess.run(["test", "-x", str(above)], cwd="/", **_identity())
        if reach.returncode:
            return f"the user {SYSTEM_USER} may not enter {above}"
    return None


def start(folder: Path, host: str, port: int, databases: tuple[str, ...]) -> str:
    """Make the cluster and the databases if need be and start the server; `user:password`."""
    secret = folder.with_suffix(".password")
    if not (folder / "PG_VERSION").exists():
        _create(folder, secret)
    if not runs(folder):
        options = (
            f"-c listen_addresses={host} -c port={port} -c unix_socket_directories= -c max_connections=200"
        )
        log = folder / "server.log"
        _call("pg_ctl", "start", "--wait", "-D", str(folder), "-l", str(log), "-o", options)
    password = secret.read_text().strip()
    _create_databases(host, port, password, databases)
    return f"{USER}:{password}"


def runs(folder: Path) -> bool:
    if not (folder / "PG_VERSION").exists():
        return False
    return _call("pg_ctl", "status", "-D", str(folder), check=False) == 0


def stop(folder: Path) -> bool:
    """Whether there was a server to stop."""
    if not runs(folder):
        return False
    _call("pg_ctl", "stop", "--wait", "--mode", "fast", "-D", str(folder))
    return True


def _create(folder: Path, secret: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(16))
    if os.geteuid() == 0:
        for path in (folder, secret):
            shutil.chown(path, SYSTEM_USER, SYSTEM_USER)
    _call(
        "initdb",
        "-D",
        str(folder),
        "-U",
        USER,
        "--auth",
        "scram-sha-256",
        "--pwfile",
        str(secret),
        "-E",
        "UTF8",
    )


def _create_databases(host: str, port: int, password: str, names: tuple[str, ...]) -> None:
    import psycopg

    try:
        connection = psycopg.connect(
            host=host, port=port, user=USER, password=password, dbname="postgres", autocommit=True
        )
    except psycopg.OperationalError:  # one that was told to stop still runs while it writes down what it has
        raise DeepSpecError(
            f"PostgreSQL runs, but does not answer at {host}:{port}; if it is about to stop, try again in a minute"
        ) from None
    with connection:
        there = {name for (name,) in connection.execute("SELECT datname FROM pg_database")}
        for name in set(names) - there:
            connection.execute(f'CREATE DATABASE "{name}"')


def _identity() -> dict:
    """Arguments of subprocess that give up root."""
    return {"user": SYSTEM_USER, "group": SYSTEM_USER, "extra_groups": []} if os.geteuid() == 0 else {}


def _call(name: str, *words: str, check: bool = True) -> int:
    """Run one of PostgreSQL's programs. The server keeps the output open, so that no pipe is waited for."""
    folder = Path(words[words.index("-D") + 1])
    programs = binaries(folder)
    if programs is None:
        raise DeepSpecError("PostgreSQL is not installed")
    log = folder.with_suffix(".setup.log")
    with log.open("ab") as out:
        done = subprocess.run(
            [str(programs / name), *words],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"LC_ALL": "C.UTF-8"},
            **_identity(),
        )
    if check and done.returncode:
        raise DeepSpecError(f"{name} failed with {done.returncode}; see {log}")
    return done.returncode
