"""τ by context: counted from the rounds of a run, kept in the record, and said by an export with the trained length."""

from __future__ import annotations

import pytest

from deepspec.evaluation.contexts import tau_by_context
from deepspec.evaluation.record import Record
from deepspec.evaluation.runs import Run, from_json
from deepspec.evaluation.summarise import contexts
from deepspec.export.advice import advise
from deepspec.export.reach import Reach
from tests import records


def bins(*runs: Run) -> list[tuple[int, int, int, float]]:
    return [(each.start, each.end, each.rounds, each.tau) for each in tau_by_context(runs)]


def test_rounds_are_counted_by_the_tokens_before_them():
    # Of the first turn rounds begin at 126, 128 and 131; of the second, whose prompt holds the first, at 1000.
    run = Run(accepted=[[1, 2, 0], [4]], drafted=[[3, 3, 3], [4]], prompt_tokens=[126, 1000])
    assert bins(run) == [(0, 128, 1, 2.0), (128, 256, 2, 2.0), (512, 1024, 1, 5.0)]
    assert sum(each[2] for each in bins(run, run)) == 2 * run.rounds


@pytest.mark.parametrize("start", [0, 1, 127, 128, 255, 256, 511, 512, 32_768, 131_071])
def test_every_round_lies_within_its_bin(start):
    ((low, high, rounds, _),) = bins(Run(accepted=[[0]], drafted=[[0]], prompt_tokens=[start]))
    assert low <= start < high and rounds == 1


def test_runs_of_before_tell_no_context_and_leave_the_section_out():
    old = from_json({"draft": {"accepted": [[1, 0]], "drafted": [[1, 1]]}})
    assert contexts({("sums", 0.0): [old]}) is None
    made = records.record()
    del made["contexts"]
    assert "contexts" not in Record.parse(made, "mine.json").dump()


def record(*at: tuple[int, int, int, float]) -> Record:
    rows = [dict(zip(("start", "end", "rounds", "tau"), each, strict=True)) for each in at]
    other = [{"start": 0, "end": 128, "rounds": 10, "tau": 9.0}]
    found = {"sums@T=0": rows, "talk@T=0": rows, "sums@T=1": other, "talk@T=1": other}
    return Record.parse(records.record(contexts=found), "mine.json")


MADE = {"data_digest": "d", "row_tokens": {"common": 200, "longest": 256}, "train": {"max_length": 512}}


@pytest.mark.parametrize(
    ("made", "evaluation", "said"),
    [
        ({}, record((0, 128, 4, 2.0)), ""),
        ({"data_digest": None, "train": {"max_length": 512}}, None, ""),
        (
            MADE,
            record((0, 128, 30, 2.5), (128, 256, 10, 2.1)),
            "It was trained on rows of up to 256 tokens (95 % of them up to 200): serve it for contexts up to that. "
            "Longer ones were not measured.",
        ),
        (
            MADE,
            record((0, 128, 30, 2.5), (256, 512, 5, 1.4), (512, 1024, 15, 1.0)),
            "It was trained on rows of up to 256 tokens (95 % of them up to 200): serve it for contexts up to that. "
            "From 256 tokens on τ was 1.10, 2.50 below.",
        ),
        (
            {"data_digest": "d", "train": {"max_length": 512}},
            None,
            "It was trained on rows of up to 512 tokens: serve it for contexts up to that. "
            "Longer ones were not measured.",
        ),
    ],
)
def test_an_export_says_what_contexts_a_draft_is_for(made, evaluation, said):
    assert Reach.of(made, evaluation).sentence() == said
    assert advise(evaluation, "eagle3", 4, made).to_dict()["contexts"]["sentence"] == said


def test_tasks_are_pooled_by_rounds_at_the_headlines_temperature_alone():
    found = Reach.of({}, record((0, 128, 30, 2.5)))
    assert [(each.rounds, each.tau) for each in found.measured] == [(60, 2.5)]
