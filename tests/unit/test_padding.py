"""Padded vocabularies, target and draft to different sizes, share the tokens of their tokenizer and no others."""

from __future__ import annotations

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
from deepspec.export.draft import load_draft
from deepspec.export.parity import check
from deepspec.target.attention import ForwardPass
from deepspec.target.model import load_target
from tests.drafting import make, write
from tests.exporting import samples, written
from tests.tiny import make_target

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
