"""The texts on which an export is compared with the draft it was made from: held-out ones, or one of ours."""

from __future__ import annotations

import torch

from deepspec.attention import Step
from deepspec.decoding import promise
from deepspec.export.readers.sample import Sample
from deepspec.target import H_LAST, Target

TEXTS, TOKENS, ANCHORS = 2, 192, 6  # so many texts, so long at most, and blocks of each
ASKED = "Write a function that returns the largest number of a list, and explain how it works."
ANSWERED = (
    "The function starts with the first number and goes through the list. It keeps the larger of the two each time: "
    "best = max(best, number). After the last number, best is the largest of all, and the function returns it."
)


def samples(target: Target, directory: str, gamma: int) -> list[Sample]:
    """Held-out conversations that the draft's directory keeps, or else a text of ours.

    Args:
        gamma: tokens that follow an anchor.
    """
    kept = [(row.ids[:TOKENS], row.anchors) for row in promise.load(directory)]
    texts = [(ids, _fitting(anchors, len(ids), gamma)) for ids, anchors in kept]
    texts = [(ids, anchors) for ids, anchors in texts if anchors][:TEXTS]
    if not texts:
        messages = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]
        ids = target.chat_ids(messages, add_generation_prompt=False)[:TOKENS]
        every = range(1, len(ids), max((len(ids) - gamma) // ANCHORS, 1))
        texts = [(ids, _fitting(list(every), len(ids), gamma))]
    return [_of(target, ids, anchors, gamma) for ids, anchors in texts]


def _fitting(anchors: list[int], length: int, gamma: int) -> list[int]:
    return [anchor for anchor in anchors if anchor + gamma < length][:ANCHORS]


def _of(target: Target, ids: list[int], anchors: list[int], gamma: int) -> Sample:
    layers = range(-1, target.num_layers - 1)
    tokens = torch.tensor(ids)
    step = Step(torch.arange(len(ids), device=target.device)[None], wanted=(*layers, H_LAST))
    target.forward(tokens[None].to(target.device), step)
    states = {layer: x[0].float().cpu() for layer, x in step.features.items()}
    return Sample(
        tokens=tokens,
        anchors=torch.tensor(anchors),
        gamma=gamma,
        last=states.pop(H_LAST),
        states=states,
        embeddings=target.embeddings.bfloat16().float().cpu(),
        head=target.head_weight.bfloat16().float().cpu(),
    )
