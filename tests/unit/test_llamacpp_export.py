"""GGUF drafts: what is written, what is refused, and the faults that llama.cpp would not name, each caught by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoTokenizer

from deepspec.decoding.calibration import CALIBRATION
from deepspec.export.engines import export
from deepspec.export.layout import write
from deepspec.export.llamacpp import Options, plans
from deepspec.export.parity import Parity, check
from deepspec.files import write_json
from deepspec.target.model import load_target
from tests.exporting import LAYERS, make_draft, samples
from tests.gguf_files import rewrite
from tests.tiny import cached_target

KINDS = ("dspark", "dflash", "dflash2", "eagle3", "lm")


@pytest.fixture(scope="module")
def target():
    return load_target(cached_target(layers=LAYERS))


@pytest.fixture(scope="module")
def drafts(tmp_path_factory, target):
    """Each with the samples that it is compared on."""
    root = tmp_path_factory.mktemp("drafts")
    made = {kind: make_draft(root, target, kind) for kind in KINDS}
    return {kind: (draft, samples(draft)) for kind, draft in made.items()}


@pytest.fixture
def parity(drafts, tmp_path):
    """Writes a draft's GGUF, plants a fault, and checks it."""

    def run(kind: str, keys=None, tensors=None, **options) -> Parity:
        draft, found = drafts[kind]
        layout = plans(Options(**options))[kind](draft, str(tmp_path), draft.block_size)
        write(layout, tmp_path / "export", "")
        changes = {"keys": keys, "tensors": tensors}
        if keys or tensors:
            (file,) = (tmp_path / "export").glob("draft-*.gguf")
            rewrite(file, **{name: change for name, change in changes.items() if change})
        return check(draft, layout, tmp_path / "export", found)

    return run


def failed(parity: Parity) -> dict[str, str]:
    return {check.name: check.message for check in parity.checks if not check.passed}


def held(path: Path):
    """Keys and tensors of a draft's file."""
    (file,) = path.glob("draft-*.gguf")
    reader = GGUFReader(file)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {tensor.name: tensor for tensor in reader.tensors}


@pytest.mark.parametrize("precision", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"])
def test_a_dspark_draft_is_read_back_in_every_precision(precision, parity):
    found = parity("dspark", precision=precision)
    assert failed(found) == {}
    assert found.max_abs_error < 1e-4


@pytest.mark.parametrize("kind", ["dflash", "dflash2", "eagle3", "lm"])
@pytest.mark.parametrize("precision", ["f16", "q8_0"])
def test_the_other_drafts_are_read_back(kind, precision, parity):
    found = parity(kind, precision=precision)
    assert failed(found) == {}
    assert found.max_abs_error < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_two_exports_have_the_same_bytes_and_the_target_lies_beside(kind, drafts, tmp_path):
    draft = drafts[kind][0]
    options = Options(with_target=True)
    first, second = (export(draft, ["llamacpp"], tmp_path / name, options) for name in ("a", "b"))
    one, other = (record["engines"]["llamacpp"] for record in (first, second))
    assert first["passed"], one["parity"]
    assert one["files"].keys() >= {"draft-f16.gguf", "target-f16.gguf"}
    for name in ("draft-f16.gguf", "target-f16.gguf"):
        assert one["files"][name] == other["files"][name]
    assert "target" in {check["name"] for check in one["parity"]["checks"]}
    assert (
        f"-m {tmp_path}/a/llamacpp/target-f16.gguf -md {tmp_path}/a/llamacpp/draft-f16.gguf" in one["command"]
    )


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("dspark", "draft-dspark"),
        ("dflash", "draft-dflash"),
        ("dflash2", "draft-dflash"),
        ("eagle3", "draft-eagle3"),
        ("lm", "draft-simple"),
    ],
)
def test_the_command_names_the_kind_of_draft(kind, named, drafts, tmp_path):
    record = export(drafts[kind][0], ["llamacpp"], tmp_path)
    assert f"--spec-type {named} --spec-draft-n-max 3" in record["engines"]["llamacpp"]["command"]


def test_layer_ids_are_inputs_and_d2t_holds_target_ids(drafts, tmp_path):
    for kind, arch, ids in (("dspark", "dflash", [2, 3, 5, 6]), ("eagle3", "eagle3", [2, 4, 6])):
        draft = drafts[kind][0]
        export(draft, ["llamacpp"], tmp_path / kind)
        keys, tensors = held(tmp_path / kind / "llamacpp")
        assert keys["general.architecture"] == arch and keys[f"{arch}.target_layers"] == ids
        assert tensors["d2t"].data.tolist() == draft.network.draft_ids.tolist()
        assert "token_embd.weight" not in tensors  # the target's own


