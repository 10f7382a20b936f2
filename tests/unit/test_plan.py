"""What a pipeline takes, from a configuration and rates alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig
from typer.testing import CliRunner

from deepspec.cli import app
from deepspec.commands.plan import duration, page, plan_of
from deepspec.config import Params, load_params
from deepspec.drafters.registry import algorithms
from deepspec.errors import DeepSpecError
from deepspec.plan.advice import remarks
from deepspec.plan.estimate import Plan
from deepspec.plan.rates import Rates
from deepspec.plan.sizes import measure_draft, measure_target

ROOT = Path(__file__).parents[2]
CONFIGS = {
    "smollm2": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "moe-235b": {
        "model_type": "qwen3_moe",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
        "mlp_only_layers": [],
    },
}
LAPTOP = Rates(flops=4e11, bandwidth=1.4e10, disk=3e8, memory=2.4e10, free_disk=1e11)
OURS = LAPTOP.model_copy(update={"bandwidth": 3e10, "narrow": 3.4e11})
GPU = Rates(flops=7e14, bandwidth=4e12, disk=2e9, memory=1.4e11, free_disk=8e12, devices=8)


def planned(name: str, rates: Rates, params: Params | None = None, **other) -> Plan:
    config = AutoConfig.for_model(**CONFIGS[name] | other)
    return plan_of(params or load_params(ROOT / "params.yaml"), name, config, rates)


def changed(**sections: dict) -> Params:
    raw = load_params(ROOT / "params.yaml").model_dump(by_alias=True)
    for name, values in sections.items():
        for key, value in values.items():
            raw[name][key] = raw[name][key] | value if isinstance(value, dict) else value
    return Params.model_validate(raw)


LARGE = {"prompts": {"count": 1_000_000}, "generate": {"max_new_tokens": 1024, "max_length": 2048}}
LARGE |= {"train": {"steps": 60_000, "batch_size": 16, "max_length": 2048}}


@pytest.mark.parametrize(
    ("name", "parameters", "active", "ends"),
    [
        ("smollm2", 134.5e6, 134.5e6, 49152 * 576),
        ("qwen3-8b", 8.19e9, 7.57e9, 2 * 151936 * 4096),
        ("moe-235b", 235.1e9, 21.6e9, 2 * 151936 * 4096),
    ],
)
def test_a_target_is_counted_from_its_configuration(name, parameters, active, ends):
    target = planned(name, GPU).target
    assert target.parameters == pytest.approx(parameters, rel=0.005)
    assert target.active == pytest.approx(active, rel=0.01)
    assert target.ends == ends and target.weights == 2 * target.parameters


def test_rows_that_are_looked_up_are_not_multiplied():
    """DFlash 2's codebook of the token before; that of the token to come is multiplied out, as DSpark's is."""
    config = AutoConfig.for_model(**CONFIGS["smollm2"])
    target = measure_target("smollm2", config, torch.bfloat16)
    for kind, rank, sizes in (("dflash2", 64, {"selector_rank": 64}), ("dspark", 32, {"markov_rank": 32})):
        found = measure_draft(algorithms()[kind].params(type=kind, **sizes), config, target)
        assert found.trained - found.multiplied == rank * config.vocab_size


def test_a_head_of_low_rank_is_multiplied_by_what_is_drafted_alone():
    """It is trained, so it has the memory of what is; its work is that of its rank, beside the target's law."""
    config = AutoConfig.for_model(**CONFIGS["smollm2"])
    target = measure_target("smollm2", config, torch.bfloat16)
    section = {"type": "dspark", "draft_vocab_size": 0}
    plain, low = (
        measure_draft(algorithms()["dspark"].params(**section, head_rank=rank), config, target)
        for rank in (None, 64)
    )
    assert low.trained - plain.trained == 64 * (config.vocab_size + config.hidden_size)
    assert low.multiplied - plain.multiplied == 64 * config.hidden_size
    changes = {"dspark": {"draft_vocab_size": 0}}, {"dspark": {"draft_vocab_size": 0, "head_rank": 64}}
    whole, cheaper = (
        planned("smollm2", OURS, changed(drafters=sizes)).of("train dspark") for sizes in changes
    )
    assert cheaper.seconds < whole.seconds and cheaper.memory > whole.memory


