"""DVC reproduces a pipeline as ever, but runs each stage's module in this process: nothing is imported twice.

python -m tests.e2e.stages REPOSITORY [STAGE ...]       # a process of its own, to be killed
"""

from __future__ import annotations

import os
import runpy
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, chdir, contextmanager
from pathlib import Path
from unittest import mock

import dvc.stage.run
from accelerate.state import AcceleratorState
from dvc.repo import Repo
from dvc.stage import PipelineStage
from dvc.stage.exceptions import StageCmdFailedError

from tests.network import replacements

# Of a process that dvc starts: no GPU, and a thread is all that a tiny model can use.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def reproduce(root: Path, *stages: str) -> list[str]:
    """What `dvc repro STAGE ...` does; the names of the stages that ran, in their order."""
    ran: list[str] = []

    def run(stage: PipelineStage, dry: bool = False, run_env: dict[str, str] | None = None) -> None:
        ran.append(stage.addressing)
        with chdir(stage.wdir), mock.patch.dict(os.environ, run_env or {}):
            if status := run_command(stage.cmd):
                raise StageCmdFailedError(stage.cmd, status)

    with alone(), mock.patch.object(dvc.stage.run, "cmd_run", run), chdir(root), Repo(str(root)) as repo:
        repo.reproduce(targets=list(stages) or None)
    return ran


def planned(root: Path) -> list[str]:
    """What `dvc repro --dry` would run, in its order."""
    with chdir(root), Repo(str(root)) as repo:
        return [stage.addressing for stage in repo.reproduce(dry=True)]


def run_command(command: str) -> int:
    """Run the module of a stage's command with its flags, as `python -m` or `accelerate launch -m` does.

    Returns:
        Its exit status.
    """
    words = shlex.split(command)
    module, *flags = words[len(words) - words[::-1].index("-m") :]
    return run_module(module, *flags)


def run_module(module: str, *flags: str) -> int:
    """`python -m MODULE FLAG ...`, in the present directory; its exit status."""
    AcceleratorState._reset_state(True)
    with mock.patch.object(sys, "argv", [module, *flags]):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as done:
            return done.code if isinstance(done.code, int) else int(done.code is not None)
    return 0


@contextmanager
def alone() -> Iterator[None]:
    """In the environment of a stage; what reaches for another machine fails, even if a library swallows that."""
    reached: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, ENVIRONMENT))
        for owner, name, function in replacements(reached.append):
            stack.enter_context(mock.patch.object(owner, name, function))
        yield
    assert not reached, f"a stage reached for {', '.join(reached)}"


if __name__ == "__main__":
    reproduce(Path(sys.argv[1]), *sys.argv[2:])
