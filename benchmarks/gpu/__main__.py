"""The GPU path, proved in numbered steps that each end within 8 minutes and keep what they found.

    python -m benchmarks.gpu --dry-run                      # every step at a small size, on the CPU
    python -m benchmarks.gpu --output OUT --steps 1 2       # on a GPU
    python -m benchmarks.gpu --report reports/gpu           # the page of what was found

A step that is finished is not run again; one that was cut short goes on where it stopped. Each runs in a process of its
own, so that what breaks one device context leaves the other steps alone. Needs torch, transformers, accelerate,
safetensors, numpy and what comes with them; docs/gpu.md says what to bring to a machine without a network.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from time import monotonic

import torch

from benchmarks.gpu.findings import SECONDS, Findings, OutOfTime, Setting
from deepspec.entry import guarded, quiet_environment
from deepspec.errors import DeepSpecError

STEPS = {
    1: ("checks", "The gpu tests, and the device's ceilings"),
    2: ("lossless", "Losslessness in float32, and the law at T = 1"),
    3: ("decoding", "Passes and decoding, beside transformers.generate"),
    4: ("training", "Training steps at Qwen3-4B's sizes"),
    5: ("processes", "Two processes on one device"),
    6: ("demo", "The demo's training with 20 times the data and steps"),
}
OUTPUT = Path(".deepspec/gpu")
_GRACE = 60  # seconds in which a piece that has begun may end


def main(argv: list[str] | None = None) -> int:
    flags = arguments().parse_args(argv)
    flags.output = flags.output or (Path(f"{OUTPUT}-dry") if flags.dry_run else OUTPUT)
    quiet_environment()
    return guarded(lambda: run(flags))


def run(flags: argparse.Namespace) -> None:
    """Run the steps that are asked for, then write the page.

    Raises:
        DeepSpecError: no GPU and no dry run, or an output folder of another device.
    """
    if flags.report:
        from benchmarks.gpu.page import write_page

        write_page(flags.output, flags.report)
        return
    setting = Setting(flags.dry_run, flags.output, flags.target, flags.draft, flags.data, flags.seconds)
    if not setting.dry and not torch.cuda.is_available():
        raise DeepSpecError("no CUDA device here; --dry-run runs every step at a small size on the CPU")
    if len(flags.steps) == 1 or flags.here:
        for number in flags.steps:
            run_step(setting, number)
    else:
        for number in flags.steps:
            run_apart(flags, number)


def run_step(setting: Setting, number: int) -> Findings:
    """One step in this process, unless it was finished before."""
    module, title = STEPS[number]
    findings = Findings(setting, number, title)
    if findings.complete:
        print(f"step {number}: finished before, {findings.path}", flush=True)
        return findings
    print(f"step {number}: {title}, on {setting.name}", flush=True)
    setting.work.mkdir(parents=True, exist_ok=True)
    try:
        import_module(f"benchmarks.gpu.{module}").run(setting, findings)
    except OutOfTime:
        print(f"step {number}: out of time; run it again to go on", flush=True)
        return findings
    findings.finish()
    failed = len(findings.failed)
    print(f"step {number}: {len(findings.record['pieces'])} pieces, {failed} failed", flush=True)
    return findings


def run_apart(flags: argparse.Namespace, number: int) -> None:
    """One step in a process of its own, which is ended when its time is long over."""
    words = ["--output", str(flags.output), "--seconds", str(flags.seconds), "--steps", str(number)]
    for name in ("target", "draft", "data"):
        words += [f"--{name}", str(getattr(flags, name))] if getattr(flags, name) else []
    words += ["--dry-run"] if flags.dry_run else []
    began = monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu", *words], timeout=flags.seconds + _GRACE
        )
    except subprocess.TimeoutExpired:
        print(f"step {number}: ended after {monotonic() - began:.0f} s in the middle of a piece", flush=True)
        return
    if done.returncode:
        print(f"step {number}: its process ended with status {done.returncode}", flush=True)


def arguments() -> argparse.ArgumentParser:
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, nargs="+", choices=list(STEPS), default=list(STEPS), help="default: all")
    add("--dry-run", action="store_true", help="small sizes, on the CPU")
    add("--output", type=Path, help=f"folder of what is found (default {OUTPUT}, of a dry run {OUTPUT}-dry)")
    add("--target", type=Path, help="directory of a real target, for steps 3 and 6")
    add("--draft", type=Path, help="directory of a draft of it, for step 3")
    add("--data", type=Path, help="directory of distillation data of it, for step 6")
    add("--seconds", type=float, default=SECONDS - _GRACE, help="after which a step starts no further piece")
    add("--here", action="store_true", help="run several steps in this one process")
    add("--report", type=Path, metavar="FOLDER", help="write the page of --output there, and run nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
