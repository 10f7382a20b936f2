"""Chains against plain decoding over many prompts of a tiny model whose layers keep a state.

python -m benchmarks.families --chains 200 --only qwen3_next falcon_h1 lfm2 kimi_linear jamba
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.tiny_families import tiny_model
from deepspec.decoding.engine import generate
from deepspec.target.model import load_target
from tests.drafting import Guesser
from tests.tiny import make_tokenizer

ANSWER, BATCH = 24, 8
SPOILED = (3, 5, 1000)  # one guess in so many is wrong, by prompt


@dataclass(frozen=True)
class Chains:
    """What drafting did to the answers of one family.

    Args:
        equal: prompts whose answer is that of plain decoding.
        tokens, rounds, passes, fed: committed tokens, verified chains, runs of the model, and committed tokens that it
            ran again.
    """

    family: str
    prompts: int
    equal: int
    tokens: int
    rounds: int
    passes: int
    fed: int

    def line(self) -> str:
        return (
            f"| {self.family} | {self.equal} of {self.prompts} | {self.tokens / self.rounds:.2f} "
            f"| {self.tokens / self.passes:.2f} | {self.fed / self.rounds:.2f} |"
        )


HEADER = "| family | equal answers | τ | tokens a run | run again a round |\n|---|---|---|---|---|"


def chains(family: str, count: int) -> Chains:
    """Decode `count` prompts of 5 to 44 tokens plainly and with partly wrong chains."""
    with tempfile.TemporaryDirectory(prefix="family-") as directory:
        tiny_model(family).save_pretrained(directory)
        make_tokenizer().save_pretrained(directory)
        target = load_target(Path(directory))
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(100, 500, (5 + i % 40,), generator=generator).tolist() for i in range(count)]
    plain = [g.tokens for g in generate(target, None, prompts, ANSWER, batch_size=BATCH)]
    known = {tuple(p): (a, SPOILED[i % 3]) for i, (p, a) in enumerate(zip(prompts, plain, strict=True))}
    drafted = generate(target, Guesser(known), prompts, ANSWER, batch_size=BATCH)
    stats = [g.stats for g in drafted]
    return Chains(
        family,
        count,
        sum(g.tokens == answer for g, answer in zip(drafted, plain, strict=True)),
        sum(s.committed for s in stats),
        sum(s.rounds for s in stats),
        sum(sum(s.passes) for s in stats),
        sum(sum(s.fed) for s in stats),
    )
