"""Exports: formats and refusals, the same bytes every time, readers that know DeepSeek's formats, cards and advice."""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deepspec.decoding.drafter import Drafter
from deepspec.decoding.engine import Engine
from deepspec.decoding.request import Request
from deepspec.drafters.load import load_drafter
from deepspec.errors import DeepSpecError
from deepspec.evaluation.record import Record
from deepspec.export import reference
from deepspec.export.advice import advise
from deepspec.export.draft import load_draft
from deepspec.export.engines import ENGINES, chosen, export, with_others
from deepspec.export.readers import block, eagle3
from deepspec.export.readers.directory import Directory
from deepspec.export.readers.sample import Sample
from deepspec.files import file_digest, write_json
from deepspec.stages import export as stage
from deepspec.target.model import Target, load_target
from tests import records
from tests.exporting import LAYERS, SIZES, make_draft, samples, written
from tests.tiny import SCALINGS, make_target, scaled_target

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
LLAMACPP = {"precision": "f16", "with_target": False}
SERVED = {
    "eagle3": {"hf", "vllm", "speculators", "sglang", "llamacpp"},
    "dspark": {"hf", "vllm", "speculators", "sglang", "llamacpp"},
    "dflash": {"hf", "vllm", "speculators", "sglang", "llamacpp"},
    "dflash2": {"hf", "llamacpp"},
    "peagle": {"hf", "vllm"},
    "mtp": {"hf"},
    "medusa": {"hf", "vllm", "tgi"},
    "lm": {"hf", "vllm", "sglang", "llamacpp"},
    "lookup": {"hf", "vllm", "sglang", "tgi"},
    "suffix": {"hf", "vllm", "sglang", "tgi"},
}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return load_target(make_target(tmp_path_factory.mktemp("target"), layers=LAYERS))


@pytest.fixture(scope="module")
def published_target(tmp_path_factory):
    """Of the shape that the published drafts of tests/fixtures are for."""
    directory = make_target(tmp_path_factory.mktemp("target"), "qwen3", layers=6)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return load_target(directory)


