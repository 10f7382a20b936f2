"""Padded vocabularies, target and draft to different sizes, share the tokens of their tokenizer and no others."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepspec.decoding.engine import generate
from deepspec.decoding.request import Sampling
from deepspec.decoding.sampling import probabilities
from deepspec.drafters.algorithms.lm import network
from deepspec.drafters.checkpoint import stored_weights, write_drafter
from deepspec.drafters.load import load_drafter
from deepspec.drafters.params import LMParams
from deepspec.drafters.registry import algorithms
from deepspec.errors import DeepSpecError
from deepspec.export.draft import load_draft
from deepspec.export.parity import check
from deepspec.export.reference import logits
from deepspec.target.attention import ForwardPass
from deepspec.target.model import load_target
from tests.drafting import make, write
from tests.exporting import samples, written
from tests.tiny import make_network, make_target

TOKENS, PADDED = 512, 576
PROMPT = [5, 9, 17, 300, 41]


def padded(path, rows: int):
    """A target directory whose embeddings and head have random rows beyond the tokenizer's."""
    make_target(path, layers=4)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(rows, mean_resizing=False)
    torch.manual_seed(4)
    with torch.no_grad():
        model.get_input_embeddings().weight[TOKENS:].normal_()
        model.get_output_embeddings().weight[TOKENS:].normal_(std=1e-3)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("padding")
    return {rows: padded(root / str(rows), rows) for rows in (TOKENS, PADDED)}


@pytest.fixture(scope="module")
def targets(directories):
    return {rows: load_target(path) for rows, path in directories.items()}


def test_the_law_of_a_padded_target_is_that_of_transformers(targets, directories):
    target, ids = targets[PADDED], torch.tensor([PROMPT])
    hidden = target.forward(ids, ForwardPass(torch.arange(5)[None]))
    found = target.logits(hidden)[0, -1]
    expected = AutoModelForCausalLM.from_pretrained(directories[PADDED])(ids).logits[0, -1]
    assert found.shape == (PADDED,) and torch.allclose(found, expected, atol=1e-4)
    assert probabilities(found, Sampling(1.0))[TOKENS:].sum() > 0


@pytest.mark.parametrize(("draft", "target"), [(TOKENS, PADDED), (PADDED, TOKENS)])
def test_a_draft_with_other_padding_is_a_perfect_draft_of_the_same_model(
    draft, target, directories, targets, tmp_path
):
    """Both are the same model up to their padding: what the one writes, the other drafts."""
    model = network(LMParams(type="lm", block_size=4, source=str(directories[draft])), targets[target])
    assert model.config.draft_vocab_size == TOKENS and model.vocabulary().size == target
    drafter = load_drafter(write(model, targets[target], tmp_path / "draft"), targets[target])
    (plain,) = generate(targets[target], None, [PROMPT], max_new_tokens=21)
    (out,) = generate(targets[target], drafter, [PROMPT], max_new_tokens=21)
    assert out.tokens == plain.tokens and max(plain.tokens) < TOKENS
    assert set(out.stats.accepted[:-1]) == {4}
    (drawn,) = generate(targets[target], drafter, [PROMPT], max_new_tokens=21, temperature=1.0)
    assert sum(drawn.stats.accepted) > 8


def test_a_padded_token_of_the_target_is_drafted_behind(directories, targets, tmp_path):
    model = network(LMParams(type="lm", block_size=4, source=str(directories[TOKENS])), targets[PADDED])
    drafter = load_drafter(write(model, targets[PADDED], tmp_path / "draft"), targets[PADDED])
    prompt = [*PROMPT, PADDED - 1]
    (plain,) = generate(targets[PADDED], None, [prompt], max_new_tokens=9)
    assert generate(targets[PADDED], drafter, [prompt], max_new_tokens=9)[0].tokens == plain.tokens


@pytest.mark.parametrize(("draft", "target"), [(TOKENS, PADDED), (PADDED, TOKENS)])
@pytest.mark.parametrize("engine", ["hf", "vllm", "llamacpp"])
def test_an_export_has_the_size_of_the_target(engine, draft, target, directories, targets, tmp_path):
    model = network(LMParams(type="lm", block_size=4, source=str(directories[draft])), targets[target])
    write_drafter(tmp_path / "lm", model.description(), stored_weights(model), targets[target], {})
    made = load_draft("lm", tmp_path / "lm", targets[target])
    layout, path = written(made, engine, tmp_path)
    parity = check(made, layout, path, samples(made))
    assert parity.passed, parity.failures
    if engine != "llamacpp":
        read = AutoModelForCausalLM.from_pretrained(path)
        assert read.get_output_embeddings().weight.shape[0] == read.config.vocab_size == target


