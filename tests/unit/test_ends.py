"""A target's ends are read by key: what training needs of it is there when its layers are not."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks.tiny_families import tiny_config, tiny_model
from deepspec.config import Params, load_params
from deepspec.drafters.algorithms.lm import cut_out
from deepspec.errors import DeepSpecError
from deepspec.files import file_digest
from deepspec.target.ends import load_ends
from deepspec.target.model import Target, load_target
from deepspec.target.source import load_model
from deepspec.training import run
from deepspec.training.paths import TrainingPaths
from tests.tiny import make_target, make_tokenizer

ROOT = Path(__file__).parents[2]
# A mixture of experts, latent attention, and heads with a scale, a soft cap and a bias.
FAMILIES = ("qwen3_moe", "deepseek_v3", "cohere", "gemma2", "phi", "gpt2")
EMBEDDINGS = "model.embed_tokens.weight"


def write_family(directory: Path, family: str, shards: str = "40KB", **own) -> Path:
    """Write a tiny random target of a family, its weights in many shards."""
    tokenizer = make_tokenizer()
    model = tiny_model(family, config=tiny_config(family, **own))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory, max_shard_size=shards)
    tokenizer.save_pretrained(directory)
    return directory


def whole(directory: Path) -> Target:
    """The target as it is when all of it is loaded, without its self-test."""
    tokenizer = make_tokenizer()
    return Target(load_model(str(directory), dtype="auto"), tokenizer, str(directory))


def same_ends(directory: Path, theirs: Target) -> None:
    ours = load_ends(directory)
    assert torch.equal(ours.embeddings, theirs.embeddings)
    assert torch.equal(ours.head_weight, theirs.head_weight)
    assert (ours.head_weight is ours.embeddings) == (
        theirs.head_weight.data_ptr() == theirs.embeddings.data_ptr()
    )
    hidden = torch.randn(3, theirs.hidden_size, generator=torch.Generator().manual_seed(0)).to(theirs.dtype)
    assert torch.equal(ours.logits(hidden), theirs.logits(hidden))
    for name in ("dtype", "num_layers", "max_length", "rope_theta", "stop_ids", "vocab_size", "precision"):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ends_are_those_of_the_whole_target(family, tmp_path):
    same_ends(tmp_path, whole(write_family(tmp_path, family)))


def test_one_tensor_may_be_both_ends(tmp_path):
    same_ends(tmp_path, whole(write_family(tmp_path, "qwen3", tie_word_embeddings=True)))


def test_weights_of_pytorch_and_names_of_a_bare_decoder_are_read_too(tmp_path):
    make_target(tmp_path)
    theirs = whole(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(
        {name.removeprefix("model."): weight for name, weight in weights.items()},
        tmp_path / "pytorch_model.bin",
    )
    same_ends(tmp_path, theirs)


def layer_shards(directory: Path) -> list[Path]:
    """The files that hold nothing but weights of layers."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    others = {file for name, file in index.items() if ".layers." not in name}
    return [directory / file for file in sorted(set(index.values()) - others)]


def test_the_shards_of_layers_may_be_anywhere_else(tmp_path):
    theirs = whole(write_family(tmp_path, "qwen3_moe"))
    lost = layer_shards(tmp_path)
    assert len(lost) > 3
    for i, path in enumerate(lost):
        path.unlink() if i % 2 else path.write_bytes(b"no longer weights")
    same_ends(tmp_path, theirs)


def test_lent_layers_are_those_of_the_whole_target_and_no_others_are_read(tmp_path):
    write_family(tmp_path, "llama", shards="1KB")  # a weight a file
    theirs = whole(tmp_path)
    for path in layer_shards(tmp_path):
        if any(f".layers.{i}." in name for name in load_file(path) for i in (0, 1, 2)):
            path.unlink()
    ours = load_ends(tmp_path)
    (mine,), (lent,) = ours.last_layers(1), theirs.last_layers(1)
    for part in ("qkv", "out", "gate_up", "down"):
        assert torch.equal(getattr(mine, part).dense, getattr(lent, part).dense), part
    assert torch.equal(ours.last_norm, theirs.last_norm)
    with pytest.raises(DeepSpecError, match=r"cannot be read|which is not there"):
        ours.last_layers(2)


