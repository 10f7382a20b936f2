"""A target is what its files are, whatever its record says; broken files are refused in one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepspec.errors import DeepSpecError
from deepspec.target.attention import ForwardPass
from deepspec.target.checks import check_files, not_applied, stop_tokens
from deepspec.target.ends import load_ends
from deepspec.target.identity import directory_digest
from deepspec.target.model import examine_target, load_target, resolve_target
from tests.tiny import cached_target, make_target

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty cache of the user's."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def directory(tmp_path) -> Path:
    return Path(shutil.copytree(cached_target(), tmp_path / "target"))


def changed(directory: Path, name: str, **settings) -> Path:
    found = json.loads((directory / name).read_text()) if (directory / name).exists() else {}
    (directory / name).write_text(json.dumps(found | settings))
    return directory


def refused(directory: Path, words: str) -> None:
    """Each way in says so, in one line, and nothing is written."""
    out = directory.parent / "out"
    for enter in (
        load_target,
        examine_target,
        lambda path: resolve_target(str(path), None, "float32", out),
    ):
        with pytest.raises(DeepSpecError, match=words) as caught:
            enter(directory)
        assert "\n" not in str(caught.value) and not out.exists()


def settled(directory: Path) -> None:
    """As a directory that was written an hour ago."""
    for path in directory.iterdir():
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - 3_600_000_000_000))


def flipped(path: Path) -> None:
    """Change the last byte in place, and leave size and time of change as they were."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 128]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "generation_config.json"])
def test_files_changed_under_a_record_are_another_target(directory, tmp_path, name):
    resolve_target(str(directory), None, "float32", tmp_path / "copy")
    settled(tmp_path / "copy")
    kept = load_target(tmp_path / "copy").digest
    if name == WEIGHTS:
        flipped(tmp_path / "copy" / name)
    else:
        (tmp_path / "copy" / name).write_text((tmp_path / "copy" / name).read_text() + "\n")
    for enter in (load_target, examine_target):
        with pytest.raises(
            DeepSpecError, match=rf"is of target {kept}, and [0-9a-f]{{16}} is there"
        ) as caught:
            enter(tmp_path / "copy")
        assert "\n" not in str(caught.value)
    (tmp_path / "copy/deepspec.json").unlink()
    assert load_target(tmp_path / "copy").digest != kept


def test_a_record_with_template_arguments_is_of_its_files_too(directory, tmp_path):
    options = {"mood": "merry"}
    resolve_target(str(directory), None, "float32", tmp_path / "copy", chat_template_kwargs=options)
    assert load_target(tmp_path / "copy").chat_template_kwargs == options
    flipped(tmp_path / "copy" / WEIGHTS)
    with pytest.raises(DeepSpecError, match="its files were changed"):
        load_target(tmp_path / "copy")


def test_weights_changed_in_place_change_the_digest_of_a_directory_without_a_record(directory):
    settled(directory)
    before = directory_digest(directory)
    flipped(directory / WEIGHTS)
    assert directory_digest(directory) != before


def test_files_that_have_not_changed_are_not_opened_again(directory, monkeypatch):
    settled(directory)
    first = directory_digest(directory)
    opened = []
    plain = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: opened.append(path.name) or plain(path, *a, **k))
    assert directory_digest(directory, lambda path: opened.append("checks")) == first
    assert not {WEIGHTS, "tokenizer.json", "checks"} & set(opened)


def test_files_that_were_written_just_now_are_hashed_again(directory):
    (directory / "config.json").touch()
    directory_digest(directory)
    assert not (Path.home() / ".cache/deepspec/digests").exists()


@pytest.mark.parametrize("size", ["tokenizer", "stop"])
def test_a_special_token_beyond_the_embeddings_is_refused_where_it_can_come(directory, size):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image|>"]})
    tokenizer.save_pretrained(directory)
    assert load_target(directory).vocab_size == len(tokenizer) - 1  # it comes in no text
    if size == "stop":
        tokenizer.eos_token = "<|image|>"
    else:
        tokenizer.chat_template += "<|image|>"
    tokenizer.save_pretrained(directory)
    with pytest.raises(DeepSpecError, match=r"its tokenizer writes '<\|image\|>' as 512, and it has 512 emb"):
        load_target(directory)


