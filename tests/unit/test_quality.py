"""Every expectation has data that breaks it, and it alone."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pyarrow
import pytest
from datasets import Dataset, Features, disable_progress_bars
from pyarrow import parquet

from deepspec.answers.conversation import Conversation
from deepspec.answers.shards import FEATURES, OPTIONAL
from deepspec.entry import guarded
from deepspec.errors import DeepSpecError
from deepspec.files import file_digest
from deepspec.guard import suite as quality
from deepspec.guard.flatten import Flattener, answer_runs, repetition
from deepspec.guard.params import ValidateParams
from deepspec.guard.suite import validate_data
from deepspec.guard.table import flat_table
from deepspec.messages.prompt import Chat, Prompt
from deepspec.messages.prompts import read_prompts
from deepspec.prompts.overlap import Overlap
from deepspec.stages import validate as stage
from tests.fake_target import FakeTarget

TARGET = FakeTarget()
NOTHING = Overlap([], 8)
PROMPTS = [
    Prompt.of_turns(f"p{i}", "seed", (f"What is {i} plus {i + 1}?", f"And twice {i}?")[: 1 + i % 2])
    for i in range(6)
]
CONSTANTS = {
    "target": TARGET.digest,
    "temperature": 0.7,
    "top_p": 1.0,
    "seed": 1,
    "engine": "local",
}
MAX_LENGTH = 512
BOUNDS = ValidateParams(
    min_rows=6,
    min_answer_tokens=3,
    max_truncated_share=0.2,
    max_failed_share=0.2,
    repetition_ngram=4,
    max_repetition=0.5,
    max_degenerate_share=0.2,
)


def conversation(prompt, text="The answer is {}.", cut=False):
    talk = Conversation(TARGET, prompt, 400, 4096)
    while talk.prompt_ids is not None:
        tokens = TARGET.ids(text.format(prompt.id))
        talk.add_answer(tokens if cut else [*tokens, TARGET.end], "length" if cut else "stop")
    return {"id": prompt.id, **talk.rows()[0], **CONSTANTS}


@pytest.fixture
def rows():
    return copy.deepcopy([conversation(prompt) for prompt in PROMPTS])


def write(directory, rows, failures=(), features=FEATURES):
    disable_progress_bars()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "train.parquet"
    features = Features({**features, **{k: v for k, v in OPTIONAL.items() if any(k in row for row in rows)}})
    columns = {name: [row.get(name) if name in OPTIONAL else row[name] for row in rows] for name in features}
    Dataset.from_dict(columns, features=features).to_parquet(path)
    (directory / "failures.jsonl").write_text("".join(json.dumps(failure) + "\n" for failure in failures))
    manifest = {"rows": len(rows), "failures": len(failures), "digest": file_digest(path)}
    (directory / "manifest.json").write_text(json.dumps(manifest))


def validate(
    tmp_path, rows, failures=(), prompts=PROMPTS, bounds=BOUNDS, eval_texts=("What is the sky made of?",)
):
    write(tmp_path / "distill", rows, failures)
    overlap = Overlap(eval_texts, 4)
    return validate_data(tmp_path / "distill", prompts, bounds, MAX_LENGTH, TARGET, overlap)


def failed(validation):
    return {check.name: [example["id"] for example in check.examples] for check in validation.failed}


def test_good_data_passes_every_check(tmp_path, rows):
    validation = validate(tmp_path, rows)
    assert validation.failed == []
    assert len(validation.checks) == 20
    assert validation.to_dict()["passed"] is True
    assert f"all {len(validation.checks)} checks passed" in validation.to_markdown()


def test_a_missing_column_and_a_wrong_type(tmp_path, rows):
    features = FEATURES.copy()
    del features["loss_mask"]
    features["seed"] = features["temperature"]
    for row in rows:
        del row["loss_mask"]
    write(tmp_path, rows, features=features)
    validation = validate_data(tmp_path, PROMPTS, BOUNDS, MAX_LENGTH, TARGET, NOTHING)
    assert failed(validation) == {"columns": ["loss_mask", "seed"]}
    assert "missing" in validation.failed[0].examples[0]["found"]


def test_another_parquet_file_than_the_manifest_says(tmp_path, rows):
    write(tmp_path, rows)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"digest": "0" * 64}))
    validation = validate_data(tmp_path, PROMPTS, BOUNDS, MAX_LENGTH, TARGET, NOTHING)
    assert failed(validation) == {"manifest": ["digest"]}


def test_too_few_rows(tmp_path, rows):
    validation = validate(tmp_path, rows[:5], prompts=PROMPTS[:5])
    assert failed(validation) == {"row_count": []}
    assert validation.failed[0].observed == "5"


def test_no_rows_at_all(tmp_path):
    assert set(failed(validate(tmp_path, []))) == {"row_count", "no_lost_prompts"}


def test_a_missing_value(tmp_path, rows):
    rows[2]["source"] = None
    rows[3]["engine"] = ""
    validation = validate(tmp_path, rows)
    assert failed(validation) == {"no_missing_values": ["p2", "p3"]}
    assert validation.failed[0].examples[0]["found"] == "source"


def test_a_missing_list(tmp_path, rows):
    rows[2]["messages"] = None
    assert failed(validate(tmp_path, rows))["no_missing_values"] == ["p2"]


def test_a_conversation_that_is_there_twice(tmp_path, rows):
    assert failed(validate(tmp_path, [*rows, rows[4]])) == {
        "unique_ids": ["p4", "p4"],
        "unique_prompts": ["p4", "p4"],
    }


def test_two_prompts_that_ask_the_same(tmp_path, rows):
    same = Prompt.of_turns("p6", "seed", ("what is  2 plus 3",))
    validation = validate(tmp_path, [*rows, conversation(same)], prompts=[*PROMPTS, same])
    assert failed(validation) == {"unique_prompts": ["p2", "p6"]}


def test_prompts_that_differ_in_a_later_turn_are_not_the_same(tmp_path, rows):
    """Even if both answers were cut short before that turn was asked."""
    pair = [
        Prompt.of_turns(id, "seed", ("Can you help me?", then))
        for id, then in (("a", "Sing."), ("b", "Dance."))
    ]
    more = [conversation(prompt, cut=True) for prompt in pair]
    bounds = BOUNDS.model_copy(update={"max_truncated_share": 0.3})
    assert not validate(tmp_path, [*rows, *more], prompts=[*PROMPTS, *pair], bounds=bounds).failed


def test_a_last_turn_without_an_answer(tmp_path, rows):
    rows[1]["messages"] = rows[1]["messages"][:3]
    assert failed(validate(tmp_path, rows)) == {
        "last_role": ["p1"],
        "alternating_roles": ["p1"],
        "loss_mask": ["p1"],
    }


def test_an_answer_that_is_too_short(tmp_path, rows):
    rows[2] = conversation(PROMPTS[2], "a")
    assert failed(validate(tmp_path, rows)) == {"answer_length": ["p2"]}


def test_answers_that_loop(tmp_path, rows):
    loop = "again and again " * 8
    rows[2] = conversation(PROMPTS[2], loop)
    assert not validate(tmp_path, rows).failed, "one row in six is within the bound"
    rows[4] = conversation(PROMPTS[4], loop)
    validation = validate(tmp_path, rows)
    assert failed(validation) == {"degenerate_repetition": ["p2", "p4"]}
    assert validation.failed[0].observed == "2 of 6 break it"


def test_answers_that_were_cut_short(tmp_path, rows):
    rows[2] = conversation(PROMPTS[2], cut=True)
    assert not validate(tmp_path, rows).failed
    rows[4] = conversation(PROMPTS[4], cut=True)
    validation = validate(tmp_path, rows)
    assert failed(validation) == {"truncated_share": ["p2", "p4"]}
    assert validation.failed[0].observed == "0.3333"


def shifted(mask, by):
    return mask[by:] + [0] * by if by > 0 else [0] * -by + mask[:by]


def first_stop(row):
    return row["loss_mask"].index(1) + row["input_ids"][row["loss_mask"].index(1) :].index(TARGET.end)


MASK_FAULTS = {
    "one token early": (lambda row: row.update(loss_mask=shifted(row["loss_mask"], 1)), "stop token"),
    "too early a start": (
        lambda row: row["loss_mask"].__setitem__(row["loss_mask"].index(1) - 1, 1),
        "does not start where the template opens",
    ),
    "too late a start": (
        lambda row: row["loss_mask"].__setitem__(row["loss_mask"].index(1), 0),
        "does not start where the template opens",
    ),
    "no stop token": (lambda row: row["loss_mask"].__setitem__(first_stop(row), 0), "stop token"),
    "an answer left out": (
        lambda row: row.update(loss_mask=[m * (i > first_stop(row)) for i, m in enumerate(row["loss_mask"])]),
        "1 masked runs, 2 answers",
    ),
    "everything": (lambda row: row.update(loss_mask=[1] * len(row["loss_mask"])), "1 masked runs, 2 answers"),
    "another length": (lambda row: row["loss_mask"].pop(), "mask values"),
    "other values": (lambda row: row["loss_mask"].__setitem__(-1, 2), "other than 0 and 1"),
    "another text": (lambda row: row["messages"][1].update(content="Else."), "do not spell the answer"),
    "an impossible token": (lambda row: row["input_ids"].__setitem__(0, 10**6), "outside the vocabulary"),
    "a stop token at a cut": (
        lambda row: row["finish_reasons"].__setitem__(0, "length"),
        "cut short has a stop",
    ),
    "an unknown reason": (lambda row: row["finish_reasons"].__setitem__(0, "error"), "finish reason 'error'"),
}


@pytest.mark.parametrize("fault", MASK_FAULTS)
def test_a_loss_mask_that_does_not_cover_exactly_the_answers(tmp_path, rows, fault):
    change, message = MASK_FAULTS[fault]
    change(rows[3])
    validation = validate(tmp_path, rows)
    assert failed(validation) == {"loss_mask": ["p3"]}
    assert message in validation.failed[0].examples[0]["found"]


def test_answers_to_other_prompts(tmp_path, rows):
    rows[0]["id"] = "unknown"
    rows[2]["messages"][0]["content"] = "Something else?"
    validation = validate(tmp_path, rows)
    assert failed(validation) == {"prompts": ["unknown", "p2"], "template": ["p2"], "no_lost_prompts": ["p0"]}


def test_a_prompt_of_the_evaluation(tmp_path, rows):
    validation = validate(tmp_path, rows, eval_texts=("Tell me: AND TWICE 70?!", "and", "twice"))
    assert "no_evaluation_prompts" not in failed(validation), "two words are no overlap"
    validation = validate(tmp_path, rows, eval_texts=("Dear friend, what is 4 plus 5, please",))
    assert failed(validation)["no_evaluation_prompts"]
    assert "what is # plus" in validation.failed[0].examples[0]["found"]


def test_prompts_that_were_lost(tmp_path, rows):
    assert failed(validate(tmp_path, rows[:5], bounds=BOUNDS.model_copy(update={"min_rows": 1}))) == {
        "no_lost_prompts": ["p5"]
    }


def test_too_many_failures(tmp_path, rows):
    bounds = BOUNDS.model_copy(update={"min_rows": 1})
    failures = [{"id": "p4", "reason": "the logits are not finite"}, {"id": "p5", "reason": "status 503"}]
    assert not validate(tmp_path, rows[:5], failures[1:], bounds=bounds).failed
    validation = validate(tmp_path, rows[:4], failures, bounds=bounds)
    assert failed(validation) == {"failed_share": ["p4", "p5"]}
    assert validation.failed[0].examples[1] == {"id": "p5", "found": "status 503"}


def test_the_summary_is_one_line_that_names_checks_and_rows(tmp_path, rows):
    rows[3]["loss_mask"][-1] = 2
    rows[5]["target"] = "fedcba9876543210"
    summary = validate(tmp_path, rows).summary()
    assert "\n" not in summary
    assert "loss_mask (1 of 6 break it, allowed: exactly; e.g. p3)" in summary
    assert "target (1 of 6 break it, allowed: 0123456789abcdef; e.g. p5)" in summary


def test_the_reports_carry_the_failure(tmp_path, rows):
    rows[3]["messages"][1]["content"] = "a | b"
    validation = validate(tmp_path, rows)
    report = json.loads(json.dumps(validation.to_dict()))
    assert report["passed"] is False
    (check,) = [check for check in report["checks"] if not check["passed"]]
    assert check["name"] == "loss_mask" and check["examples"][0]["id"] == "p3"
    table = [line for line in validation.to_markdown().splitlines() if line.startswith("| ")]
    assert len(table) == len(report["checks"]) + 1
    assert {line.count("|") for line in table} == {7}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.parquet", None, "train.parquet: no such file; run the generate stage"),
        ("train.parquet", "PAR1 but not really PAR1", "train.parquet: not a readable parquet file"),
        ("manifest.json", None, "manifest.json: no such file"),
        ("manifest.json", "{", "manifest.json: not valid JSON"),
        ("failures.jsonl", None, "failures.jsonl: no such file"),
        ("failures.jsonl", "{}\n{", "failures.jsonl: not valid JSON"),
    ],
)
def test_files_that_cannot_be_read_are_one_clear_line(tmp_path, rows, name, content, message):
    write(tmp_path, rows)
    (tmp_path / name).unlink()
    if content:
        (tmp_path / name).write_text(content)
    with pytest.raises(DeepSpecError, match=message):
        validate_data(tmp_path, PROMPTS, BOUNDS, MAX_LENGTH, TARGET, NOTHING)


def test_the_stage_writes_its_reports_before_it_fails(tmp_path, rows, monkeypatch, capsys):
    rows[3]["target"] = "fedcba9876543210"
    write(tmp_path / "data/distill", rows)
    (tmp_path / "data/prompts").mkdir()
    lines = [json.dumps({"id": p.id, "source": p.source, "turns": p.turns}) + "\n" for p in PROMPTS]
    (tmp_path / "data/prompts/train.jsonl").write_text("".join(lines))
    lost = {"an image or another medium": {"rows": 3, "first_line": 7}}
    asked = {"sources": {"jsonl:mine.jsonl": {"unusable": lost}}, "rejected": {"duplicate": 2}}
    (tmp_path / "data/prompts/manifest.json").write_text(json.dumps(asked))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deepspec.target.model.load_target", lambda path: TARGET)
    params = SimpleNamespace(
        validate_=BOUNDS,
        prompts=SimpleNamespace(overlap_ngram=8),
        generate=SimpleNamespace(max_length=MAX_LENGTH),
        evaluate=SimpleNamespace(tasks=["word_problems"], tasks_dir=None),
    )
    assert guarded(lambda: stage.main(params, None)) == 2
    assert "target (1 of 6 break it" in capsys.readouterr().err
    assert json.loads((tmp_path / "reports/validation.json").read_text())["passed"] is False
    assert "| FAILED | target |" in (tmp_path / "reports/validation.md").read_text()
    page = (tmp_path / "reports/validation.html").read_text()
    assert '<article id="target" class="failed">' in page
    assert "jsonl:mine.jsonl that cannot be used</dt><dd>3 × an image or another medium</dd>" in page
    assert "prompts that were rejected</dt><dd>2 × duplicate</dd>" in page


LOOP = "again and again " * 8
FEWER = BOUNDS.model_copy(update={"min_rows": 1})


def change(index, **values):
    """A fault: these values in the row at `index`."""
    return lambda path, rows: (rows[index].update(values), validate(path, rows))[1]


def conversations(*replaced, **options):
    """A fault: these (index, conversation) in place of the good ones."""

    def fault(path, rows):
        for index, row in replaced:
            rows[index] = row
        return validate(path, rows, **options)

    return fault


def test_a_parquet_file_of_another_program_is_judged_by_all_checks(tmp_path, rows):
    """Pandas writes `large_string` and wide integers; with Arrow's large lists nothing else differs either."""
    write(tmp_path, rows)
    path = tmp_path / "train.parquet"
    pandas.DataFrame(rows).to_parquet(path)
    schema = parquet.read_schema(path)
    wide = [field.with_type(pyarrow.large_string()) if field.name == "id" else field for field in schema]
    wide = [
        field.with_type(pyarrow.large_list(pyarrow.int64())) if field.name == "input_ids" else field
        for field in wide
    ]
    parquet.write_table(parquet.read_table(path).cast(pyarrow.schema(wide)), path)
    manifest = {"rows": len(rows), "failures": 0, "digest": file_digest(path)}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    validation = validate_data(tmp_path, PROMPTS, BOUNDS, MAX_LENGTH, TARGET, NOTHING)
    assert len(validation.checks) == 20 and not validation.failed