@pytest.mark.parametrize(
    ("rates", "took"),
    [
        # Two cores with torch's kernels (40:30 minutes), then with ours (20 minutes).
        (LAPTOP, {"generate": 570, "train dspark": 600, "evaluate": 0.37 * 810}),
        (OURS, {"prompts": 28, "generate": 213, "features": 159, "train dspark": 459, "evaluate": 158}),
    ],
    ids=["torch", "ours"],
)
def test_the_demo_is_planned_as_it_went(rates, took):
    """Of 640 steps of eight conversations.

    The first evaluation goes by the passes that are left of those that took 810 s (docs/evaluation.md).

    Features are of the demo of 90cd6ef, the first that extracts them in packed passes.
    """
    plan = planned("smollm2", rates, changed(train={"steps": 640, "batch_size": 8}))
    for stage, seconds in took.items():
        assert plan.of(stage).seconds == pytest.approx(seconds, rel=0.25), stage
    assert plan.of("features").disk / plan.of("features").tokens == pytest.approx(6916, rel=0.01)
    assert not [remark for remark in remarks(plan, load_params(ROOT / "params.yaml")) if not remark.fits]


def test_its_training_with_our_kernels_is_planned_as_it_went():
    plan = planned("smollm2", OURS.model_copy(update={"kernels": True}))
    assert plan.of("train dspark").seconds == pytest.approx(514, rel=0.25)


def test_the_demo_with_amx_is_planned_as_it_went():
    """Of `cba0b1f`: products are five times as fast as without, and a step's are too small for it."""
    rates = {"flops": 2.1e12, "narrow": 5e11, "bandwidth": 28.5e9, "kernels": True, "tiles": True}
    plan = planned("smollm2", OURS.model_copy(update=rates))
    for stage, seconds in {"generate": 147, "train dspark": 480, "evaluate": 180}.items():
        assert plan.of(stage).seconds == pytest.approx(seconds, rel=0.35), stage


def test_states_that_are_kept_while_answering_cost_a_copy():
    ours = OURS.model_copy(update={"kernels": True})
    computed, kept = (planned("smollm2", rates).of("features") for rates in (OURS, ours))
    assert kept.seconds < computed.seconds / 4 and kept.disk == computed.disk
    for other in (
        changed(generate={"engine": "given"}),
        changed(train={"features": {"directory": "shared"}}),
    ):
        assert planned("smollm2", ours, other).of("features") == planned("smollm2", OURS, other).of(
            "features"
        )


def test_the_cache_of_a_large_data_set_is_found_out_before_it_is_made():
    params = changed(**LARGE)
    plan = planned("qwen3-8b", GPU, params)
    features = plan.of("features")
    tokens = 1_000_000 * (60 + 0.7 * 1024)
    assert features.disk == pytest.approx(tokens * (6 * 4096 * 2 + 4)) and 35e12 < features.disk < 40e12
    (remark,) = [remark for remark in remarks(plan, params) if not remark.fits]
    assert remark.stage == "features" and "8 TB" in remark.found and "mode: online" in remark.change


def test_a_form_that_fits_is_named():
    params = changed(**LARGE | {"prompts": {"count": 300_000}})
    (remark,) = [r for r in remarks(planned("qwen3-8b", GPU, params), params) if not r.fits]
    assert remark.change.startswith("train.features.form: fp8")


def test_a_target_that_no_device_holds_is_trained_for_all_the_same():
    params = changed(**LARGE | {"prompts": {"count": 20_000}})
    plan = planned("moe-235b", GPU, params)
    misfits = {remark.stage: remark.change for remark in remarks(plan, params) if not remark.fits}
    assert set(misfits) == {"target", "prompts", "generate", "features", "train dspark", "evaluate"}
    assert "generate.engine: openai" in misfits["generate"]
    assert "target.engine: vllm" in misfits["features"] and "target.engine: vllm" in misfits["evaluate"]
    assert "train.real_decode: false" in misfits["train dspark"]
    without = {"real_decode": False, "features": {"states": "folder"}}
    params = changed(**LARGE | {"prompts": {"count": 20_000}, "train": LARGE["train"] | without})
    plan = planned("moe-235b", GPU, params)
    assert {remark.stage for remark in remarks(plan, params)} == {"target", "prompts", "generate", "evaluate"}


