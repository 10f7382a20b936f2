"""Every trained algorithm of the registry: trains, is written and read back, drafts as it was trained, and is lossless.

A toy algorithm shows what adding one takes (docs/drafters.md).
"""

from __future__ import annotations

import json
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.tiny_families import tiny_model
from deepspec.decoding import judge
from deepspec.decoding.drafter import DraftRequest
from deepspec.decoding.engine import generate
from deepspec.decoding.request import Sampling
from deepspec.decoding.round import padded_size
from deepspec.decoding.shapes import BestFirst, Chain, Sampled
from deepspec.drafters import registry
from deepspec.drafters.algorithms.lm import network
from deepspec.drafters.checkpoint import write_drafter
from deepspec.drafters.load import load_drafter
from deepspec.drafters.network import Network
from deepspec.drafters.params import AnyDrafter, LMParams
from deepspec.errors import DeepSpecError
from deepspec.features.local import OnlineFeatures
from deepspec.features.sequences import Sequence
from deepspec.target.attention import ForwardPass
from deepspec.target.model import load_target
from deepspec.training.batches import Batches
from deepspec.training.objective import BlockObjective
from tests.drafting import DRAFTS, make, write
from tests.tiny import cached_target, make_target, make_tokenizer


@pytest.fixture(scope="module")
def directory():
    return cached_target("llama")


@pytest.fixture(scope="module")
def target(directory):
    return load_target(directory)


@pytest.fixture(scope="module")
def batch(target):
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 500, (n,), generator=rng).tolist() for n in (24, 30, 18, 27)]
    sequences = [Sequence(row, [1] * len(row), [1] * len(row)) for row in rows]

    def of(model: Network):
        features = OnlineFeatures(target, sequences, model.config.target_layer_ids)
        return Batches(features, [0, 1, 2, 3], 4, 5, model.config.block_size, seed=0).make(0)[0]

    return of


def test_the_registry_has_every_algorithm():
    assert set(registry.algorithms()) >= {
        "dspark",
        "dflash",
        "dflash2",
        "peagle",
        "eagle3",
        "medusa",
        "lm",
        "lookup",
        "suffix",
    }


@pytest.mark.parametrize("name", DRAFTS)
def test_an_objective_trains_every_weight(name, target, batch):
    from deepspec.drafters.loss_params import LossParams

    model = make(name, target)
    loss, sums = BlockObjective(model, LossParams())(batch(model))
    loss.backward()
    idle = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert idle == [] and sums["tau"] >= sums["blocks"]


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("name", DRAFTS)
def test_a_written_draft_proposes_what_the_network_in_training_says(
    name, written_out, target, batch, tmp_path
):
    model = make(name, target)
    drafter = load_drafter(write(model, target, tmp_path / "draft", written_out), target)
    data = batch(model)
    proposal = proposed(drafter, data, Chain())
    assert len(proposal.tokens) == model.config.block_size
    for k, law in enumerate(laws_in_training(model, data, proposal.tokens)):
        found = proposal.law(k)[model.draft_ids]
        assert torch.allclose(found, law, atol=1e-5)


@pytest.mark.parametrize("name", ["eagle3-3.1", "peagle", "dflash2", "dspark-causal"])
def test_a_node_of_a_tree_survives_as_its_own_path_says(name, target, batch, tmp_path):
    model = make(name, target)
    drafter = load_drafter(write(model, target, tmp_path / "draft"), target)
    data = batch(model)
    tree = proposed(drafter, data, BestFirst(3, None, 8))
    columns = {token: column for column, token in enumerate(model.draft_ids.tolist())}
    assert len(tree.tokens) == 8 and max(tree.depths) > 1
    for node in range(len(tree.tokens)):
        path, at = [], node
        while at >= 0:
            path.insert(0, tree.tokens[at])
            at = tree.parents[at]
        laws = laws_in_training(model, data, path)
        chance = torch.stack([laws[k, columns[token]] for k, token in enumerate(path)]).prod()
        assert tree.survival[node] == pytest.approx(float(chance), rel=1e-3)


def proposed(drafter, data, shape):
    """What is proposed at T = 1 at the batch's first anchor, of the features of the tokens before it."""
    anchor = int(data.anchors[0, 0])
    session = drafter.session(1)
    session.begin(0)
    session.extend(0, data.tokens[0, :anchor].tolist(), data.features[0, :anchor].float())
    rng = torch.Generator().manual_seed(0)
    ask = DraftRequest(0, int(data.tokens[0, anchor]), Sampling(1.0), rng, 9, shape)
    return session.propose([ask])[0]


