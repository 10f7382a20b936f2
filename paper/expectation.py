"""How many rounds a drafter needs to write a text of the target's own, on average over what it may draft.

Standard speculative sampling (Leviathan 2023) commits a token x of the target's law p whether or not a draft was there.
Given x, a draft with law q stood there with chance min(1, q(x) / p(x)): the chance that x is drafted and stands is
min(p(x), q(x)). So the rounds on a given text are a Markov chain whose law is known, and nothing has to be drawn: the
mean of E[rounds | text] over texts is the mean of the rounds that decoding takes, with the variance of the texts alone
(Rao and Blackwell), and two drafters are compared on the same texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepspec.decoding.drafter import Drafter, DraftRequest, GrowingSession
from deepspec.decoding.request import Sampling
from deepspec.decoding.sampling import best, probabilities
from deepspec.decoding.shapes import Shape
from deepspec.decoding.tree import DraftLogits, Growth, Proposal, Vocabulary
from deepspec.errors import DeepSpecError
from deepspec.target.attention import ForwardPass
from deepspec.target.model import Target


@dataclass(frozen=True)
class Text:
    """A prompt, and what the target's sampler wrote after it."""

    prompt: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Rounds:
    """Means over what may be drafted.

    Attributes:
        total: all rounds.
        reached: by position in the block, [length]: rounds that drafted it, all before having stood. A text's last
            token is not counted as drafted.
        stood: those in which it stood too.
    """

    total: float
    reached: list[float]
    stood: list[float]


@torch.inference_mode()
def chances(
    target: Target, drafter: Drafter, texts: Sequence[Text], sampling: Sampling, batch_size: int = 16
) -> list[Tensor]:
    """Of each text [tokens, γ]: at (s, k) the chance that token s + k stands in a block drafted before token s, given
    that those between do. 0 where nothing is drafted: the last token is the target's own, whoever ends the text.

    Args:
        drafter: a network's: it has a law of what it drafts.
        sampling: the one by which the texts were drawn. Where it cuts (top-k, top-p, min-p), a token at the edge that
            this pass rounds out of the target's law counts as certain to stand.

    Raises:
        DeepSpecError: a drafter that looks up what it proposes.
    """
    found: list[Tensor] = []
    for start in range(0, len(texts), batch_size):
        found += _chances(target, drafter, texts[start : start + batch_size], sampling)
    return found


def rounds(chances: Tensor, length: int) -> Rounds:
    """Those in which a chain of at most `length` tokens writes the text of `chances` [tokens, γ >= length]."""
    tokens = len(chances)
    begins = [1.0] + [0.0] * tokens  # chance that a round begins with this many tokens written
    reached, stood = [0.0] * length, [0.0] * length
    for s, row in enumerate(chances[:, :length].double().tolist()):
        reach, room = begins[s], tokens - s - 1
        for k, chance in enumerate(row[:room]):
            reached[k] += reach
            begins[s + k + 1] += reach * (1 - chance)
            reach *= chance
            stood[k] += reach
        begins[s + min(length, room) + 1] += reach
    return Rounds(sum(begins[:tokens]), reached, stood)


def _chances(target: Target, drafter: Drafter, texts: Sequence[Text], sampling: Sampling) -> list[Tensor]:
    session = drafter.session(len(texts))
    if not isinstance(session, GrowingSession):
        raise DeepSpecError(
            f"{type(drafter).__name__} has no law of what it drafts: its rounds cannot be expected"
        )
    read = [_read(target, drafter.layers, text, sampling) for text in texts]
    found = [torch.zeros(len(text.tokens), drafter.block_size) for text in texts]
    for row, (text, (features, _)) in enumerate(zip(texts, read, strict=True)):
        session.begin(row)
        session.extend(row, text.prompt[:-1], _part(features, 0, len(text.prompt) - 1))
    for s in range(max(len(text.tokens) for text in texts) - 1):
        paths = {row: _Along(text.tokens[s:-1]) for row, text in enumerate(texts) if s < len(text.tokens) - 1}
        anchors = {row: (texts[row].tokens[s - 1] if s else texts[row].prompt[-1]) for row in paths}
        asks = [
            DraftRequest(row, anchors[row], sampling, torch.Generator(), len(path.tokens), path)
            for row, path in paths.items()
        ]
        session.propose(asks)
        for row, chance in zip(paths, _drafted(list(paths.values()), sampling), strict=True):
            found[row][s, : len(chance)] = chance / read[row][1][s : s + len(chance)]
            place = len(texts[row].prompt) - 1 + s
            session.extend(row, [anchors[row]], _part(read[row][0], place, place + 1))
    return [table.clamp_(max=1) for table in found]


