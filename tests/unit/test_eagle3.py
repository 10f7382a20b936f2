"""EAGLE-3 against DeepSeek's own class (tests/fixtures/eagle3-tiny) and against itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepspec.decoding.drafter import DraftRequest
from deepspec.decoding.engine import generate
from deepspec.decoding.request import Sampling
from deepspec.decoding.shapes import Beam, BestFirst, Chain
from deepspec.decoding.tree import Proposal
from deepspec.drafters.algorithms.eagle3 import (
    ALGORITHM,
    Eagle3Config,
    Eagle3Drafter,
    Eagle3Model,
    default_layers,
)
from deepspec.drafters.checkpoint import Checkpoint, load_network, stored_weights, write_drafter
from deepspec.drafters.load import load_drafter
from deepspec.drafters.params import Eagle3Params
from deepspec.errors import DeepSpecError
from deepspec.target.model import load_target
from tests.tiny import make_target

FIXTURE = Path(__file__).parents[1] / "fixtures" / "eagle3-tiny"


@pytest.fixture(scope="module")
def expected():
    return load_file(FIXTURE / "expected.safetensors")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A target of the published draft's shape; the draft brings its own embeddings and head."""
    directory = make_target(tmp_path_factory.mktemp("target"), "qwen3", vocab=512, layers=6)
    return load_target(directory, dtype="float32")


@pytest.fixture(scope="module")
def network(published) -> Eagle3Model:
    config = json.loads((FIXTURE / "config.json").read_text())
    return load_network(Eagle3Model(Eagle3Config.read(config)), Checkpoint(FIXTURE, config), published)


@pytest.fixture
def session(published):
    """Three rows after the published prompt, taken in in different pieces."""

    def start(expected, cuts=((20,), (5, 20), (19, 20))):
        session = load_drafter(FIXTURE, published).session(len(cuts))
        ids, features = expected["prompt_ids"][0].tolist(), expected["features"][0]
        for row, ends in enumerate(cuts):
            session.begin(row)
            for begin, end in zip((0, *ends), ends, strict=False):
                session.extend(row, ids[begin:end], features[begin:end])
        return session

    return start


def ask(row: int, expected, shape=None, room: int = 5, temperature: float = 0.0) -> DraftRequest:
    rng = torch.Generator().manual_seed(row)
    return DraftRequest(row, int(expected["anchor"]), Sampling(temperature), rng, room, shape or Chain())


def unrolled(network: Eagle3Model, expected, drafted: list[int]) -> torch.Tensor:
    """The training pass's logits [γ, vocab] at the anchor, when `drafted` is what followed it."""
    gamma = network.config.block_size
    ids = [*expected["prompt_ids"][0].tolist(), int(expected["anchor"]), *drafted, *[0] * gamma]
    features = torch.zeros(1, len(ids), expected["features"].shape[-1])
    features[:, :20] = expected["features"]
    with torch.no_grad():
        return network.lm_head(network(features, torch.tensor([ids]), torch.tensor([[20]]))[0, 0])


def test_the_published_tokens_are_drafted(session, expected):
    for proposal in session(expected).propose([ask(row, expected) for row in range(3)]):
        assert proposal.tokens == expected["draft_tokens"][0].tolist()


def test_the_training_pass_gives_the_published_logits(network, expected):
    logits = unrolled(network, expected, expected["draft_tokens"][0].tolist())
    assert torch.allclose(logits, expected["draft_logits"][0], atol=1e-5)


def test_a_block_sees_nothing_behind_its_anchor(network, expected):
    features = torch.cat((expected["features"], torch.zeros(1, 6, 320)), 1)
    tokens = torch.randint(512, (1, 26), generator=torch.Generator().manual_seed(0))
    anchors = torch.tensor([[3, 9, 9]])
    with torch.no_grad():
        before = network(features, tokens, anchors)
        features[:, 9:], tokens[:, 14:] = 1.0, 7
        after = network(features, tokens, anchors)
    assert torch.allclose(before, after, atol=1e-5)
    assert torch.allclose(before[0, 1], before[0, 2], atol=1e-5)


