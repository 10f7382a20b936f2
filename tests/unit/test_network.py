"""The guard itself: a test that reaches out fails, and so does a process that it starts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tests.network import GUARD, REACHED, is_here, replacements


@pytest.mark.parametrize(
    "host", [None, "", "localhost", "127.0.0.1", "::1", "127.8.8.8", socket.gethostname()]
)
def test_this_machine_may_be_reached(host):
    assert is_here(host)


@pytest.mark.parametrize("host", ["192.0.2.1", "example.org", "2001:db8::1"])
def test_another_may_not_and_is_told_of(host):
    told: list[str] = []
    guards = {name: function for _, name, function in replacements(told.append)}
    with pytest.raises(OSError, match="may not reach"):
        guards["getaddrinfo"](host, 80)
    with pytest.raises(OSError, match="may not reach"), socket.socket() as client:
        guards["connect"](client, (host, 80))
    assert told == [host, host]


def test_a_process_that_is_started_is_guarded_even_if_it_swallows_the_refusal(tmp_path):
    code = """
import urllib.request
try:
    urllib.request.urlopen("http://example.org", timeout=1)
except OSError:
    pass
"""
    path = os.pathsep.join(map(str, (tmp_path, GUARD)))
    environment = os.environ | {"PYTHONPATH": path, REACHED: str(tmp_path / "reached"), "no_proxy": "*"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True)
    assert (tmp_path / "reached").read_text() == "example.org\n"
