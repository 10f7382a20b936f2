"""The section `prompts` of params.yaml."""

from __future__ import annotations

from pydantic import Field, model_validator

from deepspec.section import Section


class MagpieParams(Section):
    """The target writes its own user turns (Magpie, arXiv 2406.08464)."""

    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(0.95, gt=0, le=1)
    max_new_tokens: int = Field(96, ge=4)


class PromptsParams(Section):
    """Where training prompts come from. `mix` maps a source to its weight."""

    count: int = Field(ge=1)
    mix: dict[str, float] = Field(
        description="`magpie`, `seed`, `tools`, `jsonl:<path>`, `hub:<dataset>[:split]`, `preset:<name>` → weight."
    )
    magpie: MagpieParams = MagpieParams()
    min_chars: int = Field(12, ge=1)
    max_chars: int = Field(1500, ge=1)
    max_malformed_share: float = Field(
        0.05, ge=0, le=1, description="Of a JSONL file's lines; all are counted."
    )
    overlap_ngram: int = Field(8, ge=2, description="Words in the n-gram that marks an evaluation prompt.")

    @model_validator(mode="after")
    def _weights(self) -> PromptsParams:
        for source, weight in self.mix.items():
            if source not in ("magpie", "seed", "tools") and not source.startswith(
                ("jsonl:", "hub:", "preset:")
            ):
                raise ValueError(
                    f"unknown prompt source {source!r}: use magpie, seed, tools, jsonl:<path>, hub:<dataset>[:split] "
                    "or preset:<name>"
                )
            if weight < 0:
                raise ValueError(f"the weight of prompt source {source!r} is negative ({weight})")
        if sum(self.mix.values()) <= 0:
            raise ValueError("no prompt source has a positive weight")
        return self
