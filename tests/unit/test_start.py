"""A draft that begins as the target's last layers computes what they compute, and is stored like any other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.tiny_families import tiny_model
from deepspec.drafters.algorithms.dspark import DSparkModel
from deepspec.drafters.registry import algorithms
from deepspec.drafters.start import match_head, resolve_start
from deepspec.errors import DeepSpecError
from deepspec.target.attention import ForwardPass
from deepspec.target.model import load_target
from tests.tiny import SCALINGS, cached_target, make_network, make_target, make_tokenizer, scaled_target

IDS = torch.tensor([[7, 80, 300, 9, 41, 250]])
LAYERS = (0, 1)  # of the features; the draft's are 2 and 3


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def target(request):
    return load_target(cached_target(request.param))


def begun(target, kind: str, **sizes):
    algorithm = algorithms()[kind]
    params = algorithm.params(type=kind, start="target", draft_vocab_size=0, target_layer_ids=LAYERS, **sizes)
    torch.manual_seed(0)
    network = algorithm.network(params, target)
    network.share(target, torch.arange(target.vocab_size))
    network.init_from_target(target, states(target).flatten(0, -2).std(0))
    return network


def states(target, layers=LAYERS) -> torch.Tensor:
    step = ForwardPass(torch.arange(IDS.shape[1])[None], wanted=layers)
    target.forward(IDS, step)
    return torch.cat([step.features[layer] for layer in layers], -1)


def normed(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


@pytest.mark.parametrize("target", ["qwen3"], indirect=True)
@pytest.mark.parametrize("kind", ["dspark", "dflash"])
def test_layers_with_norms_of_queries_compute_what_the_targets_last_do(target, kind):
    computes_the_targets_layer(begun(target, kind, layers=2), target)


def computes_the_targets_layer(network, target) -> None:
    """Layer 2 of the target at the last token, which sees the others as the draft's context."""
    below = states(target, (1,))
    places = torch.arange(IDS.shape[1])[None]
    rope, before = network.rope(places[:, -1:], below.dtype), network.rope(places[:, :-1], below.dtype)
    mask = torch.zeros(1, 1, 1, IDS.shape[1])
    ours = network.layers[0](below[:, -1:], normed(below[:, :-1]), rope, before, mask)
    torch.testing.assert_close(ours, states(target, (2,))[:, -1:], atol=1e-4, rtol=1e-4)
    assert torch.equal(network.norm.weight, target.last_norm)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_draft_scales_its_rotary_embedding_as_its_target_does(scaling, tmp_path):
    target = load_target(scaled_target(tmp_path, SCALINGS[scaling]))
    network = begun(target, "dspark", layers=2)
    assert network.config.rope_scaling["rope_type"] == scaling
    computes_the_targets_layer(network, target)
    assert begun(target, "eagle3").config.rope_scaling["rope_type"] == scaling
    assert begun(target, "eagle3", rope="plain").config.rope_scaling is None


def test_a_scaling_that_changes_with_the_length_is_not_followed(tmp_path):
    target = load_target(scaled_target(tmp_path, {"rope_type": "dynamic", "factor": 2.0}))
    assert begun(target, "dflash").config.rope_scaling is None


