"""No test reaches another machine: connections of this process, and of every Python process that a test starts."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable
from pathlib import Path

GUARD = (
    Path(__file__).parent / "guard"
)  # has the sitecustomize.py that installs it in a process that is started
REACHED = "DEEPSPEC_TESTS_REACHED"  # names the file in which such a process says what it reached for


def is_here(host: object) -> bool:
    if host in (None, "", "localhost", b"localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False


def replacements(reached: Callable[[str], None]) -> list[tuple[object, str, Callable]]:
    """(owner, name, function) to put in place: each tells `reached` of a foreign host, then refuses it."""

    def refuse(host: object) -> None:
        if not is_here(host):
            reached(str(host))
            raise OSError(f"tests may not reach {host}")

    def guard(real: Callable) -> Callable:
        def connect(self: socket.socket, address):
            if self.family != socket.AF_UNIX:
                refuse(address[0])
            return real(self, address)

        return connect

    resolve = socket.getaddrinfo

    def getaddrinfo(host, *args, **options):
        refuse(host)
        return resolve(host, *args, **options)

    connects = [
        (socket.socket, name, guard(getattr(socket.socket, name))) for name in ("connect", "connect_ex")
    ]
    return [*connects, (socket, "getaddrinfo", getaddrinfo)]


def install() -> None:
    """For the whole life of this process."""

    def write(host: str) -> None:
        with open(os.environ[REACHED], "a") as file:
            file.write(f"{host}\n")

    for owner, name, function in replacements(write):
        setattr(owner, name, function)