def test_the_nodes_of_trees_follow_their_own_paths(session, network, expected):
    shapes = [BestFirst(3, 4, 12), Chain(), Beam(2, 3, 8)]
    trees = session(expected).propose([ask(row, expected, shape) for row, shape in enumerate(shapes)])
    for tree in (trees[0], trees[2]):
        assert len(set(tree.parents)) > 2
        for node in range(len(tree.tokens)):
            path = path_to(tree, node)
            laws = unrolled(network, expected, path).softmax(-1)
            chance = torch.stack([laws[k, token] for k, token in enumerate(path)]).prod()
            assert tree.survival[node] == pytest.approx(float(chance), rel=1e-4)


def path_to(tree: Proposal, node: int) -> list[int]:
    path: list[int] = []
    while node >= 0:
        path.insert(0, tree.tokens[node])
        node = tree.parents[node]
    return path


def test_rejected_drafts_leave_no_trace(session, expected, published):
    """Drafting again after one more token is as drafting for the first time."""
    drafted, fresh = session(expected, ((19,),)), session(expected, ((19,),))
    ids = expected["prompt_ids"][0].tolist()
    drafted.propose([DraftRequest(0, ids[19], Sampling(), torch.Generator(), 5, BestFirst(3, 4, 12))])
    last = expected["features"][0, 19:]
    for each in (drafted, fresh):
        each.extend(0, ids[19:], last)
    found = [each.propose([ask(0, expected)])[0].tokens for each in (drafted, fresh)]
    assert found[0] == found[1] == expected["draft_tokens"][0].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shape", [Chain(), BestFirst(3, 4, 10)])
def test_decoding_with_it_is_lossless(published, temperature, shape):
    drafter = load_drafter(FIXTURE, published)
    prompts = [[5, 9, 14, 3], [100], [7] * 40]
    plain = generate(published, None, prompts, 20)
    with_draft = generate(published, drafter, prompts, 20, temperature=temperature, tree=shape)
    assert all(len(run.tokens) == 20 or run.finish_reason == "stop" for run in with_draft)
    if temperature == 0:
        assert [run.tokens for run in with_draft] == [run.tokens for run in plain]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_what_is_saved_loads_back(published, tmp_path, qk_norm):
    params = Eagle3Params(type="eagle3", draft_vocab_size=100, qk_norm=qk_norm)
    model = ALGORITHM.network(params, published)
    model.share(published, torch.arange(7, 107))
    stored = stored_weights(model)
    assert ("layers.0.hidden_norm.weight" if qk_norm else "midlayer.hidden_norm.weight") in stored
    write_drafter(tmp_path / "draft", model.config.to_dict(), stored, published, {})
    again = load_drafter(tmp_path / "draft", published)
    assert again.vocabulary.ids == list(range(7, 107))
    model = model.to(torch.bfloat16).float()  # as the file has it
    model.embed_tokens.weight.data = published.embeddings.float()
    mine = Eagle3Drafter(model, published)
    proposals = []
    for drafter in (mine, again):
        session = drafter.session(1)
        session.begin(0)
        features = torch.randn(9, len(drafter.layers) * 64, generator=torch.Generator().manual_seed(0))
        session.extend(0, list(range(9)), features)
        proposals.append(session.propose([DraftRequest(0, 4, Sampling(), torch.Generator(), 5)])[0])
    assert proposals[0].tokens == proposals[1].tokens
    assert proposals[0].survival == pytest.approx(proposals[1].survival, rel=1e-4)


def test_an_unknown_weight_or_option_is_an_error(published, tmp_path):
    config = json.loads((FIXTURE / "config.json").read_text())
    weights = load_file(FIXTURE / "model.safetensors")
    save_file(weights, tmp_path / "model.safetensors")
    for change, message in (({"hidden_act": "gelu"}, "hidden_act"), ({"hidden_size": None}, "hidden_size")):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(DeepSpecError, match=message):
            load_drafter(tmp_path, published)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights | {"layers.0.extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(DeepSpecError, match="unknown weights"):
        load_drafter(tmp_path, published)
    save_file({"midlayer.extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(DeepSpecError, match=r"fc\.weight is missing"):
        load_drafter(tmp_path, published)


def test_features_come_from_a_low_a_middle_and_a_high_layer():
    assert default_layers(30) == [1, 14, 26]
    assert max(default_layers(2)) == 0
