"""A mistake in params.yaml is named with its key before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from deepspec.config import load_params
from deepspec.errors import DeepSpecError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def params_file(tmp_path):
    """Writes the smoke profile with changes: `write("train.lr", 1)`; a value of None deletes the key."""

    def write(dotted: str, value: object) -> Path:
        raw = yaml.safe_load((ROOT / "params.smoke.yaml").read_text())
        *parents, last = dotted.split(".")
        section = raw
        for name in parents:
            section = section.setdefault(name, {})
        if value is None:
            section.pop(last)
        else:
            section[last] = value
        path = tmp_path / "params.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return write


@pytest.mark.parametrize(
    "profile", ["params.yaml", "params.smoke.yaml", "params.tools.yaml", "params.night.yaml"]
)
def test_profiles_of_the_repository_are_valid(profile):
    params = load_params(ROOT / profile)
    assert set(params.pipeline) <= set(params.drafters)


def test_everything_is_measured_where_all_is_asked_for():
    params = load_params(ROOT / "params.yaml").evaluate
    assert (params.computed, params.plain_new_tokens, params.controllers, params.throughput) == (
        True,
        32,
        [],
        None,
    )
    full = params.full()
    assert (full.computed, full.plain_new_tokens, full.sweeps) == (False, None, params.sweeps)
    assert [chosen.type for chosen in full.controllers] == ["fixed"] and full.throughput.batches == [1, 4, 16]
    assert full.full() == full and full.tasks == params.tasks and full.decode == params.decode


def test_the_night_is_ten_demos():
    demo, night = (
        load_params(ROOT / name).model_dump(by_alias=True) for name in ("params.yaml", "params.night.yaml")
    )
    assert night["prompts"].pop("count") == 10 * demo["prompts"].pop("count")
    assert night["train"].pop("steps") == 10 * demo["train"].pop("steps")
    for params in (demo, night):
        del params["train"]["eval_every"], params["train"]["features"]["form"]
    assert night == demo


def test_states_of_an_engine_are_kept(params_file):
    with pytest.raises(DeepSpecError, match=r"train\.features\.states goes with mode: cached, not online"):
        load_params(params_file("train.features", {"mode": "online", "states": "folder"}))
    assert load_params(params_file("train.features", {"states": "folder"})).train.features.states == "folder"


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("train.learning_rate", None),
        ("train.stps", "steps"),
        ("trian", "train"),
        ("evaluate.decode.controler", "controller"),
        ("drafters.dspark.markov_rnk", "markov_rank"),
        ("drafters.lookup.min_mach", "min_match"),
        ("generate.openai.base_url", "base_urls"),
        ("train.loss.cee", "ce"),
    ],
)
def test_an_unknown_key_names_itself_and_the_nearest_valid_one(params_file, key, near):
    with pytest.raises(DeepSpecError) as error:
        load_params(params_file(key, 1))
    message = str(error.value)
    assert f"unknown key '{key}'" in message
    assert "\n" not in message
    if near:
        assert f"did you mean '{near}'?" in message


def test_a_key_that_was_renamed_is_unknown_before_its_old_name_is_missing(tmp_path):
    text = (ROOT / "params.yaml").read_text().replace("  lr: 2.0e-3", "  lrr: 2.0e-3")
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(DeepSpecError, match=r"unknown key 'train.lrr'; did you mean 'lr'\?"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.lr", "fast", "train.lr: .*found 'fast'"),
        ("train.steps", 0, "train.steps: .*found 0"),
        ("train.lr", None, "missing key 'train.lr'"),
        ("target.dtype", "int3", "target.dtype: .*found 'int3'"),
        (
            "drafters.dspark.type",
            "dsprk",
            "drafters.dspark.type: unknown type 'dsprk'; did you mean 'dspark'",
        ),
        ("drafters.dspark.layers", "two", "drafters.dspark.layers: .*found 'two'"),
        ("pipeline", ["lokup"], "'lokup'.*did you mean 'lookup'"),
        ("evaluate.tasks", [], "evaluate.tasks: .*at least 1 item"),
        ("evaluate.temperatures", [], "evaluate.temperatures: .*at least 1 item"),
        ("evaluate.temperatures", [-1.0], "evaluate.temperatures.*greater than or equal to 0"),
        (
            "evaluate.decode.tree",
            {"type": "best_first", "width": 0},
            r"evaluate.decode.tree.width: .*\(found 0\)",
        ),
        (
            "evaluate.decode.tree",
            {"type": "best_first", "widht": 3},
            "unknown key 'evaluate.decode.tree.widht'; did you mean 'width'",
        ),
        (
            "evaluate.decode.tree",
            {"type": "static", "paths": [[0], [1, 0]]},
            r"evaluate.decode.tree.paths: path \[1, 0\] needs \[1\]",
        ),
        (
            "evaluate.decode.tree",
            {"type": "best"},
            "evaluate.decode.tree.type: unknown type 'best'; did you mean 'best_first'",
        ),
        (
            "evaluate.decode.controller",
            {"type": "threshold", "least": 1.5},
            r"evaluate.decode.controller.least: .*\(found 1.5\)",
        ),
        (
            "evaluate.decode.controller",
            {"type": "threshold"},
            "missing key 'evaluate.decode.controller.least'",
        ),
        (
            "train.loss.positions",
            {"type": "geometric", "decay": 0},
            r"train.loss.positions.decay: .*\(found 0\)",
        ),
        (
            "train.loss.positions",
            {"type": "dpace", "decay": 2},
            "unknown key 'train.loss.positions.decay'",
        ),
        ("prompts.mix", {"csv:x": 1}, "unknown prompt source 'csv:x'"),
        ("prompts.mix", {"seed": -1}, "weight of prompt source 'seed' is negative"),
        ("prompts.mix", {"seed": 0}, "no prompt source has a positive weight"),
    ],
)
def test_a_wrong_value_names_its_key_and_what_was_found(params_file, key, value, expected):
    with pytest.raises(DeepSpecError, match=expected) as error:
        load_params(params_file(key, value))
    assert "\n" not in str(error.value)


def test_a_missing_a_broken_and_an_empty_file_each_give_one_line(tmp_path):
    with pytest.raises(DeepSpecError, match="no such file"):
        load_params(tmp_path / "absent.yaml")
    for text, expected in (
        ("a: [1", "not valid YAML"),
        ("", "expected a mapping"),
        ("- 1", "expected a mapping"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(DeepSpecError, match=expected) as error:
            load_params(tmp_path / "bad.yaml")
        assert "\n" not in str(error.value)


def test_a_bare_no_means_no_mixed_precision(params_file):
    assert load_params(params_file("train.mixed_precision", False)).train.mixed_precision == "no"


@pytest.mark.parametrize(
    "tree",
    [
        {"type": "chain", "depth": 3},
        {"type": "static", "paths": [[0], [1], [0, 0]]},
        {"type": "beam", "width": 3, "depth": 2, "nodes": 5},
        {"type": "best_first", "nodes": 6},
        {"type": "sampled", "branching": [2, 1], "budget": 3},
    ],
)
def test_every_tree_of_the_parameters_can_be_grown(tree):
    from deepspec.decoding.request import Sampling
    from deepspec.decoding.tree import Vocabulary
    from deepspec.drafters.params import DecodeParams

    shape = DecodeParams.model_validate({"tree": tree}).tree
    assert shape.type == tree["type"]
    assert shape.nodes is None or shape.nodes <= 24
    growth = shape.growth(Vocabulary(8), Sampling(), 2, torch.Generator())
    assert growth.frontier == [-1]


@pytest.mark.parametrize(
    "controller",
    [
        {"type": "fixed", "length": 2},
        {"type": "threshold", "least": 0.4},
        {"type": "cost"},
        {"type": "scheduler"},
    ],
)
def test_every_controller_of_the_parameters_can_be_made(controller):
    from deepspec.decoding.cost import CostCurve
    from deepspec.decoding.scheduler import CostStop, Fixed, PrefixScheduler, Threshold
    from deepspec.drafters.params import DecodeParams

    made = DecodeParams.model_validate({"controller": controller}).controller.make(CostCurve({1: [(1, 1.0)]}))
    kinds = {"fixed": Fixed, "threshold": Threshold, "cost": CostStop, "scheduler": PrefixScheduler}
    assert type(made) is kinds[controller["type"]]