def other_columns(path, rows):
    features = FEATURES.copy()
    del features["source"]
    write(path, [{k: v for k, v in row.items() if k != "source"} for row in rows], features=features)
    return validate_data(path, PROMPTS, BOUNDS, MAX_LENGTH, TARGET, NOTHING)


def other_manifest(path, rows):
    write(path, rows)
    (path / "manifest.json").write_text(json.dumps({"rows": 5, "failures": 0}))
    return validate_data(path, PROMPTS, BOUNDS, MAX_LENGTH, TARGET, NOTHING)


def no_last_answer(path, rows):
    """Neither in the text nor in the mask."""
    row = rows[1]
    row["messages"] = row["messages"][:3]
    row["finish_reasons"] = row["finish_reasons"][:1]
    row["loss_mask"] = [mask * (i <= first_stop(row)) for i, mask in enumerate(row["loss_mask"])]
    return validate(path, rows)


def a_call_without_result(row):
    first, answer, *others = row["messages"]
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {}}}
    return json.dumps({"messages": [first, answer | {"tool_calls": [call]}, *others]})


SAME = Prompt.of_turns("p6", "seed", ("what is  2 plus 3",))
# Check → the fault that breaks it, and what else cannot hold then.
FAULTS = {
    "columns": (other_columns, set()),
    "manifest": (other_manifest, set()),
    "row_count": (lambda path, rows: validate(path, rows[:5], prompts=PROMPTS[:5]), set()),
    "no_missing_values": (change(2, engine=""), set()),
    "unique_ids": (lambda path, rows: validate(path, [*rows, rows[4]]), {"unique_prompts"}),
    "unique_prompts": (
        lambda path, rows: validate(path, [*rows, conversation(SAME)], prompts=[*PROMPTS, SAME]),
        set(),
    ),
    "last_role": (no_last_answer, {"alternating_roles"}),
    "alternating_roles": (
        lambda path, rows: (
            rows[0]["messages"].insert(1, {"role": "tool", "content": "18 C"}),
            validate(path, rows),
        )[1],
        {"template", "tool_results"},
    ),
    "length": (conversations((3, conversation(PROMPTS[3], "".join(map(str, range(200)))))), set()),
    "answer_length": (conversations((2, conversation(PROMPTS[2], "a"))), set()),
    "degenerate_repetition": (
        conversations(*((i, conversation(PROMPTS[i], LOOP)) for i in (2, 4))),
        set(),
    ),
    "truncated_share": (conversations(*((i, conversation(PROMPTS[i], cut=True)) for i in (2, 4))), set()),
    "loss_mask": (
        lambda path, rows: (rows[3]["loss_mask"].__setitem__(-1, 2), validate(path, rows))[1],
        set(),
    ),
    "template": (
        lambda path, rows: (
            rows[0]["messages"].insert(0, {"role": "system", "content": "Be brief."}),
            validate(path, rows),
        )[1],
        set(),
    ),
    "tool_results": (
        lambda path, rows: (rows[1].update(chat=a_call_without_result(rows[1])), validate(path, rows))[1],
        set(),
    ),
    "target": (change(5, target="fedcba9876543210"), set()),
    "prompts": (
        lambda path, rows: (rows[2]["messages"][0].update(content="Something else?"), validate(path, rows))[
            1
        ],
        {"template"},
    ),
    "no_evaluation_prompts": (
        lambda path, rows: validate(path, rows, eval_texts=("Dear friend, what is 4 plus 5, please",)),
        set(),
    ),
    "no_lost_prompts": (lambda path, rows: validate(path, rows[:5], bounds=FEWER), set()),
    "failed_share": (
        lambda path, rows: validate(
            path, rows[:4], [{"id": id, "reason": "status 503"} for id in ("p4", "p5")], bounds=FEWER
        ),
        set(),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_expectation_is_broken_by_data_that_break_no_other(tmp_path, rows, name):
    """But for those that imply others: a conversation that is there twice asks the same twice, one without its last
    answer does not alternate, and other messages are not what the ids say."""
    fault, implied = FAULTS[name]
    assert set(failed(fault(tmp_path, rows))) == {name} | implied


def test_no_expectation_is_without_such_data(tmp_path, rows):
    assert [check.name for check in validate(tmp_path, rows).checks] == list(FAULTS)


def test_every_bound_is_set_in_params_yaml(tmp_path, rows):
    """The keys that the page names exist, and every bound of the section `validate` is named by some check."""
    named = {key for check in validate(tmp_path, rows).checks for key in check.params}
    bounds = {
        f"validate.{key}" for key in ValidateParams.model_fields if key != "sample"
    }  # which bounds nothing
    assert named == bounds | {"generate.max_length", "prompts.overlap_ngram"}


def test_the_docs_list_every_expectation_with_its_bounds(tmp_path, rows):
    lines = (Path(__file__).parents[2] / "docs/versioning.md").read_text().splitlines()
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")
    ]
    expected = [
        [f"`{check.name}`", ", ".join(f"`{key}`" for key in check.params)]
        for check in validate(tmp_path, rows).checks
    ]
    assert [[name, bounds] for name, _, bounds in table] == expected


def test_the_page_says_what_the_data_is_made_of(tmp_path, rows):
    rows[0]["messages"][1]["content"] = "</think>"
    found = validate(tmp_path, rows).facts
    assert found["sources"] == "seed 100.0%" and found["scripts of the user's turns"] == "Latin 100.0%"
    assert found["with a thought"] == "16.7%" and found["with tools"] == "0.0%"


@pytest.mark.parametrize(
    ("surprise", "author", "warned"), [(-0.9, "target", 1), (-0.9, "another", 0), (0.1, "target", 0)]
)
def test_given_answers_that_the_target_would_not_give_are_a_warning(tmp_path, rows, surprise, author, warned):
    write(tmp_path, [{**row, "logprob": -2.0, "surprise": surprise} for row in rows])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"settings": {"answered_by": author}}))
    validation = validate_data(tmp_path, PROMPTS, BOUNDS, MAX_LENGTH, TARGET, NOTHING)
    assert len(validation.warnings) == warned and not validation.failed
    assert "surprise of a given answer's token" in validation.to_markdown()


