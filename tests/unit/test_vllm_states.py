"""vLLM itself hands out the states and the answers of a tiny target, where it is installed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from deepspec.decoding.engine import generate
from deepspec.decoding.request import Request
from deepspec.errors import DeepSpecError
from deepspec.features.codec import codec
from deepspec.features.extract import Extractor
from deepspec.features.sequences import Sequences
from deepspec.features.served import ServedStates
from deepspec.features.states import engine_layers
from deepspec.serving import environment
from deepspec.stages import body
from deepspec.target.ends import H_LAST, load_ends
from deepspec.target.model import load_target
from deepspec.target.params import TargetParams
from tests.tiny import make_target
from tests.unit.test_ends import whole, write_family

pytestmark = pytest.mark.engine
LAYERS = (0, 2, H_LAST)
SHAPES = {
    "qwen3_moe": {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 64},
    "deepseek_v3": {  # the one size for which vLLM's kernel for CPUs is built
        "hidden_size": 256,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "head_dim": 64,
        "moe_intermediate_size": 64,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    },
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The section of params.yaml of a target that is to be in data/target."""
    if environment.find() is None:
        pytest.skip("vLLM is not set up; make serve-check does")
    monkeypatch.chdir(tmp_path)
    return TargetParams(source="tiny", dtype="float32", engine="vllm")


@pytest.fixture
def served(here):
    make_target("data/target", hidden=256)
    return here


def same(found, computed):
    for ours, theirs in zip(found, computed, strict=True):
        for name in ours:
            torch.testing.assert_close(ours[name].float(), theirs[name].float(), rtol=0.01, atol=0.01)


def test_its_states_are_those_computed_here_and_a_wrong_layer_is_refused(served, sequences):
    rows = Sequences.of(sequences)
    ends, target = load_ends("data/target"), load_target("data/target")
    asked = engine_layers(LAYERS, ends.num_layers)
    with body.served_target(served, asked, 64) as servers:
        states = ServedStates(servers, ends, rows, LAYERS)
        states.check_layers()
        found = states.rows(list(range(len(rows))))
        assert list(Path(servers.folder).iterdir()) == []
        others = ServedStates(servers, ends, rows, (0, 1, H_LAST))
        with pytest.raises(DeepSpecError, match="states of the engine's layers"):
            others.rows([0])
    assert not Path(servers.folder).exists()
    same(found, Extractor(target, rows, LAYERS).rows(list(range(len(rows)))))


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_states_that_are_encoded_inside_it_are_near_those_computed_here(served, sequences, name):
    rows, ends, form = Sequences.of(sequences[:4]), load_ends("data/target"), codec(name)
    with body.served_target(served, engine_layers(LAYERS, ends.num_layers), 64, name) as servers:
        states = ServedStates(servers, ends, rows, LAYERS, name)
        states.check_layers()
        found = states.rows([0, 1, 2, 3])
    for ours, theirs in zip(
        found, Extractor(load_target("data/target"), rows, LAYERS).rows([0, 1, 2, 3]), strict=True
    ):
        for layer in (0, 2):
            difference = form.decode(ours[layer]).float() - theirs[layer]
            assert float(difference.norm() / theirs[layer].norm()) < 0.05
        torch.testing.assert_close(ours[H_LAST], theirs[H_LAST], rtol=0.01, atol=0.01)


@pytest.mark.parametrize("family", SHAPES)
def test_states_of_experts_and_of_latent_attention_are_those_computed_here(here, sequences, family):
    target = whole(write_family(Path("data/target"), family, **SHAPES[family]))
    rows, ends = Sequences.of(sequences[:4]), load_ends("data/target")
    with body.served_target(here, engine_layers(LAYERS, ends.num_layers), 64) as servers:
        states = ServedStates(servers, ends, rows, LAYERS)
        states.check_layers()
        found = states.rows([0, 1, 2, 3])
    same(found, Extractor(target, rows, LAYERS).rows([0, 1, 2, 3]))


def test_its_greedy_answers_are_those_of_our_engine(served, sequences):
    target = load_target("data/target")
    prompts = [sequence.ids for sequence in sequences[:6]]
    asked = iter([Request(ids, 8, id=i) for i, ids in enumerate(prompts)])
    with body.served_target(served, None, 64) as servers:
        found = {g.id: g.tokens for g in servers.stream(target.stop_ids, lambda: next(asked, None))}
    own = generate(target, None, prompts, max_new_tokens=8)
    assert sum(found[i] == each.tokens for i, each in enumerate(own)) >= 5  # one may be a near tie
    shutil.rmtree("data")
