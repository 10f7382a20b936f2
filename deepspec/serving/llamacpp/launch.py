"""A llama.cpp server of a target, plain or with a draft, started on this machine's loopback."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspec.serving.launch import free_port, started
from deepspec.serving.llamacpp.environment import Environment

SCRIPT = Path(__file__).with_name("server.py")


@dataclass(frozen=True)
class Server:
    """What is served, and how.

    Args:
        kind: llama.cpp's `--spec-type`, kinds with a comma between them; empty decodes plainly.
        tokens: drafted at most.
        least: `--spec-draft-p-min`; 0 does not cut drafts.
        match: tokens that ngram-simple looks up; 0 leaves it as it is.
        cache: type of the KV cache's numbers.
    """

    model: Path
    context: int
    threads: int
    kind: str = ""
    draft: Path | None = None
    tokens: int = 0
    least: float = 0.0
    match: int = 0
    cache: str = "f16"

    def settings(self, port: int) -> dict[str, Any]:
        """Return what `server.py` reads."""
        paths = {"model": str(self.model.resolve()), "draft": str(self.draft.resolve()) if self.draft else ""}
        return vars(self) | paths | {"port": port}

    def flags(self, port: int) -> list[str]:
        """Return the flags of a llama-server."""
        found = [
            "-m",
            str(self.model.resolve()),
            "-c",
            str(self.context),
            "-t",
            str(self.threads),
            "-np",
            "1",
        ]
        found += [
            "-ctk",
            self.cache,
            "-ctv",
            self.cache,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--no-webui",
            "--fit",
            "off",
            "--cache-ram",
            "0",
        ]
        if self.draft:
            found += ["-md", str(self.draft.resolve())]
        if self.kind:
            found += ["--spec-type", self.kind]
        if self.draft and self.kind:
            found += ["--spec-draft-n-max", str(self.tokens), "--spec-draft-p-min", str(self.least)]
            found += ["-ctkd", self.cache, "-ctvd", self.cache]
        if self.match:
            found += [
                "--spec-ngram-simple-size-n",
                str(self.match),
                "--spec-ngram-simple-size-m",
                str(self.tokens),
            ]
        return found


@contextmanager
def serving(environment: Environment, server: Server, name: str) -> Iterator[str]:
    """Start it; yield its address, and end it on leaving. `name`: of its log.

    Raises:
        DeepSpecError: it ended or hung while starting, or ended while it served.
    """
    port = free_port()
    variables = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LLAMA_ARG_"))
    }
    if environment.binary:
        command = [str(environment.binary), *server.flags(port)]
    else:
        command = [str(environment.python), str(SCRIPT), json.dumps(server.settings(port))]
    with started("llama.cpp", command, variables, port, name) as address:
        yield address
