"""4-bit weights: the blocks are those of Q4_1, and what cannot have them says so."""

from __future__ import annotations

import pytest
import torch

from deepspec.decoding.engine import generate
from deepspec.drafters.algorithms.lookup import LookupDrafter
from deepspec.errors import DeepSpecError
from deepspec.target.fused import Int4Linear
from deepspec.target.model import load_target
from tests.tiny import cached_target


@pytest.fixture(scope="module")
def directory():
    return cached_target("llama")


def test_weights_that_came_from_blocks_of_four_bits_come_back_as_they_were():
    rng = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 16, (48, 2, 32), generator=rng)
    levels[..., 0], levels[..., 1] = 0, 15  # a block spans its own smallest to largest weight
    scale = (torch.rand(48, 2, 1, generator=rng) + 0.5).bfloat16().float() / 16
    low = -8 * scale
    weight = (low + levels * scale).flatten(1)
    linear = Int4Linear(weight)
    x = torch.randn(5, 64, generator=rng).bfloat16()
    exact = x.float() @ weight.T
    assert torch.allclose(linear(x).float(), exact, atol=2e-2 * float(exact.abs().max()))
    rebuilt = linear(torch.eye(64).bfloat16()).float().T  # [48, 64]
    assert torch.allclose(rebuilt, weight, rtol=1 / 128, atol=1e-6)  # the products are rounded to bfloat16


def test_bias_and_residual_are_added():
    weight, bias = torch.randn(32, 32), torch.randn(32)
    x, residual = torch.randn(1, 3, 32).bfloat16(), torch.randn(1, 3, 32).bfloat16()
    with_both = Int4Linear(weight, bias)(x, residual)
    assert with_both.shape == (1, 3, 32)
    expected = Int4Linear(weight)(x) + bias.bfloat16() + residual
    assert torch.allclose(with_both.float(), expected.float(), rtol=1 / 64, atol=5e-2)


def test_a_target_in_four_bits_decodes_and_is_named_so(directory):
    dense = load_target(directory, dtype="bfloat16", device="cpu")
    target = load_target(directory, dtype="bfloat16", device="cpu", weights="int4")
    assert (dense.precision, target.precision) == ("bfloat16", "int4 weights, bfloat16")
    assert target.digest == dense.digest  # a draft of the target fits both
    prompt = [33, 2, 33, 2, 33, 2, 33]
    plain = generate(target, None, prompt, 16)[0]
    drafted = generate(target, LookupDrafter(3, 1), prompt, 16)[0]
    assert len(plain.tokens) == 16 or plain.finish_reason == "stop"
    assert drafted.tokens[:4] == plain.tokens[:4]


def test_what_cannot_be_in_four_bits_says_so(directory):
    with pytest.raises(DeepSpecError, match="bfloat16 activations"):
        load_target(directory, dtype="float32", device="cpu", weights="int4")
    with pytest.raises(DeepSpecError, match="unknown weights 'int3'; known: dense, int4"):
        load_target(directory, weights="int3")
