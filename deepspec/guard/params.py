"""The section `validate` of params.yaml."""

from __future__ import annotations

from pydantic import Field

from deepspec.section import Section


class ValidateParams(Section):
    """Bounds of the Great Expectations suite that guards the distillation data."""

    min_rows: int = Field(1, ge=1)
    min_answer_tokens: int = Field(1, ge=1)
    max_truncated_share: float = Field(0.9, ge=0, le=1)
    max_failed_share: float = Field(0.05, ge=0, le=1)
    repetition_ngram: int = Field(8, ge=2)
    max_repetition: float = Field(
        0.7, ge=0, le=1, description="Share of an answer's n-grams that are repeats."
    )
    max_degenerate_share: float = Field(0.2, ge=0, le=1, description="Rows allowed above max_repetition.")
    sample: int = Field(
        10_000,
        ge=1,
        description="Rows whose answers are rendered, spelt and searched for repeats; of a larger set a sample.",
    )