def test_tools_that_the_template_does_not_show_are_a_warning(tmp_path, rows):
    rows[0]["chat"] = json.dumps({"messages": rows[0]["messages"], "tools": [{"function": {"name": "look"}}]})
    write(tmp_path, rows)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    seen = {"chat_template_kwargs": {}, "tools": True, "history": "kept", "shows_calls": False}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"template": [seen]}))
    validation = validate_data(tmp_path, PROMPTS, BOUNDS, MAX_LENGTH, TARGET, NOTHING)
    assert [warning[:18] for warning in validation.warnings] == ["1 rows offer tools"]
    assert validation.facts["history under the template (no arguments, tools)"] == "kept"


def test_how_an_expectation_is_written_stays_out_of_what_training_depends_on(tmp_path, rows):
    validation = validate(tmp_path, rows)
    assert all(check.expectation["type"].startswith("expect_") for check in validation.checks)
    for check in validation.to_dict()["checks"]:
        assert list(check) == ["name", "meaning", "bound", "observed", "passed", "examples"]


def test_nothing_is_sent():
    assert quality.os.environ["GX_ANALYTICS_ENABLED"] == "false"


def test_repetition_is_the_share_of_repeated_ngrams():
    assert repetition([1, 2, 3, 4, 5], 2) == 0
    assert repetition([1, 2] * 4, 2) == pytest.approx(5 / 7)
    assert repetition([1], 2) == 0


