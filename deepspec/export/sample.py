"""The texts on which an export is compared with the draft it was made from: held-out ones, or one of ours."""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec.decoding import train_parity as promise
from deepspec.export.draft import Draft
from deepspec.export.readers.sample import Sample
from deepspec.target.attention import ForwardPass
from deepspec.target.ends import H_LAST, Ends
from deepspec.target.model import Target

TEXTS, TOKENS, ANCHORS = 2, 192, 6  # so many texts, so long at most, and blocks of each
ASKED = "Write a function that returns the largest number of a list, and explain how it works."
ANSWERED = (
    "The function starts with the first number and goes through the list. It keeps the larger of the two each time: "
    "best = max(best, number). After the last number, best is the largest of all, and the function returns it."
)


def samples(draft: Draft) -> list[Sample]:
    """Return held-out conversations that the draft's directory keeps, or else a text of ours."""
    target, gamma = draft.target, draft.block_size
    kept = [(row.ids[:TOKENS], row.anchors) for row in promise.load(draft.directory)]
    texts = [(ids, _fitting(anchors, len(ids), gamma)) for ids, anchors in kept]
    texts = [(ids, anchors) for ids, anchors in texts if anchors][:TEXTS]
    if not texts:
        messages = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]
        ids = target.chat_ids(messages, add_generation_prompt=False)[:TOKENS]
        every = range(1, len(ids), max((len(ids) - gamma) // ANCHORS, 1))
        texts = [(ids, _fitting(list(every), len(ids), gamma))]
    return [_of(draft, ids, anchors) for ids, anchors in texts]


def _fitting(anchors: list[int], length: int, gamma: int) -> list[int]:
    return [anchor for anchor in anchors if anchor + gamma < length][:ANCHORS]


def _of(draft: Draft, ids: list[int], anchors: list[int]) -> Sample:
    target = draft.target
    tokens = torch.tensor(ids)
    states = _states(target, tokens) if isinstance(target, Target) else _drawn(target, tokens)
    return Sample(
        tokens=tokens,
        anchors=torch.tensor(anchors),
        gamma=draft.block_size,
        last=states.pop(H_LAST),
        states=states,
        embeddings=target.embeddings.cpu().to(draft.dtype).float(),
        head=target.head_weight.cpu().to(draft.dtype).float(),
    )


def _states(target: Target, tokens: Tensor) -> dict[int, Tensor]:
    """Return the target's states of a text by layer, [tokens, d]."""
    layers = range(-1, target.num_layers - 1)
    step = ForwardPass(torch.arange(len(tokens), device=target.device)[None], wanted=(*layers, H_LAST))
    target.forward(tokens[None].to(target.device), step)
    return {layer: x[0].float().cpu() for layer, x in step.features.items()}


def _drawn(target: Ends, tokens: Tensor) -> dict[int, Tensor]:
    """Draw states by layer, [tokens, d], for a target whose layers are not here; any compare two networks."""
    rng = torch.Generator().manual_seed(0)
    shape = len(tokens), target.hidden_size
    states = {layer: torch.randn(shape, generator=rng) for layer in range(target.num_layers - 1)}
    last = target.normed(torch.randn(shape, generator=rng).to(target.device, target.dtype))
    return {-1: target.embeddings[tokens].float().cpu(), **states, H_LAST: last.float().cpu()}
