"""The section `promote` of params.yaml."""

from __future__ import annotations

from pydantic import Field

from deepspec.section import Section


class PromoteParams(Section):
    """The gate between challenger and champion; docs/registry.md has its rules."""

    margin: float = Field(0.03, ge=0, lt=1, description="Share of τ or speed-up that a challenger may lack.")
    proof: bool = Field(False, description="The whole 95 % interval must lie above 1 - margin.")
    min_speedup: float = Field(1.0, ge=0, description="Over plain decoding, of any champion.")
    require_export: bool = Field(True, description="Some engine's export must have passed parity.")