def test_of_a_large_set_every_row_is_judged_and_what_takes_a_tokenizer_on_a_sample(tmp_path, rows):
    bounds = BOUNDS.model_copy(update={"sample": 3})
    checks = {check.name: check for check in validate(tmp_path / "good", rows, bounds=bounds).checks}
    assert all(check.passed for check in checks.values())
    assert (
        checks["template"].observed == "0 of 3 break it" and "a sample of 3 rows" in checks["template"].bound
    )
    assert checks["loss_mask"].observed == "0 of 6 break it" and "sample" not in checks["loss_mask"].bound
    for row in rows:
        row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    rows[5]["loss_mask"][-1] = 0
    found = {check.name: check.observed for check in validate(tmp_path / "bad", rows, bounds=bounds).failed}
    assert found.keys() == {"loss_mask", "template"}
    assert found["loss_mask"] == "1 of 6 break it" and found["template"].endswith("of 3 break it")


def _mask_off(row):
    row["loss_mask"][-1] = 0


def _mask_on(row):
    row["loss_mask"][0] = 1


def _mask_longer(row):
    row["loss_mask"].append(1)


def _mask_of_two(row):
    row["loss_mask"][-1] = 2


def _unknown_token(row):
    row["input_ids"][-2] = TARGET.vocab_size


