"""The section `train.features` of params.yaml."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from deepspec.section import Section

Form = Literal["bf16", "fp8", "int8", "int4"]  # `codec.py` has what each of them is


class FeaturesParams(Section):
    """Where the target's hidden states come from in training."""

    mode: Literal["cached", "online"] = Field(
        "cached", description="`online` runs the target in every step and stores nothing."
    )
    form: Form = Field("bf16", description="How each hidden state is stored, by vLLM's servers too.")
    states: str | None = Field(
        None,
        description="Folder of hidden states that a serving engine wrote; null: the target computes them here.",
    )
    directory: str | None = Field(
        None, description="Of the cache, to share it; null: one of its own under .deepspec/features."
    )

    @model_validator(mode="after")
    def _kept(self) -> FeaturesParams:
        if self.states is not None and self.mode != "cached":
            raise ValueError(f"train.features.states goes with mode: cached, not {self.mode}")
        return self
