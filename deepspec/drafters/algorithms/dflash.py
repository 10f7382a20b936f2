"""DFlash: DSpark's backbone without its heads (arXiv 2602.06036). All tokens of a block are drafted at once.

The block is the anchor and γ masks, and the masks predict: the paper's layout, and the only one that vLLM and SGLang
run DFlash in. With `sample_from_anchor` directories have the format of DeepSeek's own DFlash releases:
`Qwen3DSparkModel` with `markov_rank: 0`.
"""

from __future__ import annotations

from deepspec.drafters.algorithm import Algorithm
from deepspec.drafters.algorithms import dspark
from deepspec.drafters.algorithms.dspark import DSparkModel
from deepspec.drafters.params import DFlashParams, DSparkParams
from deepspec.target.ends import Ends


def network(params: DFlashParams, target: Ends) -> DSparkModel:
    """Make a DSpark network without sequential and confidence heads."""
    same = DSparkParams(type="dspark", markov_rank=0, confidence_head=False, **params.options())
    return dspark.network(same, target, params.model_fields_set | {"markov_rank"})


ALGORITHM = Algorithm(DFlashParams, (), network=network, read=dspark.read)
