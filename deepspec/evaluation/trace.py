"""A generation token by token: who produced each, what had been proposed there, and the draft's alternatives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from deepspec.decoding.engine import Engine
from deepspec.decoding.request import Request, Sampling
from deepspec.decoding.round import Round
from deepspec.decoding.sampling import probabilities
from deepspec.decoding.shapes import Shape
from deepspec.decoding.tree import DraftLogits, Growth, Proposal, Vocabulary
from deepspec.evaluation.contest import DecodingConfig
from deepspec.target.model import Target

ALTERNATIVES = 5


def trace(
    target: Target,
    config: DecodingConfig,
    prompt_ids: list[int],
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """Decode one prompt and note all that was proposed.

    Returns:
        {"tau": τ, "tokens": [{"text", "origin": "draft", "lookup" or "target", "round", "confidence", "proposed",
        "alternatives": [[text, probability], ...]}]}. `confidence` is the chance, as seen before verification, that
        the proposals down to this place are accepted; `proposed` what was proposed here, which a token of the target's
        replaced or follows (None). Alternatives are the draft's law here, the likeliest first.
    """
    notes = _Notes()
    engine = Engine(
        target,
        config.drafter,
        tree=_Traced(config.tree, notes),
        verify=config.verify,
        controller=config.controller,
        on_round=notes.ended,
    )
    request = Request(prompt_ids, max_new_tokens, sampling=Sampling(temperature), seed=seed)
    (generation,) = engine.run(iter([request, None]).__next__)
    return {"tau": generation.stats.tau, "tokens": _tokens(target, notes.rounds)}


Likeliest = dict[tuple[int, ...], list[tuple[int, float]]]  # path below the anchor → its children's likeliest


@dataclass
class _Notes:
    """The rounds of one request, each with the laws that were drafted by in it."""

    rounds: list[tuple[Round, Likeliest]] = field(default_factory=list)
    laws: Likeliest = field(default_factory=dict)

    def ended(self, done: Round) -> None:
        self.rounds.append((done, self.laws))
        self.laws = {}


class _Traced(Shape):
    """Another shape, whose growths note the laws they are fed."""

    def __init__(self, inner: Shape, notes: _Notes):
        self.inner, self.notes = inner, notes
        self.draws = inner.draws

    @property
    def depth(self) -> int | None:
        return self.inner.depth

    @property
    def nodes(self) -> int | None:
        return self.inner.nodes

    def settled(self, trees: bool) -> Shape:
        return _Traced(self.inner.settled(trees), self.notes)

    def growth(self, vocabulary: Vocabulary, sampling: Sampling, depth: int, rng: torch.Generator) -> Growth:
        return _TracedGrowth(self.inner.growth(vocabulary, sampling, depth, rng), self.notes)


class _TracedGrowth(Growth):
    """Another growth, which notes the laws it is fed."""

    def __init__(self, inner: Growth, notes: _Notes):
        super().__init__(inner.vocabulary, inner.sampling, inner.depth)
        self.inner, self.notes = inner, notes
        self._follow()

    def _follow(self) -> None:
        self.tokens, self.parents, self.frontier = self.inner.tokens, self.inner.parents, self.inner.frontier

    def feed(self, laws: DraftLogits) -> None:
        for node, logits in zip(self.frontier, laws.logits, strict=True):
            law = probabilities(logits.float(), Sampling(self.sampling.temperature or 1.0))
            top = law.topk(min(ALTERNATIVES, len(law)))
            likeliest = [
                (self.vocabulary.token(column), chance)
                for column, chance in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ]
            self.notes.laws[_path(self.tokens, self.parents, node)] = likeliest
        self.inner.feed(laws)
        self._follow()

    def proposal(self) -> Proposal:
        return self.inner.proposal()


def _path(tokens: list[int], parents: list[int], node: int) -> tuple[int, ...]:
    """Return the tokens from the anchor's child down to `node`."""
    path: list[int] = []
    while node >= 0:
        path.append(tokens[node])
        node = parents[node]
    return tuple(reversed(path))


def _tokens(target: Target, rounds: list[tuple[Round, Likeliest]]) -> list[dict[str, Any]]:
    texts = iter(_texts(target, [token for each, _ in rounds for token in each.tokens]))
    rows = []
    for number, (each, laws) in enumerate(rounds):
        proposal = each.proposal
        drafter = "lookup" if proposal.free else "draft"
        children, node = proposal.children(), -1
        for place, token in enumerate(each.tokens):
            path = tuple(each.tokens[:place])
            below = [i for i, parent in enumerate(proposal.parents) if parent == node]
            own = children.get((node, token))
            shown = own if place < each.accepted else (below[0] if below else None)
            rows.append(
                {
                    "text": next(texts),
                    "origin": drafter if place < each.accepted else "target",
                    "round": number,
                    "confidence": _chance(proposal, shown),
                    "proposed": None if shown is None else _text(target, proposal.tokens[shown]),
                    "alternatives": [[_text(target, t), round(p, 4)] for t, p in laws.get(path, [])],
                }
            )
            node = own if own is not None else -2  # nothing was proposed below a token of the target's own
    return rows


def _chance(proposal: Proposal, node: int | None) -> float | None:
    if node is None or proposal.survival is None:
        return None
    return round(proposal.survival[node], 4)


def _text(target: Target, token: int) -> str:
    return str(target.tokenizer.decode([token]))


def _texts(target: Target, tokens: list[int]) -> list[str]:
    """Return the text that each token adds; a character of several tokens comes with its last one."""
    texts, shown = [], ""
    for end in range(1, len(tokens) + 1):
        text = str(target.tokenizer.decode(tokens[:end]))
        whole = text if end == len(tokens) else text.rstrip("�")
        texts.append(whole[len(shown) :] if whole.startswith(shown) else "")
        shown = whole if whole.startswith(shown) else shown
    return texts
