"""DSpark against DeepSeek's own classes (tests/fixtures: tiny checkpoints and their outputs) and against itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepspec.decoding.drafter import DraftRequest
from deepspec.decoding.engine import generate
from deepspec.decoding.request import Sampling
from deepspec.decoding.shapes import Auto, Beam, BestFirst, Chain, Sampled
from deepspec.drafters.algorithms.dspark import DSparkConfig, DSparkDrafter, DSparkModel
from deepspec.drafters.algorithms.lookup import LookupDrafter
from deepspec.drafters.block_drafting import Blocks, BlockSession, Late
from deepspec.drafters.block_network import spread_layers
from deepspec.drafters.checkpoint import (
    Checkpoint,
    draft_digest,
    load_network,
    stored_weights,
    write_drafter,
)
from deepspec.drafters.load import load_drafter
from deepspec.drafters.lookup_first import LookupFirst
from deepspec.errors import DeepSpecError
from deepspec.kernels import kernels
from deepspec.target.attention import KVCache
from deepspec.target.model import load_target
from tests.tiny import cached_target, make_draft

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module", params=["dspark-vanilla-tiny", "dspark-gated-tiny"])
def checkpoint(request):
    return FIXTURES / request.param


@pytest.fixture(scope="module")
def expected(checkpoint):
    return load_file(checkpoint / "expected.safetensors")


@pytest.fixture(scope="module")
def published():
    """A target of the published draft's shape; its own weights do not matter here."""
    return load_target(cached_target("qwen3", vocab=512, layers=6))


@pytest.fixture(scope="module")
def model(published, checkpoint):
    return load_dspark(checkpoint, published)


def load_dspark(directory: Path, target) -> DSparkModel:
    checkpoint = Checkpoint.own(directory)
    return load_network(DSparkModel(DSparkConfig.read(checkpoint.config)), checkpoint, target)


def propose(drafter, expected, sampling=None, seed=0, shape=None, rows=(0,)):
    """What the drafter proposes after the published prompt, taken in in two pieces, in each of the rows."""
    session = drafter.session(max(rows) + 1)
    ids, features = expected["prompt_ids"][0].tolist(), expected["features"][0]
    for row in rows:
        session.begin(row)
        session.extend(row, ids[:13], features[:13])
        session.extend(row, ids[13:], features[13:])
    anchor = int(expected["anchor"])
    rng = torch.Generator().manual_seed(seed)
    return session.propose(
        [DraftRequest(row, anchor, sampling or Sampling(), rng, 99, shape or Chain()) for row in rows]
    )


def test_a_published_checkpoint_gives_the_published_hidden_states(model, expected):
    tokens = torch.cat([expected["prompt_ids"], expected["anchor"][None]], 1)
    with torch.no_grad():
        hidden = model(expected["features"], tokens, torch.tensor([[20]]))
        assert torch.allclose(hidden[:, 0], expected["block_hidden"], atol=1e-5)
        assert torch.allclose(model.lm_head(hidden[:, 0]), expected["base_logits"], atol=1e-5)


def test_a_published_checkpoint_gives_the_published_confidence(model, expected):
    previous = torch.cat([expected["anchor"], expected["draft_tokens"][0, :-1]])
    scores = model.outputs(expected["block_hidden"][0], previous).confidence
    assert torch.allclose(scores, expected["confidence_logits"][0], atol=1e-5)


def test_inference_in_pieces_drafts_the_published_tokens(model, published, expected):
    drafter = DSparkDrafter(model, published)
    (proposal,) = propose(drafter, expected)
    assert proposal.tokens == expected["draft_tokens"][0].tolist()


def test_sampled_drafts_come_with_the_law_they_were_drawn_from(model, published, expected):
    drafter = DSparkDrafter(model, published)
    anchor = int(expected["anchor"])
    (proposal,) = propose(drafter, expected, Sampling(1.0), seed=3)
    laws = path_laws(model, expected["block_hidden"][0], anchor, proposal.tokens)
    for k in range(len(proposal.tokens)):
        assert torch.allclose(proposal.law(k), laws[k], atol=1e-5)


