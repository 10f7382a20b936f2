"""Training with the target's features cached and online: tokens/s, peak memory, bytes kept a token.

Each way trains a drafter of params.yaml for a few steps in a process of its own, on all of `data/distill` and on an
eighth of it: memory that grows with the data would show. Run it where `dvc repro` has run; cached features that are
not there yet are computed first, which is timed apart. Sequences are shuffled, so the tokens of a step differ; rates
are sums over sums.

    python -m benchmarks.features --drafter dspark
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import REPORTS, command_line, write_report
from benchmarks.training_steps import forget_peak, resident
from deepspec.config import Params, load_params
from deepspec.errors import DeepSpecError
from deepspec.features.codec import CODECS
from deepspec.markdown import markdown_table
from deepspec.progress import Progress

SHARES = (1.0, 0.125)
WAYS = ("online", *CODECS)
_UNTIMED = 2


def with_features(params: Params, way: str) -> Params:
    """The same run, its features `online` or cached in the form `way`."""
    chosen = {"mode": "online"} if way == "online" else {"mode": "cached", "form": way}
    features = params.train.features.model_copy(update=chosen)
    return params.model_copy(update={"train": params.train.model_copy(update={"features": features})})


def one(drafter: str, way: str, share: float, steps: int, params: Params) -> dict[str, float]:
    """Train in this process."""
    from accelerate import Accelerator

    from deepspec.target.model import load_target
    from deepspec.training.prepare import TrainingData, make_network, prepare
    from deepspec.training.run import make_trainer

    params = with_features(params, way)
    target = load_target("data/target")
    everything = TrainingData.read(params.train)
    data = TrainingData(everything.sequences[: int(len(everything.sequences) * share)], everything.digest)
    network = make_network(params, drafter, target)
    accelerator = Accelerator(mixed_precision=params.train.mixed_precision)
    began = time.perf_counter()
    prepared = prepare(params, drafter, network, target, lambda: target, data, accelerator)
    trainer = make_trainer(prepared, accelerator)
    prepared_s = time.perf_counter() - began
    forget_peak()
    seconds, positions = [], []
    for _ in range(_UNTIMED + steps):
        tick = time.perf_counter()
        positions.append(trainer.train_step()["positions"])
        seconds.append(time.perf_counter() - tick)
        trainer.step += 1
    return {
        "step_s": sum(seconds[_UNTIMED:]) / steps,
        "positions_per_second": sum(positions[_UNTIMED:]) / sum(seconds[_UNTIMED:]),
        "peak_bytes": resident("VmHWM"),
        "prepared_s": prepared_s,
        "bytes_a_token": getattr(trainer.batches.store, "bytes_a_token", 0.0),
    }


def measure(flags: argparse.Namespace, way: str, share: float) -> dict[str, float]:
    """`one` in a fresh process.

    Raises:
        DeepSpecError: it failed.
    """
    arguments = ["--drafter", flags.drafter, "--steps", str(flags.steps), "--params", flags.params]
    command = [sys.executable, "-m", "benchmarks.features", *arguments, "--one", way, str(share)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        last = ran.stderr.strip().splitlines()[-1:] or ["no message"]
        raise DeepSpecError(f"{way}: {last[0]}")
    return json.loads(ran.stdout.strip().splitlines()[-1])


def table(found: dict[str, dict[str, float]]) -> str:
    """`found` by "way, share of the data"."""
    rows = [
        (
            what,
            f"{of['step_s']:.2f}",
            f"{of['positions_per_second']:.0f}",
            f"{of['peak_bytes'] / 2**20:.0f}",
            f"{of['bytes_a_token']:.0f}",
            f"{of['prepared_s']:.0f}",
        )
        for what, of in found.items()
    ]
    heads = ("features", "s a step", "positions/s", "peak MiB", "bytes a token", "s before the first step")
    return markdown_table(heads, rows, "tn")


def arguments() -> argparse.ArgumentParser:
    parser = command_line("features", __doc__)
    add = parser.add_argument
    add("--drafter", default="dspark", help="a name under `drafters` (default: %(default)s)")
    add("--params", default="params.yaml", help="default: %(default)s")
    add("--ways", nargs="+", default=["online", "bf16"], choices=WAYS, help="default: online bf16")
    add("--steps", type=int, default=12, help="timed steps of each (default 12)")
    add("--one", nargs=2, metavar=("WAY", "SHARE"), help=argparse.SUPPRESS)
    add("--output", type=Path, default=REPORTS, help="folder of the report")
    return parser


def main(argv: list[str] | None = None) -> int:
    flags = arguments().parse_args(argv)
    try:
        params = load_params(flags.params)
        if flags.drafter not in params.drafters:
            raise DeepSpecError(f"{flags.params} has no drafter {flags.drafter!r}")
        if flags.one:
            print(json.dumps(one(flags.drafter, flags.one[0], float(flags.one[1]), flags.steps, params)))
            return 0
        found = {}
        with Progress("training", len(flags.ways) * len(SHARES)) as progress:
            for way in flags.ways:
                for share in SHARES:
                    found[f"{way}, {share:.3g} of the data"] = measure(flags, way, share)
                    progress.advance()
    except DeepSpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_report(flags.output, "feature-modes", "Features cached and online", table(found), found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
