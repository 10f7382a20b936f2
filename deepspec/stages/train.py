"""Train one drafter by distillation: `accelerate launch -m deepspec.stages.train --drafter dspark`."""

from __future__ import annotations

import argparse
from pathlib import Path

from deepspec.config import Params
from deepspec.stages.common import stage


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--drafter", required=True, help="a name under `drafters` of the params file")


def main(params: Params, flags: argparse.Namespace) -> None:
    from deepspec.tracking.system import watched
    from deepspec.training.run import Outputs, train

    outputs = Outputs.of(flags.drafter)
    with watched(flags.drafter, outputs.draft):
        train(params, flags.drafter, Path("data/target"), outputs)


if __name__ == "__main__":
    stage(main, add_flags)