@pytest.mark.parametrize("target", ["qwen3"], indirect=True)
def test_eagles_layer_is_the_targets_last_where_it_reads_the_state(target):
    network = begun(target, "eagle3", qk_norm=True)
    below = states(target, (2,))[:, :1]  # the first token sees itself alone
    rope = network.rope(torch.zeros(1, 1), below.dtype)
    attention = network.layers[0].self_attn
    joined = network.layers[0].joined(torch.zeros_like(below), below)
    _, values = attention.keys_values(joined, rope)
    attended = values.repeat_interleave(attention.q_proj.out_features // attention.k_proj.out_features, 1)
    ours = network.norm(network.layers[0].finish(attended.transpose(1, 2), below))
    step = ForwardPass(torch.zeros(1, 1, dtype=torch.int64))
    torch.testing.assert_close(ours, target.forward(IDS[:, :1], step), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("target", ["llama"], indirect=True)
@torch.no_grad()
def test_norms_that_the_target_lacks_keep_the_size_of_queries_and_keys(target):
    attention = begun(target, "dspark", layers=1).layers[0].self_attn
    x = torch.randn(4000, attention.q_proj.in_features)
    for norm, projection in ((attention.q_norm, attention.q_proj), (attention.k_norm, attention.k_proj)):
        plain = projection(x).square().mean()
        drafted = norm(projection(x).unflatten(-1, (-1, attention.head_dim))).square().mean()
        assert float(drafted) == pytest.approx(float(plain), rel=0.02)


@pytest.mark.parametrize("kind", ["dspark", "dflash", "eagle3"])
def test_what_the_layers_read_is_the_deepest_feature(target, kind):
    network, features = begun(target, kind), states(target)
    read = network.fc(features)
    torch.testing.assert_close(read, features[..., -read.shape[-1] :])


@pytest.mark.parametrize("kind", ["dspark", "dflash", "eagle3"])
def test_the_stored_weights_read_features_as_they_come(target, kind):
    """Evened out in training, `fc` is folded for the file: a network that was filled from it says the same."""
    network, features = begun(target, kind), states(target)
    again = type(network)(network.config)
    again.share(target, torch.arange(target.vocab_size))
    own = {again.stored_name(name): name for name in again.state_dict()}
    again.load_state_dict({own[name]: w for name, w in network.stored().items()}, strict=False)
    assert float(network.fc.scale.std()) > 0
    assert torch.equal(again.fc.scale, torch.ones_like(again.fc.scale))
    anchors = torch.tensor([[2, 4]])
    torch.testing.assert_close(
        again(features, IDS, anchors), network(features, IDS, anchors), atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_the_stored_rnn_head_reads_its_inputs_as_they_come(target):
    head = begun(target, "dspark", markov_head="rnn", markov_rank=8).markov_head
    for weight in head.parameters():
        torch.nn.init.normal_(weight)
    again = type(head)(begun(target, "dspark", markov_head="rnn", markov_rank=8).config)
    again.load_state_dict(head.state_dict() | {"joint_proj.weight": head.joint_proj.folded_weight()})
    assert head.joint_proj.scale.unique().tolist() == pytest.approx([1, 8**0.5, target.hidden_size**0.5])
    embedded, hidden = torch.randn(2, 3, 8), torch.randn(2, 3, target.hidden_size)
    torch.testing.assert_close(again.unrolled(embedded, hidden), head.unrolled(embedded, hidden))


def test_a_network_takes_over_what_another_divides_by(target):
    network = begun(target, "dspark")
    fresh = DSparkModel(network.config)
    fresh.take_buffers(network)
    assert torch.equal(fresh.fc.scale, network.fc.scale)


def test_auto_begins_at_random_where_the_target_cannot_lend_its_layers(tmp_path):
    own = load_target(make_target(tmp_path / "llama", "llama"))
    other = load_target(make_target(tmp_path / "gemma3", "gemma3"))
    for kind in ("dspark", "dflash", "eagle3"):
        algorithm = algorithms()[kind]
        params = algorithm.params(type=kind)
        assert algorithm.network(params, own).start == "target"
        assert algorithm.network(params, other).start == "random"
    assert resolve_start("auto", own, layers=4) == "target"
    assert resolve_start("auto", own, layers=5) == "random"


@pytest.mark.parametrize(
    ("family", "eagle3", "dspark"), [("qwen3", "random", "target"), ("qwen2", "random", "random")]
)
def test_auto_takes_layers_whole_or_not_at_all(tmp_path, family, eagle3, dspark):
    """EAGLE-3's served layer has no norms of queries and keys, and no draft has biases; `target` leaves them out."""
    target = load_target(make_target(tmp_path, family))
    for kind, start in (("eagle3", eagle3), ("dspark", dspark)):
        algorithm = algorithms()[kind]
        assert algorithm.network(algorithm.params(type=kind), target).start == start
        assert algorithm.network(algorithm.params(type=kind, start="target"), target).start == "target"


def test_a_target_of_another_shape_or_too_few_layers_is_refused_with_one_line(tmp_path):
    target = load_target(make_target(tmp_path / "gemma3", "gemma3"))
    with pytest.raises(DeepSpecError, match="cannot begin as layers of this shape; use `start: random`"):
        begun(target, "dspark")
    target = load_target(make_target(tmp_path / "llama", "llama"))
    with pytest.raises(DeepSpecError, match="has 4 layers, 5 were asked for"):
        begun(target, "dspark", layers=5)


@pytest.mark.parametrize(("family", "scale"), [("granite", 0.25), ("cohere", 0.25), ("llama", 1.0)])
@pytest.mark.parametrize("kind", ["eagle3", "dspark"])
def test_a_draft_begins_with_logits_of_the_size_of_its_targets(kind, family, scale, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    target = load_target(tmp_path)
    network = make_network(target, kind, block_size=3)
    before = network.norm.weight.detach().clone()
    match_head(network, target)
    assert torch.equal(network.norm.weight, before * scale)
    product = before.new_ones(1, target.hidden_size)
    states, head = network.outputs(product * network.norm.weight, torch.zeros(1, dtype=torch.int64)).factors[
        0
    ]
    mine = states @ head.T
    assert torch.allclose(mine, target.logits(product * before), rtol=1e-4, atol=1e-4)
