"""Python processes that need not import torch, DVC and Prefect first: each is forked from a server that has done so.

    with warm(folder, environment) as programs: ...

The programs of the folder, `python` and `accelerate`, stand for the process that they ask for: they have its arguments,
environment, directory and open files, its exit status is theirs, and whoever kills them, `kill -9` too, kills it. Of
this project's own code the server imports nothing, so that a fork runs what its PYTHONPATH has.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

SOCKET = "warm.socket"
FIRST = 500  # descriptors from here on are nobody's while they are sorted
SLOW = (
    "accelerate.commands.accelerate_cli", "datasets", "dvc.api", "dvc.cli", "dvc.commands.checkout",
    "dvc.commands.metrics", "dvc.commands.repro", "dvc.repo.reproduce", "dvc_data.index", "great_expectations",
    "matplotlib.figure", "pandas", "prefect", "prefect.flow_engine", "prefect.task_engine", "pyarrow.parquet",
    "safetensors.torch", "scipy.stats", "torch", "transformers", "transformers.models.llama.modeling_llama",
)  # fmt: skip
PROGRAM = """#!{python} -IS
import json, os, signal, socket, struct, sys
server = socket.socket(socket.AF_UNIX)
server.connect({socket!r})
open_ones = []
for fd in map(int, os.listdir("/proc/self/fd")):
    try:
        if os.get_inheritable(fd):
            open_ones.append(fd)
    except OSError:
        pass
said = json.dumps([sys.argv, os.getcwd(), dict(os.environ), open_ones]).encode()
socket.send_fds(server, [struct.pack("I", len(said))], open_ones)
server.sendall(said)
pid, = struct.unpack("i", server.recv(4, socket.MSG_WAITALL))
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
told = server.recv(4, socket.MSG_WAITALL)
status, = struct.unpack("i", told) if told else (1,)
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@dataclass(frozen=True)
class Request:
    """What a process shall run: its words as they were called, and where."""

    words: list[str]
    directory: str
    environment: dict[str, str]


def serve(folder: Path) -> Request:
    """Fork a process for each request, for ever; this returns in the forks alone."""
    place = folder / SOCKET
    place.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(place))
    listener.listen(64)
    events = selectors.DefaultSelector()
    events.register(listener, selectors.EVENT_READ)
    running: dict[int, tuple[int, socket.socket]] = {}  # descriptor of a process or its program → both
    while True:
        for key, _ in events.select():
            if key.fileobj is listener:
                program, _ = listener.accept()
                forked = _fork(program)
                if isinstance(forked, Request):
                    KEPT.extend(
                        (listener, events, running)
                    )  # they would close numbers that are another's by now
                    return forked
                if forked is not None:
                    process = os.pidfd_open(forked)
                    running[process] = running[program.fileno()] = (forked, program)
                    events.register(process, selectors.EVENT_READ)
                    events.register(program, selectors.EVENT_READ)
            elif key.fd in running:
                pid, program = running[key.fd]
                if isinstance(key.fileobj, socket.socket) and key.fileobj is not program:
                    continue  # of one that has ended in this round, whose number was given out again
                if key.fileobj is program:  # its program was killed
                    events.unregister(program)
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                    continue
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                events.unregister(key.fd)
                with suppress(KeyError):
                    events.unregister(program)
                running.pop(key.fd)
                running.pop(program.fileno(), None)
                os.close(key.fd)
                with suppress(OSError):
                    program.sendall(struct.pack("i", status))
                program.close()


def _fork(program: socket.socket) -> Request | int | None:
    """Return the id of the process in the server, the request in the process; None if its program is gone."""
    try:
        length, received, _, _ = socket.recv_fds(program, 4, 250)
        said = program.recv(struct.unpack("I", length)[0], socket.MSG_WAITALL)
        words, directory, environment, wanted = json.loads(said)
    except (OSError, ValueError, struct.error):
        program.close()
        return None
    if pid := os.fork():
        for fd in received:
            os.close(fd)
        with suppress(OSError):
            program.sendall(struct.pack("i", pid))
        return pid
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, FIRST) for fd in received]
    os.closerange(0, FIRST)
    for fd, number in zip(high, wanted, strict=True):
        os.dup2(fd, number)
    os.closerange(FIRST, FIRST + 2 * len(high) + 1)
    program.detach()
    return Request(words, directory, environment)


def become(request: Request) -> None:
    """Run what was asked for in this process, as the interpreter does with these words."""
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.directory)
    random.seed()
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
    sys.stdin = open(0, closefd=False) if _is_open(0) else None  # noqa: SIM115
    program, *words = request.words
    sys.executable = str(Path(program).with_name("python"))
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "deepspec", "flows")]:
        del sys.modules[name]
    own = [path for path in sys.path if path not in PATHS]
    sys.path[:] = [*filter(None, request.environment.get("PYTHONPATH", "").split(os.pathsep)), *own]
    importlib.invalidate_caches()
    if Path(program).name == "accelerate":
        words = ["-m", "accelerate.commands.accelerate_cli", *words]
    while words[0] in ("-u", "-I", "-B"):
        words = words[1:]
    if words[0] == "-m":
        sys.path.insert(0, request.directory)
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(words[0]).parent))
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def _is_open(fd: int) -> bool:
    with suppress(OSError):
        os.fstat(fd)
        return True
    return False


KEPT: list[object] = []
PATHS = {os.getcwd(), "", *os.environ.get("PYTHONPATH", "").split(os.pathsep)}  # of the server itself


@contextmanager
def warm(folder: Path, environment: dict[str, str], modules: tuple[str, ...] = SLOW) -> Iterator[Path]:
    """A server with these modules and the programs that ask it; the folder of these, to be the first on the PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("python", "accelerate"):
        program = folder / name
        program.write_text(
            PROGRAM.format(python=os.path.realpath(sys.executable), socket=str(folder / SOCKET))
        )
        program.chmod(0o755)
    (folder / SOCKET).unlink(missing_ok=True)
    with (folder / "warm.log").open("ab") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder), *modules], env=environment, stdout=log, stderr=log
        )
    try:
        while not (folder / SOCKET).exists():
            if server.poll() is not None:
                raise RuntimeError(f"the server of warm processes ended; see {folder / 'warm.log'}")
            with suppress(subprocess.TimeoutExpired):
                server.wait(0.2)
        yield folder
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    for module in sys.argv[2:]:
        importlib.import_module(module)
    become(serve(Path(sys.argv[1])))