@pytest.mark.parametrize("name", ["dspark", "eagle3", "medusa"])
def test_a_reduced_vocabulary_of_a_padded_target_is_that_of_its_tokens(name, targets, tmp_path):
    drafter = load_drafter(
        write(make(name, targets[PADDED]), targets[PADDED], tmp_path / name), targets[PADDED]
    )
    plain = generate(targets[PADDED], None, PROMPT, max_new_tokens=12)
    assert generate(targets[PADDED], drafter, PROMPT, max_new_tokens=12)[0].tokens == plain[0].tokens


SIZES = {
    "eagle3": {"block_size": 3},
    "dspark": {"layers": 1, "block_size": 3, "markov_rank": 4, "target_layer_ids": [0, 1]},
    "medusa": {"heads": 3, "layers": 1},
}
BOTH_WAYS = [(TOKENS, PADDED), (PADDED, TOKENS)]
MASK = 500  # the last token of a target is padding, which another does not have


def published(path, kind: str, target, columns: int, written_out: bool = False):
    """A draft of a target as others publish one: nothing says which target it is of."""
    write(make_network(target, kind, draft_vocab_size=columns, **SIZES[kind]), target, path, written_out)
    (path / "deepspec.json").unlink()
    config = json.loads((path / "config.json").read_text())
    config |= {"mask_token_id": MASK} if "mask_token_id" in config else {}
    (path / "config.json").write_text(json.dumps(config))
    return path


def law(made, target) -> torch.Tensor:
    """Logits [anchors, γ, TOKENS] on a text of the tokens that both targets have; -inf where there is no column."""
    (sample,) = samples(made)
    found = logits(made.network, sample)
    full = torch.full((*found.shape[:-1], target.vocab_size), -torch.inf)
    return full.index_copy(-1, made.network.draft_ids, found)[..., :TOKENS]


@pytest.mark.parametrize(("draft", "target"), BOTH_WAYS)
@pytest.mark.parametrize("columns", [0, 128])
@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("kind", SIZES)
def test_a_trained_draft_with_other_padding_says_of_each_token_what_it_said(
    kind, written_out, columns, draft, target, targets, tmp_path
):
    path = published(tmp_path / kind, kind, targets[draft], columns, written_out)
    before = law(load_draft(kind, path, targets[draft]), targets[draft])
    after = law(load_draft(kind, path, targets[target]), targets[target])
    known = columns or TOKENS
    assert int(torch.isfinite(before[0, 0]).sum()) in (known, known - (PADDED - TOKENS if columns else 0))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    plain = generate(targets[target], None, PROMPT, max_new_tokens=12)
    drafter = load_drafter(path, targets[target])
    assert generate(targets[target], drafter, PROMPT, max_new_tokens=12)[0].tokens == plain[0].tokens


@pytest.mark.parametrize(("draft", "target"), BOTH_WAYS)
@pytest.mark.parametrize(("kind", "engine"), [("eagle3", "vllm"), ("eagle3", "hf"), ("dspark", "sglang")])
def test_a_draft_with_other_padding_is_exported_in_the_size_of_the_target(
    kind, engine, draft, target, targets, tmp_path
):
    path = published(tmp_path / kind, kind, targets[draft], 0)
    made = load_draft(kind, path, targets[target])
    layout, directory = written(made, engine, tmp_path / "exports")
    parity = check(made, layout, directory, samples(made))
    assert parity.passed, parity.failures


@pytest.mark.parametrize(("draft", "target"), BOTH_WAYS)
def test_training_goes_on_from_a_draft_with_other_padding(draft, target, targets, tmp_path):
    path = published(tmp_path / "eagle3", "eagle3", targets[draft], 0)
    algorithm = algorithms()["eagle3"]
    network = algorithm.network(algorithm.params(type="eagle3", start=str(path)), targets[target])
    network.share(targets[target], network.origin.ids)
    assert network.origin.ids.tolist() == list(range(TOKENS))
    assert len(network.embed_tokens.weight) == target


def test_a_draft_of_another_vocabulary_is_refused(targets, tmp_path):
    path = published(tmp_path / "eagle3", "eagle3", targets[TOKENS], 128)
    config = json.loads((path / "config.json").read_text())
    for rows, words in (
        (400, "400, but the target .* has 576, 512 of them tokens"),
        (530, "530, but t2d has"),
    ):
        (path / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
        with pytest.raises(DeepSpecError, match=f"vocab_size is {words}") as caught:
            load_drafter(path, targets[PADDED])
        assert "\n" not in str(caught.value)


def test_a_mask_that_the_target_has_no_row_for_is_refused(targets, tmp_path):
    path = published(tmp_path / "dspark", "dspark", targets[PADDED], 0)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"mask_token_id": PADDED - 1}))
    with pytest.raises(DeepSpecError, match=f"its mask is token {PADDED - 1} of {PADDED}, and the target"):
        load_drafter(path, targets[TOKENS])
