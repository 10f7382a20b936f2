"""The evaluation record: committed ones are read and written unchanged, others are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from deepspec.errors import DeepSpecError
from deepspec.evaluation import parts
from deepspec.evaluation import record as models
from deepspec.evaluation.figures import SHOWN, figures, figures_help
from deepspec.evaluation.parts import StateCosts
from deepspec.evaluation.record import EVAL_VERSION, Record
from deepspec.evaluation.runs import Run
from deepspec.evaluation.summarise import state_costs
from tests import records

ROOT = Path(__file__).parents[2]
COMMITTED = [
    path
    for folder in ("reports/eval", "paper/reports/eval")
    for path in sorted((ROOT / folder).rglob("*.json"))
    if not path.name.endswith(".traces.json")
]


def test_there_are_committed_records():
    assert len(COMMITTED) >= 10


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_committed_record_is_written_as_it_was_read(path, tmp_path):
    Record.read(path).write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("trained", [True, False])
def test_a_record_with_and_without_a_trained_draft_is_read(trained):
    made = records.record(trained=trained)
    found = Record.parse(made, "made up")
    assert found.dump() == json.loads(json.dumps(made))
    assert bool(found.greedy_blocks) == (found.train_parity is not None) == trained


def test_a_key_that_is_not_known_is_named(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(records.record(taus=1)))
    with pytest.raises(DeepSpecError, match=r"mine\.json: not an evaluation record: taus: Extra inputs"):
        Record.read(path)


def test_a_missing_figure_is_named_with_its_place(tmp_path):
    made = records.record()
    del made["tasks"]["sums@T=0"]["tau"]
    with pytest.raises(
        DeepSpecError, match=r"tasks\.sums@T=0\.tau: Field required; evaluate the drafter again"
    ):
        Record.parse(made, "mine.json")


def test_an_older_version_of_this_shape_is_read_and_not_taken_for_a_comparable_one():
    found = Record.parse(records.record(eval_version="2"), "mine.json")
    assert found.eval_version == "2"
    with pytest.raises(
        DeepSpecError, match=f"mine.json: of evaluation version 2, not {EVAL_VERSION}; evaluate it again"
    ):
        found.require_version("mine.json")


def test_an_older_version_of_another_shape_is_refused_by_its_version():
    made = records.record(eval_version="2")
    del made["summary"]
    with pytest.raises(
        DeepSpecError, match=f"of evaluation version 2, not {EVAL_VERSION}; evaluate it again"
    ):
        Record.parse(made, "mine.json")


def test_what_is_no_record_is_refused(tmp_path):
    for value in ([], {}, "text"):
        with pytest.raises(DeepSpecError, match="not an evaluation record"):
            Record.parse(value, "mine.json")
    with pytest.raises(DeepSpecError, match=r"absent\.json: no such record; evaluate the drafter first"):
        Record.read(tmp_path / "absent.json")


def test_a_record_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Record.parse(records.record(), "mine.json").summary.tau = 9.0


def test_every_field_has_a_description():
    named = vars(models) | vars(parts)
    found = [each for each in named.values() if isinstance(each, type) and issubclass(each, BaseModel)]
    bare = [
        f"{m.__name__}.{name}" for m in found for name, info in m.model_fields.items() if not info.description
    ]
    assert bare == [] and len(found) > 20


def test_every_figure_that_the_help_chooses_is_a_field():
    chosen = {name for _, names in SHOWN.values() for name in names}
    assert chosen <= {key.rsplit(".", 1)[-1] for key in figures()}
    assert (
        "  accept_rate_by_position " in figures_help() and max(map(len, figures_help().splitlines())) <= 120
    )


def test_only_a_target_with_a_state_has_costs_of_it():
    run = Run(accepted=[[2, 0], [1]], drafted=[[3, 3], [2]], extra_passes=1, fed=6)
    plain = Run(accepted=[[2]], drafted=[[2]])
    found = state_costs({("sums", 0.0): [{"draft": run}], ("chat", 0.0): [{"draft": plain}]})
    assert found == {"sums@T=0": StateCosts(passes=4, fed_tokens=6, fed_per_round=2.0, tokens_per_pass=6 / 4)}
    made = Record.parse(records.record(), "mine.json")
    assert "states" not in made.dump()
    kept = Record.parse(made.dump() | {"states": {"sums@T=0": found["sums@T=0"].model_dump()}}, "mine.json")
    assert kept.states == found
