"""Every planted fault is caught by the parity check, and its message names the fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepspec.export.parity import Parity, check
from deepspec.export.readers import eagle3
from deepspec.export.readers.directory import Directory
from deepspec.target.model import load_target
from tests.exporting import LAYERS, make_draft, samples, written
from tests.tiny import cached_target

AUX = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture(scope="module")
def target():
    return load_target(cached_target(layers=LAYERS))


@pytest.fixture(scope="module")
def drafts(tmp_path_factory, target):
    """Each with the samples that it is compared on."""
    root = tmp_path_factory.mktemp("drafts")
    made = {name: make_draft(root, target, name) for name in ("eagle3", "dspark", "dflash", "medusa", "lm")}
    return {name: (draft, samples(draft)) for name, draft in made.items()}


@pytest.fixture
def parity(drafts, tmp_path):
    """Writes an export, plants a fault, and checks it."""

    def run(name: str, engine: str, config=None, weights=None, files=None) -> Parity:
        draft, found = drafts[name]
        layout, path = written(draft, engine, tmp_path)
        if config:
            edit_config(path, config)
        if weights:
            held = load_file(path / layout.weights_file)
            weights(held)
            save_file({key: x.contiguous() for key, x in held.items()}, path / layout.weights_file)
        if files:
            files(path)
        return check(draft, layout, path, found)

    return run


def edit_config(path: Path, change) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def failed(parity: Parity) -> dict[str, str]:
    return {check.name: check.message for check in parity.checks if not check.passed}


def shifted(*keys: str):
    """Adds one to the layer ids at these dotted keys."""

    def change(config):
        for key in keys:
            *parents, last = key.split(".")
            section = config
            for parent in parents:
                section = section[parent]
            section[last] = [i + 1 for i in section[last]]

    return change


ENGINES = {
    "eagle3": ("hf", "vllm", "speculators", "sglang"),
    "dspark": ("hf", "vllm", "speculators", "sglang"),
    "dflash": ("hf", "vllm", "speculators", "sglang"),
    "medusa": ("hf", "vllm", "tgi"),
    "lm": ("hf", "vllm", "sglang"),
}


@pytest.mark.parametrize(
    ("name", "engine"), [(name, engine) for name, all in ENGINES.items() for engine in all]
)
def test_a_sound_export_passes_every_check(name, engine, parity):
    found = parity(name, engine)
    assert failed(found) == {}
    assert found.max_abs_error < 1e-4


@pytest.mark.parametrize(
    ("name", "engine", "keys"),
    [
        ("eagle3", "vllm", (AUX, f"eagle_config.{AUX}")),
        ("eagle3", "speculators", (AUX,)),
        ("dflash", "vllm", ("dflash_config.target_layer_ids",)),
        ("dflash", "speculators", ("aux_hidden_state_layer_ids",)),
        ("dspark", "vllm", ("target_layer_ids",)),
    ],
)
def test_layer_ids_off_by_one(name, engine, keys, parity):
    found = failed(parity(name, engine, config=shifted(*keys)))
    assert set(found) == {"layer_ids", "logits"}
    assert found["layer_ids"].endswith("they are off by +1")
    assert found["logits"].startswith("layer ids are off by +1: with this mended")


def test_layer_ids_that_the_target_does_not_hand_out(parity):
    def change(config):
        config["dflash_config"]["target_layer_ids"] = [1, 3, LAYERS - 1]

    assert (
        "layer ids: the engine would read target layer 7"
        in failed(parity("dflash", "vllm", change))["readable"]
    )


def sglang_parity(draft, root, change=None) -> dict[str, str]:
    layout, path = written(draft, "sglang", root)
    if change:
        edit_config(path, change)
    return failed(check(draft, layout, path, samples(draft)))


@pytest.mark.parametrize(("layers", "ids"), [([1, 3, 5], [1, 3, 5]), ([2, 4, 6], [3, 5, 7])])
def test_sglang_s_ids_are_outputs_from_1_on_and_else_inputs(layers, ids, target, tmp_path):
    draft = make_draft(tmp_path, target, "eagle3", target_layer_ids=layers)
    config = written(draft, "sglang", tmp_path)[0].config
    assert config["eagle_config"][AUX] == ids
    assert sglang_parity(draft, tmp_path) == {}


def test_outputs_where_sglang_reads_inputs(target, tmp_path):
    draft = make_draft(tmp_path, target, "eagle3", target_layer_ids=[2, 3, 5])

    def before_the_rule(config):
        config["eagle_config"][AUX] = [2, 3, 5]

    found = sglang_parity(draft, tmp_path, before_the_rule)
    assert found["layer_ids"].endswith("they are off by -1")
    _, path = written(draft, "sglang", tmp_path / "again")
    sample = samples(draft)[0]
    old = eagle3.sglang_before(Directory.open(path), sample).facts.layer_ids
    assert old == (3, 4, 6)  # a version before the rule takes every state one layer late


def test_layer_ids_that_only_another_engine_reads(parity):
    """SGLang's directory in vLLM: the same keys, one layer lower."""

    def change(config):
        del config[AUX]
        config["eagle_config"][AUX] = [1, 3, 5]

    assert failed(parity("eagle3", "vllm", change))["layer_ids"].endswith("they are off by -1")


