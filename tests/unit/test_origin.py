"""`start: <directory>`: training goes on from a draft, ours or another trainer's, and says so."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from deepspec.decoding.drafter import DraftRequest
from deepspec.decoding.request import Sampling
from deepspec.decoding.shapes import Chain
from deepspec.drafters.checkpoint import stored_weights
from deepspec.drafters.load import load_drafter
from deepspec.drafters.loss_params import LossParams
from deepspec.drafters.origin import keep_scale
from deepspec.drafters.registry import algorithms
from deepspec.errors import DeepSpecError
from deepspec.features.local import OnlineFeatures
from deepspec.features.sequences import Sequence
from deepspec.target.model import load_target
from deepspec.training.batches import Batches
from deepspec.training.objective import BlockObjective
from tests.drafting import make, write
from tests.published import LAYERS, VOCAB, D, block, eagle3
from tests.tiny import make_target

TEXT = torch.randint(2, VOCAB, (19,), generator=torch.Generator().manual_seed(3)).tolist()
NAMED = {"eagle_aux_hidden_state_layer_ids": [2, 4, 5]}
DFLASH = {
    "architectures": ["DFlashDraftModel"],
    "block_size": 4,
    "rope_theta": 1e6,
    "dflash_config": {"mask_token_id": VOCAB - 2, "target_layer_ids": [1, 3, 4]},
}
NEW = {"norms": ("fc_norm",), "fc_norm": True, "norm_output": True}  # EAGLE-3.1


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    directory = make_target(tmp_path_factory.mktemp("origin"), "qwen3", VOCAB, LAYERS, D)
    return load_target(directory, dtype="float32")


def begun(target, kind: str, start, **asked):
    """The network as training has it before the first step; a new vocabulary is the first tokens."""
    algorithm = algorithms()[kind]
    made = algorithm.network(algorithm.params(type=kind, start=str(start), **asked), target)
    columns = made.config.draft_vocab_size
    made.share(target, made.origin.ids if columns == len(made.origin.ids) else torch.arange(columns))
    return made


def laws(drafter) -> torch.Tensor:
    """Laws [γ, vocab] behind the text, of features that are the same for every drafter."""
    session = drafter.session(1)
    session.begin(0)
    rng = torch.Generator().manual_seed(0)
    session.extend(0, TEXT[:-1], torch.randn(len(TEXT) - 1, len(drafter.layers) * D, generator=rng))
    (proposal,) = session.propose([DraftRequest(0, TEXT[-1], Sampling(1.0), rng, 9, Chain())])
    return torch.stack([proposal.law(k) for k in range(len(proposal.tokens))])


def says_the_same(network, path, target, scratch) -> None:
    again = load_drafter(write(network, target, scratch), target)
    torch.testing.assert_close(laws(again), laws(load_drafter(path, target)), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "draft"),
    [
        ("eagle3", lambda: eagle3([2, 4, 5], own_embeddings=True, **NAMED)),
        ("eagle3", lambda: eagle3([2, 4, 5], columns=None, **NEW, **NAMED)),
        ("dflash", lambda: block([2, 4, 5], 4, **DFLASH)),
    ],
    ids=["eagle3", "eagle3.1", "dflash"],
)
def test_a_published_draft_is_where_training_begins(kind, draft, target, tmp_path):
    """What is its own, embeddings and head, is written again."""
    path = draft().write(tmp_path / "published")
    network = begun(target, kind, path)
    says_the_same(network, path, target, tmp_path / "again")
    own = "embed_tokens.weight" in draft().weights
    assert own == ("embed_tokens.weight" in stored_weights(network))
    assert network.origin.record["directory"] == str(path)


@torch.no_grad()
def test_features_are_divided_by_their_deviation_and_nothing_else_changes(target, tmp_path):
    network = begun(target, "eagle3", eagle3([2, 4, 5], **NAMED).write(tmp_path))
    features = torch.randn(5, 3 * D)
    before = network.fuse(features)
    keep_scale(network.fc, torch.rand(3 * D) + 0.1)
    assert float(network.fc.scale.std()) > 0
    torch.testing.assert_close(network.fuse(features), before, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_dflash_grows_into_a_dspark_that_says_the_same_at_first(target, tmp_path):
    path = block([2, 4, 5], 4, **DFLASH).write(tmp_path / "published")
    network = begun(target, "dspark", path, markov_head="rnn", markov_rank=8)
    assert network.confident and not network.config.sample_from_anchor
    assert network.config.num_hidden_layers == 2 and network.config.block_size == 3
    says_the_same(network, path, target, tmp_path / "again")


@torch.no_grad()
def test_a_dflash_grows_into_a_dflash_2(target, tmp_path):
    """With no convolution and no preference of pairs at first: its law is the DFlash's among the likeliest tokens."""
    path = block([2, 4, 5], 4, **DFLASH).write(tmp_path / "published")
    network = begun(target, "dflash2", path, selector_top_k=5)
    before, after = (
        laws(load_drafter(where, target)) for where in (path, write(network, target, tmp_path / "again"))
    )
    kept = before * (before >= before.topk(5).values[:, -1:])
    torch.testing.assert_close(after, kept / kept.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_an_eagle3_grows_into_a_peagle(target, tmp_path):
    """Its first place is EAGLE-3's."""
    path = eagle3([2, 4, 5], **NAMED).write(tmp_path / "published")
    network = begun(target, "peagle", path)
    before, after = (
        laws(load_drafter(where, target)) for where in (path, write(network, target, tmp_path / "again"))
    )
    torch.testing.assert_close(after[0], before[0], atol=1e-5, rtol=1e-4)
    assert len(after) == 5 and network.config.mask_token_id == VOCAB - 1


@torch.no_grad()
@pytest.mark.parametrize("columns", [60, 300])
def test_a_draft_vocabulary_is_cut_and_extended(columns, target, tmp_path):
    """Rows that both have are the draft's, new ones the target's; the law to learn stays the target's."""
    draft = eagle3([2, 4, 5], **NAMED)
    network = begun(target, "eagle3", draft.write(tmp_path), draft_vocab_size=columns)
    theirs = dict(zip(draft.ids.tolist(), draft.weights["lm_head.weight"], strict=True))
    assert 0 < len(theirs.keys() & set(range(columns))) < columns
    for token in range(columns):
        torch.testing.assert_close(network.head[token], theirs.get(token, target.head_weight[token]))
    assert torch.equal(network.lm_head.weight, target.head_weight[:columns])


def test_a_draft_that_goes_on_learns_with_all_but_its_head_and_embeddings(target, tmp_path):
    draft = eagle3(
        [2, 4, 5], layers=2, norms=("norm_before_fc",), norm_before_fc=True, first="layers.0.", **NAMED
    )
    network = begun(target, "eagle3", draft.write(tmp_path))
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 500, (n,), generator=rng).tolist() for n in (24, 30)]
    sequences = [Sequence(row, [1] * len(row), [1] * len(row)) for row in rows]
    features = OnlineFeatures(target, sequences, network.config.target_layer_ids)
    batch = Batches(features, [0, 1], 2, 5, network.config.block_size, seed=0).make(0)[0]
    BlockObjective(network, LossParams())(batch)[0].backward()
    for name, parameter in network.named_parameters():
        frozen = name in {"embed_tokens.weight", "lm_head.weight", "own_head.weight"}
        assert (parameter.grad is None) == frozen, name


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dspark", "dflash", "dflash2", "eagle3", "peagle", "medusa"])
def test_a_draft_of_ours_goes_on_as_it_was(kind, target, tmp_path):
    """With the record of what it was made from."""
    path = write(make(kind, target), target, tmp_path / "first")
    record = json.loads((path / "deepspec.json").read_text())
    parents = [{"directory": "older", "digest": "0" * 16}]
    (path / "deepspec.json").write_text(json.dumps(record | {"data_digest": "code", "parents": parents}))
    network = begun(target, kind, path)
    assert network.origin.record["data_digest"] == "code" and network.origin.record["parents"] == parents
    first = load_file(path / "model.safetensors")
    for name, weight in network.stored().items():
        torch.testing.assert_close(weight, first[name].float(), atol=1e-6, rtol=0)