@pytest.mark.parametrize("kind", ["dspark", "dflash", "dflash2"])
def test_what_the_layers_of_a_block_see_is_written(kind, target, tmp_path):
    draft = make_draft(tmp_path, target, kind, causal=True, sliding_window=6)
    record = export(draft, ["llamacpp"], tmp_path)
    assert record["passed"], record
    keys = held(tmp_path / "llamacpp")[0]
    assert keys["dflash.attention.causal"] and keys["dflash.attention.sliding_window"] == 6
    assert keys["dflash.attention.sliding_window_pattern"] == [True, True]


def test_another_view_of_a_block(parity):
    found = failed(parity("dflash", keys=lambda keys: keys.update({"dflash.attention.causal": 1})))
    assert "(causal, window, candidates) as [True, None, None]" in found["block"] and "logits" in found


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("dflash.selector_top_k", "llama.cpp would draft as DFlash"),
        ("dflash.conv_group_size", "dflash.conv_group_size is missing"),
    ],
)
def test_a_dflash_2_without_one_of_its_sizes(key, says, parity):
    assert says in failed(parity("dflash2", keys=lambda keys: keys.pop(key)))["readable"]


def test_a_dflash_2_with_another_count_of_candidates(parity):
    found = failed(parity("dflash2", keys=lambda keys: keys.update({"dflash.selector_top_k": 4})))
    assert list(found) == ["block"]  # no logit shows it


def test_a_dflash_block_counts_its_anchor(drafts, tmp_path):
    sizes = {}
    for kind in ("dspark", "dflash"):
        export(drafts[kind][0], ["llamacpp"], tmp_path / kind)
        sizes[kind] = held(tmp_path / kind / "llamacpp")[0]["dflash.block_size"]
    assert sizes == {"dspark": 3, "dflash": 4}


@pytest.mark.parametrize(
    ("temperatures", "divisor", "says"),
    [
        ([2.0, 2.0, 2.0], 2.0, "its calibrated temperature (2) is in the head"),
        ([1.0, 2.0, 2.0], 1.0, "differ from place to place"),
        (None, 1.0, "its calibrated temperature (1) is in the head"),
    ],
)
def test_one_temperature_is_folded_into_the_confidence_head(temperatures, divisor, says, target, tmp_path):
    draft = make_draft(tmp_path, target, "dspark")
    if temperatures:
        (draft.directory / CALIBRATION).write_text(json.dumps({"greedy": temperatures}))
    record = export(draft, ["llamacpp"], tmp_path / "exports")
    assert record["passed"]
    tensors = held(tmp_path / "exports" / "llamacpp")[1]
    trained = draft.weights["confidence_head.proj.weight"].float() / divisor
    assert torch.allclose(torch.from_numpy(np.array(tensors["conf_proj.weight"].data)), trained)
    assert says in (tmp_path / "exports" / "llamacpp" / "README.md").read_text()


