"""The page of large targets: every command that it shows is read by the program that would run it."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import typer
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers import AutoConfig
from typer.testing import CliRunner

from deepspec.answers.params import GenerateParams
from deepspec.cli import STAGES, app
from deepspec.commands.plan import plan_of
from deepspec.config import load_params
from deepspec.plan.advice import remarks
from deepspec.plan.rates import Rates

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/large-targets.md").read_text()
LINES = [line.strip() for line in PAGE.splitlines() if line.startswith("    ")]
COMMANDS = [
    line for line in LINES if re.match(r"(CUDA_VISIBLE_DEVICES= )?(deepspec|accelerate|vllm|dvc) ", line)
]
RATES = yaml.safe_load("\n".join(line for line in LINES if re.match(r"\w+: ", line)))
SHAPE = {
    "model_type": "qwen2",
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}


def words_of(command: str) -> list[str]:
    return [word for word in shlex.split(command) if "=" not in word or word.startswith("-")]


def dry_run(stage: str, words: list[str]) -> str:
    result = CliRunner().invoke(app, [stage, *words, "--dry-run"])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["deepspec"])  # a stage's command names itself there


def test_the_page_goes_from_the_target_to_a_served_draft():
    said = [words_of(command)[:2] for command in COMMANDS]
    stages = [words[1] for words in said if words[0] == "deepspec" and words[1] in STAGES]
    assert stages == ["target", "prompts", "generate", "validate", "export", "evaluate"]
    assert [words[0] for words in said].count("accelerate") == 4


@pytest.mark.parametrize("command", [c for c in COMMANDS if words_of(c)[0] == "deepspec"])
def test_a_command_of_ours_takes_its_flags(command):
    name, *words = words_of(command)[1:]
    if name in STAGES:
        assert "params.large.yaml and the flags are right; nothing was run" in dry_run(name, words)
    else:
        group = typer.main.get_command(app)
        assert group.commands[name].make_context(name, words).params["params"] == Path("params.large.yaml")


@pytest.mark.parametrize("command", [c for c in COMMANDS if words_of(c)[0] == "accelerate"])
def test_accelerate_would_launch_training_on_as_many_gpus(command):
    flags = launch_command_parser().parse_args(words_of(command)[2:])
    found = load_config_from_file(flags.config_file)
    assert flags.module and flags.training_script == "deepspec.stages.train"
    assert found.num_processes == 8 * found.num_machines
    assert "train@eagle3" in dry_run("train", flags.training_script_args)
    if found.num_machines > 1:
        assert flags.main_process_ip == "first" and int(flags.machine_rank) < found.num_machines


@pytest.mark.parametrize("command", [c for c in COMMANDS if words_of(c)[0] == "dvc"])
def test_dvc_has_the_stages(command):
    declared = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert words_of(command)[1] == "repro" and set(words_of(command)[2:]) <= set(declared)


def test_the_server_is_the_one_whose_address_the_page_gives():
    (command,) = [words_of(c) for c in COMMANDS if words_of(c)[0] == "vllm"]
    flags = dict(zip(command[3::2], command[4::2], strict=True))
    (given,) = re.findall(r"`generate: (\{.*\})`", PAGE)
    params = load_params("params.large.yaml")
    generate = GenerateParams.model_validate(yaml.safe_load(given))
    assert flags["--served-model-name"] == generate.openai.model
    assert {url.rpartition(":")[2] for url in generate.openai.base_urls} == {flags["--port"]}
    assert int(flags["--tensor-parallel-size"]) == params.target.vllm.tensor_parallel


def test_the_plan_finds_what_the_page_says():
    params = load_params("params.large.yaml")
    config = AutoConfig.for_model(**SHAPE)
    plan = plan_of(params, params.target.source, config, Rates.model_validate(RATES))
    assert not [remark for remark in remarks(plan, params) if not remark.fits]
    assert plan.target.weights == pytest.approx(145e9, rel=0.01)
    assert plan.target.ends * plan.target.bytes == pytest.approx(5e9, rel=0.01)
    assert plan.of("features").disk == pytest.approx(2.6e12, rel=0.05)


def test_a_dry_run_names_what_is_wrong_and_runs_nothing(tmp_path):
    result = CliRunner().invoke(
        app, ["train", "--params", "params.large.yaml", "--drafter", "eagle", "--dry-run"]
    )
    assert result.exit_code == 2 and "unknown drafter 'eagle'; did you mean 'eagle3'?" in result.output
    (tmp_path / "params.yaml").write_text("seed: 0\ntrainn: {}\n")
    result = CliRunner().invoke(app, ["generate", "--params", str(tmp_path / "params.yaml"), "--dry-run"])
    assert result.exit_code == 2 and "trainn" in result.output