def test_what_cannot_change_is_refused(target, tmp_path):
    eagle = eagle3([2, 4, 5], **NAMED).write(tmp_path / "eagle")
    dflash = block([2, 4, 5], 4, **DFLASH).write(tmp_path / "dflash")
    dspark = write(make("dspark", target), target, tmp_path / "dspark")
    for kind, start, asked, message in (
        ("eagle3", "traget", {}, "'traget' is none of auto, target, random, and no such draft"),
        ("eagle3", dflash, {}, "is DFlash, 2 layers, and a draft of type eagle3 is wanted"),
        ("eagle3", eagle, {"target_layer_ids": [0, 2, 4]}, r"has target_layer_ids \[1, 3, 4\], which stays"),
        ("dspark", dflash, {"layers": 3}, "has num_hidden_layers 2, which stays; 3 was asked for"),
        ("dflash", dspark, {}, "has markov_rank 4, which stays; 0 was asked for"),
        ("dspark", dspark, {"markov_head": "gated"}, "has markov_head_type vanilla, which stays"),
        ("medusa", "auto", {}, "is no draft directory, the only start that Medusa has"),
    ):
        algorithm = algorithms()[kind]
        with pytest.raises(DeepSpecError, match=message):
            algorithm.network(algorithm.params(type=kind, start=str(start), **asked), target)
