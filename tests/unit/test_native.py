"""The kernels for CPUs: near exact arithmetic, and to the bit the same whatever else is in a pass."""

from __future__ import annotations

import os
import pickle
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from deepspec import kernels as build
from deepspec.decoding.engine import Engine, generate
from deepspec.decoding.request import Request, Sampling
from deepspec.decoding.sampling import draw
from deepspec.decoding.shapes import BestFirst
from deepspec.decoding.tree import Proposal
from deepspec.decoding.verify import block, block_at_once, takes_at_once
from deepspec.drafters.algorithms.lookup import LookupDrafter
from deepspec.features.extract import LOG_NORM, Extractor
from deepspec.features.sequences import Sequence, Sequences
from deepspec.lineage import code_digest
from deepspec.target import fused
from deepspec.target.attention import ForwardPass, KVCache, OneWay, tree_mask
from deepspec.target.ends import H_LAST
from deepspec.target.fused import DecoderRotary, FusedLayer, Int4Linear, PackedLinear, rope_operands
from deepspec.target.layerwise import Layerwise
from deepspec.target.model import Target, load_target
from deepspec.target.native import laws
from deepspec.target.native.entries import Entries
from deepspec.target.native.layer import NativeLayers, Norm
from deepspec.target.native.norm import can_norm, learnt_norm
from deepspec.target.source import load_model
from tests.tiny import SCALINGS, cached_target, make_model

needed = pytest.mark.skipif(build.kernels() is None, reason=f"kernels {build.state()}")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # a window, biases, norms of queries and keys


