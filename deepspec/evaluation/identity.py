"""Does the draft change a token? Plain and drafted greedy decoding compared in float32.

Two forward passes of different width round differently, so where the target's two best tokens all but tie,
either may win without the draft being at fault. Such a tie is *proven*, by recomputing the difference of
the two top logits in float64 on the shared context, and counted; the outputs are compared up to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepspec.decoding.engine import generate
from deepspec.decoding.lossless import top_two_gap
from deepspec.decoding.tree import Shape
from deepspec.evaluation.record import Identity
from deepspec.target import Target

TIE = 1e-4  # of the two top logits, in float64


def check_identity(
    target: Target,
    drafter: Any,
    target_dir: str | Path,
    prompts: list[list[int]],
    max_new_tokens: int,
    seed: int = 0,
    tree: Shape | None = None,
) -> Identity:
    """Compare the drafted greedy output of each prompt with the plain one; `target` is in float32."""
    options = {"max_new_tokens": max_new_tokens, "temperature": 0.0, "seed": seed}
    plain = generate(target, None, prompts, **options)
    ties = 0
    lossless = True
    for prompt_ids, reference in zip(prompts, plain, strict=True):
        drafted = generate(target, drafter, prompt_ids, tree=tree, **options)[0]
        same = _shared(reference.tokens, drafted.tokens)
        if same == len(reference.tokens) == len(drafted.tokens):
            continue
        # A run that just ends early differs in no token: that is no tie.
        differs = same < min(len(reference.tokens), len(drafted.tokens))
        tie = differs and top_two_gap(target_dir, prompt_ids + reference.tokens[:same]) < TIE
        ties += tie
        lossless &= tie
    tokens = sum(len(reference.tokens) for reference in plain)
    return Identity(lossless=lossless, ties=ties, prompts=len(prompts), tokens=tokens)


def _shared(a: list[int], b: list[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