def _no_stop(row):
    row["input_ids"][-1] = row["input_ids"][-2]


def _early_stop(row):
    row["input_ids"][-3] = TARGET.end


def _other_reason(row):
    row["finish_reasons"][-1] = "length"


def _one_reason_more(row):
    row["finish_reasons"].append("stop")


def _no_source(row):
    row["source"] = ""


def _no_messages(row):
    row["messages"] = None


def _tool(row):
    row["messages"].insert(1, {"role": "tool", "content": "rain"})


def _system(row):
    row["messages"].insert(0, {"role": "system", "content": "Be brief."})


def _no_user(row):
    row["messages"][0]["role"] = "developer"


def _thought(row):
    row["messages"][-1]["content"] = "<think>so</think> yes"


def _other_turns(row):
    row["messages"][0]["content"] += "!"


def _held_out(row):
    row["messages"][0]["content"] = "Tell me: what is the sky made of?"


def _no_prompt(row):
    row["id"] = "another"


def _with_chat(row):
    row["chat"] = json.dumps({"messages": row["messages"], "tools": [{"function": {"name": "look"}}]})


def _generation(row):
    row["id"], row["prompt"] = f"{row['id']}-0", row["id"]


def _given(row):
    row["logprob"], row["surprise"] = -2.0, 0.5