@contextmanager
def with_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@needed
@pytest.mark.parametrize("kind", [PackedLinear, Int4Linear])
@pytest.mark.parametrize(("out", "inputs"), [(16, 32), (64, 96), (100, 64), (7, 1536), (272, 576)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_is_near_the_exact_one_and_a_row_does_not_depend_on_the_others(kind, out, inputs, biased):
    weight, bias = random(out, inputs), random(out, seed=1) if biased else None
    linear = kind(weight, bias)
    assert linear.native is not None
    exact = linear(torch.eye(inputs).bfloat16()).T.double() if kind is Int4Linear else weight.double()
    if biased and kind is Int4Linear:
        exact = kind(weight)(torch.eye(inputs).bfloat16()).T.double()
    tolerance = inputs**0.5 * (0.02 if kind is Int4Linear else 1e-5)  # `exact` of 4 bits is itself rounded
    for rows in (1, 2, 5, 6, 7, 13, 40):
        x, residual = random(1, rows, inputs, seed=rows), random(1, rows, out, seed=99)
        found = linear(x, residual)
        wanted = x.double() @ exact.T + (0 if bias is None else bias.double()) + residual.double()
        assert ((found.double() - wanted).abs() <= tolerance + wanted.abs() / 256).all()
        for i in range(rows):
            assert torch.equal(linear(x[:, i : i + 1], residual[:, i : i + 1])[0, 0], found[0, i])
    assert linear(random(1, 0, inputs), random(1, 0, out)).shape == (1, 0, out)


@needed
def test_a_weight_comes_back_as_it_was_and_threads_change_nothing():
    weight = random(100, 64)
    linear, x = PackedLinear(weight), random(9, 64, seed=1)
    assert torch.equal(linear.dense, weight)
    found = []
    for number in (1, 2, 3):
        with with_threads(number):
            found.append(linear(x))
    assert all(torch.equal(found[0], other) for other in found)


@needed
@pytest.mark.parametrize("out", [16, 100, 5000])
def test_the_log_normaliser_is_that_of_the_rounded_logits_whatever_the_threads(out):
    linear, x = PackedLinear(random(out, 64), random(out, seed=1)), random(19, 64, seed=2)
    assert linear.native is not None
    found = linear.native.log_norm(x)
    assert torch.allclose(found, linear(x).float().logsumexp(-1), atol=1e-5)
    with with_threads(3):
        assert torch.equal(linear.native.log_norm(x), found)
    assert torch.equal(linear.native.log_norm(x[3:4]), found[3:4])
    assert torch.equal(laws.log_norm(linear(x)), found)
    assert torch.equal(laws.log_norm(linear(x)[3:4]), found[3:4])


@needed
@pytest.mark.parametrize("row", [0, 40, 99])
def test_a_logit_that_is_not_a_number_is_seen_in_the_log_normaliser(row):
    weight = random(100, 64)
    weight[row, 5] = torch.nan
    native = PackedLinear(weight).native
    assert native is not None and native.log_norm(random(3, 64)).isnan().all()


@pytest.mark.parametrize("scaling", [None, "llama3", "yarn", "dynamic"])
def test_a_table_of_rotations_has_those_of_every_position(scaling, tmp_path):
    """Beyond its first length too; rates that change with the length are asked for anew."""
    scalings = {**SCALINGS, "dynamic": {"rope_type": "dynamic", "factor": 2.0}}
    model = make_model("llama")
    if scaling:
        model.config.rope_parameters = {"rope_theta": 10000.0, **scalings[scaling]}
    rotary = LlamaRotaryEmbedding(model.config)
    x = torch.zeros(1, dtype=torch.bfloat16)
    table = DecoderRotary(rotary, x)
    for positions in ([0, 1, 2], [7, 511], [512, 3, 3], [5000], [1]):
        places = torch.tensor([positions])
        for ours, theirs in zip(table(ForwardPass(places)), rope_operands(rotary(x, places)), strict=True):
            own = theirs if scaling == "dynamic" else theirs[0, :, 0]
            assert torch.equal(ours if scaling == "dynamic" else ours[places[0]], own)


@needed
@pytest.mark.parametrize("tree", [False, True])
def test_all_layers_in_one_call_are_the_layers_one_by_one(target, tree, monkeypatch):
    ids, wanted = (
        torch.randint(2, 500, (1, 19), generator=torch.Generator().manual_seed(3)),
        (-1, 0, 2, H_LAST),
    )
    found: list[list[Tensor]] = []
    final: list[Tensor] = []
    for whole in (True, False):
        monkeypatch.setitem(vars(target), "_stack", None) if not whole else vars(target).pop("_stack", None)
        assert not whole or target._stack is not None
        cache, states = KVCache(3, 16), []
        for start, counts in ((0, [4, 9]), (9, [5, 1])):  # the cache grows in between
            cache.reserve(start + 20)
            mask = tree_mask([[-1] * (n - 1) for n in counts], [start, start], max(counts)) if tree else None
            n = sum(counts)
            positions = torch.cat([torch.arange(start, start + c) for c in counts])[None]
            step = ForwardPass(
                positions, mask, cache=cache, rows=[2, 0], starts=[start] * 2, counts=counts, wanted=wanted
            )
            last = target.forward(ids[:, :n], step)  # under a norm of ours where all is one call
            assert step.features[H_LAST] is last
            final.append(last)
            states += [step.features[layer] for layer in wanted[:-1]]
            assert len(step.stored) == target.num_layers
        found.append(states)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    for ours, theirs in zip(final[:2], final[2:], strict=True):
        assert torch.allclose(ours.float(), theirs.float(), rtol=2**-7)  # rounded once, and twice


@needed
def test_one_call_that_differs_from_its_layers_is_found(target):
    model = load_model(target.source, dtype="bfloat16")
    both = Layerwise(target, model, torch.arange(100, 130))
    assert target.joined and both.joined_unlike() is None
    parts = list(target._stack.parts)
    vars(target)["_stack"] = NativeLayers(
        [parts[0], replace(parts[1], scale=parts[1].scale * 1.1), *parts[2:]], 0
    )
    try:
        assert both.joined_unlike() == 1
    finally:
        del vars(target)["_stack"]


@needed
def test_features_are_the_states_of_decoding_to_the_bit(target):
    lengths = [40, 7, 25]
    sequences = Sequences.of(Sequence(list(range(100, 100 + n)), [1] * n, [1] * n) for n in lengths)
    rows = Extractor(target, sequences, (0, 2)).rows([0, 1, 2])
    for row, n in zip(rows, lengths, strict=True):
        passes = Passes(target)
        alone = torch.stack([passes((0, i, [100 + i]))[0] for i in range(n)])
        assert torch.equal(row[H_LAST], alone)
        assert torch.allclose(row[LOG_NORM], target.logits(alone).float().logsumexp(-1), atol=1e-5)
        assert row[0].shape == row[2].shape == (n, 64)


@pytest.fixture(scope="module", params=FAMILIES)
def target(request) -> Target:
    return load_target(cached_target(request.param), dtype="bfloat16", device="cpu")


class Passes:
    """Runs passes of a target over one cache of two slots."""

    def __init__(self, target: Target):
        self.target, self.cache = target, KVCache(2, 256)

    def __call__(
        self, *parts: tuple[int, int, list[int]], parents: list[int] | None = None, depths=None
    ) -> Tensor:
        """parts: (cache row, start, ids) of each request. Returns h_last [tokens, d]."""
        counts = [len(ids) for _, _, ids in parts]
        places = [start + i for _, start, ids in parts for i in range(len(ids))]
        visible = None
        if parents is not None:
            places = [parts[0][1] + depth for depth in depths]
            visible = tree_mask([parents], [parts[0][1]], counts[0])
        step = ForwardPass(
            torch.tensor([places]),
            visible,
            cache=self.cache,
            rows=[row for row, _, _ in parts],
            starts=[start for _, start, _ in parts],
            counts=counts,
        )
        return self.target.forward(torch.tensor([[token for _, _, ids in parts for token in ids]]), step)[0]


@needed
def test_a_token_has_the_same_bits_alone_in_a_chain_in_a_tree_and_beside_another_request(target):
    assert all(isinstance(layer, FusedLayer) and layer.native for layer in target.layers)
    ids = torch.randint(100, 500, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    passes = Passes(target)
    passes((0, 0, ids[:70]))
    alone = [passes((0, i, ids[i : i + 1]))[0] for i in range(70, 90)]
    passes((1, 0, ids[:70]))
    together = passes((1, 70, ids[70:90]))
    assert torch.equal(torch.stack(alone), together)
    tree = [ids[70], ids[71], 7, ids[72], 8, ids[73], 9]  # two branches in turn
    found = passes((1, 70, tree), parents=[-1, -1, 0, 1, 2, 3], depths=[0, 1, 1, 2, 2, 3, 3])
    assert torch.equal(found[[0, 1, 3, 5]], torch.stack(alone[:4]))
    with torch.inference_mode():
        passes.cache.compact(1, 70, [0, 1, 3, 5])
    assert torch.equal(passes((1, 74, ids[74:80])), torch.stack(alone[4:10]))
    both = passes((0, 80, ids[80:83]), (1, 80, ids[80:90]))
    assert torch.equal(both, torch.cat((torch.stack(alone[10:13]), torch.stack(alone[10:20]))))


@needed
def test_a_cache_is_compacted_as_torch_would(monkeypatch):
    kept, found = [0, 2, 3, 7], []
    for ours in (True, False):
        if not ours:
            monkeypatch.setattr(Entries, "of", lambda _: None)
        cache = KVCache(3, 16)
        for index, (heads, width, dtype) in enumerate([(2, 8, torch.bfloat16), (1, 5, torch.float32)]):
            keys, values = (random(3, heads, 16, width, seed=index + i).to(dtype) for i in (0, 9))
            for room, x in zip(cache.layer(index, keys, values), (keys, values), strict=True):
                room.copy_(x)
        cache.compact(1, 4, kept)
        cache.reserve(40)
        cache.compact(2, 5, [0, 1, 4])
        found.append([x for layer in cache._layers.values() for x in layer])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@needed
def test_passes_are_near_those_of_torch(target, monkeypatch):
    ids = torch.randint(100, 500, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    ours = Passes(target)
    found = torch.cat((ours((0, 0, ids[:80])), ours((0, 80, ids[80:]))))
    monkeypatch.setattr(fused, "can_hold", lambda weight: False)
    plain = load_target(target.source, dtype="bfloat16", device="cpu")
    assert plain.layers[0].native is None
    theirs = Passes(plain)
    expected = torch.cat((theirs((0, 0, ids[:80])), theirs((0, 80, ids[80:]))))
    error = (found - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
    assert error.median() < 0.02


LAYERS: dict[str, tuple[Any, Any]] = {
    "biases": (LlamaDecoderLayer, lambda **sizes: LlamaConfig(attention_bias=True, mlp_bias=True, **sizes)),
    "window": (MistralDecoderLayer, lambda **sizes: MistralConfig(sliding_window=9, **sizes)),
    "norms": (Qwen3DecoderLayer, Qwen3Config),
    "one way": (LlamaDecoderLayer, LlamaConfig),
    "one way in a window": (LlamaDecoderLayer, LlamaConfig),
}
RULES = {"one way": OneWay(), "one way in a window": OneWay(9)}
# width, inner width, heads, key heads, numbers of a head, those of them that turn
SIZES = [(48, 80, 2, 2, 16, 16), (112, 16, 7, 1, 48, 48), (80, 112, 5, 1, 80, 20), (96, 96, 48, 1, 16, 16)]
SIZES += [(112, 48, 14, 2, 256, 64), (48, 48, 16, 1, 96, 96)]
PARENTS, DEPTHS = [-1, -1, 0, 1, 2, 3], [0, 1, 1, 2, 2, 3, 3]


def layer_of(kind: str, width: int, inner: int, heads: int, key_heads: int, head: int) -> Any:
    """Make a random layer in bfloat16."""
    made, configuration = LAYERS[kind]
    config = configuration(
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head,
        num_hidden_layers=1,
    )
    torch.manual_seed(0)
    layer = made(config, 0).bfloat16()
    if kind in RULES:
        layer.self_attn.sliding_window = RULES[kind]
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, weight.shape[-1] ** -0.5)
    return layer


def turned(places: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin of RoPE, [1, n, width] in bfloat16."""
    angles = places[..., None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.cat((angles, angles), -1)
    return angles.cos().bfloat16(), angles.sin().bfloat16()


@needed
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_layer_of_any_shape_is_near_exact_arithmetic_under_any_mask(kind, sizes):
    *shape, turning = sizes
    layer = layer_of(kind, *shape)
    ours, exact = FusedLayer(layer), FusedLayer(deepcopy(layer).double())
    assert ours.native is not None and exact.native is None
    tree, everything = tree_mask([PARENTS], [20], 7), torch.ones(1, 7, 27, dtype=torch.bool)
    branches = (20 + torch.tensor(DEPTHS))[None]
    x = random(1, 27, shape[0])
    for places, options in (
        (torch.arange(20, 27)[None], {}),
        (branches, {"visible": tree}),
        (torch.arange(20, 27)[None], {"bidirectional": True}),
        (torch.arange(20, 27)[None], {"visible": everything}),
    ):
        found = []
        for run, dtype in ((ours, torch.bfloat16), (exact, torch.float64)):
            cache = KVCache(3, 32)
            with torch.inference_mode():
                for part, at, more in ((x[:, :20], torch.arange(20)[None], {}), (x[:, 20:], places, options)):
                    rope = tuple(operand.to(dtype) for operand in turned(at, turning))
                    start, count = (0, 20) if part.shape[1] == 20 else (20, 7)
                    step = ForwardPass(at, cache=cache, rows=[1], starts=[start], counts=[count], **more)
                    states = run(part.to(dtype), rope, step=step)
            keys, values = cache.layer(0, x, x)  # made by now
            found.append((states, keys[1, :, :27], values[1, :, :27]))
            assert not keys[[0, 2]].any() and not keys[1, :, 27:].any()
        for name, mine, wanted in zip(("states", "keys", "values"), *found, strict=True):
            error = (mine.double() - wanted).norm() / wanted.norm()
            assert error < 0.01, (name, options)


@needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 15, 256, 257, 8192, 40_000])
def test_a_law_is_the_exact_softmax_and_a_row_does_not_depend_on_the_others_or_the_threads(columns, dtype):
    logits = (random(3, columns) * 4).to(dtype)
    logits[1, columns // 2] = -torch.inf
    exact = (logits.double() / 0.7).softmax(-1)
    with with_threads(2):
        found = laws.probabilities(logits, 0.7)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-9, equal_nan=True)
    with with_threads(1):
        assert torch.equal(laws.probabilities(logits, 0.7).nan_to_num(), found.nan_to_num())
        assert torch.equal(laws.probabilities(logits[2:], 0.7), found[2:])
    assert columns == 1 or found[1, columns // 2] == 0


@needed
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_logit_that_is_not_finite_makes_no_law_and_is_no_likeliest_token(bad):
    logits = random(2, 700).float()
    logits[1, 300] = bad
    found = laws.probabilities(logits, 1.0)
    assert found[0].isfinite().all() and found[1].isnan().all()
    assert laws.best(logits)[1].isfinite().tolist() == [True, False]
    assert 0 <= int(laws.draw(found, torch.tensor([0.5, 0.5]))[1]) < 700


@needed
def test_a_draw_is_the_exact_inverse_cdf_and_what_cannot_come_never_does():
    rng = torch.Generator().manual_seed(0)
    weights = torch.rand(400, 3000, generator=rng) * (torch.rand(400, 3000, generator=rng) < 0.01)
    uniform = torch.rand(400, generator=rng, dtype=torch.float64)
    uniform[:4] = torch.tensor([0.0, 1 - 2**-53, 0.0, 1 - 2**-53], dtype=torch.float64)
    cumulated = weights.double().cumsum(-1)
    exact = torch.searchsorted(cumulated, (uniform * cumulated[:, -1])[:, None], right=True)[:, 0]
    found = laws.draw(weights, uniform)
    assert (weights.gather(1, found[:, None]) > 0).all()
    assert int((found != exact).sum()) <= 2  # a point that rounding moves over an edge
    assert torch.equal(found[7:8], laws.draw(weights[7:8], uniform[7:8]))
    last = torch.zeros(1, 2000)
    last[0, 5] = 1
    assert laws.draw(last, torch.tensor([1 - 2**-53], dtype=torch.float64)).tolist() == [5]


@needed
@pytest.mark.parametrize("width", [1, 15, 300, 2000])
def test_the_mass_above_a_drafts_law_is_the_exact_one(width):
    rng = torch.Generator().manual_seed(0)
    p = torch.rand(3000, generator=rng) ** 4
    p /= p.sum()
    columns = torch.randperm(3000, generator=rng)[:width]
    q = torch.rand(width, generator=rng)
    q /= q.sum()
    whole = torch.zeros(3000).index_put((columns,), q)
    for scale in (1.0, 0.3):
        exact = float((scale * p.double() - whole.double()).clamp(min=0).sum())
        assert laws.excess(p, q, columns, scale) == pytest.approx(exact, abs=1e-6)
        assert laws.excess(p, whole, None, scale) == pytest.approx(exact, abs=1e-6)
        rest = (scale * p - whole).clamp(min=0)
        for found, mass in (
            laws.remainder(p, q, columns, scale),
            laws.remainder(p, whole, None, scale),
        ):
            assert torch.equal(found, rest) and mass == pytest.approx(exact, abs=1e-6)


@needed
def test_what_is_left_of_laws_that_are_equal_or_no_numbers_has_no_mass():
    p = torch.full((40,), 1 / 40)
    rest, mass = laws.remainder(p, p.clone(), None, 1.0)
    assert mass == 0 and not rest.any()
    p[3] = torch.nan
    rest, mass = laws.remainder(p, p.clone(), None, 1.0)
    assert not mass > 0 and rest[3].isnan()


@needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_token_is_the_first_of_equals(dtype):
    logits = random(5, 1000).to(dtype)
    logits[0, [900, 300, 299]] = logits[0].max() + 1
    logits[1] = -torch.inf
    columns, values = laws.best(logits)
    assert columns[0] == 299 and columns[1] == 0
    assert torch.equal(columns, logits.float().argmax(-1)) and torch.equal(values, logits.float().amax(-1))


@needed
@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 5, 576)])
def test_a_norm_is_near_the_exact_one(shape):
    norm, x = Norm(random(shape[-1], seed=1), 1e-5), random(*shape)
    exact = torch.nn.functional.rms_norm(x.double(), shape[-1:], norm.weight.double(), 1e-5)
    assert norm.takes(x) and ((norm(x).double() - exact).abs() <= 0.004 * exact.abs() + 1e-12).all()


@needed
@pytest.mark.parametrize("copy", [deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_of_a_layer_reads_its_own_weights(copy):
    layer, x = FusedLayer(layer_of("norms", *SIZES[0][:-1])), random(1, 5, 48)
    found = []
    assert layer.native is not None  # made by now
    for each in (layer, copied := copy(layer)):
        step = ForwardPass(torch.arange(5)[None], cache=KVCache(1, 8))
        found.append(each(x, turned(step.positions, 16), step=step))
        with torch.no_grad():
            layer.down.weight.zero_()
            layer.norms[0].weight.zero_()
    assert torch.equal(*found)
    assert copied.native.parts[0].down is copied.down.native


@needed
def test_what_the_kernels_cannot_read_is_refused():
    linear = PackedLinear(random(32, 64))
    for x, said in (
        (random(3, 64).float(), "read x as bfloat16 [3, 64], not float32 [3, 64]"),
        (random(3, 32), "not bfloat16 [3, 32]"),
        (random(3, 64).requires_grad_(), "x asks for a gradient"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            linear(x)
    with pytest.raises(ValueError, match="the residual as bfloat16"):
        linear(random(3, 64), random(1, 32))
    with torch.no_grad():
        assert not linear(random(3, 64).requires_grad_()).requires_grad
    bias = random(32, seed=1)
    wanted = PackedLinear(random(32, 64), bias)(random(3, 64))
    assert torch.equal(PackedLinear(random(32, 64), bias.float())(random(3, 64)), wanted)


def decoded(
    target: Target, prompts: list[list[int]], tree: BestFirst | None, batch: int
) -> dict[int, list[int]]:
    """Return the greedy answer of each prompt, drafted by a lookup, so many requests at once."""
    engine = Engine(target, LookupDrafter(4, 1), batch_size=batch, tree=tree)
    asked = iter([Request(ids, 24, sampling=Sampling(0.0), seed=0, id=i) for i, ids in enumerate(prompts)])
    return {result.id: result.tokens for result in engine.run(lambda: next(asked, None))}


@needed
@pytest.mark.parametrize("weights", ["dense", "int4"])
def test_greedy_text_in_bfloat16_is_the_plain_one_in_any_batch_and_tree(target, weights):
    target = load_target(target.source, dtype="bfloat16", device="cpu", weights=weights)
    prompts = [[33 + i, 2, 33, 2, 33, 2, 33 + i] * 3 for i in range(5)]
    plain = [generate(target, None, prompt, 24)[0].tokens for prompt in prompts]
    for tree, batch in ((None, 1), (None, 4), (BestFirst(3, None, 12), 1), (BestFirst(3, None, 12), 4)):
        found = decoded(target, prompts, tree, batch)
        assert [found[i] for i in range(len(prompts))] == plain


def test_the_switch_and_a_missing_compiler_leave_torchs_kernels(tmp_path):
    code = (
        "import torch; from deepspec import kernels as build; from deepspec.target.fused import PackedLinear\n"
        "x = torch.randn(32, 32).bfloat16(); linear = PackedLinear(x)\n"
        "print(build.state()); print(linear.native, linear(x).shape)"
    )
    environment = {"HOME": str(tmp_path), "PATH": "/nowhere", "OMP_NUM_THREADS": "1"}
    for more, reason in (
        ({"DEEPSPEC_NATIVE": "0"}, "$DEEPSPEC_NATIVE is 0"),
        ({}, "no C++ compiler"),
        ({"CXX": "false"}, "no C++"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment | more,
            capture_output=True,
            text=True,
            cwd=Path.cwd(),
        )
        assert done.returncode == 0, done.stderr
        said, made = done.stdout.splitlines()
        assert said.startswith("not used: ") and (reason in said or "this CPU has" in said)
        assert made == "None torch.Size([32, 32])"


@needed
def test_a_compiler_that_fails_is_one_line(tmp_path, monkeypatch, caplog):
    source = tmp_path / "kernels.cpp"
    source.write_text("this is no C++\n")
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setenv("HOME", str(tmp_path))
    library, reason = build._found.__wrapped__()
    assert library is None and "error" in reason and "\n" not in reason
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert not list(tmp_path.joinpath(*build.CACHED).iterdir())


@needed
def test_a_compiler_or_a_system_without_tiles_leaves_kernels_without_them(tmp_path, monkeypatch, caplog):
    found = torch.cpu.get_capabilities() | dict.fromkeys(build.TILES, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    library, more = (
        build._found.__wrapped__()
    )  # asks for tiles on any CPU; one without them does not grant any
    assert library is not None and more == build.WITH_TILES * build.with_tiles()
    assert len(caplog.records) == (not build.with_tiles())
    caplog.clear()
    compiler = tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-mamx-tile*) echo "error: no -mamx-tile" >&2; exit 1;; esac\nexec g++ "$@"\n'
    )
    compiler.chmod(stat.S_IRWXU)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler))
    library, more = build._found.__wrapped__()
    assert library is not None and more == ""
    assert [record.message for record in caplog.records] == [
        f"the kernels for this CPU do without AMX: {compiler}: error: no -mamx-tile"
    ]


@pytest.mark.skipif(not build.with_tiles(), reason=f"kernels {build.state()}")
def test_what_holds_with_tiles_holds_without_them():
    """Products, bits of a row in any pass, and greedy text, in a process that leaves AMX out."""
    names = "product or row or threads or greedy or normaliser or layers"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        f"({names}) and not tiles",
    ]
    done = subprocess.run(
        command, env=os.environ | {build.SWITCH: build.WITHOUT_TILES}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "skipped" not in done.stdout


@needed
@pytest.mark.parametrize("content", [None, "no library"])
def test_a_library_that_does_not_load_is_not_kept(content, tmp_path, monkeypatch):
    compiler = tmp_path / "compiler"
    write = "" if content is None else 'while [ "$1" != -o ]; do shift; done; echo no library > "$2"'
    compiler.write_text(f"#!/bin/sh\n{write}\n")
    compiler.chmod(stat.S_IRWXU)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CXX", f"{compiler} -m64")  # with an argument
    reasons = {build._found.__wrapped__()[1] for _ in range(2)}
    assert len(reasons) == 1 and f"{compiler} made does not load" in reasons.pop()
    assert not list(tmp_path.joinpath(*build.CACHED).iterdir())


@needed
def test_a_user_without_a_home_directory_has_torchs_kernels(monkeypatch):
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    assert build._found.__wrapped__() == (None, "Could not determine home directory.")


@needed
def test_work_of_other_kernels_is_not_gone_on_with(tmp_path, monkeypatch):
    before = code_digest.__wrapped__("deepspec.target.fused")
    source = tmp_path / "kernels.cpp"
    source.write_bytes(build.SOURCE.read_bytes() + b"\n// another\n")
    monkeypatch.setattr(build, "SOURCE", source)
    assert code_digest.__wrapped__("deepspec.target.fused") != before
    left_out = set()
    for reason in ("no C++ compiler", "this CPU has no avx512_f"):
        monkeypatch.setattr(build, "_found", lambda reason=reason: (None, reason))
        left_out.add(code_digest.__wrapped__("deepspec.target.fused"))
    assert len(left_out) == 1 and before not in left_out
    assert code_digest.__wrapped__("deepspec.decoding.params") == code_digest("deepspec.decoding.params")


@pytest.mark.parametrize("reduced", [False, True])
def test_a_block_is_judged_at_once_as_it_is_token_by_token(reduced):
    vocab, width, drafted = 300, 40, 5
    rng = torch.Generator().manual_seed(1)
    seen = set()
    for case in range(60):
        p = (torch.randn(drafted + 1, vocab, generator=rng) * 2).softmax(-1)
        columns = p.mean(0).topk(width).indices.sort().values if reduced else None
        own = p[:drafted] if columns is None else p[:drafted][:, columns]
        q = (own.log() + 0.2 * torch.randn(own.shape, generator=rng)).softmax(-1)
        if case == 0:
            q[2] = own[2] / own[2].sum()
        if case == 1:
            p[3, 7] = float("nan")
        places = torch.multinomial(q, 1, generator=rng)[:, 0].tolist()
        tokens = places if columns is None else columns[places].tolist()
        proposal = Proposal.chain(tokens, probs=q, columns=columns, places=places, vocab_size=vocab)
        proposal = proposal.cut(case % drafted + 1)
        one, other = torch.Generator().manual_seed(case), torch.Generator().manual_seed(case)
        law = p[: len(proposal.tokens) + 1]

        def uniform(one=one):
            return float(torch.rand((), generator=one, dtype=torch.float64))

        def pick(weights, uniform=uniform):
            return int(draw(weights[None], torch.tensor([uniform()], dtype=torch.float64)))

        assert takes_at_once(block, proposal, law)
        at_once = block_at_once(
            proposal, law, lambda n, other=other: torch.rand(n, generator=other, dtype=torch.float64)
        )
        assert at_once == block(proposal, lambda node, law=law: law[node + 1], uniform, pick)
        assert one.get_state().equal(other.get_state())
        seen.add(len(at_once[0]))
    assert len(seen) > 3


def test_a_position_without_a_rotation_is_refused_before_anything_is_read(target: Target):
    cache = KVCache(1, 8)
    step = ForwardPass(torch.tensor([[0, 5000]]), cache=cache, starts=[0], largest=1)
    with pytest.raises(IndexError, match="a position has no rotation"):
        target.forward(torch.tensor([[1, 2]]), step)
    step = ForwardPass(torch.tensor([[0, 5000]]), cache=cache, starts=[0])
    assert target.forward(torch.tensor([[1, 2]]), step).isfinite().all()


@needed
def test_logits_in_the_same_call_are_those_of_the_states_to_the_bit(target: Target):
    ids = torch.randint(2, 500, (1, 9), generator=torch.Generator().manual_seed(4))
    step = ForwardPass(torch.arange(9)[None], cache=KVCache(1, 16), judged=True)
    hidden = target.forward(ids, step)
    assert step.logits is not None and torch.equal(step.logits, target.logits(hidden[0]))
    with target.one_by_one():
        step = ForwardPass(torch.arange(9)[None], cache=KVCache(1, 16), judged=True)
        assert torch.equal(target.forward(ids, step), hidden) and step.logits is None


@needed
def test_a_token_outside_the_vocabulary_is_refused_before_anything_is_read(target: Target):
    step = ForwardPass(torch.arange(2)[None], cache=KVCache(1, 8), starts=[0])
    for token in (-1, target.embeddings.shape[0]):
        with pytest.raises(IndexError, match="vocabulary"):
            target.forward(torch.tensor([[1, token]]), step)
        step.clear()


@needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 7, 96), (130, 64), (1, 16), (0, 32)])
def test_a_norm_that_is_learnt_has_torchs_gradients(shape, dtype):
    rng = torch.Generator().manual_seed(6)
    x, weight, slope = (torch.randn(*size, generator=rng).to(dtype) for size in (shape, shape[-1:], shape))
    ours = [
        x.clone().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_(),
        weight.clone().requires_grad_(),
    ]
    assert can_norm(*ours) and not can_norm(x, weight.double())
    assert not can_norm(x[..., :8], weight[:8]) and not can_norm(x[..., :-1], weight)
    found = learnt_norm(*ours, 1e-5)
    exact = [part.detach().double().requires_grad_() for part in ours]
    expected = F.rms_norm(exact[0], weight.shape, exact[1], 1e-5)
    gradients = torch.autograd.grad(found, ours, slope)
    precision = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.01, "atol": 0.02}
    torch.testing.assert_close(found.double(), expected, **precision)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, exact, slope.double()), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), theirs, **precision)
