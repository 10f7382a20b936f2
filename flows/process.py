"""A process that outlives the command that started it: its id in a file, its output in another."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import psutil

STOP_S = 30.0


class Process:
    """`<home>/<name>.pid` holds the id and the time of birth, since ids are given out again."""

    def __init__(self, home: Path, name: str) -> None:
        self.name, self.file, self.log = name, home / f"{name}.pid", home / f"{name}.log"
        self._family: list[psutil.Process] = []

    def start(self, command: list[str], cwd: Path, environment: dict[str, str]) -> None:
        with self.log.open("ab") as log:
            started = subprocess.Popen(
                command,
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.file.write_text(f"{started.pid} {psutil.Process(started.pid).create_time()}")

    def pid(self) -> int | None:
        """Of the process, if it is still the one that was started."""
        found = self._found()
        return found.pid if found else None

    def _found(self) -> psutil.Process | None:
        try:
            pid, born = self.file.read_text().split()
            found = psutil.Process(int(pid))
            if found.create_time() == float(born) and found.status() != psutil.STATUS_ZOMBIE:
                return found
        except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
            pass
        return None

    def terminate(self) -> bool:
        """Tell it to stop; whether there was anything to tell. `wait` sees to it."""
        found = self._found()
        if found:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since
                self._family = [found, *found.children(recursive=True)]
                found.terminate()
        return found is not None

    def wait(self) -> None:
        """Until it and all that it started are gone; what does not go is killed."""
        _, alive = psutil.wait_procs(self._family, STOP_S)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, STOP_S)
        self.file.unlink(missing_ok=True)

    def last_line(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n") if self.log.exists() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
