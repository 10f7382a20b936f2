"""What the distillation data must be before a draft is trained on it: a Great Expectations suite.

Each `Rule` is one expectation with its meaning in words; `validate_data` applies them all and says, for each, what
was found and in which rows. Nothing is sent or written anywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read when the library is imported

import great_expectations as gx
import great_expectations.expectations as gxe
import pandas
from great_expectations.data_context.types.base import ProgressBarsConfig
from pyarrow import ArrowInvalid, parquet

from deepspec.config import ValidateParams
from deepspec.data.flatten import Flattener
from deepspec.data.shards import FEATURES
from deepspec.errors import DeepSpecError
from deepspec.files import file_digest

EXAMPLES = 5
ALTERNATING = r"^user assistant( user assistant)*$"


@dataclass(frozen=True)
class Rule:
    """An expectation about one of the tables.

    Args:
        bound: what is allowed, in words.
        worst: the column whose highest values serve as examples, where the expectation is about a mean.
    """

    name: str
    meaning: str
    bound: str
    expectation: gxe.Expectation
    worst: str | None = None


@dataclass(frozen=True)
class Check:
    """A rule and what was found. Examples are `{"id", "found"}`."""

    name: str
    meaning: str
    bound: str
    observed: str
    passed: bool
    examples: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Validation:
    target: str
    rows: int
    failures: int
    checks: list[Check]

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    def to_dict(self) -> dict[str, Any]:
        return {"passed": not self.failed, **asdict(self)}

    def to_markdown(self) -> str:
        verdict = f"{len(self.failed)} of {len(self.checks)} checks failed" if self.failed else "all checks passed"
        lines = [
            "# Validation of the distillation data",
            "",
            f"{self.rows} conversations, {self.failures} failures, target `{self.target}`: {verdict}.",
            "",
            "| | check | meaning | bound | observed | examples |",
            "|---|---|---|---|---|---|",
        ]
        for check in self.checks:
            examples = "; ".join(f"{example['id']}: {example['found']}" for example in check.examples)
            cells = (check.name, check.meaning, check.bound, check.observed, examples)
            lines.append("| " + " | ".join(["✔" if check.passed else "✘", *map(_cell, cells)]) + " |")
        return "\n".join(lines) + "\n"

    def summary(self) -> str:
        """The failed checks and their example rows, in one line."""
        parts = []
        for check in self.failed:
            ids = ", ".join(dict.fromkeys(example["id"] for example in check.examples[:3]))
            parts.append(f"{check.name} ({check.observed}{f'; e.g. {ids}' if ids else ''})")
        return "; ".join(parts)


def validate_data(
    directory: str | Path,
    bounds: ValidateParams,
    max_length: int,
    target: Any,
    overlap: Callable[[str], str | None],
) -> Validation:
    """Check the data set that the generate stage wrote to `directory`.

    Args:
        max_length: of a conversation, in tokens.
        target: anything with `tokenizer`, `digest`, `stop_ids`, `vocab_size` and `chat_ids`.
        overlap: an n-gram that the text shares with an evaluation prompt, or None.

    Raises:
        DeepSpecError: a file of the data set is missing or cannot be read.
    """
    directory = Path(directory)
    path = directory / "train.parquet"
    manifest = _load_json(directory / "manifest.json")
    failures = _load_failures(directory / "failures.jsonl")
    try:
        rows = parquet.read_metadata(path).num_rows
        columns = _columns(path)
    except FileNotFoundError:
        raise DeepSpecError(f"{path}: no such file; run the generate stage first") from None
    except ArrowInvalid as error:
        raise DeepSpecError(f"{path}: not a readable parquet file: {' '.join(str(error).split())}") from None
    checks = apply_rules(columns, [COLUMNS]) + apply_rules(_manifest_facts(manifest, path, rows), [MANIFEST])
    if checks[0].passed:
        table = Flattener(target, bounds.repetition_ngram, overlap).table(path)
        checks += check_rows(table, bounds, max_length, target.digest)
        checks += apply_rules(_attempts(table, failures), [_failed_share(bounds)])
    return Validation(target.digest, rows, len(failures), checks)
