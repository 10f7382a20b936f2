"""A target that differs from transformers' own forward is refused, and the layer and the position are named."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks.tiny_families import tiny_config, tiny_model
from deepspec.decoding.engine import generate
from deepspec.errors import DeepSpecError
from deepspec.target import selftest
from deepspec.target.attention import NAME
from deepspec.target.model import Target, examine_target, load_target, resolve_target
from deepspec.target.reaches import reaches, reduced, resized
from deepspec.target.selftest import ATTENTION, STATES, STEPS, Verdict, examine
from deepspec.target.source import model_class
from tests.tiny import make_target, make_tokenizer

WINDOW = 24  # of the tiny families
SEEING = ("mistral3", "qwen3_vl", "llava")  # models that also see


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty cache of the user's."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def verdict_on(family: str, fault=None, dtype=torch.float32, sizes: dict | None = None) -> Verdict:
    """The verdict on a family's tiny model; `fault` changes the one that runs through our attention."""
    config = tiny_config(family, **sizes or {})
    weights = tiny_model(family, dtype=dtype, config=config).state_dict()

    def load(attention, wanted, resizing):
        options = {} if attention is None else {"attn_implementation": attention}
        config = resized(tiny_config(family, **sizes or {}), resizing)
        model = model_class(config).from_config(config, dtype=wanted or dtype, **options).eval()
        model.load_state_dict(weights)
        if fault and attention == NAME:
            fault(model)
        return model

    return examine(
        family, load, lambda model, verdict: Target(model, None, family, verdict=verdict), fresh=True
    )


def wider_window(model) -> None:
    model.config.sliding_window += 1
    for layer in model.model.layers:
        if getattr(layer.self_attn, "sliding_window", None):
            layer.self_attn.sliding_window += 1


def no_sink(model) -> None:
    model.model.layers[2].self_attn.sinks.data.fill_(-1e4)


def no_scale(model) -> None:
    model.model.layers[1].self_attn.scaling = 1.0


def no_head_scale(model) -> None:
    model.config.logits_scaling = 1.0


@pytest.mark.parametrize(
    "family",
    ["mistral", "gemma2", "gpt_oss", "llama4_text", "deepseek_v3", "gemma4_text", "granite", *SEEING],
)
def test_a_family_that_our_attention_runs_is_right_under_it(family):
    verdict = verdict_on(family)
    assert (verdict.refusal, verdict.body) == (None, ATTENTION)
    assert verdict.tokens > WINDOW and verdict.error < verdict.tolerance


@pytest.mark.parametrize(
    ("family", "body"),
    [("qwen3_next", STATES), ("falcon_h1", STATES), ("deepseek_v32", STATES), ("jamba", STEPS)],
)
def test_a_family_that_keeps_states_runs_through_transformers_own_cache(family, body):
    verdict = verdict_on(family)
    assert (verdict.refusal, verdict.body, verdict.trees) == (None, body, False)
    assert "keeps a" in verdict.reason


def test_a_model_that_never_calls_our_attention_is_not_run_through_it():
    verdict = verdict_on("bloom")
    assert (verdict.refusal, verdict.body) == (None, STATES)
    assert verdict.reason == "layer 0 does not attend through it"


@pytest.mark.parametrize(
    ("family", "fault", "where", "position"),
    [
        ("mistral", wider_window, "layer 0", WINDOW),
        ("gpt_oss", wider_window, "layer 0", WINDOW),
        ("gpt_oss", no_sink, "layer 2", 0),
        ("llama", no_scale, "layer 1", 1),
        ("granite", no_head_scale, "the head's output", 0),
    ],
)
def test_a_planted_fault_is_refused_and_named(family, fault, where, position):
    refusal = verdict_on(family, fault).refusal
    assert re.match(rf"{where} differs from position {position} on", refusal) and "\n" not in refusal


def shorter_window(model) -> None:
    model.model.layers[1].self_attn.sliding_window -= 1


LARGE = {
    "sliding_window": 500,
    "hidden_size": 256,
    "head_dim": 64,
}  # a key in 500 is lost in bfloat16's rounding
MIXED = LARGE | {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 2}


