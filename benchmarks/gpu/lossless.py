"""Step 2: decoding changes nothing. Greedy tokens are the plain ones; sampled ones have the target's law.

Greedy runs over different shapes may part where the two best tokens are closer than rounding: such a tie is counted
apart, judged by the gap in float64.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from benchmarks.gpu import models
from benchmarks.gpu.findings import Findings, Setting
from deepspec.decoding.drafter import Drafter
from deepspec.decoding.engine import Engine, generate
from deepspec.decoding.request import Generation, Request, Sampling
from deepspec.decoding.sampling import probabilities
from deepspec.decoding.shapes import BestFirst, Chain, Sampled, Shape
from deepspec.evaluation.identity import top_two_gap
from deepspec.target.attention import ForwardPass
from deepspec.target.model import Target, load_target

BATCHES = (1, 2, 8, 32)
TREES: dict[str, Shape] = {"chain": Chain(), "tree": BestFirst(width=3, depth=4, nodes=12)}
TIE = 1e-4  # of logits in float32
_FEWEST = 8  # prompts
RULES: dict[str, tuple[str, Shape, str | None]] = {  # draft, shape, rule
    "standard": ("lm", Chain(), "standard"),
    "block": ("lm", Chain(), "block"),
    "recursive": ("lm", Sampled((2, 1)), "recursive"),
    "traversal": ("lm", Sampled((2, 1)), "traversal"),
    "walk": ("lm", BestFirst(2, None, 4), None),
    "block, dspark": ("dspark", Chain(), "block"),
    "traversal, eagle3": ("eagle3", Sampled((2, 1)), "traversal"),
}
SAMPLING = Sampling(temperature=1.0, top_k=3)
CONTEXT, LENGTH = [7, 20, 33, 5], 3
LEAST_P = 1e-3  # of a chi-square; there are a dozen


def run(setting: Setting, findings: Findings) -> None:
    sizes = setting.pick(models.TINY, models.SMALL)
    path = models.make_target(setting.work / "float32", sizes, "float32", setting.device)
    for graphs in setting.graphs:
        target = load_target(path, device=str(setting.device), graphs=graphs)
        way = "graphs" if graphs else "eager"
        plain: dict[int, list[Generation]] = {}
        for name in models.DRAFTS:
            drafter = models.make_drafter(setting.work / f"float32-{name}", name, target)
            for tree, shape in TREES.items():
                for batch in setting.pick((3,), BATCHES):
                    findings.piece(
                        f"greedy, {way}, {name}, {tree}, batch {batch}",
                        lambda d=drafter, s=shape, b=batch, t=target, p=plain: greedy(setting, t, d, s, b, p),
                    )
        for rule, (name, shape, verify) in RULES.items():
            drafter = models.make_drafter(setting.work / f"float32-{name}", name, target)
            findings.piece(
                f"law, {way}, {rule}",
                lambda d=drafter, s=shape, v=verify, t=target: law(setting, t, d, s, v),
            )


def greedy(
    setting: Setting,
    target: Target,
    drafter: Drafter,
    shape: Shape,
    batch: int,
    plain: dict[int, list[Generation]],
) -> dict[str, Any]:
    """Prompts decoded as without a draft, one at a time, by the target without graphs. `plain` keeps the latter.

    Raises:
        RuntimeError: they part where no tie is.
    """
    tokens, longest = setting.pick(12, 32), setting.pick(24, 160)
    prompts = models.random_prompts(target, setting.pick(4, max(BATCHES)), longest)
    if 0 not in plain:
        alone = load_target(target.source, device=str(setting.device))
        plain[0] = [generate(alone, None, prompt, tokens)[0] for prompt in prompts]
    count = setting.pick(4, max(batch, _FEWEST))
    drafted = generate(target, drafter, prompts[:count], tokens, tree=shape, batch_size=batch)
    ties, rounds = 0, sum(one.stats.rounds for one in drafted)
    for expected, found in zip(plain[0][:count], drafted, strict=True):
        if found.error:
            raise RuntimeError(found.error)
        if found.tokens == expected.tokens:
            continue
        pairs = zip(expected.tokens, found.tokens, strict=False)
        at = next(
            (i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected.tokens), len(found.tokens))
        )
        gap = top_two_gap(target.source, [*expected.prompt_ids, *expected.tokens[:at]])
        if gap > TIE:
            raise RuntimeError(f"another token at place {at}, where the best two are {gap:.2g} apart")
        ties += 1
    committed = sum(one.stats.committed for one in drafted)
    return {"prompts": count, "tokens": committed, "ties": ties, "tau": committed / max(rounds, 1)}


def law(
    setting: Setting, target: Target, drafter: Drafter, shape: Shape, verify: str | None
) -> dict[str, Any]:
    """The chi-square between what many seeds write and the target's law.

    Raises:
        RuntimeError: it is too large for chance.
    """
    draws, expected = setting.pick(160, 8000), target_law(target)
    requests = iter(
        [
            Request(CONTEXT, LENGTH, sampling=SAMPLING, seed=seed, stop_ids=frozenset())
            for seed in range(draws)
        ]
    )
    engine = Engine(target, drafter, batch_size=setting.pick(32, 64), tree=shape, verify=verify)
    found: Counter[tuple[int, ...]] = Counter()
    accepted = drafted = 0
    for one in engine.run(lambda: next(requests, None)):
        found[tuple(one.tokens)] += 1
        accepted += sum(one.stats.accepted)
        drafted += sum(one.stats.drafted)
    if outside := set(found) - set(expected):
        raise RuntimeError(f"{len(outside)} sequences that the target cannot write")
    statistic = sum((found[path] - draws * p) ** 2 / (draws * p) for path, p in expected.items())
    halves = torch.tensor([len(expected) - 1, statistic], dtype=torch.float64) / 2
    p = float(torch.special.gammaincc(*halves))
    if p < LEAST_P:
        raise RuntimeError(f"p = {p:.2g} of the chi-square over {draws} draws")
    return {"draws": draws, "p": p, "accepted": accepted / max(drafted, 1)}


def target_law(target: Target) -> dict[tuple[int, ...], float]:
    """Sequence behind `CONTEXT` → its probability under `SAMPLING`, by full forwards."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        contexts = torch.tensor([[*CONTEXT, *path] for path in law], device=target.device)
        step = ForwardPass(torch.arange(contexts.shape[1], device=target.device).expand(contexts.shape))
        logits = target.logits(target.forward(contexts, step)[:, -1])
        laws = probabilities(logits, SAMPLING).cpu()
        law = {
            (*path, token): chance * float(probs[token])
            for (path, chance), probs in zip(law.items(), laws, strict=True)
            for token in probs.nonzero()[:, 0].tolist()
        }
    return law
