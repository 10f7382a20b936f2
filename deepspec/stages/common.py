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
    if add_flags:
        add_flags(parser)
    flags = parser.parse_args(argv)
    spec = module.__spec__  # has the name by which `python -m` was called
    send({"stage": _name(spec.name if spec else module.__name__, getattr(flags, "drafter", None) or [])})
    from deepspec.config import Params, load_params  # after --help: it imports torch

    sys.exit(guarded(lambda: main(load_params(flags.params, params or Params), flags)))


def _name(module: str, drafters: str | list[str]) -> str:
    """Return a stage's name as DVC has it, `train@dspark`."""
    named = [drafters] if isinstance(drafters, str) else drafters
    return "@".join([module.rpartition(".")[2], *named])