@pytest.mark.parametrize(("name", "engine"), [("eagle3", "vllm"), ("eagle3", "sglang"), ("dflash", "vllm")])
def test_d2t_as_ids_in_the_place_of_offsets(name, engine, drafts, parity):
    ids = drafts[name][0].network.draft_ids

    def change(held):
        held["d2t"] = ids.clone()

    (message,) = failed(parity(name, engine, weights=change)).values()
    assert "d2t holds target ids; engines read it as offsets" in message


def test_d2t_as_ids_where_they_all_stay_inside_the_vocabulary(target, tmp_path):
    """A draft of the lowest ids: read as offsets they lead to other tokens that exist."""
    draft = make_draft(tmp_path, target, "eagle3", draft_vocab_size=target.vocab_size // 2)
    low = torch.arange(1, target.vocab_size // 2 + 1)
    held = load_file(draft.directory / "model.safetensors")
    held["d2t"] = low - torch.arange(len(low))
    held["t2d"] = torch.zeros(target.vocab_size, dtype=torch.bool).index_fill_(0, low, True)
    save_file(held, draft.directory / "model.safetensors")
    layout, path = written(draft, "vllm", tmp_path / "exports")
    held = load_file(path / layout.weights_file)
    held["d2t"] = low
    del held["t2d"]
    save_file(held, path / layout.weights_file)
    found = failed(check(draft, layout, path, samples(draft)))
    assert "it holds target ids in the place of offsets" in found["d2t"]


@pytest.mark.parametrize(("name", "engine"), [("eagle3", "vllm"), ("dspark", "sglang"), ("dflash", "vllm")])
def test_a_wrong_rope_base(name, engine, parity):
    def change(config):
        config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 500.0

    found = failed(parity(name, engine, config=change))
    assert found["rope"] == "RoPE base: the engine would take 500.0, the draft was trained with 10000.0"
    assert found["logits"].startswith("wrong RoPE base")


def test_two_rope_bases(parity):
    def change(config):
        config["rope_theta"] = 500.0

    assert "rope_theta and rope_parameters disagree" in failed(parity("eagle3", "vllm", change))["readable"]


@pytest.mark.parametrize("name", ["eagle3", "dspark", "dflash"])
def test_a_missing_final_norm(name, parity):
    def dropped(held):
        del held["norm.weight"]

    def initial(held):
        held["norm.weight"] = torch.ones_like(held["norm.weight"])

    assert failed(parity(name, "vllm", weights=dropped))["readable"].startswith("norm.weight is missing")
    found = failed(parity(name, "vllm", weights=initial))
    assert found["logits"].startswith("the final norm (norm.weight) is missing or not the trained one")


def test_a_transposed_markov_matrix(drafts, target, parity, tmp_path):
    name = "markov_head.markov_w2.weight"

    def change(held):
        held[name] = held[name].T

    found = failed(parity("dspark", "vllm", weights=change))
    assert found == {
        "logits": f"the Markov matrix {name} is transposed: with this mended the logits are the trained draft's"
    }
    oblong = make_draft(tmp_path / "oblong", target, "dspark", markov_rank=8)
    layout, path = written(oblong, "vllm", tmp_path / "oblong")
    held = load_file(path / layout.weights_file)
    held[name] = held[name].T.contiguous()
    save_file(held, path / layout.weights_file)
    (message,) = failed(check(oblong, layout, path, samples(oblong))).values()
    assert message == f"{name} is [8, 64], the engine wants [64, 8]; it is transposed"


@pytest.mark.parametrize(("name", "keys"), [("dflash", ("dflash_config",)), ("dspark", ())])
def test_a_wrong_mask_token(name, keys, parity):
    def change(config):
        for key in keys:
            config = config[key]
        config["mask_token_id"] = 7

    found = failed(parity(name, "vllm", config=change))
    assert found["mask_token"].startswith("mask token: the engine would feed 7, the draft was trained with 5")
    assert found["logits"].startswith("wrong mask token")


def test_a_block_that_begins_at_the_wrong_place(parity):
    def anchored(config):
        config["dflash_config"]["sample_from_anchor"] = True

    def unanchored(config):
        config["sample_from_anchor"] = False

    assert "from the masks alone" in failed(parity("dflash", "vllm", anchored))["readable"]
    assert not parity("dspark", "vllm", config=unanchored).passed


def test_a_dropped_weight_and_one_too_many(parity):
    def dropped(held):
        del held["midlayer.mlp.up_proj.weight"]

    def added(held):
        held["midlayer.self_attn.q_proj.bias"] = torch.zeros(64)

    missing = failed(parity("eagle3", "vllm", weights=dropped))
    assert missing["readable"].startswith("midlayer.mlp.up_proj.weight is missing")
    found = failed(parity("eagle3", "vllm", weights=added))
    assert found == {"weights": "weights that the engine reads nowhere: midlayer.self_attn.q_proj.bias"}


def test_one_wrong_weight_is_named(parity):
    def change(held):
        held["layers.1.self_attn.k_norm.weight"] = held["layers.1.self_attn.k_norm.weight"] * 2

    found = failed(parity("dflash", "vllm", weights=change))
    assert found["logits"].startswith("layers.1.self_attn.k_norm.weight is not the trained weight")


@pytest.mark.parametrize("name", ["eagle3", "dflash", "lm"])
def test_positions_for_2048_tokens_only(name, parity):
    found = failed(parity(name, "vllm", config=lambda config: config.update(max_position_embeddings=2048)))
    assert found == {
        "max_position_embeddings": "max_position_embeddings is 2048, the target's 4096: beyond 2048 the draft fails"
    }


def test_another_tokenizer_and_another_template(parity):
    def tokenizer(path):
        file = path / "tokenizer.json"
        file.write_text(file.read_text().replace('"<|im_end|>"', '"<|end|>"'))

    def template(path):
        (path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")

    found = failed(parity("eagle3", "vllm", files=tokenizer))
    assert found == {"tokenizer": "another tokenizer than the target's: tokenizer.json differs"}
    assert failed(parity("lm", "hf", files=template)) == {
        "chat_template": "another chat template than the target's"
    }


def test_medusa_biases_that_vllm_would_drop(parity):
    found = failed(parity("medusa", "vllm", config=lambda config: config.pop("medusa_fc_bias")))
    assert "vLLM drops them silently unless medusa_fc_bias" in found["readable"]


def test_a_medusa_directory_that_tgi_would_take_for_a_model(parity):
    found = failed(
        parity("medusa", "tgi", config=lambda config: config.update(architectures=["MedusaModel"]))
    )
    assert "TGI would take the directory for a model" in found["readable"]


def test_another_models_weights_in_a_draft_lm(parity):
    def change(held):
        held["model.norm.weight"] = held["model.norm.weight"] * 2

    assert failed(parity("lm", "vllm", weights=change))["logits"].startswith("logits differ by up to")