@pytest.mark.parametrize("kind", SERVED)
def test_a_draft_goes_to_every_engine_that_can_serve_it(kind, target, tmp_path):
    draft = make_draft(tmp_path, target, kind)
    record = export(draft, chosen(None), tmp_path / "exports" / kind)
    assert record["passed"], record
    assert record["draft_digest"] == draft.digest and record["target_digest"] == target.digest
    assert {name for name, entry in record["engines"].items() if "refused" not in entry} == SERVED[kind]
    for name, entry in record["engines"].items():
        if "refused" in entry:
            assert not (tmp_path / "exports" / kind / name).exists()
            continue
        directory = Path(entry["path"])
        assert entry["files"] == {name: file_digest(directory / name) for name in entry["files"]}
        assert {path.name for path in directory.iterdir()} == {*entry["files"], "SHA256SUMS"}
        assert entry["command"] in (directory / "README.md").read_text()
        sums = subprocess.run(
            ["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=directory, capture_output=True
        )
        assert sums.returncode == 0


@pytest.mark.parametrize("kind", ["eagle3", "dspark", "medusa", "lm", "lookup"])
def test_two_exports_of_a_draft_have_the_same_bytes(kind, target, tmp_path):
    draft = make_draft(tmp_path, target, kind)
    again = replace(draft, directory=draft.directory)  # nothing remembered
    first, second = (export(each, chosen(None), tmp_path / "exports") for each in (draft, again))
    assert first == second


@pytest.mark.parametrize(
    ("kind", "engine", "sizes", "says"),
    [
        ("dspark", "vllm", {"context_skip": True}, "context_skip: false"),
        ("dspark", "vllm", {"markov_head": "gated"}, "markov_head: vanilla"),
        ("dspark", "speculators", {"markov_head": "rnn"}, "markov_head: vanilla"),
        ("dspark", "sglang", {"sample_from_anchor": False}, "sample_from_anchor: true"),
        ("dflash", "vllm", {"sample_from_anchor": True}, "sample_from_anchor: false"),
        ("dflash", "sglang", {"context_skip": True}, "context_skip: false"),
        ("dflash", "vllm", {"target_layer_ids": [3, 1]}, "ascending"),
        ("dflash", "vllm", {"target_layer_ids": [-1, 1]}, "without target layer -1"),
        ("eagle3", "vllm", {"qk_norm": True}, "qk_norm: false"),
        ("eagle3", "sglang", {"target_layer_ids": [1, 2]}, "three target layers"),
        ("eagle3", "sglang", {"target_layer_ids": [0, 2, 4]}, "from 1 on"),
        ("eagle3", "tgi", {}, "train medusa"),
        ("eagle3", "sglang", {"version": "3.1"}, 'version: "3"'),
        ("dflash2", "vllm", {}, "not in a release of vLLM whose reading of it could be checked (vllm#52816"),
        ("dflash2", "speculators", {}, "speculators#1006"),
        ("dflash2", "sglang", {}, "sglang#35371 proposes it"),
        ("mtp", "vllm", {}, "engines run next-token modules of families whose checkpoints bring them"),
        ("mtp", "tgi", {}, "train medusa"),
        ("mtp", "speculators", {}, "export --to vllm"),
        ("mtp", "llamacpp", {}, "engines run next-token modules of families whose checkpoints bring them"),
        ("eagle3", "vllm", {"sliding_window": 9}, "its attention has a window"),
        ("dflash", "sglang", {"causal": True}, "causal: false"),
        ("dspark", "vllm", {"sliding_window": 9}, "no sliding_window"),
    ],
)
def test_what_an_engine_cannot_serve_is_refused_with_what_to_train(
    kind, engine, sizes, says, target, tmp_path
):
    draft = make_draft(tmp_path, target, kind, **sizes)
    record = export(draft, [engine, "hf"], tmp_path / "exports")
    assert says in record["engines"][engine]["refused"]
    assert record["passed"]  # what our own engine and transformers read is written


@pytest.mark.parametrize("kind", ["eagle3", "peagle", "dflash", "dspark"])
def test_the_scaling_of_the_rotary_embedding_goes_along(kind, tmp_path):
    target = load_target(scaled_target(tmp_path / "target", SCALINGS["llama3"], layers=LAYERS))
    record = export(make_draft(tmp_path, target, kind), chosen(None), tmp_path / "exports")
    assert record["passed"], record
    config = json.loads((tmp_path / "exports" / "vllm" / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "llama3" and config["rope_scaling"]["factor"] == 8
    if kind != "peagle":
        assert "rope: plain" in record["engines"]["llamacpp"]["refused"]


def test_nothing_written_is_nothing_passed(target, tmp_path):
    draft = make_draft(tmp_path, target, "eagle3")
    assert not export(draft, ["tgi"], tmp_path / "exports")["passed"]


def test_an_export_for_one_engine_keeps_what_is_known_of_the_others(target, tmp_path):
    draft, path = make_draft(tmp_path, target, "eagle3"), tmp_path / "eagle3.json"
    everything = export(draft, chosen(None), tmp_path / "exports")
    assert with_others(everything, path) == everything
    write_json(path, everything)
    refused = with_others(export(draft, ["tgi"], tmp_path / "exports"), path)
    assert refused == everything  # exports of one draft have the same bytes
    write_json(path, everything | {"draft_digest": "another"})
    assert set(with_others(export(draft, ["vllm"], tmp_path / "exports"), path)["engines"]) == {"vllm"}


def test_a_refusal_leaves_no_directory_of_an_earlier_draft(target, tmp_path):
    export(make_draft(tmp_path / "a", target, "dspark"), ["vllm"], tmp_path / "exports")
    assert (tmp_path / "exports/vllm").exists()
    export(make_draft(tmp_path / "b", target, "dspark", context_skip=True), ["vllm"], tmp_path / "exports")
    assert not (tmp_path / "exports/vllm").exists()


def test_layer_ids_are_counted_as_each_engine_counts_them(target, tmp_path):
    draft = make_draft(tmp_path, target, "eagle3")

    def config(engine):
        return json.loads((written(draft, engine, tmp_path)[1] / "config.json").read_text())

    ids = SIZES["eagle3"]["target_layer_ids"]
    key = "eagle_aux_hidden_state_layer_ids"
    assert config("vllm")[key] == config("vllm")["eagle_config"][key] == [i + 1 for i in ids]
    assert config("speculators")[key] == [i + 1 for i in ids]
    assert config("sglang")["eagle_config"][key] == ids and key not in config("sglang")


def test_a_native_export_drafts_in_our_engine_as_the_draft_does(target, tmp_path):
    for kind in ("eagle3", "dspark", "dflash", "medusa", "lookup"):
        draft = make_draft(tmp_path, target, kind)
        export(draft, ["hf"], tmp_path / "exports" / kind)
        ours, theirs = (
            proposals(load_drafter(directory, target), target)
            for directory in (draft.directory, tmp_path / "exports" / kind / "hf")
        )
        assert ours == theirs and any(ours), kind


def proposals(drafter: Drafter, target: Target) -> list[list[int]]:
    """The tokens that are drafted in each round of a greedy answer to a text that repeats itself."""
    found: list[list[int]] = []
    engine = Engine(target, drafter, on_round=lambda part: found.append(part.proposal.tokens))
    requests = iter([Request([5, 6, 7, 8] * 4, 12, stop_ids=frozenset())])
    list(engine.run(lambda: next(requests, None)))
    return found


def test_an_assistant_model_helps_transformers_and_changes_no_token(target, tmp_path):
    draft = make_draft(tmp_path, target, "lm")
    record = export(draft, ["hf"], tmp_path / "exports")
    model = AutoModelForCausalLM.from_pretrained(target.source, dtype=torch.float32)
    assistant = AutoModelForCausalLM.from_pretrained(record["engines"]["hf"]["path"], dtype=torch.float32)
    assert assistant.generation_config.num_assistant_tokens == 3
    ids = torch.tensor([target.chat_ids([{"role": "user", "content": "How many apples?"}])])
    plain, helped = (
        model.generate(ids, max_new_tokens=12, do_sample=False, **options)
        for options in ({}, {"assistant_model": assistant})
    )
    assert torch.equal(plain, helped)


@pytest.mark.parametrize("name", ["dspark-vanilla-tiny", "dspark-gated-tiny", "eagle3-tiny"])
def test_readers_give_the_outputs_that_deepseek_published(name):
    expected = load_file(FIXTURES / name / "expected.safetensors")
    source = Directory.open(FIXTURES / name)
    layers = source.config["target_layer_ids"]
    features = expected["features"][0].chunk(len(layers), -1)
    tokens = torch.cat([expected["prompt_ids"][0], expected["anchor"], expected["draft_tokens"][0]])
    none = torch.empty(0)
    sample = Sample(
        tokens=tokens,
        anchors=torch.tensor([len(expected["prompt_ids"][0])]),
        gamma=expected["draft_tokens"].shape[1],
        states={i: x for i, x in zip(layers, features, strict=True)},
        last=none,
        embeddings=none,
        head=none,
    )
    reading = (eagle3 if "eagle3" in name else block).native(source, sample)
    assert torch.allclose(reading.logits[0], expected["draft_logits"][0], atol=1e-5)
    assert source.unread() == []


@pytest.mark.parametrize("name", ["dspark-vanilla-tiny", "dspark-gated-tiny", "eagle3-tiny"])
def test_a_published_draft_saved_and_loaded_again_has_the_same_logits(name, published_target, tmp_path):
    draft = load_draft(name, FIXTURES / name, published_target)
    record = export(draft, ["hf"], tmp_path)
    assert record["passed"], record
    again = load_draft(name, tmp_path / "hf", published_target)
    (sample,) = samples(draft)
    assert torch.equal(reference.logits(draft.network, sample), reference.logits(again.network, sample))


def test_a_published_dspark_goes_to_vllm_with_its_own_embeddings_and_head(published_target, tmp_path):
    draft = load_draft("published", FIXTURES / "dspark-vanilla-tiny", published_target)
    record = export(draft, ["vllm"], tmp_path)
    assert record["passed"], record
    weights = load_file(tmp_path / "vllm" / "model.safetensors")
    assert {"embed_tokens.weight", "lm_head.weight"} <= set(weights) and "d2t" not in weights


def test_readers_import_nothing_of_the_drafters():
    for path in (ROOT / "deepspec/export/readers").glob("*.py"):
        tree = ast.parse(path.read_text())
        modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        ours = {module for module in modules if module.startswith("deepspec")}
        assert all(module.startswith("deepspec.export.readers") for module in ours), path


def test_the_package_imports_no_pipeline_tool():
    tools = {"dvc", "prefect", "mlflow", "datasets", "great_expectations", "pandas", "pyarrow"}
    code = f"import sys, deepspec.export.engines; print({tools} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_an_unknown_engine_is_an_error_that_names_the_nearest():
    with pytest.raises(DeepSpecError, match=r"unknown engine 'vlm'; known: hf, .*did you mean 'vllm'\?"):
        chosen(["vlm"])
    assert chosen(["vllm", "hf", "vllm"]) == ["vllm", "hf"]
    assert chosen(["all"]) == chosen(None) == list(ENGINES)


def record(rates: list[float], draft_s: float) -> Record:
    """An evaluation record of a target whose passes all take 20 ms."""
    alone = {
        "blocks": 9,
        "tau": 2.0,
        "accept_rate_by_position": rates,
        "reached_by_position": [9] * len(rates),
    }
    costs = {"identity": {}, "passes": {"1": [[1, 0.02], [8, 0.02]]}, "drafts": {"1": draft_s}}
    made = records.record(draft_digest="d", blocks={"greedy": {"task": alone}}, round_costs=costs)
    return Record.parse(made, "made up")


def test_advice_weighs_what_a_token_is_worth_against_what_it_costs():
    rates = [0.8, 0.5, 0.1, 0.1]
    cheap, dear = (advise(record(rates, s), "eagle3", 4) for s in (0.0001, 0.02))
    assert (cheap.tokens, dear.tokens) == (4, 2)
    assert [round(choice.tau, 3) for choice in dear.choices] == [1.8, 2.2, 2.24, 2.244]
    assert dear.choices[1].tokens_per_second == pytest.approx(2.2 / 0.03)
    assert advise(record(rates, 0.02), "dflash", 4).tokens == 4  # a block is drafted whole or not at all
    assert advise(None, "eagle3", 4).tokens == 4


def test_a_record_of_another_draft_is_refused(target, tmp_path):
    draft = make_draft(tmp_path, target, "eagle3")
    path = tmp_path / "eval.json"
    record([0.5], 0.01).write(path)
    with pytest.raises(DeepSpecError, match=r"measured with draft d, but this one is .*; evaluate it first"):
        load_draft("eagle3", draft.directory, target, path)


def test_the_stage_fails_in_words_where_an_export_is_not_the_draft(target, tmp_path, monkeypatch):
    """A draft whose own config.json names fewer positions than its target has."""
    monkeypatch.chdir(tmp_path)
    draft = make_draft(tmp_path / "data/drafts", target, "eagle3")
    config = json.loads((draft.directory / "config.json").read_text())
    (draft.directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    (tmp_path / "data/target").symlink_to(target.source)
    flags = argparse.Namespace(
        drafter="eagle3", to=["hf", "vllm"], output=Path("data/exports"), precision="f16", with_target=False
    )
    with pytest.raises(DeepSpecError, match="hf: max_position_embeddings is 2048, the target's 4096"):
        stage.main(None, flags)
    record = json.loads(Path("reports/export/eagle3.json").read_text())
    assert not record["passed"]
    assert record["engines"]["vllm"]["parity"]["passed"]  # written with the target's positions
    assert record["engines"]["vllm"]["command"].startswith("vllm serve data/target --speculative-config")


def test_asking_for_an_engine_that_refuses_is_an_error(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_draft(tmp_path / "data/drafts", target, "eagle3")
    (tmp_path / "data/target").symlink_to(target.source)
    flags = argparse.Namespace(
        drafter="eagle3", to=["tgi"], output=Path("data/exports"), precision="f16", with_target=False
    )
    with pytest.raises(DeepSpecError, match="eagle3: nothing was written"):
        stage.main(None, flags)
    assert not json.loads(Path("reports/export/eagle3.json").read_text())["passed"]


def test_another_targets_draft_is_refused(target, published_target, tmp_path):
    draft = make_draft(tmp_path, target, "eagle3")
    with pytest.raises(DeepSpecError, match="made for target"):
        load_draft("eagle3", draft.directory, published_target)