def test_in_vllm_the_target_fits_every_stage():
    train = LARGE["train"] | {"real_decode": False}
    params = changed(**LARGE | {"prompts": {"count": 20_000}, "train": train, "target": {"engine": "vllm"}})
    plan = planned("moe-235b", GPU, params)
    assert [remark.stage for remark in remarks(plan, params) if not remark.fits] == []
    assert plan.of("target").disk == 0 and "in vLLM" in plan.of("evaluate").how
    assert plan.of("train dspark").memory < 0.1 * plan.target.weights


def test_training_takes_the_memory_of_the_ends_however_deep_the_target_is():
    ends = changed(train={"real_decode": False})
    once, twice = (
        planned("qwen3-8b", GPU, ends, num_hidden_layers=layers).of("train dspark").memory
        for layers in (36, 72)
    )
    assert once == twice
    online = changed(train={"features": {"mode": "online"}})
    assert planned("qwen3-8b", GPU, online).of("train dspark").memory > once + 12e9


def test_a_pass_of_many_tokens_reads_more_experts():
    target = planned("moe-235b", GPU).target
    one, many = target.read(1), target.read(512)
    assert one == pytest.approx(2 * target.active, rel=0.01)
    assert many > 8 * one and many < 2 * target.parameters


def test_every_trained_drafter_of_the_pipeline_has_a_line_and_processes_share_the_work():
    params = changed()
    params = params.model_copy(update={"pipeline": ["lookup", "dspark", "eagle3", "medusa", "lm"]})
    plan = planned("qwen3-8b", GPU, params)
    stages = [estimate.stage for estimate in plan.estimates]
    assert [s for s in stages if s.startswith("train")] == [f"train {n}" for n in params.pipeline[1:]]
    alone = planned("qwen3-8b", GPU.model_copy(update={"devices": 1}), params)
    assert alone.of("generate").seconds == pytest.approx(8 * plan.of("generate").seconds)


def test_the_command_says_what_does_not_fit_and_exits_with_one(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen3-8b"]))
    (tmp_path / "rates.yaml").write_text(yaml.safe_dump(LAPTOP.model_dump()))
    words = ["plan", "--params", str(ROOT / "params.yaml"), "--config", str(tmp_path), "--rates"]
    small = CliRunner().invoke(app, [*words, str(tmp_path / "rates.yaml")])
    assert small.exit_code == 1 and "does not fit: target needs" in small.output
    (tmp_path / "rates.yaml").write_text(yaml.safe_dump(GPU.model_dump()))
    large = CliRunner().invoke(app, [*words, str(tmp_path / "rates.yaml")])
    assert large.exit_code == 0 and "everything fits" in large.output
    found = json.loads(CliRunner().invoke(app, [*words, str(tmp_path / "rates.yaml"), "--json"]).output)
    assert {stage["stage"] for stage in found["stages"]} >= {"generate", "features", "train dspark"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("flops: fast", "flops: "),
        ("speed: 1", "speed: "),
        ("flops: [", "not valid YAML"),
        ("3", "the file: "),
    ],
)
def test_a_mistake_in_a_file_of_rates_is_named(tmp_path, text, said):
    (tmp_path / "rates.yaml").write_text(text)
    with pytest.raises(DeepSpecError, match=said):
        Rates.read(tmp_path / "rates.yaml")


def test_a_plan_is_a_page():
    text = page(planned("smollm2", LAPTOP))
    assert "0.135 B parameters" in text and "| train dspark |" in text and "| all |" in text
    assert [duration(s) for s in (40, 700, 7300, 9e5)] == ["40 s", "12 min", "2.0 h", "10.4 days"]