CHANGES = [
    _mask_off,
    _mask_on,
    _mask_longer,
    _mask_of_two,
    _unknown_token,
    _no_stop,
    _early_stop,
    _other_reason,
    _one_reason_more,
    _no_source,
    _no_messages,
    _tool,
    _system,
    _no_user,
    _thought,
    _other_turns,
    _held_out,
    _no_prompt,
    _with_chat,
    _generation,
    _given,
]


def test_many_rows_at_once_say_what_each_says_alone(tmp_path):
    """Every fault beside sound rows, in groups of which some have holes and go row by row."""
    talks = [
        Prompt("sys", "seed", Chat(({"role": "system", "content": "Be kind."}, *PROMPTS[0].chat.messages))),
        Prompt.of_turns("like", "seed", ["what is 1 PLUS 2 ?", "And twice 1?"]),
        Prompt.of_turns("far", "elsewhere", ["Éa 猫 1.5 it's"]),
    ]
    sound = [conversation(prompt) for prompt in (*PROMPTS, *talks)]
    sound[6]["messages"].insert(0, {"role": "system", "content": "Be kind."})
    rows = []
    for number, fault in enumerate(CHANGES):
        broken = copy.deepcopy(sound[number % len(sound)])
        fault(broken)
        rows += [*copy.deepcopy(sound), broken]
    write(tmp_path, rows)
    path, size = tmp_path / "train.parquet", len(sound) + 1
    parquet.write_table(parquet.read_table(path), path, row_group_size=size)
    prompt_file = tmp_path / "prompts.jsonl"
    prompt_file.write_text(
        "".join(
            json.dumps({"id": p.id, "source": p.source, **p.chat.fields()}, ensure_ascii=p.id == "far") + "\n"
            for p in (*PROMPTS, *talks)
        )
    )
    sample = np.zeros(len(rows), bool)
    sample[3] = True
    flattener = Flattener(TARGET, read_prompts(prompt_file), 8, Overlap(["What is the sky made of?"], 4))
    found = flat_table(path, sample, flattener)
    stored = parquet.read_table(path).to_pylist()
    alone = pandas.DataFrame(
        [
            flattener.flat(row, bool(of)) | {"sampled": bool(of)}
            for row, of in zip(stored, sample, strict=True)
        ]
    )
    alone.loc[alone["generation"] & alone["asked"].duplicated(), "prompt"] = None
    assert set(found) == set(alone)
    for name in set(alone) - {"prompt"}:
        ours, theirs = ([None if pandas.isna(x) else x for x in table[name]] for table in (found, alone))
        assert ours == theirs, name
    # What is asked once is a number, and a text where somebody else asks the same.
    several = alone["prompt"].duplicated(keep=False) & alone["prompt"].notna()
    assert several.sum() > len(CHANGES)
    assert found["prompt"][several].tolist() == alone["prompt"][several].tolist()
    assert found["prompt"].isna().tolist() == alone["prompt"].isna().tolist()
    assert not found["prompt"][~several].duplicated().any()