@pytest.mark.parametrize(("digest", "told"), [(None, True), ("another", False)])
def test_the_card_tells_what_was_measured_of_this_very_draft(digest, told, drafts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draft = drafts["dspark"][0]
    found = {
        "engine_version": "xllamacpp 1",
        "precision": "f16",
        "threads": 2,
        "advice": "do not draft here: slow",
        "plain_seconds": 0.02,
        "fastest": "the fastest of its ways is ngram-simple",
    }
    write_json("reports/serve/dspark-llamacpp-f16.json", found | {"draft_digest": digest or draft.digest})
    export(draft, ["llamacpp"], tmp_path)
    card = (tmp_path / "llamacpp" / "README.md").read_text()
    said = "Measured in xllamacpp 1, target in f16, 2 threads: do not draft here: slow; the fastest of its ways is "
    assert (said in card) == told


def test_a_gguf_has_the_targets_tokens_and_template(drafts, target, tmp_path):
    export(drafts["lm"][0], ["llamacpp"], tmp_path)
    path = tmp_path / "llamacpp"
    tokenizer = AutoTokenizer.from_pretrained(path, gguf_file="draft-f16.gguf")
    text = "Tom has 12 apples.<|im_end|>\n  def best(): ..."
    assert tokenizer(text)["input_ids"] == target.tokenizer(text)["input_ids"]
    assert held(path)[0]["tokenizer.chat_template"] == target.tokenizer.chat_template


@pytest.mark.parametrize(
    ("kind", "sizes", "says"),
    [
        ("dspark", {"markov_head": "rnn"}, "markov_head: vanilla"),
        ("dspark", {"markov_head": "gated"}, "markov_head: vanilla"),
        ("dspark", {"context_skip": True}, "context_skip: false"),
        ("dflash", {"sample_from_anchor": True}, "sample_from_anchor: false"),
        ("dflash", {"target_layer_ids": [3, 1]}, "ascending"),
        ("eagle3", {"target_layer_ids": [1, 2]}, "three target layers"),
        ("eagle3", {"qk_norm": True}, "qk_norm: false"),
        ("eagle3", {"version": "3.1"}, 'version: "3"'),
        ("dflash2", {"draft_vocab_size": 64}, "draft_vocab_size: 0"),
        ("dflash2", {"selector_top_k": 16}, "wants a width of 272 for selector_top_k 16"),
        ("medusa", {}, "train eagle3, dflash, dflash2, dspark, mtp or lm"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused_in_a_line(kind, sizes, says, target, tmp_path):
    refused = export(make_draft(tmp_path, target, kind, **sizes), ["llamacpp"], tmp_path / "exports")
    said = refused["engines"]["llamacpp"]["refused"]
    assert says in said and "\n" not in said


def test_a_precision_that_is_not_written_here_is_refused(drafts, tmp_path):
    record = export(drafts["dspark"][0], ["llamacpp"], tmp_path, Options(precision="q4_k_m"))
    assert "llama-quantize" in record["engines"]["llamacpp"]["refused"]


@pytest.mark.parametrize(("kind", "arch"), [("dspark", "dflash"), ("dflash", "dflash"), ("eagle3", "eagle3")])
def test_layer_ids_that_were_not_raised_by_one(kind, arch, parity):
    def change(keys):
        keys[f"{arch}.target_layers"] = [i - 1 for i in keys[f"{arch}.target_layers"]]

    found = failed(parity(kind, keys=change))
    assert found["layer_ids"].endswith("they are off by -1")
    assert "layer ids are off by -1: with this mended" in found["logits"]


@pytest.mark.parametrize("kind", ["dspark", "dflash", "eagle3"])
def test_d2t_as_offsets(kind, parity):
    def change(tensors):
        tensors["d2t"] = tensors["d2t"] - np.arange(len(tensors["d2t"]))

    assert (
        "it holds offsets, and llama.cpp reads target ids" in failed(parity(kind, tensors=change))["readable"]
    )


def test_d2t_of_another_type_or_missing(parity):
    def narrow(tensors):
        tensors["d2t"] = tensors["d2t"].astype(np.int32)

    assert "asserts I64" in failed(parity("dspark", tensors=narrow))["readable"]
    gone = failed(parity("dspark", tensors=lambda tensors: tensors.pop("d2t")))
    assert "llama.cpp does not start" in gone["readable"]


def halves(array: np.ndarray, dim: int) -> np.ndarray:
    return array.reshape(-1, dim // 2, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)


def pairs(array: np.ndarray, dim: int) -> np.ndarray:
    return array.reshape(-1, 2, dim // 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)


@pytest.mark.parametrize(
    ("kind", "order", "says"),
    [
        ("eagle3", halves, "are in halves, and llama.cpp rotates neighbouring pairs"),
        ("dspark", pairs, "are in pairs, and llama.cpp rotates halves"),
        ("dflash", pairs, "are in pairs, and llama.cpp rotates halves"),
    ],
)
def test_query_and_key_rows_in_the_other_order(kind, order, says, parity, drafts):
    dim = drafts[kind][0].network.config.head_dim

    def change(tensors):
        for name in tensors:
            if name.endswith(("attn_q.weight", "attn_k.weight")):
                tensors[name] = order(tensors[name], dim)

    assert says in failed(parity(kind, tensors=change))["logits"]


def test_a_draft_lm_in_transformers_order_of_rows(parity, drafts):
    dim = drafts["lm"][0].config["head_dim"]

    def change(tensors):
        for name in tensors:
            if name.endswith(("attn_q.weight", "attn_k.weight")):
                tensors[name] = halves(tensors[name], dim)

    assert "logits" in failed(parity("lm", tensors=change))


@pytest.mark.parametrize(
    ("kind", "key", "says"),
    [
        ("dspark", "tokenizer.ggml.mask_token_id", "llama.cpp aborts at its first draft"),
        ("dflash", "tokenizer.ggml.mask_token_id", "llama.cpp aborts at its first draft"),
        ("dspark", "dflash.block_size", "llama.cpp aborts while it starts"),
        ("dflash", "dflash.block_size", "the engine drafts 15 tokens, the draft was trained for 3"),
        ("dspark", "dflash.target_layers", "dflash.target_layers is missing"),
        ("eagle3", "eagle3.target_layers", "eagle3.target_layers is missing"),
    ],
)
def test_a_missing_key(kind, key, says, parity):
    assert says in failed(parity(kind, keys=lambda keys: keys.pop(key)))["readable"]


def test_another_mask_token(parity):
    found = failed(parity("dflash", keys=lambda keys: keys.update({"tokenizer.ggml.mask_token_id": 7})))
    assert found["logits"].startswith("wrong mask token") and "would feed 7" in found["mask_token"]


def test_the_wrong_anchor_layout(parity):
    found = failed(parity("dspark", keys=lambda keys: keys.update({"dflash.sample_from_anchor": False})))
    assert "anchor layout: the engine would take sample_from_anchor as False" in found["anchor"]


def test_a_dspark_draft_without_its_markov_head_is_another_kind(parity):
    def change(tensors):
        del tensors["markov_w1.weight"], tensors["markov_w2.weight"]

    assert "the engine drafts 2 tokens" in failed(parity("dspark", tensors=change))["readable"]


def test_a_transposed_markov_matrix(parity):
    def square(tensors):
        tensors["markov_w2.weight"] = tensors["markov_w2.weight"].T  # 64 columns of rank 64

    assert (
        "Markov matrix markov_head.markov_w2.weight is transposed"
        in failed(parity("dspark", tensors=square))["logits"]
    )

    def oblong(tensors):
        tensors["markov_w1.weight"] = tensors["markov_w1.weight"].T

    assert "it is transposed" in failed(parity("dspark", tensors=oblong))["readable"]


def test_another_pre_tokenizer(parity):
    found = failed(parity("dspark", keys=lambda keys: keys.update({"tokenizer.ggml.pre": "llama-bpe"})))
    assert "llama.cpp would read other tokens" in found["gguf_pre"]


@pytest.mark.parametrize("kind", ["dspark", "dflash"])
def test_missing_query_and_key_norms(kind, parity):
    gone = failed(parity(kind, tensors=lambda tensors: tensors.pop("blk.1.attn_q_norm.weight")))
    assert "blk.1.attn_q_norm.weight is missing" in gone["readable"]


def test_a_confidence_head_that_is_missing_or_not_the_trained_one(parity):
    def gone(tensors):
        del tensors["conf_proj.weight"], tensors["conf_proj.bias"]

    assert "would draft nothing, silently" in failed(parity("dspark", tensors=gone))["readable"]

    def said(keys):
        keys["dflash.has_confidence_head"] = False

    assert "would draft nothing, silently" in failed(parity("dspark", keys=said, tensors=gone))["confidence"]

    def other(tensors):
        tensors["conf_proj.weight"] = tensors["conf_proj.weight"] * 2

    assert "not the trained one" in failed(parity("dspark", tensors=other))["confidence"]


@pytest.mark.parametrize(
    ("kind", "key", "value", "name"),
    [
        ("dspark", "dflash.rope.freq_base", 5.0, "rope"),
        ("eagle3", "eagle3.rope.freq_base", 5.0, "rope"),
        ("dspark", "dflash.attention.layer_norm_rms_epsilon", 0.5, "norms"),
        ("dspark", "dflash.context_length", 16, "max_position_embeddings"),
    ],
)
def test_another_number_than_the_draft_was_trained_with(kind, key, value, name, parity):
    assert name in failed(parity(kind, keys=lambda keys: keys.update({key: value})))


def test_norms_that_are_not_in_float32_and_tensors_that_nothing_reads(parity):
    def half(tensors):
        tensors["output_norm.weight"] = tensors["output_norm.weight"].astype(np.float16)

    assert "multiplies by norms in F32" in failed(parity("dspark", tensors=half))["readable"]

    def more(tensors):
        tensors["blk.0.attn_gate.weight"] = tensors["blk.0.attn_q.weight"]

    assert "weights that the engine reads nowhere" in failed(parity("dspark", tensors=more))["weights"]
