"""The law of what an engine writes, by chi-square against full forwards, under a drafter that is often right."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from deepspec.decoding.drafter import Drafter, Session
from deepspec.decoding.engine import Engine
from deepspec.decoding.request import Request, Sampling
from deepspec.decoding.sampling import probabilities
from deepspec.decoding.shapes import Shape
from deepspec.decoding.tree import DraftLogits, Vocabulary, grow
from deepspec.drafters.load import load_drafter
from deepspec.target.attention import ForwardPass
from deepspec.target.model import Target
from tests.drafting import DRAFTS, write
from tests.tiny import make_network


@dataclass(frozen=True)
class Case:
    """`draws` answers of `length` tokens to one prompt."""

    prompt: tuple[int, ...]
    length: int
    sampling: Sampling
    draws: int


def next_laws(target: Target, contexts: list[list[int]]) -> torch.Tensor:
    """The target's logits [contexts, vocab] after contexts of one length, by full forwards."""
    step = ForwardPass(torch.arange(len(contexts[0])).expand(len(contexts), -1))
    with torch.inference_mode():
        return target.logits(target.forward(torch.tensor(contexts), step)[:, -1])


def exact_law(target: Target, case: Case) -> dict[tuple[int, ...], float]:
    """Sequence → probability under the request's sampler, of all that can come."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(case.length):
        laws = probabilities(next_laws(target, [[*case.prompt, *path] for path in law]), case.sampling)
        law = {
            (*path, token): chance * float(probs[token])
            for (path, chance), probs in zip(law.items(), laws, strict=True)
            for token in probs.nonzero()[:, 0].tolist()
        }
    return law


class MarkovDrafter(Drafter):
    """Draws from a table of logits by the last token alone: the target's own after [*prompt, token], disturbed."""

    def __init__(self, target: Target, case: Case):
        self.block_size = case.length - 1
        table = next_laws(target, [[*case.prompt, token] for token in range(target.vocab_size)]).clone()
        if len(case.prompt) > 1:  # the first draft stands behind the prompt itself
            table[case.prompt[-1]] = next_laws(target, [list(case.prompt)])[0]
        noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(1))
        self.table = table + 0.5 * noise
        self.vocabulary = Vocabulary(target.vocab_size)

    def session(self, slots: int) -> Session:
        return MarkovSession(self)


class MarkovSession(Session):
    def __init__(self, drafter: MarkovDrafter):
        self.drafter = drafter

    def begin(self, row): ...

    def extend(self, row, tokens, features): ...

    def move(self, source, destination): ...

    def propose(self, asks):
        vocabulary, depth = self.drafter.vocabulary, self.drafter.block_size
        growths = [ask.shape.growth(vocabulary, ask.sampling, min(depth, ask.room), ask.rng) for ask in asks]

        def expand(parents):
            return DraftLogits(self.drafter.table[[parent.token for parent in parents]])

        return grow(growths, [ask.anchor for ask in asks], expand)


def taught(name: str, target: Target, case: Case, directory: Path, steps: int = 150) -> Drafter:
    """A draft of `DRAFTS` that has learnt a part of what can come: often right, and often wrong."""
    sizes = {"block_size": case.length - 1, "draft_vocab_size": 0}
    kept = {key: value for key, value in DRAFTS[name].items() if key not in sizes}
    known = sizes if "draft_vocab_size" in DRAFTS[name] else {"block_size": case.length - 1}
    model = make_network(target, name.split("-")[0], **kept | known)
    rows = torch.tensor([[*case.prompt, *path] for path in exact_law(target, case)])
    layers = model.config.target_layer_ids
    step = ForwardPass(torch.arange(rows.shape[1]).expand(len(rows), -1), wanted=layers)
    target.forward(rows, step)
    features = torch.cat([step.features[layer] for layer in layers], -1).clone()
    anchor = len(case.prompt)
    weights = (torch.rand(len(rows), generator=torch.Generator().manual_seed(2)) - 0.4).clamp(min=0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(steps):
        hidden = model(features, rows, torch.full((len(rows), 1), anchor))
        outputs = model.outputs(hidden, rows[:, None, anchor:-1])
        total = outputs._replace(candidates=None).logits()[:, 0]  # [rows, γ, vocab]
        alone, head = outputs.factors[0]
        kinds = [total] if outputs.candidates is None else [total, alone[:, 0] @ head.T]
        coming = rows[:, anchor + 1 :].flatten()
        losses = [F.cross_entropy(x.flatten(0, 1), coming, reduction="none") for x in kinds]
        loss = (sum(losses) * weights.repeat_interleave(case.length - 1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return load_drafter(write(model, target, directory), target)


def p_value(
    target: Target,
    drafter: Drafter,
    expected: dict[tuple[int, ...], float],
    case: Case,
    shape: Shape | None = None,
    rule: str | None = None,
    batch: int = 64,
) -> float:
    """Of the chi-square between what the engine wrote in all draws and the law; 0 if it wrote the impossible."""
    requests = iter(
        [
            Request(list(case.prompt), case.length, sampling=case.sampling, seed=seed, stop_ids=frozenset())
            for seed in range(case.draws)
        ]
    )
    engine = Engine(target, drafter, batch_size=batch, tree=shape, verify=rule)
    found: Counter[tuple[int, ...]] = Counter()
    accepted, drafted = 0, 0
    for run in engine.run(lambda: next(requests, None)):
        found[tuple(run.tokens)] += 1
        accepted += sum(run.stats.accepted)
        drafted += sum(run.stats.drafted)
    assert sum(found.values()) == case.draws
    if not set(found) <= set(expected):
        return 0.0
    statistic = sum((found[path] - case.draws * p) ** 2 / (case.draws * p) for path, p in expected.items())
    halves = torch.tensor([len(expected) - 1, statistic], dtype=torch.float64) / 2
    p = float(torch.special.gammaincc(*halves))
    # A law that fits was only put to the test where both outcomes of a draft were seen.
    assert p < 0.01 or 0.3 * drafted < accepted < 0.9 * drafted, f"{accepted} of {drafted} accepted"
    return p