def test_a_tokenizer_with_more_words_than_embeddings_is_refused(directory, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["swimming", "apples"])
    tokenizer.save_pretrained(directory)
    with pytest.raises(DeepSpecError, match=r"its tokenizer writes '\w+' as 512, and it has 512 embeddings"):
        load_target(directory)
    with pytest.raises(DeepSpecError, match="its tokenizer writes"):
        resolve_target(str(directory), None, "float32", tmp_path / "out")


@pytest.mark.parametrize("stops", ["2", 1.5, [1, "2"], -1, 512])
def test_a_stop_token_that_is_none_is_refused(directory, stops):
    changed(directory, "generation_config.json", eos_token_id=stops)
    with pytest.raises(DeepSpecError) as caught:
        load_target(directory)
    assert "eos_token_id" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("stops", "found"), [(None, {1}), (7, {1, 7}), ([7, 9], {1, 7, 9})])
def test_stop_tokens_are_one_several_or_none(directory, stops, found):
    target = load_target(changed(directory, "generation_config.json", eos_token_id=stops))
    assert target.stop_ids == found
    assert set(stop_tokens(target.generation_config)) | {1} == found


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, ()),
        ({"temperature": 0.6, "do_sample": True, "top_k": 20, "repetition_penalty": 1.0, "num_beams": 1}, ()),
        ({"repetition_penalty": 1.05, "suppress_tokens": []}, ("repetition_penalty 1.05",)),
        ({"bad_words_ids": [[3]], "min_new_tokens": 4}, ("min_new_tokens 4", "bad_words_ids [[3]]")),
        ({"forced_eos_token_id": 1, "forced_bos_token_id": None}, ("forced_eos_token_id 1",)),
    ],
)
def test_settings_that_change_greedy_answers_are_named(settings, said, directory):
    changed(directory, "generation_config.json", **settings)
    assert not_applied(load_target(directory).generation_config) == said


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "awq", "gptq", "compressed-tensors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dense_weights_under_a_quantised_configuration_are_refused(method, dtype, tmp_path):
    make_target(tmp_path / "target", dtype=dtype, layers=1)
    changed(tmp_path / "target", "config.json", quantization_config={"quant_method": method})
    refused(tmp_path / "target", f"quantization_config says {method}, but the weights are dense")