@pytest.mark.parametrize(
    "family", ["mistral", "gemma3_text", "gpt_oss", "llama4_text", "qwen3_moe", "phimoe"]
)
def test_a_family_in_bfloat16_sees_what_transformers_sees(family, monkeypatch):
    monkeypatch.setattr(selftest, "SMALL", 0)
    verdict = verdict_on(family, dtype=torch.bfloat16)
    assert (verdict.refusal, verdict.body, verdict.dtype) == (None, ATTENTION, "bfloat16")


@pytest.mark.parametrize(
    ("family", "sizes", "fault", "said"),
    [
        (
            "gemma3_text",
            LARGE,
            wider_window,
            r"layer 0 sees more tokens than transformers' own at position 519; ",
        ),
        (
            "qwen3",
            MIXED,
            shorter_window,
            r"layer 1 sees fewer tokens than transformers' own at position 518; ",
        ),
    ],
)
def test_a_window_off_by_one_is_caught_in_bfloat16(family, sizes, fault, said, monkeypatch):
    monkeypatch.setattr(selftest, "SMALL", 0)
    refusal = verdict_on(family, fault, torch.bfloat16, sizes).refusal
    assert re.match(said, refusal) and "\n" not in refusal


def scale_by(factor: float):
    def fault(model) -> None:
        model.model.layers[1].self_attn.scaling *= factor

    return fault


def slower_rotation(model) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.995)


def other_softcap(model) -> None:
    model.config.final_logit_softcapping *= 1.1


SHARP = {
    "hidden_size": 256,
    "head_dim": 64,
    "initializer_range": 0.2,
}  # attention prefers some tokens, logits are large


@pytest.mark.parametrize(
    ("family", "fault", "said"),
    [
        (
            "qwen3",
            scale_by(1.05),
            r"layer 1 is off by 0\.\d+ of what it adds from position 0 on, where rounding",
        ),
        ("llama", slower_rotation, r"layer 0 is off by"),
        ("gpt_oss", scale_by(0.95), r"layer 1 is off by"),
        ("gemma2", other_softcap, r"the head is off by 0\.0\d+ of its output"),
    ],
)
def test_a_small_fault_of_one_layer_is_caught_in_bfloat16(family, fault, said, monkeypatch):
    monkeypatch.setattr(selftest, "SMALL", 0)
    sizes = SHARP | ({"final_logit_softcapping": 3.0} if family == "gemma2" else {})
    assert verdict_on(family, None, torch.bfloat16, sizes).refusal is None
    refusal = verdict_on(family, fault, torch.bfloat16, sizes).refusal
    assert re.match(said, refusal) and "\n" not in refusal


def written(family: str, path, spoil=None):
    """A directory of the family's tiny model."""
    model = tiny_model(family)
    if spoil:
        spoil(model)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def test_a_refused_target_is_neither_resolved_nor_loaded(tmp_path):
    source = written("doge", tmp_path / "source")
    with pytest.raises(DeepSpecError, match=r"refused: layer \d differs from position \d+") as caught:
        resolve_target(str(source), None, "float32", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    with pytest.raises(DeepSpecError, match="refused"):
        load_target(source)


@pytest.mark.parametrize("family", ["mistral3", "qwen3_vl"])
def test_a_model_that_also_sees_is_a_target_for_text(family, tmp_path):
    source = written(family, tmp_path / "source")
    resolve_target(str(source), None, "float32", tmp_path / "copy")
    target = load_target(tmp_path / "copy", dtype="float32")
    ids = torch.arange(100, 160)
    theirs = tiny_model(family)
    expected = theirs.generate(
        ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=24, do_sample=False
    )
    (found,) = generate(target, None, ids.tolist(), max_new_tokens=24)
    assert found.tokens == expected[0, 60:].tolist()[: len(found.tokens)] and len(found.tokens) > 2


def test_a_verdict_is_kept_under_the_digest(tmp_path):
    path = make_target(tmp_path / "target")
    found = examine_target(path)
    kept = list((tmp_path / "home").rglob("selftests/*.json"))
    assert len(kept) == 1 and examine_target(path) == found
    examine_target(make_target(tmp_path / "other", seed=1))
    assert len(list((tmp_path / "home").rglob("selftests/*.json"))) == 2


FAR = {"sliding_window": 4096, "max_position_embeddings": 8192}  # no prompt of the test is so long


def test_a_window_beyond_the_longest_prompt_is_tested_by_a_copy_with_a_short_one(tmp_path):
    path = make_target(tmp_path / "target", "mistral")
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace('"sliding_window": 48', '"sliding_window": 4000'))
    verdict = examine_target(path)
    assert (verdict.refusal, verdict.body, verdict.unreached) == (None, ATTENTION, ())
    assert verdict.shortened == ("sliding_window 4000 as 32",) and verdict.shortened[0] in verdict.summary
    assert examine_target(path) == verdict  # as it was kept