def laws_in_training(model, data, drafted: list[int]) -> torch.Tensor:
    """Laws [γ, columns] of the network in training where these tokens stand behind the batch's first anchor."""
    anchor, gamma = int(data.anchors[0, 0]), model.config.block_size
    behind = [*drafted, *[0] * gamma][:gamma]
    tokens = torch.tensor([[*data.tokens[0, : anchor + 1].tolist(), *behind]])
    features = torch.zeros(1, tokens.shape[1], data.features.shape[-1])
    features[:, :anchor] = data.features[0, :anchor].float()
    with torch.no_grad():
        hidden = model(features, tokens, torch.tensor([[anchor]]))
        outputs = model.outputs(hidden, tokens[:, anchor : anchor + hidden.shape[2]][:, None])
        return outputs.logits()[0, 0].softmax(-1)


@pytest.mark.parametrize("shape", [Chain(), BestFirst(3, None, 8)], ids=["chain", "tree"])
@pytest.mark.parametrize("name", DRAFTS)
def test_drafting_changes_no_token(name, shape, target, tmp_path):
    drafter = load_drafter(write(make(name, target), target, tmp_path / "draft"), target)
    prompts = [[5, 9, 17, 3], [8], [100, 200, 300, 400, 11, 12]]
    plain = generate(target, None, prompts, max_new_tokens=24)
    drafted = generate(target, drafter, prompts, max_new_tokens=24, tree=shape)
    assert [g.tokens for g in drafted] == [g.tokens for g in plain]


@pytest.mark.parametrize(
    "name", ["eagle3", "eagle3-3.1", "peagle", "medusa", "lm", "dflash2", "dspark-causal"]
)
def test_sampled_trees_are_drafted_too(name, target, tmp_path):
    drafter = load_drafter(write(make(name, target), target, tmp_path / "draft"), target)
    (out,) = generate(
        target, drafter, [5, 9, 17, 3], max_new_tokens=16, temperature=1.0, tree=Sampled((3, 2, 1), 8)
    )
    assert len(out.tokens) == 16 or out.finish_reason == "stop"


@pytest.mark.parametrize("name", ["dspark", "dflash"])
def test_a_block_draft_takes_in_as_few_numbers_of_tokens_as_the_target(name, target, tmp_path):
    """torch makes a kernel for each: prompts and accepted tokens of a batch add up to any number."""
    drafter = load_drafter(write(make(name, target), target, tmp_path / "draft"), target)
    sizes: list[int] = []
    whole = drafter._fc
    drafter._fc = lambda features: sizes.append(len(features)) or whole(features)
    generate(target, drafter, [[5, 9, 17, 3] * n for n in range(1, 12)], max_new_tokens=12)
    assert len(sizes) > 5 and all(size == padded_size(size) for size in sizes)


def test_the_laws_of_a_batch_are_made_in_one_call(target, tmp_path, monkeypatch):
    drafter = load_drafter(write(make("dspark", target), target, tmp_path / "draft"), target)
    calls: list[int] = []
    real = judge.probabilities

    def counted(logits, sampling):
        calls.append(len(logits))
        return real(logits, sampling)

    monkeypatch.setattr(judge, "probabilities", counted)
    found = generate(target, drafter, [[5, 9], [8, 4], [7, 3, 2]], max_new_tokens=12, temperature=1.0)
    assert 0 < len(calls) <= max(generation.stats.rounds for generation in found)
    assert max(calls) > 1 + drafter.block_size


def test_a_target_is_its_own_perfect_draft(directory, target, tmp_path):
    params = LMParams(type="lm", block_size=4, source=str(directory), finetune=False)
    model = network(params, target)
    assert not any(p.requires_grad for p in model.parameters())
    drafter = load_drafter(write(model, target, tmp_path / "draft"), target)
    (out,) = generate(target, drafter, [5, 9, 17, 3], max_new_tokens=21)
    assert set(out.stats.accepted[:-1]) == {4}


def test_a_draft_cut_out_of_the_target_has_its_layers(target):
    model = network(LMParams(type="lm", from_layers=[0, 3]), target)
    whole = AutoModelForCausalLM.from_pretrained(target.source, dtype=torch.float32)
    for place, layer in enumerate((0, 3)):
        ours, theirs = model.model.model.layers[place], whole.model.layers[layer]
        assert torch.equal(ours.mlp.up_proj.weight, theirs.mlp.up_proj.weight)
    assert not model.model.get_input_embeddings().weight.requires_grad


def test_a_draft_of_another_tokenizer_is_refused(target, tmp_path):
    other = make_target(tmp_path / "other", vocab=400)
    with pytest.raises(DeepSpecError, match="another tokenizer than the target's"):
        network(LMParams(type="lm", source=str(other)), target)