def path_laws(model, hidden, anchor: int, tokens: list[int]) -> torch.Tensor:
    """[γ, vocab], of a block with hidden states [γ, d] in which `tokens` are drafted, as training computes them."""
    previous = torch.tensor([anchor, *tokens, *[0] * len(hidden)][: len(hidden)])
    with torch.no_grad():
        return model.outputs(hidden, previous).logits().softmax(-1)


def test_a_draft_does_not_depend_on_its_company(model, published, expected):
    drafter = DSparkDrafter(model, published)
    alone = propose(drafter, expected)[0]
    for proposal in propose(drafter, expected, rows=(2, 0, 3)):
        assert proposal.tokens == alone.tokens
        assert proposal.survival == pytest.approx(alone.survival, abs=1e-5)


def test_survival_is_the_product_of_the_published_confidences(model, published, expected):
    chances = torch.sigmoid(expected["confidence_logits"][0]).cumprod(0)
    (proposal,) = propose(DSparkDrafter(model, published), expected)
    assert proposal.survival == pytest.approx(chances.tolist(), abs=1e-4)
    hot = DSparkDrafter(model, published, {"greedy": [2.0] * drafter_depth(expected)})
    chances = torch.sigmoid(expected["confidence_logits"][0] / 2).cumprod(0)
    assert propose(hot, expected)[0].survival == pytest.approx(chances.tolist(), abs=1e-4)


def drafter_depth(expected) -> int:
    return expected["confidence_logits"].shape[1]


def test_a_tree_is_conditioned_on_each_nodes_own_parent(model, published, expected):
    (tree,) = propose(DSparkDrafter(model, published), expected, shape=BestFirst(width=3, depth=4, nodes=12))
    check_paths(tree, model, expected["block_hidden"][0], int(expected["anchor"]))


def check_paths(tree, model, hidden, anchor: int) -> None:
    """The survival of each node is its path's probability."""
    for node in range(len(tree.tokens)):
        path, at = [], node
        while at >= 0:
            path.insert(0, tree.tokens[at])
            at = tree.parents[at]
        laws = path_laws(model, hidden, anchor, path)
        chance = torch.stack([laws[k, token] for k, token in enumerate(path)]).prod()
        assert tree.survival[node] == pytest.approx(float(chance), rel=1e-3)


@pytest.mark.parametrize(("kind", "rank"), [("vanilla", 8), ("gated", 8), ("rnn", 8), ("vanilla", 0)])
def test_every_head_drafts_by_the_law_it_was_trained_with(kind, rank, published, expected):
    """Rank 0 is DFlash: no head at all."""
    sizes = {"markov_head": kind, "markov_rank": rank, "block_size": 4, "draft_vocab_size": 0}
    model = make_draft(published, confidence_head=rank > 0, target_layer_ids=[0, 2, 4], **sizes)
    if rank:
        for weight in model.markov_head.parameters():
            torch.nn.init.normal_(weight, std=1.0)
    drafter = DSparkDrafter(model, published)
    anchor = int(expected["anchor"])
    tokens = torch.cat([expected["prompt_ids"], expected["anchor"][None]], 1)
    with torch.no_grad():
        hidden = model(expected["features"], tokens, torch.tensor([[20]]))[0, 0]
    (tree,) = propose(drafter, expected, shape=BestFirst(width=3, depth=4, nodes=12))
    check_paths(tree, model, hidden, anchor)
    (chain,) = propose(drafter, expected, Sampling(1.0), seed=3)
    laws = path_laws(model, hidden, anchor, chain.tokens)
    for k in range(len(chain.tokens)):
        assert torch.allclose(chain.law(k), laws[k], atol=1e-5)
    assert (chain.survival is None) == (rank == 0)