@pytest.mark.parametrize(("family", "fault"), [("mistral", wider_window), ("gemma3_text", wider_window)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_far_window_off_by_one_is_caught(family, fault, dtype, monkeypatch):
    if dtype != torch.float32:
        monkeypatch.setattr(selftest, "SMALL", 0)
    sizes = FAR | ({} if dtype == torch.float32 else {"hidden_size": 256, "head_dim": 64})
    assert verdict_on(family, None, dtype, sizes).refusal is None
    refusal = verdict_on(family, fault, dtype, sizes).refusal
    assert re.match(r"with sliding_window 4096 as 32, .*layer \d (differs from|sees more)", refusal)
    assert "\n" not in refusal


@pytest.mark.parametrize(
    ("family", "sizes", "shortened"),
    [
        (
            "llama4_text",
            {"attention_chunk_size": 8192, "floor_scale": 8192},
            "attention_chunk_size 8192 as 32",
        ),
        ("deepseek_v32", {"index_topk": 2048}, "index_topk 2048 as 32"),
        ("gpt_oss", {"sliding_window": 2000}, "sliding_window 2000 as 32"),
        ("minimax_m3_vl_text", {"index_topk_blocks": 200}, "index_topk_blocks 1600 as 32"),
    ],
)
def test_chunks_and_indices_beyond_the_longest_prompt_are_tested_too(family, sizes, shortened):
    verdict = verdict_on(family, sizes=sizes | {"max_position_embeddings": 1 << 15})
    assert (verdict.refusal, verdict.unreached) == (None, ()) and shortened in verdict.shortened


def test_what_a_copy_cannot_show_is_said(monkeypatch):
    def fail(config, sizes):
        raise RuntimeError("no such size")

    monkeypatch.setattr(f"{__name__}.resized", lambda config, sizes: fail(config, sizes) if sizes else config)
    verdict = verdict_on("mistral", sizes=FAR)
    assert verdict.refusal is None and verdict.shortened == ()
    (said,) = verdict.unreached
    assert said.startswith("sliding_window 4096 as 32: ") and said.endswith("no such size")
    assert said in verdict.summary


def test_small_sizes_keep_their_order():
    config = tiny_config("mistral", max_position_embeddings=1 << 17)
    config.sliding_window, config.index_topk, config.attention_chunk_size = 128, 2048, 8192
    far = {name: n for name, n in reaches(config).items() if n > 1280}
    assert reduced(config, far) == {"index_topk": 32, "attention_chunk_size": 64}


def test_an_index_over_blocks_or_compressed_states_reaches_as_many_tokens():
    config = tiny_config("mistral", max_position_embeddings=1 << 17)
    config.index_topk, config.compress_rates = 1024, {"csa": 4, "hca": 128}
    config.index_topk_blocks, config.index_block_size = 16, 128
    found = reaches(config)
    assert (found["index_topk"], found["index_topk_blocks"]) == (4096, 2048)
    small = resized(
        config, reduced(config, {name: found[name] for name in ("index_topk", "index_topk_blocks")})
    )
    assert (small.index_topk, small.index_topk_blocks, config.index_topk) == (16, 2, 1024)


def test_a_window_as_long_as_the_longest_text_hides_nothing():
    config = tiny_config("mistral", max_position_embeddings=4096)
    config.sliding_window = 4096
    assert reaches(config) == {}


def test_a_dtype_may_be_a_name_or_itself(tmp_path):
    path = make_target(tmp_path / "target")
    assert (
        load_target(path, dtype=torch.float64).dtype
        == load_target(path, dtype="float64").dtype
        == torch.float64
    )