def test_layers_of_another_shape_are_not_lent(tmp_path):
    ends = load_ends(write_family(tmp_path, "deepseek_v3"))
    with pytest.raises(DeepSpecError, match="cannot begin as layers of this shape"):
        ends.last_layers(1)


@pytest.mark.parametrize("own", [{}, {"tie_word_embeddings": True}], ids=["two ends", "one end"])
def test_a_draft_of_some_layers_reads_these_alone(own, tmp_path, monkeypatch):
    write_family(tmp_path, "qwen3", shards="1KB", **own)
    state = load_model(str(tmp_path), dtype=torch.float32).state_dict()
    read = recorded(monkeypatch)
    model = cut_out(load_ends(tmp_path), [0, 3])
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, state[name.replace(".layers.1.", ".layers.3.")]), name
    assert {name.split(".")[2] for name in read if ".layers." in name} == {"0", "3"}


def test_layers_whose_weights_are_put_together_are_cut_out_of_the_whole(tmp_path):
    write_family(tmp_path, "qwen3_moe")
    state = load_model(str(tmp_path), dtype=torch.float32).state_dict()
    for name, weight in cut_out(load_ends(tmp_path), [2]).state_dict().items():
        assert torch.equal(weight, state[name.replace(".layers.0.", ".layers.2.")]), name


def test_an_end_that_is_not_there_is_named(tmp_path):
    make_target(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    torch.save({n: w for n, w in weights.items() if n != EMBEDDINGS}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(DeepSpecError, match=f"its weights lack {EMBEDDINGS}"):
        load_ends(tmp_path)


def recorded(monkeypatch) -> set[str]:
    """The names of the weights that are read from safetensors from now on."""
    names: set[str] = set()

    @contextmanager
    def opened(path, framework):
        with safe_open(path, framework) as file:
            get = lambda name: (names.add(name), file.get_tensor(name))[1]  # noqa: E731
            yield SimpleNamespace(keys=file.keys, get_tensor=get, get_slice=file.get_slice)

    monkeypatch.setattr("deepspec.target.weights.safe_open", opened)
    return names


def write_data(directory: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 40, (24,), generator=rng).tolist()
    rows = [torch.randint(2, 500, (n,), generator=rng).tolist() for n in lengths]
    directory.mkdir(parents=True)
    table = pyarrow.table({"input_ids": rows, "loss_mask": [[0] * 5 + [1] * (len(row) - 5) for row in rows]})
    pyarrow.parquet.write_table(table, directory / "train.parquet")
    (directory / "manifest.json").write_text(json.dumps({"digest": "d"}))


def settings() -> Params:
    raw = load_params(ROOT / "params.smoke.yaml").model_dump(by_alias=True)
    raw["train"] |= {"steps": 4, "eval_every": 2, "save_every": 2, "real_decode": False}
    return Params.model_validate(raw)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_draft_is_trained_to_the_byte_without_the_layers(family, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data/distill")
    target = write_family(tmp_path / "target", family)

    def draft(name: str) -> Path:
        root = tmp_path / name
        paths = TrainingPaths(root / "draft", root / "history.jsonl", root / "features.json")
        run.train(settings(), "dspark", target, paths)
        shutil.rmtree(tmp_path / ".deepspec/train")
        return paths.draft

    with monkeypatch.context() as patched:
        patched.setattr(run, "load_ends", lambda directory, device: load_target(directory, device=device))
        expected = draft("whole")
    read = recorded(monkeypatch)
    monkeypatch.setattr(run, "load_target", None)
    found = draft("ends")
    assert EMBEDDINGS in read and not [name for name in read if ".layers." in name]
    names = sorted(path.name for path in expected.iterdir() if path.name != "deepspec.json")
    assert names == sorted(path.name for path in found.iterdir() if path.name != "deepspec.json")
    assert [file_digest(found / name) for name in names] == [file_digest(expected / name) for name in names]
    records = [(tmp_path / name / "history.jsonl").read_text() for name in ("whole", "ends")]
    losses = [[json.loads(line)["loss"] for line in record.splitlines()] for record in records]
    assert losses[0] == losses[1]
