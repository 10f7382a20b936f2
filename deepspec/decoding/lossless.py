"""The judge of ties: the target's own logits in float64."""

from __future__ import annotations

from functools import lru_cache

import torch

from deepspec.target.attention import ForwardPass
from deepspec.target.model import Target, load_target


def top_two_gap(target_path: str, ids: list[int]) -> float:
    """Difference of the target's two largest logits after the context `ids`, recomputed in float64.

    Where it is smaller than rounding, greedy runs over different shapes may part without either being wrong.
    """
    target = _in_float64(str(target_path))
    step = ForwardPass(torch.arange(len(ids), device=target.device)[None])
    hidden = target.forward(torch.tensor([ids], device=target.device), step)
    best, second = target.logits(hidden[:, -1])[0].topk(2).values.tolist()
    return best - second


@lru_cache(maxsize=1)
def _in_float64(path: str) -> Target:
    return load_target(path, dtype="float64")
