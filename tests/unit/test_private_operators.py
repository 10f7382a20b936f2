"""Operators of torch that have no public name: an upgrade may change them.

`deepspec/target/fused.py` uses them, and of attention `deepspec/drafters/block_attention.py`.
"""

from __future__ import annotations

import pytest
import torch

_READ, _OPTIONS = ("query", "key", "value"), ("attn_mask", "scale")
# The arguments with their names, as torch declares them, up to those that have defaults.
OPERATORS = {
    "mkldnn::_is_mkldnn_bf16_supported": [],
    "mkldnn::_reorder_linear_weight": ["self", "batch_size"],
    "mkldnn::_linear_pointwise": ["X", "W", "B", "attr", "scalars", "algorithm"],
    "mkldnn::_linear_pointwise.binary": ["X", "other", "W", "B", "attr"],
    "aten::_convert_weight_to_int4pack_for_cpu": ["self", "innerKTiles"],
    "aten::_weight_int4pack_mm_for_cpu": ["self", "mat2", "qGroupSize", "qScaleAndZeros"],
    "aten::_scaled_dot_product_flash_attention_for_cpu": [*_READ, "dropout_p", "is_causal", *_OPTIONS],
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": [
        *("grad_out", *_READ, "out", "logsumexp", "dropout_p", "is_causal"),
        *_OPTIONS,
    ],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_private_operator_of_torch_is_there_and_takes_what_it_took(name: str):
    space, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    missing = f"torch {torch.__version__} has no {name}: mend what uses it or pin torch"
    assert hasattr(getattr(torch.ops, space), packet), missing
    operator = getattr(getattr(torch.ops, space), packet)
    assert (overload or "default") in operator.overloads(), missing
    schema = getattr(operator, overload or "default")._schema
    assert [argument.name for argument in schema.arguments] == OPERATORS[name], str(schema)