def _part(features: Tensor | None, start: int, end: int) -> Tensor | None:
    return None if features is None else features[start:end]


def _read(
    target: Target, layers: tuple[int, ...], text: Text, sampling: Sampling
) -> tuple[Tensor | None, Tensor]:
    """The target's features of all but the last token, [n, len(layers)·d], and its chance of each of the answer's."""
    ids = [*text.prompt, *text.tokens[:-1]]
    positions = torch.arange(len(ids), device=target.device)[None]
    step = ForwardPass(positions, wanted=layers)
    hidden = target.forward(torch.tensor([ids], device=target.device), step)[0, len(text.prompt) - 1 :]
    features = torch.cat([step.features[layer] for layer in layers], -1)[0] if layers else None
    if sampling.temperature == 0:
        return features, torch.ones(len(text.tokens))
    # Clamped: rounding may give a token that was sampled probability 0.
    return features, _chance(target.logits(hidden), text.tokens, sampling).clamp_(min=1e-30)


def _drafted(paths: list[_Along], sampling: Sampling) -> list[Tensor]:
    """The drafter's chance of each token that it was led along, for each path."""
    columns = [column for path in paths for column in path.columns]
    if not columns:  # no session is ready: prompts of one token
        return [torch.zeros(0)] * len(paths)
    logits = torch.cat([row for path in paths for row in path.logits])
    chance = _chance(logits, [max(column, 0) for column in columns], sampling)
    chance[torch.tensor(columns) < 0] = 0
    return list(chance.split([len(path.columns) for path in paths]))


def _chance(logits: Tensor, columns: list[int], sampling: Sampling) -> Tensor:
    """logits [n, columns] → float32 [n] on the CPU, the sampler's chance of one column of each row."""
    if sampling.temperature == 0:
        return torch.tensor([float(a == b) for a, b in zip(best(logits)[0], columns, strict=True)])
    at = torch.tensor(columns, device=logits.device)[:, None]
    return probabilities(logits, sampling).gather(1, at)[:, 0].cpu()


@dataclass
class _Along(Shape):
    """A chain along `tokens`: nothing is drawn, and the logits on the way are kept."""

    tokens: list[int]
    logits: list[Tensor] = field(default_factory=list)  # [1, columns] each
    columns: list[int] = field(default_factory=list)  # of the tokens; -1: the drafter has none

    @property
    def depth(self) -> int | None:
        return None

    @property
    def nodes(self) -> int | None:
        return None

    def growth(self, vocabulary: Vocabulary, sampling: Sampling, depth: int, rng: torch.Generator) -> Growth:
        return _AlongGrowth(self, vocabulary, sampling, depth)


class _AlongGrowth(Growth):
    def __init__(self, path: _Along, vocabulary: Vocabulary, sampling: Sampling, depth: int):
        super().__init__(vocabulary, sampling, depth)
        self.path = path

    def feed(self, laws: DraftLogits) -> None:
        k = len(self.tokens)
        token = self.path.tokens[k]
        column = _column(self.vocabulary, token)
        self.path.logits.append(laws.logits)
        self.path.columns.append(column)
        self.parents.append(k - 1)
        self.tokens.append(token)
        self.frontier = [k] if column >= 0 and k + 1 < self.depth else []

    def proposal(self) -> Proposal:
        return Proposal.chain(self.tokens)


def _column(vocabulary: Vocabulary, token: int) -> int:
    if vocabulary.columns is None:
        return token
    found = (vocabulary.columns == token).nonzero().flatten().tolist()
    return found[0] if found else -1
