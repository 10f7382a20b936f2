"""What the distillation data must be before a draft is trained on it: a Great Expectations suite.

Each `Rule` is one expectation with its meaning in words; `validate_data` applies them all and says, for each,
what was found and in which rows. Nothing is sent anywhere, and the suite leaves no files. Of a set of more than
`validate.sample` rows, what takes a tokenizer or every word is judged on a sample; everything else on every row.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read when the library is imported

import great_expectations as gx
import great_expectations.expectations as gxe
import numpy as np
import pandas
from datasets import Features, LargeList, List, Value
from great_expectations.data_context.types.base import ProgressBarsConfig
from pyarrow import ArrowInvalid, parquet

from deepspec.answers.shards import FEATURES
from deepspec.errors import DeepSpecError
from deepspec.files import file_digest
from deepspec.guard.facts import facts, warnings
from deepspec.guard.flatten import Asked, Flattener
from deepspec.guard.params import ValidateParams
from deepspec.guard.table import flat_table
from deepspec.guard.verdict import Check, Validation
from deepspec.messages.prompt import Prompt
from deepspec.messages.prompts import Prompts
from deepspec.prompts.overlap import Overlap

EXAMPLES = 5
# The system first, then whoever asks and the assistant in turn; a tool speaks behind the assistant that called it.
_ASKING = r"(?: (?:system|developer|user))"
_NEXT = rf"(?:(?: tool)+ assistant|(?: tool)*{_ASKING}+ assistant)"
ALTERNATING = rf"^(?:(?:system|developer) )*user{_ASKING}* assistant{_NEXT}*$"


@dataclass(frozen=True)
class Rule:
    """An expectation about a table.

    Args:
        bound: what is allowed, in words.
        worst: where the expectation is about a mean, the column whose highest values serve as examples.
        params: keys of params.yaml that set the bound.
        sampled: it is about the sampled rows alone.
    """

    name: str
    meaning: str
    bound: str
    expectation: gxe.Expectation
    worst: str | None = None
    params: tuple[str, ...] = ()
    sampled: bool = False


def validate_data(
    directory: str | Path,
    prompts: Sequence[Prompt],
    bounds: ValidateParams,
    max_length: int,
    target: Any,
    overlap: Overlap,
) -> Validation:
    """Check the data set that the generate stage wrote to `directory`.

    Args:
        prompts: what the target was asked.
        max_length: of a conversation, in tokens.
        target: anything with `tokenizer`, `digest`, `stop_ids`, `vocab_size` and `chat_ids`.
        overlap: the evaluation prompts, with which no text may share an n-gram.

    Raises:
        DeepSpecError: a file of the data set is missing or cannot be read.
    """
    path = Path(directory) / "train.parquet"
    manifest = _read_json_lines(path.with_name("manifest.json"), whole=True)[0]
    failures = _read_json_lines(path.with_name("failures.jsonl"))
    try:
        rows = parquet.read_metadata(path).num_rows
        found = Features.from_arrow_schema(parquet.read_schema(path))
    except FileNotFoundError:
        raise DeepSpecError(f"{path}: no such file; run the generate stage first") from None
    except ArrowInvalid as error:
        raise DeepSpecError(f"{path}: not a readable parquet file: {' '.join(str(error).split())}") from None
    checks = apply_rules(_column_facts(found), [COLUMNS])
    checks += apply_rules(_manifest_facts(manifest, path, rows, len(failures)), [MANIFEST])
    found_facts: dict[str, str] = {}
    doubts: list[str] = []
    if checks[0].passed:
        asked: Asked = prompts if isinstance(prompts, Prompts) else {prompt.id: prompt for prompt in prompts}
        sample = _sample(rows, bounds.sample)
        table = flat_table(path, sample, Flattener(target, asked, bounds.repetition_ngram, overlap))
        rules = row_rules(bounds, max_length, target.digest) if rows else [_row_count(bounds)]
        checks += _apply_to_rows(table, rules, bounds.sample)
        ids = prompts.ids if isinstance(prompts, Prompts) else [prompt.id for prompt in prompts]
        checks += apply_rules(_outcomes(ids, table, failures), _outcome_rules(bounds))
        found_facts, doubts = facts(table, manifest), warnings(table, manifest)
    return Validation(target.digest, rows, len(failures), checks, found_facts, doubts)


def _sample(rows: int, size: int) -> np.ndarray:
    """Return of each row whether it is in the sample; all are where there are not more than its size, bool [rows]."""
    chosen = np.ones(rows, bool)
    if rows > size:
        chosen[np.random.default_rng(0).choice(rows, rows - size, replace=False)] = False
    return chosen


def _apply_to_rows(table: pandas.DataFrame, rules: list[Rule], size: int) -> list[Check]:
    """Validate every row, and where the set is large the rules about a sample on the sample."""
    if len(table) <= size:
        return apply_rules(table, rules)
    every = iter(apply_rules(table, [rule for rule in rules if not rule.sampled]))
    of = f"; of a sample of {size} rows"
    few = [replace(rule, bound=rule.bound + of) for rule in rules if rule.sampled]
    some = iter(apply_rules(table[table["sampled"]].reset_index(drop=True), few))
    return [next(some if rule.sampled else every) for rule in rules]


def row_rules(bounds: ValidateParams, max_length: int, target_digest: str) -> list[Rule]:
    """Return the expectations about the flattened table."""
    return [
        _row_count(bounds),
        *_form_rules(),
        *_token_rules(bounds, max_length),
        *_origin_rules(target_digest),
    ]


COLUMNS = Rule(
    "columns",
    "the columns are there, of the types that training reads",
    "the columns of deepspec/answers/shards.py",
    gxe.ExpectColumnPairValuesToBeEqual(column_A="expected", column_B="found"),
)
MANIFEST = Rule(
    "manifest",
    "the parquet file is the one that the manifest describes",
    "equal",
    gxe.ExpectColumnPairValuesToBeEqual(column_A="expected", column_B="found"),
)


def _row_count(bounds: ValidateParams) -> Rule:
    return Rule(
        "row_count",
        "enough conversations to train on",
        f"at least {bounds.min_rows}",
        gxe.ExpectTableRowCountToBeBetween(min_value=bounds.min_rows),
        params=("validate.min_rows",),
    )


def _form_rules() -> list[Rule]:
    return [
        Rule(
            "no_missing_values",
            "no value is null or empty",
            "none",
            gxe.ExpectColumnValuesToBeNull(column="missing"),
        ),
        Rule(
            "unique_ids",
            "no conversation is there twice",
            "unique",
            gxe.ExpectColumnValuesToBeUnique(column="id"),
        ),
        Rule(
            "unique_prompts",
            "no two prompts ask the same (case, spacing and punctuation aside)",
            "unique",
            gxe.ExpectColumnValuesToBeUnique(column="prompt"),
        ),
        Rule(
            "last_role",
            "a conversation ends with an answer",
            "assistant",
            gxe.ExpectColumnValuesToBeInSet(column="last_role", value_set=["assistant"]),
        ),
        Rule(
            "alternating_roles",
            "who asks and the assistant take turns, the user first; tools follow the assistant that called them",
            "(system,) user, assistant, ...",
            gxe.ExpectColumnValuesToMatchRegex(column="roles", regex=ALTERNATING),
        ),
    ]


def _token_rules(bounds: ValidateParams, max_length: int) -> list[Rule]:
    return [
        Rule(
            "length",
            "tokens of a conversation",
            f"2 to {max_length} (generate.max_length)",
            gxe.ExpectColumnValuesToBeBetween(column="tokens", min_value=2, max_value=max_length),
            params=("generate.max_length",),
        ),
        Rule(
            "answer_length",
            "tokens of a conversation's answers, stop tokens included",
            f"at least {bounds.min_answer_tokens}",
            gxe.ExpectColumnValuesToBeBetween(column="answer_tokens", min_value=bounds.min_answer_tokens),
            params=("validate.min_answer_tokens",),
        ),
        Rule(
            "degenerate_repetition",
            f"the share of an answer's {bounds.repetition_ngram}-grams that are repeats",
            f"at most {bounds.max_repetition:g}, but for {bounds.max_degenerate_share:.1%} of the rows",
            gxe.ExpectColumnValuesToBeBetween(
                column="repetition", max_value=bounds.max_repetition, mostly=1 - bounds.max_degenerate_share
            ),
            params=(
                "validate.repetition_ngram",
                "validate.max_repetition",
                "validate.max_degenerate_share",
            ),
            sampled=True,
        ),
        Rule(
            "truncated_share",
            "the share of conversations whose last answer was cut short",
            f"at most {bounds.max_truncated_share:g}",
            gxe.ExpectColumnMeanToBeBetween(column="truncated", max_value=bounds.max_truncated_share),
            worst="truncated",
            params=("validate.max_truncated_share",),
        ),
        Rule(
            "loss_mask",
            "the loss mask covers exactly the answers' tokens, stop tokens included",
            "exactly",
            gxe.ExpectColumnValuesToBeNull(column="mask_problem"),
        ),
        Rule(
            "template",
            "the ids before every answer are those that the template makes of the messages",
            "equal",
            gxe.ExpectColumnValuesToBeNull(column="template_problem"),
            sampled=True,
        ),
        Rule(
            "tool_results",
            "tool results follow their calls, and calls have their results",
            "paired",
            gxe.ExpectColumnValuesToBeNull(column="tool_problem"),
        ),
    ]


def _origin_rules(target_digest: str) -> list[Rule]:
    return [
        Rule(
            "target",
            "the answers are those of the target that is loaded now",
            target_digest,
            gxe.ExpectColumnValuesToBeInSet(column="target", value_set=[target_digest]),
        ),
        Rule(
            "prompts",
            "a conversation's user turns are those of the prompt with its id",
            "equal",
            gxe.ExpectColumnValuesToBeNull(column="prompt_problem"),
        ),
        Rule(
            "no_evaluation_prompts",
            "no user turn shares an n-gram with an evaluation prompt",
            "none",
            gxe.ExpectColumnValuesToBeNull(column="overlap"),
            params=("prompts.overlap_ngram",),
        ),
    ]


def _outcome_rules(bounds: ValidateParams) -> list[Rule]:
    return [
        Rule(
            "no_lost_prompts",
            "every prompt became a conversation or a recorded failure",
            "every prompt",
            gxe.ExpectColumnValuesToBeInSet(column="outcome", value_set=["row", "failure"]),
        ),
        Rule(
            "failed_share",
            "the share of prompts that became no conversation",
            f"at most {bounds.max_failed_share:g}",
            gxe.ExpectColumnMeanToBeBetween(column="failed", max_value=bounds.max_failed_share),
            worst="failed",
            params=("validate.max_failed_share",),
        ),
    ]


def apply_rules(table: pandas.DataFrame, rules: list[Rule]) -> list[Check]:
    """Validate a table that has a column `id`; checks come in the order of the rules."""
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("memory").add_dataframe_asset("table")
    batch = asset.add_batch_definition_whole_dataframe("whole").get_batch({"dataframe": table})
    form = {
        "result_format": "SUMMARY",
        "partial_unexpected_count": EXAMPLES,
        "unexpected_index_column_names": ["id"],
    }
    return [_check(table, rule, batch.validate(rule.expectation, result_format=form)) for rule in rules]


def _check(table: pandas.DataFrame, rule: Rule, outcome: Any) -> Check:
    result = outcome.result
    examples = []
    if not outcome.success:
        examples = _worst(table, rule.worst) if rule.worst else _unexpected(result)
    written = rule.expectation.configuration.to_json_dict()
    return Check(
        rule.name,
        rule.meaning,
        rule.bound,
        _observed(outcome),
        bool(outcome.success),
        examples,
        rule.params,
        {"type": written["type"], "kwargs": written["kwargs"]},
    )


def _observed(outcome: Any) -> str:
    result = outcome.result
    if "observed_value" in result:
        return f"{result['observed_value']:.4g}"
    if "unexpected_count" in result:
        return f"{result['unexpected_count']} of {result['element_count']} break it"
    return f"could not be computed ({outcome.exception_info})"


def _unexpected(result: dict[str, Any]) -> list[dict[str, str]]:
    rows = result.get("partial_unexpected_index_list", [])
    return [
        {"id": str(row["id"]), "found": _short(*(value for name, value in row.items() if name != "id"))}
        for row in rows[:EXAMPLES]
    ]


def _worst(table: pandas.DataFrame, column: str) -> list[dict[str, str]]:
    rows = table[table[column] > 0].nlargest(EXAMPLES, column)
    found = rows["reason"] if "reason" in rows else rows[column]
    return [{"id": str(id), "found": _short(value)} for id, value in zip(rows["id"], found, strict=True)]


def _short(*values: Any) -> str:
    text = ", ".join(dict.fromkeys(map(str, values)))
    return text if len(text) <= 120 else f"{text[:117]}..."


def _column_facts(found: Features) -> pandas.DataFrame:
    """Return one row for every required column."""
    facts = []
    for name, kind in FEATURES.items():
        same = name in found and _kind(found[name]) == _kind(kind)
        facts.append((name, str(kind), str(kind) if same else str(found.get(name, "missing"))))
    return pandas.DataFrame(facts, columns=["id", "expected", "found"])


def _kind(feature: Any) -> object:
    """Return a column's type without widths: pandas' `large_string` reads as `string` does."""
    if isinstance(feature, Value):
        name = feature.dtype.removeprefix("large_").removesuffix("_view")
        return re.sub(r"^(u?int|float)\d+$", lambda found: found[1].lstrip("u"), name)
    if isinstance(feature, List | LargeList):
        return [_kind(feature.feature)]
    if isinstance(feature, dict):
        return {name: _kind(part) for name, part in feature.items()}
    return str(feature)


def _manifest_facts(manifest: dict, path: Path, rows: int, failures: int) -> pandas.DataFrame:
    actual = {"rows": rows, "failures": failures, "digest": file_digest(path)}
    facts = [(name, str(manifest.get(name)), str(value)) for name, value in actual.items()]
    return pandas.DataFrame(facts, columns=["id", "expected", "found"])


def _outcomes(ids: list[str], table: pandas.DataFrame, failures: list[dict]) -> pandas.DataFrame:
    """Return one row for every prompt: answered, failed or lost."""
    outcome = dict.fromkeys(table.get("asked", []), "row")
    reasons = {failure["id"]: failure["reason"] for failure in failures}
    outcome |= dict.fromkeys(reasons, "failure")
    return pandas.DataFrame(
        {
            "id": ids,
            "outcome": [outcome.get(id, "lost") for id in ids],
            "failed": [float(id in reasons) for id in ids],
            "reason": [reasons.get(id, "") for id in ids],
        }
    )


def _read_json_lines(path: Path, whole: bool = False) -> list[dict]:
    """Read the objects of a JSON-lines file, or with `whole` the one that the file is."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DeepSpecError(f"{path}: no such file; run the generate stage first") from None
    try:
        return [json.loads(part) for part in ([text] if whole else text.splitlines())]
    except ValueError as error:
        raise DeepSpecError(f"{path}: not valid JSON: {error}") from None
