"""What every stage shares: its flags, and how it is run.

A stage is `python -m deepspec.stages.<stage> [--params FILE] ...`. It reads `params.yaml`, calls the library,
and turns a user's mistake into one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from deepspec.entry import guarded, quiet_environment
from deepspec.errors import DeepSpecError, nearest
from deepspec.progress import send

if TYPE_CHECKING:
    from deepspec.config import Params


def stage(
    main: Callable[[Any, argparse.Namespace], None],
    add_flags: Callable[[argparse.ArgumentParser], None] | None = None,
    argv: list[str] | None = None,
    params: type[Params] | None = None,
) -> None:
    """Run a stage's `main(params, flags)` and exit with its status.

    Args:
        params: what the params file must be; None: `Params`.
    """
    quiet_environment()
    module = sys.modules[main.__module__]
    parser = argparse.ArgumentParser(description=(module.__doc__ or "").strip().split("\n")[0])
    parser.add_argument("--params", default="params.yaml", help="the parameters (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="check parameters and flags, and run nothing")
    if add_flags:
        add_flags(parser)
    flags = parser.parse_args(argv)
    spec = module.__spec__  # has the name by which `python -m` was called
    name = _name(spec.name if spec else module.__name__, _drafters(flags))
    if not flags.dry_run:
        send({"stage": name})
    from deepspec.config import Params, load_params  # after --help: it imports torch

    def run() -> None:
        read = load_params(flags.params, params or Params)
        if not flags.dry_run:
            main(read, flags)
            return
        for drafter in _drafters(flags):
            if drafter not in read.drafters:
                raise DeepSpecError(f"unknown drafter {drafter!r}{nearest(drafter, read.drafters)}")
        print(f"{name}: {flags.params} and the flags are right; nothing was run")

    sys.exit(guarded(run))


def _drafters(flags: argparse.Namespace) -> list[str]:
    """Return the drafters that a stage's flags name."""
    named = getattr(flags, "drafter", None) or []
    return [named] if isinstance(named, str) else named


def _name(module: str, drafters: list[str]) -> str:
    """Return a stage's name as DVC has it, `train@dspark`."""
    return "@".join([module.rpartition(".")[2], *drafters])
