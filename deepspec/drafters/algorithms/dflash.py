"""DFlash: DSpark's backbone without its heads (arXiv 2602.06036). All tokens of a block are drafted at once.

The block is the anchor and γ masks, and the masks predict: the paper's layout, and the only one that vLLM and SGLang
run DFlash in. With `sample_from_anchor` directories have the format of DeepSeek's own DFlash releases:
`Qwen3DSparkModel` with `markov_rank: 0`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from deepspec.drafters.algorithm import Algorithm, TrainedParams
from deepspec.drafters.algorithms import dspark
from deepspec.drafters.algorithms.dspark import DSparkModel, DSparkParams
from deepspec.drafters.start import START
from deepspec.target.model import Target


class DFlashParams(TrainedParams):
    """DFlash: a parallel block drafter; every position is predicted on its own."""

    type: Literal["dflash"]
    layers: int = Field(2, ge=1)
    block_size: int = Field(7, ge=1, description="γ: tokens drafted per block.")
    target_layer_ids: list[int] | None = Field(None, description="None spreads five over the depth.")
    draft_vocab_size: int = Field(8192, ge=0, description="Most frequent tokens kept; 0 keeps them all.")
    context_skip: bool = Field(
        False, description="Feed the newest target feature into the block's input (our engine only)."
    )
    start: str = Field("auto", description=START)
    sample_from_anchor: bool = Field(
        False, description="The anchor's place predicts the first token, as in DSpark; no engine serves that."
    )


def network(params: DFlashParams, target: Target) -> DSparkModel:
    """Make a DSpark network without sequential and confidence heads."""
    same = DSparkParams(type="dspark", markov_rank=0, confidence_head=False, **params.options())
    return dspark.network(same, target, params.model_fields_set | {"markov_rank"})


ALGORITHM = Algorithm(DFlashParams, (), network=network)
