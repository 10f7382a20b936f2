"""Does the draft change a token? Plain and drafted greedy decoding compared in float32.

Two forward passes of different width round differently, so where the target's two best tokens all but tie,
either may win without the draft being at fault. Such a tie is *proven*, by recomputing the difference of
the two top logits in float64 on the shared context, and counted; the outputs are compared up to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path

import torch

from deepspec.decoding.drafter import Drafter
from deepspec.decoding.engine import generate
from deepspec.decoding.request import Generation
from deepspec.decoding.shapes import Shape
from deepspec.evaluation.record import Identity
from deepspec.target.attention import ForwardPass
from deepspec.target.model import Target, load_target

TIE = 1e-4  # of the two top logits, in float64


def check_identity(
    target: Target,
    drafter: Drafter | None,
    target_dir: str | Path,
    references: list[Generation],
    max_new_tokens: int,
    tree: Shape | None = None,
    together: bool = False,
) -> Identity:
    """Compare the drafted greedy output of each prompt with the plain one; `target` is in float32.

    Args:
        references: plain greedy generations of at most `max_new_tokens`, by the same target.
        together: decode the prompts in one batch, not one at a time.
    """
    prompts = [reference.prompt_ids for reference in references]
    decode = partial(generate, target, drafter, max_new_tokens=max_new_tokens, temperature=0.0, tree=tree)
    outputs: Iterable[Generation] = (
        decode(prompt_ids=prompts) if together else (decode(prompt_ids=ids)[0] for ids in prompts)
    )
    ties = 0
    lossless = True
    for reference, drafted in zip(references, outputs, strict=True):
        same = _shared(reference.tokens, drafted.tokens)
        if same == len(reference.tokens) == len(drafted.tokens):
            continue
        # A run that just ends early differs in no token: that is no tie.
        differs = same < min(len(reference.tokens), len(drafted.tokens))
        tie = differs and top_two_gap(str(target_dir), reference.prompt_ids + reference.tokens[:same]) < TIE
        ties += tie
        lossless &= tie
    tokens = sum(len(reference.tokens) for reference in references)
    return Identity(lossless=lossless, ties=ties, prompts=len(prompts), tokens=tokens)


def sum_of(checks: list[Identity]) -> Identity:
    """Return several checks of one path as one."""
    return Identity(
        lossless=all(check.lossless for check in checks),
        ties=sum(check.ties for check in checks),
        prompts=sum(check.prompts for check in checks),
        tokens=sum(check.tokens for check in checks),
    )


def _shared(a: list[int], b: list[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def top_two_gap(target_path: str, ids: list[int]) -> float:
    """Return the difference of the target's two largest logits after the context `ids`, recomputed in float64.

    Where it is smaller than rounding, greedy runs over different shapes may part without either being wrong.
    """
    target = _in_float64(target_path)
    step = ForwardPass(torch.arange(len(ids), device=target.device)[None])
    hidden = target.forward(torch.tensor([ids], device=target.device), step)
    best, second = target.logits(hidden[:, -1])[0].topk(2).values.tolist()
    return best - second


@lru_cache(maxsize=1)
def _in_float64(path: str) -> Target:
    return load_target(path, dtype="float64")
