"""Train one drafter by distillation: `accelerate launch -m deepspec.stages.train --drafter dspark`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from deepspec.config import Params
from deepspec.stages.common import stage


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--drafter", required=True, help="a name under `drafters` of the params file")
    parser.add_argument("--seed", type=int, help="in place of `seed` of the params file")
    parser.add_argument(
        "--as", dest="name", help="write data/drafts/NAME and its reports (default: the drafter's name)"
    )
    parser.add_argument(
        "--features-only",
        action="store_true",
        help="store the target's features (mode: cached), and train nothing",
    )


def main(params: Params, flags: argparse.Namespace) -> None:
    from deepspec.stages.body import served_target
    from deepspec.training.paths import TrainingPaths
    from deepspec.training.run import store_features, train
    from deepspec.training.system import watched

    if flags.seed is not None:
        params = params.model_copy(update={"seed": flags.seed})
    name = flags.name or flags.drafter
    paths = TrainingPaths.of(name)
    engine = partial(served_target, params.target) if params.target.engine == "vllm" else None
    target = Path("data/target")
    if flags.features_only:
        store_features(params, flags.drafter, target, engine)
        return
    with watched(name, paths.draft):
        train(params, flags.drafter, target, paths, engine)


if __name__ == "__main__":
    stage(main, add_flags)
