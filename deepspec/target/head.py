"""What a target's head does to its product with h_last: a scale, a bias, a soft cap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadTransform:
    """z = cap · tanh((scale · (x + bias)) / cap) of a product x = W h_last; each part may be absent.

    The same for the law that is sampled from and for the law that a draft is distilled from.
    """

    scale: float = 1.0
    softcap: float | None = None
    bias: Tensor | None = None  # [vocab]

    @property
    def plain(self) -> bool:
        return self.scale == 1.0 and self.softcap is None and self.bias is None

    def __call__(self, product: Tensor) -> Tensor:
        """[..., vocab] → the same."""
        if self.bias is not None:
            product = product + self.bias.to(product)
        if self.scale != 1.0:
            product = product * self.scale
        if self.softcap is not None:
            product = torch.tanh(product / self.softcap) * self.softcap
        return product

    def rows(self, ids: Tensor) -> HeadTransform:
        """For a head of which only the rows `ids` are kept."""
        bias = None if self.bias is None else self.bias[ids.to(self.bias.device)]
        return HeadTransform(self.scale, self.softcap, bias)


PLAIN = HeadTransform()


def head_transform(config: Any, bias: Tensor | None = None) -> HeadTransform:
    """Read the transform from a text configuration; the self-test says whether it is the whole of it.

    Args:
        bias: of the head [vocab], where it has one.
    """
    scale = 1.0
    if scaling := getattr(config, "logits_scaling", None):  # Granite, MiniCPM3
        scale /= scaling
    if factor := getattr(config, "logit_scale", None):  # Cohere
        scale *= factor
    if factor := getattr(config, "lm_head_multiplier", None):  # Falcon-H1
        scale *= factor
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; Griffin; xLSTM
    softcap = next((cap for cap in (getattr(config, name, None) for name in caps) if cap), None)
    return HeadTransform(scale, softcap, None if bias is None else bias.detach())