def test_a_draft_lm_has_one_origin():
    with pytest.raises(ValueError, match="wants one of source, from_layers, hidden_size; found none"):
        LMParams(type="lm")
    with pytest.raises(ValueError, match="found source and from_layers"):
        LMParams(type="lm", source="x", from_layers=[1])


def test_a_draft_lm_with_a_missing_weight_is_refused(target, tmp_path):
    path = write(make("lm", target), target, tmp_path / "draft")
    weights = load_file(path / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DeepSpecError, match="missing keys"):
        load_drafter(path, target)


def test_a_published_medusa_with_heads_of_its_own_loads(target, tmp_path):
    """FasterDecoding's layout: no architectures, other file name, a vocabulary matrix for each head."""
    model = make("medusa", target)
    heads = [torch.randn(target.vocab_size, target.hidden_size) for _ in range(3)]
    weights = {n: t.clone() for n, t in model.stored().items() if n[0].isdigit()}
    weights |= {f"{k}.2.weight": head for k, head in enumerate(heads)}
    save_file(weights, tmp_path / "medusa_lm_head.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 3, "medusa_num_layers": 2}))
    drafter = load_drafter(tmp_path, target)
    hidden = torch.randn(2, target.hidden_size)
    with torch.no_grad():
        states, found = model.states(hidden), drafter.logits(hidden)
    for k, head in enumerate(heads):
        assert torch.allclose(found[:, k], states[:, k] @ head.T, atol=1e-4)
    (plain,), (drafted,) = (generate(target, d, [5, 9, 17], max_new_tokens=16) for d in (None, drafter))
    assert plain.tokens == drafted.tokens


TOY = '''
"""Always drafts the tokens that came before, in reverse."""

from typing import Literal

from deepspec.decoding.tree import Proposal
from deepspec.drafters.algorithm import Algorithm
from deepspec.decoding.drafter import Drafter, Session
from deepspec.section import Section


class ToyParams(Section):
    type: Literal["toy"]
    block_size: int = 2


class Toy(Drafter):
    config = {"architectures": ["ToyDrafter"]}

    def __init__(self, block_size=2):
        self.block_size = block_size

    def session(self, slots):
        return ToySession(self, slots)


class ToySession(Session):
    def __init__(self, drafter, slots):
        self.drafter, self.tokens = drafter, [[] for _ in range(slots)]

    def begin(self, row):
        self.tokens[row] = []

    def extend(self, row, tokens, features):
        self.tokens[row] += tokens

    def move(self, source, destination):
        self.tokens[destination] = self.tokens[source]

    def propose(self, asks):
        return [Proposal.chain(self.tokens[a.row][::-1][: min(a.room, self.drafter.block_size)]) for a in asks]


ALGORITHM = Algorithm(
    ToyParams, ("ToyDrafter",), load=lambda checkpoint, target: Toy(), make=lambda params: Toy(params.block_size)
)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """One file in drafters/algorithms/, nothing else."""
    import deepspec.drafters.algorithms

    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "toy.py").write_text(TOY)
    folder = deepspec.drafters.algorithms
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path / "more")])
    registry.algorithms.cache_clear()
    yield registry.algorithms()["toy"]
    registry.algorithms.cache_clear()


def test_every_algorithm_has_its_section_in_the_parameters():
    sections = get_args(get_args(AnyDrafter)[0])
    assert set(sections) == {algorithm.params for algorithm in registry.algorithms().values()}


def test_a_file_in_drafters_is_all_that_a_new_algorithm_takes(toy, target, tmp_path):
    drafter = toy.make(toy.params(type="toy", block_size=2))
    write_drafter(tmp_path / "draft", drafter.config, {}, target, {})
    loaded = load_drafter(tmp_path / "draft", target)
    (plain,), (drafted,) = (generate(target, d, [5, 9, 17], max_new_tokens=16) for d in (None, loaded))
    assert plain.tokens == drafted.tokens and sum(drafted.stats.drafted) > 0


def test_a_draft_of_all_layers_of_a_scaled_target_is_distilled_to_its_law(tmp_path):
    """Granite divides its logits: the draft's in training are those that its own forward gives."""
    tiny_model("granite").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    target = load_target(tmp_path)
    model = network(LMParams(type="lm", block_size=2, from_layers=[0, 1, 2, 3]), target)
    tokens, anchors = torch.tensor([[5, 9, 17, 300, 41, 7]]), torch.tensor([[2]])
    logits = model.outputs(model(torch.zeros(1, 6, 0), tokens, anchors), tokens).logits()
    hidden = target.forward(tokens, ForwardPass(torch.arange(6)[None]))
    assert torch.allclose(logits[0, 0], target.logits(hidden)[0, 2:4], atol=1e-4)