def test_sound_rows_of_a_large_set_are_not_looked_at_one_by_one(tmp_path, rows, monkeypatch):
    write(tmp_path, rows)
    flattener = Flattener(TARGET, {p.id: p for p in PROMPTS}, 8, NOTHING)
    monkeypatch.setattr(flattener, "flat", lambda *row: pytest.fail(f"flattened alone: {row}"))
    found = flat_table(tmp_path / "train.parquet", np.zeros(6, bool), flattener)
    assert found["mask_problem"].isna().all() and found["prompt"].is_unique


def test_row_groups_of_one_file_are_one_table(tmp_path, rows):
    """Rows of a conversation that lie in different groups ask the same once."""
    several = [
        {**copy.deepcopy(row), "id": f"{row['id']}-{i}", "prompt": row["id"]} for row in rows for i in (0, 1)
    ]
    write(tmp_path, several)
    path = tmp_path / "train.parquet"
    table = parquet.read_table(path)
    parquet.write_table(table, path, row_group_size=1)
    found = flat_table(path, np.ones(12, bool), Flattener(TARGET, {p.id: p for p in PROMPTS}, 8, NOTHING))
    assert list(found["id"]) == [row["id"] for row in several]
    assert list(found["prompt"].isna()) == [False, True] * 6


def test_answer_runs_are_the_masked_stretches():
    assert answer_runs([5, 6, 7, 8, 9], [0, 1, 1, 0, 1]) == [(1, [6, 7]), (4, [9])]
    assert answer_runs([], []) == []
