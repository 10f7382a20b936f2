"""How much each position of a block counts in the loss: later tokens are reached less often."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from deepspec.section import choice, tag

if TYPE_CHECKING:
    from torch import Tensor


@choice
class Geometric:
    """exp(−(k − 1)/γ_w) for k = 1..γ, of valid positions: the same for every block."""

    type: Literal["geometric"] = tag(default="geometric", kw_only=True)
    decay: float = Field(default=4.0, gt=0, description="γ_w")

    def __call__(self, chances: Tensor, valid: Tensor) -> Tensor:
        """Return weights [blocks, γ]; see `Weighing`."""
        import torch  # params.yaml is read without it

        return valid * torch.exp(-torch.arange(valid.shape[-1], device=valid.device) / self.decay)

    def total(self, valid: Tensor) -> Tensor:
        """Return what the weighted sum over valid [..., γ] positions is to be divided by."""
        return self(valid, valid).sum()


@choice
class DPace:
    """D-PACE (arXiv 2605.18810): w_j = Σ_{m≥j} Π_{i≤m} q̃_i with q̃ = (1 − a)·q(x*) + a, held fixed.

    The weight of a position is the expected number of accepted tokens from it on, under the current draft. A loss
    is divided by the number of blocks, so that weights that grow with the draft are not divided away.
    """

    type: Literal["dpace"] = tag(default="dpace", kw_only=True)
    smoothing: float = Field(0.5, ge=0, le=1, description="a of q̃ = (1 − a)·q(x*) + a.")

    def __call__(self, chances: Tensor, valid: Tensor) -> Tensor:
        """Return weights [blocks, γ]; see `Weighing`."""
        reached = ((1 - self.smoothing) * chances + self.smoothing).cumprod(-1) * valid
        return reached.flip(-1).cumsum(-1).flip(-1) * valid

    def total(self, valid: Tensor) -> Tensor:
        """Return the number of blocks with a valid position."""
        return valid.any(-1).sum().float()


AnyWeights = Annotated[Geometric | DPace, Field(discriminator="type")]
