"""The section `loss` of params.yaml, of `train` or of one drafter."""

from __future__ import annotations

from pydantic import Field, model_validator

from deepspec.drafters.position_weights import AnyWeights, Geometric
from deepspec.section import Section


class LossParams(Section):
    """Weights of the loss terms and of the positions of a block.

    `training/losses.py` has the formulas; `lk` and `lk_mixed` are the LK losses (arXiv 2602.23881), the position
    weights `dpace` are D-PACE (arXiv 2605.18810).
    """

    ce: float = Field(0.1, ge=0)
    kl: float = Field(0.0, ge=0)
    tv: float = Field(0.9, ge=0, description="Of ‖q − p‖₁, as in the DSpark paper.")
    lk: float = Field(0.0, ge=0, description="Of −log α.")
    lk_mixed: float = Field(0.0, ge=0, description="Of λ·KL + (1 − λ)·½‖q − p‖₁, λ = exp(−3α).")
    confidence: float = Field(1.0, ge=0, description="Of the confidence head's cross-entropy.")
    positions: AnyWeights = Geometric()
    budget_mib: float | None = Field(
        None,
        gt=0,
        description="Largest tensor over the vocabulary; null: 20 on a CPU, 128 with our kernels, 256 on a GPU.",
    )

    @property
    def with_kl(self) -> bool:
        """Check whether any term needs KL(p ‖ q)."""
        return bool(self.kl or self.lk_mixed)

    @property
    def with_overlap(self) -> bool:
        """Check whether any term needs α, the overlap of p and q."""
        return bool(self.tv or self.lk or self.lk_mixed)

    @model_validator(mode="after")
    def _some(self) -> LossParams:
        if not any((self.ce, self.kl, self.tv, self.lk, self.lk_mixed)):
            raise ValueError("loss: every term has weight 0")
        return self
