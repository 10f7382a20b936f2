"""A target that only an engine holds is resolved, described and exported for without its layers."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from deepspec.config import Params, load_params
from deepspec.drafters.suitable import intended
from deepspec.errors import DeepSpecError
from deepspec.export.suitable import refusals
from deepspec.stages import target as stage
from deepspec.target.identity import directory_digest
from deepspec.target.unloaded import resolve_unloaded
from tests.unit.test_ends import layer_shards, recorded, same_ends, whole, write_family

ROOT = Path(__file__).parents[2]


def parameters(**target) -> Params:
    raw = load_params(ROOT / "params.smoke.yaml").model_dump(by_alias=True)
    raw["target"] |= {"engine": "vllm"} | target
    raw["train"] |= {"real_decode": False}
    return Params.model_validate(raw)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_no_weight_of_a_layer_is_read(family, tmp_path, monkeypatch):
    source = write_family(tmp_path / "source", family)
    theirs = whole(source)
    read = recorded(monkeypatch)
    ends = resolve_unloaded(str(source), None, "float32", tmp_path / "target")
    networks, refused = intended(ends, parameters().drafters)
    assert {"dspark", "eagle3", "medusa"} <= networks.keys() and set(refused) <= {"lm"}
    assert refusals(ends, networks)["dspark"]["vllm"] is None
    assert not [name for name in read if ".layers." in name]
    monkeypatch.undo()
    same_ends(tmp_path / "target", theirs)


def test_the_weights_are_those_files_and_the_source_stays_as_it_is(tmp_path):
    source = write_family(tmp_path / "source", "qwen3")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    resolve_unloaded(str(source), None, "bfloat16", tmp_path / "target")
    for path in layer_shards(source):
        assert path.samefile(tmp_path / "target" / path.name)
    config = json.loads((tmp_path / "target/config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_what_an_engine_quantises_is_another_target(tmp_path):
    source = write_family(tmp_path / "source", "qwen3")
    dense, rounded = tmp_path / "dense", tmp_path / "rounded"
    one = resolve_unloaded(str(source), None, "float32", dense)
    other = resolve_unloaded(str(source), None, "float32", rounded, quantization="fp8")
    assert one.digest != other.digest
    assert [directory_digest(each) for each in (dense, rounded)] == [one.digest, other.digest]
    record = json.loads((rounded / "deepspec.json").read_text())
    assert (record["engine"], record["quantization"]) == ("vllm", "fp8")


def test_a_template_that_hides_what_a_user_says_is_refused(tmp_path):
    source = write_family(tmp_path / "source", "qwen3")
    (source / "chat_template.jinja").write_text("Hello.")
    with pytest.raises(DeepSpecError, match="the chat template does not show what a user says"):
        resolve_unloaded(str(source), None, "float32", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_broken_files_and_strange_sources_are_refused(tmp_path):
    source = write_family(tmp_path / "source", "qwen3")
    layer_shards(source)[0].unlink()
    with pytest.raises(DeepSpecError):
        resolve_unloaded(str(source), None, "float32", tmp_path / "target")
    assert not (tmp_path / "target").exists()
    with pytest.raises(DeepSpecError, match="no such target directory"):
        resolve_unloaded(str(tmp_path / "nowhere"), None, "float32", tmp_path / "target")


def test_the_stage_loads_nothing_of_the_layers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = write_family(tmp_path / "source", "qwen3_moe")
    monkeypatch.setitem(sys.modules, "deepspec.target.selftest.examine", None)
    read = recorded(monkeypatch)
    stage.main(parameters(source=str(source)).model_copy(update={"pipeline": ["dspark", "medusa"]}), None)
    said = capsys.readouterr().out
    assert "vLLM runs it, 4 layers that are not loaded here" in said and "medusa: engines" in said
    assert not [name for name in read if ".layers." in name]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target": {"vllm": {"tensor_parallel": 0}}}, "target.vllm.tensor_parallel"),
        ({"target": {"vllm": {"tensor": 2}}}, "unknown key 'target.vllm.tensor'"),
        (
            {"target": {"vllm": {"base_urls": ["http://a"], "tensor_parallel": 2}}},
            "target.vllm.tensor_parallel is of a server that is started here",
        ),
        ({"target": {"vllm": {"states_folder": "x"}}}, "states_folder is of servers at base_urls"),
        ({"train": {"real_decode": True}}, "set train.real_decode to false"),
    ],
)
def test_what_does_not_go_together_is_told_in_one_line(change, said, tmp_path):
    raw = yaml.safe_load((ROOT / "params.smoke.yaml").read_text())
    raw["target"] |= {"engine": "vllm"}
    raw["train"] |= {"real_decode": False}
    for section, values in change.items():
        raw[section] |= values
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(DeepSpecError) as error:
        load_params(tmp_path / "params.yaml")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_export_is_compared_on_states_that_are_drawn(tmp_path, monkeypatch):
    from deepspec.drafters.checkpoint import stored_weights, write_drafter
    from deepspec.export.draft import load_draft
    from deepspec.export.engines import export
    from tests.tiny import make_network

    source = write_family(tmp_path / "source", "qwen3")
    ends = resolve_unloaded(str(source), None, "float32", tmp_path / "target")
    network = make_network(ends, "eagle3", block_size=3, target_layer_ids=[0, 1, 2])
    write_drafter(tmp_path / "draft", network.description(), stored_weights(network), ends, {})
    read = recorded(monkeypatch)
    draft = load_draft("eagle3", tmp_path / "draft", ends)
    entry = export(draft, ["vllm"], tmp_path / "exports")["engines"]["vllm"]
    assert entry["parity"]["passed"] and not [
        name for name in read if "target" in name and ".layers." in name
    ]
    assert {check["name"] for check in entry["parity"]["checks"]} >= {"logits", "layer_ids"}
    shutil.rmtree(tmp_path / "exports")
