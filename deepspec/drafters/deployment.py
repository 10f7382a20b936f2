"""How a trained draft is used: `evaluate.decode` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from deepspec.decoding.params import AnyController, CostController
from deepspec.decoding.shapes import AnyShape
from deepspec.decoding.tree import CHAIN
from deepspec.drafters.algorithms.lookup import LookupParams
from deepspec.drafters.algorithms.suffix import SuffixParams
from deepspec.section import Section

LookupChoice = Annotated[LookupParams | SuffixParams, Field(discriminator="type")]


class DecodeParams(Section):
    """How a trained draft is used at decode time."""

    lookup: LookupChoice | None = Field(
        SuffixParams(type="suffix", min_match=3),
        description="Asked before the trained draft, which answers where nothing matches; null: not asked.",
    )
    tree: AnyShape = CHAIN
    verify: Literal["standard", "block", "recursive", "traversal"] | None = Field(
        None, description="Rule for sampled drafts; None: the best that fits."
    )
    controller: AnyController = CostController()
