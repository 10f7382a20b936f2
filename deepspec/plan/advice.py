"""What of a plan would not fit, and what to change in params.yaml so that it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deepspec.plan.estimate import CODES, Estimate, Plan

if TYPE_CHECKING:
    from deepspec.config import Params

USABLE = 0.92  # of a device's memory, and of the free disk
LONG_H = 48.0  # hours of a stage from which on it is remarked on
ENGINE = "target.engine: vllm, which spreads the target over devices (docs/vllm.md)"


@dataclass(frozen=True)
class Remark:
    """Something that does not fit, or takes long, and what to do."""

    stage: str
    found: str
    change: str
    fits: bool = False


def remarks(plan: Plan, params: Params) -> list[Remark]:
    """Return what is wrong with a plan, worst first: what does not fit, then what takes days."""
    found = [
        Remark(
            estimate.stage,
            f"needs {gigabytes(estimate.memory)} of memory, a device has {gigabytes(plan.rates.memory)}",
            _less_memory(estimate, plan, params),
        )
        for estimate in plan.estimates
        if estimate.memory > USABLE * plan.rates.memory
    ]
    if plan.disk > USABLE * plan.rates.free_disk:
        largest = max(plan.estimates, key=lambda estimate: estimate.disk)
        found.append(
            Remark(
                largest.stage,
                f"{gigabytes(plan.disk)} in all, {gigabytes(largest.disk)} of it here; "
                f"the disk has {gigabytes(plan.rates.free_disk)}",
                _less_disk(largest, plan, params),
            )
        )
    found += [
        Remark(
            estimate.stage, f"takes {estimate.seconds / 3600:.0f} hours", _less_time(estimate, params), True
        )
        for estimate in plan.estimates
        if estimate.seconds > 3600 * LONG_H
    ]
    return found


def _less_memory(estimate: Estimate, plan: Plan, params: Params) -> str:
    room = USABLE * plan.rates.memory
    whole = plan.target.weights > room
    match estimate.stage.split()[0]:
        case "generate" if not whole:
            return f"generate.batch_size below {params.generate.batch_size}, or a shorter generate.max_length"
        case "prompts" if not whole:
            return f"generate.batch_size below {params.generate.batch_size}"
        case "prompts":
            return "prompts.mix without magpie: seed, jsonl or hub prompts need no target"
        case "generate":
            return "generate.engine: openai with a server that holds the target (vLLM, SGLang), or given"
        case "features":
            return ENGINE
        case "train" if params.train.features.mode == "online":
            return "train.features.mode: cached, which leaves all but the target's ends out of training"
        case "train" if whole and params.train.real_decode:
            return "train.real_decode: false, which leaves the target's layers out (no calibration, no decoded τ)"
        case "train":
            return (
                f"train.batch_size below {params.train.batch_size}, a shorter train.max_length, "
                "or gradient_checkpointing: true"
            )
        case "evaluate" if not whole:
            return "a device that holds a float32 copy; deepspec serve-check measures a draft without one"
        case _:
            return f"a device that holds the target, or {ENGINE}"


def _less_disk(estimate: Estimate, plan: Plan, params: Params) -> str:
    if estimate.stage != "features":
        return "a larger disk, or fewer prompts.count"
    form, room = params.train.features.form, USABLE * plan.rates.free_disk - (plan.disk - estimate.disk)
    smaller = {name: estimate.disk * size / CODES[form] for name, size in CODES.items() if size < CODES[form]}
    fitting = [name for name, disk in smaller.items() if disk <= room]
    if fitting:
        return f"train.features.form: {fitting[0]} ({gigabytes(smaller[fitting[0]])})"
    share = max(room, 0.0) / min([estimate.disk, *smaller.values()])
    fewer = (
        f"; or prompts.count {int(share * params.prompts.count)} with the smallest form"
        if share > 0.01
        else ""
    )
    return f"train.features.mode: online keeps none and runs the target in every step{fewer}"


def _less_time(estimate: Estimate, params: Params) -> str:
    match estimate.stage.split()[0]:
        case "generate" | "prompts":
            return "more devices (accelerate launch), generate.engine: openai, or fewer prompts"
        case "features":
            return "more devices: every process of accelerate launch computes its share; or fewer prompts"
        case "train":
            return f"train.anchors below {params.train.anchors}, fewer steps, or a smaller draft_vocab_size"
        case _:
            return "fewer evaluate.prompts_per_task"


def gigabytes(size: float) -> str:
    """Return bytes in words."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1e3:.3g} kB"