def test_the_rnn_head_begins_as_the_vanilla_one(published):
    """Whatever the backbone's state: the token's embedding comes through, and no state of the recurrence."""
    head = make_draft(published, markov_head="rnn", markov_rank=8).markov_head
    head.begin()
    embedded, hidden = torch.randn(2, 5, 8) / 50, torch.randn(2, 5, 64)
    assert head.joint_proj.in_features == 2 * 8 + hidden.shape[-1]
    assert torch.allclose(head.unrolled(embedded, hidden), embedded, atol=1e-4)
    assert not head.markov_w2.weight.any()
    head.set_scale()  # divides the state and the backbone's, which say nothing yet
    assert torch.allclose(head.unrolled(embedded, hidden), embedded, atol=1e-4)
    head.step(embedded[:, 0], hidden[:, 0], torch.randn(2, 8))[0].sum().backward()
    assert head.joint_proj.weight.grad[16:, :8].any()  # and it can learn to listen to it


def test_what_is_saved_loads_back(published, tmp_path):
    model = make_draft(published, draft_vocab_size=100, context_skip=True)
    write_drafter(tmp_path / "draft", model.config.to_dict(), stored_weights(model), published, {})
    again = load_dspark(tmp_path / "draft", published)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(again.state_dict()[name].float(), tensor.float(), atol=1e-2), name
    assert torch.equal(again.draft_ids, model.draft_ids)


def test_a_draft_is_its_weights_and_settings_whoever_made_it(published, tmp_path):
    model = make_draft(published, draft_vocab_size=100)
    weights, config = stored_weights(model), model.config.to_dict()
    write_drafter(tmp_path / "a", config, weights, published, {"git_commit": "a"})
    write_drafter(tmp_path / "b", config, weights, published, {"git_commit": "b"})
    assert draft_digest(tmp_path / "a") == draft_digest(tmp_path / "b")
    weights["fc.weight"][0, 0] += 1
    write_drafter(tmp_path / "b", config, weights, published, {"git_commit": "b"})
    assert draft_digest(tmp_path / "a") != draft_digest(tmp_path / "b")


@pytest.mark.parametrize(
    "fault", ["unknown", "missing", "shape", "nan", "corrupt", "other target", "architecture"]
)
def test_a_bad_draft_directory_gives_one_clear_line(fault, published, tmp_path):
    model = make_draft(published)
    weights, config, record = stored_weights(model), model.config.to_dict(), {}
    if fault == "unknown":
        weights["layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
    elif fault == "missing":
        del weights["fc.weight"]
    elif fault == "shape":
        weights["fc.weight"] = torch.zeros(3, 3)
    elif fault == "nan":
        weights["fc.weight"][0, 0] = float("nan")
    elif fault == "other target":
        record = {"target_digest": "0123456789abcdef"}
    elif fault == "architecture":
        config["architectures"] = ["Unheard"]
    write_drafter(tmp_path / "draft", config, weights, published, record)
    if fault == "corrupt":
        path = tmp_path / "draft" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:100])
    words = {
        "unknown": "unknown weights",
        "missing": "missing weights",
        "shape": "expected",
        "nan": "not finite",
        "corrupt": "corrupt checkpoint",
        "other target": "made for target",
        "architecture": "Unheard",
    }
    with pytest.raises(DeepSpecError, match=words[fault]) as caught:
        load_drafter(tmp_path / "draft", published)
    assert "\n" not in str(caught.value)


def test_feature_layers_never_include_the_last():
    for depth in range(2, 40):
        layers = spread_layers(depth)
        assert layers == sorted(set(layers)) and layers[0] >= 0 and layers[-1] <= depth - 2
    assert spread_layers(30) == [1, 8, 14, 20, 27]


def test_saved_weights_are_safetensors_without_the_embeddings(published, tmp_path):
    save_file(stored_weights(make_draft(published)), tmp_path / "x.safetensors")
    assert "embed_tokens.weight" not in load_file(tmp_path / "x.safetensors")