def test_weights_in_eight_bits_are_run_as_transformers_runs_them(directory):
    """Blocks of 128 with a scale each; on a CPU transformers makes them dense."""
    weights = load_file(directory / WEIGHTS)
    for name in [name for name in weights if "_proj" in name]:
        weight = weights.pop(name).float()
        scale = weight.abs().max() / 448
        weights[name] = (weight / scale).to(torch.float8_e4m3fn)
        weights[name + "_scale_inv"] = scale.expand(
            -(-weight.shape[0] // 128), -(-weight.shape[1] // 128)
        ).clone()
    save_file(weights, directory / WEIGHTS, {"format": "pt"})
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    changed(directory, "config.json", quantization_config=settings)
    try:
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    except Exception as error:
        pytest.skip(f"transformers does not run it here: {error}")
    ids = torch.arange(20, 40)[None]
    target = load_target(directory, dtype="float32", device="cpu")
    found = target.logits(target.forward(ids, ForwardPass(torch.arange(20)[None])))
    with torch.inference_mode():
        assert torch.allclose(found, theirs(ids).logits, atol=1e-3)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_quantised_weights_whose_library_is_not_there_name_it(method, directory):
    weights = load_file(directory / WEIGHTS)
    weights["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(8, 8, dtype=torch.int32)
    save_file(weights, directory / WEIGHTS, {"format": "pt"})
    changed(directory, "config.json", quantization_config={"quant_method": method, "bits": 4})
    refused(directory, "cannot be loaded as a target: .*")


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_that_is_not_merged_is_refused(directory, whole):
    changed(directory, "adapter_config.json", peft_type="LORA", base_model_name_or_path="owner/base")
    if not whole:
        (directory / "config.json").unlink()
    refused(directory, r"holds an adapter \(adapter_config.json\) that is not merged into owner/base")


def test_a_model_without_layers_is_refused(directory):
    changed(directory, "config.json", num_hidden_layers=0)
    refused(directory, "num_hidden_layers 0; a target has one at least")


@pytest.mark.parametrize("name", ["generation_config.json", "config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", "", "[1]", "\xff"])
def test_settings_that_cannot_be_read_are_not_taken_for_absent(directory, name, text):
    (directory / name).write_bytes(text.encode("latin-1"))
    refused(directory, f"{name}: not (valid JSON|an object)")


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_weights_cut_short_are_refused_by_name(directory, left):
    whole = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(whole[: left if left >= 0 else len(whole) + left])
    refused(directory, rf"{WEIGHTS}: cannot be loaded: ")


def test_a_shard_of_the_index_that_is_missing_or_cut_short_is_refused(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    (directory / WEIGHTS).unlink()
    model.save_pretrained(directory, max_shard_size="400KB")
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 1 and load_target(directory).num_layers == 4
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-1])
    refused(directory, rf"{shards[1].name}: cannot be loaded: it has {len(whole) - 1} of {len(whole)} bytes")
    shards[1].unlink()
    refused(directory, f"index.json: names {shards[1].name}, which is not there")


def test_code_that_comes_with_a_model_is_not_run_nor_asked_about(directory, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda said="": pytest.fail(f"asked: {said}"))
    for name in ("configuration_own.py", "modeling_own.py"):
        (directory / name).write_text(f"open({str(directory / 'ran')!r}, 'w')\n")
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    assert load_target(changed(directory, "config.json", auto_map=code)).num_layers == 4  # transformers' own
    changed(directory, "config.json", model_type="own")
    refused(directory, "cannot be loaded as a target: it needs code of its own, which is not run here$")
    assert not (directory / "ran").exists()


def test_a_file_that_is_no_file_is_refused(directory):
    (directory / "extra.safetensors").symlink_to(directory / "nowhere")
    with pytest.raises(DeepSpecError, match=r"extra\.safetensors: cannot be read: No such file"):
        load_target(directory)
    (directory / "extra.safetensors").unlink()
    check_files(directory)


SHARDS = "pytorch_model.bin.index.json"
MAP = json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model-00001-of-00002.bin"}})
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (SHARDS, MAP),
        (f"{WEIGHTS}.index.json", MAP),
        ("consolidated.safetensors", POINTER),
        ("consolidated.safetensors.index.json", MAP),
    ],
)
def test_weights_that_transformers_does_not_read_are_let_be(name, text, directory):
    expected = load_target(directory)
    (directory / name).write_text(text)
    found, ends = load_target(directory), load_ends(directory)
    assert torch.equal(found.head_weight, expected.head_weight) and found.digest != expected.digest
    assert torch.equal(ends.embeddings, expected.embeddings)
    assert torch.equal(ends.head_weight, expected.head_weight)


def test_shards_that_transformers_reads_go_before_files_of_pytorch(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    (directory / WEIGHTS).unlink()
    model.save_pretrained(directory, max_shard_size="400KB")
    torch.save({"lm_head.weight": torch.zeros(512, 64)}, directory / "pytorch_model.bin")
    (directory / SHARDS).write_text(MAP)
    assert torch.equal(load_target(directory).head_weight, model.lm_head.weight)
    assert torch.equal(load_ends(directory).head_weight, model.lm_head.weight)


@pytest.mark.parametrize("source", ["~/target", "nowhere/at/all"])
def test_a_home_that_nobody_spelled_out_is_no_hub_id(source):
    with pytest.raises(DeepSpecError, match=f"^{source}: no such target directory"):
        load_target(source)