@pytest.fixture(scope="module")
def drawing():
    if kernels() is None:
        pytest.skip("no kernels here")
    target = load_target(cached_target("llama"), dtype="bfloat16", device="cpu")
    model = make_draft(target, block_size=5, markov_rank=8, draft_vocab_size=128)
    model.markov_head.markov_w2.weight.data.normal_()
    drafter = DSparkDrafter(model, target)
    assert drafter.at_once is not None and drafter.grows_trees
    return drafter


def test_the_context_is_written_in_one_call_as_it_is_part_by_part(drawing, monkeypatch):
    """To a rounding; a request's own part does not depend on the others', to the bit."""
    counts, rng = [1, 6, 3], torch.Generator().manual_seed(2)
    width = len(drawing.layers) * drawing.config.hidden_size
    parts = [torch.randn(n, width, generator=rng).bfloat16() for n in counts]

    def written(rows: list[int], starts: list[int]) -> list[torch.Tensor]:
        cache = KVCache(4, 16)
        with torch.no_grad():
            drawing.absorb(cache, Late(rows, starts, [parts[row] for row in rows]))
        return [x for i in range(len(drawing._k_norms)) for x in cache._layers[i]]

    assert drawing._context is not None
    together = written([0, 1, 2], [5, 0, 9])
    alone = written([1], [0])
    assert all(torch.equal(one[1], other[1]) for one, other in zip(together, alone, strict=True))
    assert all(x[0, :, 5].any() and x[2, :, 9:12].any() and not x[3].any() for x in together)
    monkeypatch.setattr(drawing, "_context", None)
    for ours, torchs in zip(together, written([0, 1, 2], [5, 0, 9]), strict=True):
        torch.testing.assert_close(ours.float(), torchs.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("late_rows", [[0, 1, 2], [2], []])
def test_a_proposal_is_one_call_and_what_several_make_of_it_to_the_bit(drawing, monkeypatch, late_rows):
    rng = torch.Generator().manual_seed(3)
    width = len(drawing.layers) * drawing.config.hidden_size
    known = [torch.randn(n, width, generator=rng).bfloat16() for n in (4, 7, 3)]
    new = {row: torch.randn(row + 1, width, generator=rng).bfloat16() for row in late_rows}
    starts = [len(part) for part in known]
    ends = [start + len(new.get(row, ())) for row, start in enumerate(starts)]
    late = Late(late_rows, [starts[row] for row in late_rows], list(new.values())) if late_rows else None

    @torch.no_grad()
    def drafted(at_once: bool) -> Blocks:
        cache = KVCache(4, 32)
        drawing.absorb(cache, Late([0, 1, 2], [0, 0, 0], known))
        if late and not at_once:
            drawing.absorb(cache, late)
        return drawing.blocks(cache, [0, 1, 2], ends, [5, 6, 7], [], late if at_once else None)

    together = drafted(at_once=True)
    for one, other in zip(together, drafted(at_once=False), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(together.base, drawing.head(together.hidden))
    monkeypatch.setattr(drawing, "_stack", None)
    for one, other in zip(together, drafted(at_once=False), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("before", ["lookup", "nothing"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_that_begin_alike_share_what_the_draft_made_of_it(drawing, monkeypatch, temperature, before):
    """What is accepted of every round is what it is when each prompt is read whole."""
    target = load_target(cached_target("llama"), dtype="bfloat16", device="cpu")
    drafter = drawing if before == "nothing" else LookupFirst(LookupDrafter(4, 3), drawing)
    shared = list(range(30, 70))
    prompts = [[*shared, 5, 6, 7], [*shared, 8], [*shared[:9], 5, 5], [*shared, 5, 6, 7], [11, 12], shared]
    took = []
    real = BlockSession.share
    monkeypatch.setattr(
        BlockSession, "share", lambda self, *args: took.append(len(args[2])) or real(self, *args)
    )

    def decoded() -> list[tuple[list[int], list[int], list[int]]]:
        found = generate(target, drafter, prompts, 24, temperature=temperature, seed=3, batch_size=3)
        return [(each.tokens, each.stats.accepted, each.stats.drafted) for each in found]

    together = decoded()
    assert sorted(took)[-1] >= 39 and len(took) >= 3
    monkeypatch.setattr(BlockSession, "share", lambda *_: False)
    assert together == decoded()


class TestGrownAtOnce:
    """Where the kernels run, all tokens of all chains and trees come from one call."""

    def proposals(self, drafter, samplings, at_once, monkeypatch, shape=None):
        if not at_once:
            monkeypatch.setattr("deepspec.decoding.drafter.grow_at_once", lambda *_: False)
        session, asks = drafter.session(len(samplings)), []
        rng = torch.Generator().manual_seed(1)
        width = len(drafter.layers) * drafter.config.hidden_size
        for row, sampling in enumerate(samplings):
            session.begin(row)
            session.extend(row, list(range(7)), torch.randn(7, width, generator=rng).bfloat16())
            generator = torch.Generator().manual_seed(row)
            room = 9 if row else 3
            asks.append(DraftRequest(row, 20 + row, sampling, generator, room, shape or Chain()))
        found = session.propose(asks)
        return found, [float(torch.rand((), generator=ask.rng)) for ask in asks]

    @pytest.mark.parametrize("temperatures", [(0.0,), (1.0,), (0.0, 0.7, 1.0, 0.7, 0.0)])
    def test_they_are_those_grown_place_by_place(self, drawing, temperatures, monkeypatch):
        samplings = [Sampling(temperature) for temperature in temperatures]
        (ours, after), (theirs, then) = (
            self.proposals(drawing, samplings, at_once, monkeypatch) for at_once in (True, False)
        )
        assert after == then  # each took as many numbers from its generator
        for mine, wanted in zip(ours, theirs, strict=True):
            assert mine.tokens == wanted.tokens and mine.survival == wanted.survival
            assert (mine.probs is None) == (wanted.probs is None)
            assert mine.probs is None or torch.equal(mine.probs, wanted.probs)
        assert len(ours[0].tokens) == 3 and all(len(other.tokens) == 5 for other in ours[1:])

    @pytest.mark.parametrize(
        "shape", [BestFirst(4, None, 16), Beam(3, 4, 12), BestFirst(1, None, 3), Auto(budget=9)]
    )
    @pytest.mark.parametrize("temperatures", [(0.0,), (0.0, 1.0, 0.7, 0.0)])
    def test_trees_are_those_grown_level_by_level(self, drawing, temperatures, shape, monkeypatch):
        samplings = [Sampling(temperature) for temperature in temperatures]
        (ours, after), (theirs, then) = (
            self.proposals(drawing, samplings, at_once, monkeypatch, shape) for at_once in (True, False)
        )
        assert after == then
        for mine, wanted in zip(ours, theirs, strict=True):
            assert (mine.tokens, mine.parents) == (wanted.tokens, wanted.parents)
            assert mine.survival == wanted.survival
        assert [len(tree.tokens) for tree in ours[1:]] == [
            shape.greedy.nodes if sampling.temperature == 0 or not isinstance(shape, Auto) else 5
            for sampling in samplings[1:]
        ]

    def test_a_sampled_shape_at_temperature_0_is_ranked_at_once(self, drawing, monkeypatch):
        shape = Sampled((4, 2, 1), budget=10)
        (ours, _), (theirs, _) = (
            self.proposals(drawing, [Sampling()] * 3, at_once, monkeypatch, shape)
            for at_once in (True, False)
        )
        assert [(tree.tokens, tree.parents, tree.survival) for tree in ours] == [
            (tree.tokens, tree.parents, tree.survival) for tree in theirs
        ]

    def test_a_sampler_that_cuts_is_grown_place_by_place(self, drawing, monkeypatch):
        found, _ = self.proposals(drawing, [Sampling(1.0, top_k=1), Sampling(1.0)], True, monkeypatch)
        assert ((found[0].probs > 0).sum(-1) < 5).all()  # but for equals, one
        assert len(found[1].tokens) == 5
