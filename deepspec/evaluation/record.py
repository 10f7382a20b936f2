"""The evaluation record, `reports/eval/<drafter>.json`: what was measured of one drafter, on what, and by what means.

The models are the contract between the evaluation and everything that reads it; a field's description is its
definition, from which docs/evaluation.md and `deepspec evaluate --help` are made. Its parts are in `parts.py`;
`summarise.py` builds a record.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from deepspec.errors import DeepSpecError
from deepspec.evaluation.parts import (
    Blocks,
    Confidence,
    ContextBin,
    Decode,
    DraftProvenance,
    Mode,
    Part,
    PassCosts,
    RecordWarning,
    RoundCosts,
    StateCosts,
    Summary,
    Sweeps,
    TaskEntry,
    Throughput,
    TrainParity,
)
from deepspec.files import write_json

EVAL_VERSION = "3"  # raised whenever numbers of before and after cannot be compared
DRAFT = "draft"  # the contestant that a record is about: the draft as `evaluate.decode` uses it
_LATER = (
    "states",
    "contexts",
    "pass_costs",
    "plain_new_tokens",
    "engine",
)  # sections that records of this version may lack
LOOKUP = "lookup"  # the strongest baseline that needs no training


@dataclass(frozen=True)
class Identity:
    """Outcome of a token-identity check: no difference but `ties` proven ties, or not lossless."""

    lossless: bool
    ties: int
    prompts: int = 0
    tokens: int = 0


class Record(Part):
    """All that was measured of one drafter."""

    eval_version: str = Field(description="numbers of two versions cannot be compared")
    drafter: str = Field(description="its name in params.yaml")
    draft_digest: str = Field(description="digest of the draft's files")
    target: str = Field(description="where the target came from")
    target_digest: str = Field(description="digest of the target's files")
    device: str = Field(description="machine and software it was measured on")
    dtype: str = Field(description="precision of the target")
    seed: int = Field(description="seed of sampling and of the bootstrap")
    processes: int = Field(description="processes that measured at once")
    max_new_tokens: int = Field(description="tokens of an answer at most, of every turn")
    tasks: dict[str, TaskEntry] = Field(description="`<task>@T=<temperature>` → its figures")
    summary: Summary = Field(description="means over tasks")
    blocks: dict[Mode, dict[str, Blocks]] | None = Field(
        description="the trained draft alone by task, whole blocks: acceptance by position without lookup "
        "and controller"
    )
    confidence: dict[Mode, Confidence] | None = Field(
        description="what the confidence head is worth, before and after calibration; null for a drafter without one"
    )
    throughput: list[Throughput] | None = Field(
        description="tokens/s of full batches: plain, fixed lengths, prefix scheduler"
    )
    sweeps: Sweeps | None = Field(
        description="tau and speed-up at T = 0 over the length of chains, the depth and the nodes of best-first "
        "trees, of the draft alone"
    )
    promise: dict[Mode, TrainParity] | None = Field(
        description="greedy acceptance at position 1 and the drafted tokens themselves, on the same held-out contexts, "
        "in training and in decoding"
    )
    warnings: list[RecordWarning] = Field(description="what a reader must not overlook")
    decode: Decode = Field(description="how the draft was used (`evaluate.decode`)")
    round_costs: RoundCosts | None = Field(description="what a pass and a draft cost on the machine")
    provenance: DraftProvenance = Field(description="code, command and packages that made the record")
    states: dict[str, StateCosts] | None = Field(
        None,
        description="as `tasks`: what the rounds cost a target that keeps a state (recurrent layers) and runs accepted "
        "tokens again; absent for every other target",
    )
    pass_costs: dict[str, PassCosts] | None = Field(
        None,
        description="as `tasks`: what a pass of the draft's rounds cost beside a plain one, by the cost curve and in "
        "fact; absent in records of before",
    )
    contexts: dict[str, list[ContextBin]] | None = Field(
        None,
        description="as `tasks`: tau of the draft's rounds by the tokens before them, of prompt and answer, in bins of "
        "doubling length; absent in records of before",
    )

    plain_new_tokens: int | None = Field(
        None,
        description="tokens at most of a plain run whose answer no later turn needs; absent: `max_new_tokens`",
    )
    engine: str | None = Field(
        None,
        description="serving engine and version in which all of it was measured, where only that can run the target; "
        "absent: this project's own engine",
    )

    @property
    def train_parity(self) -> TrainParity | None:
        """Greedy decoding beside training, where the draft kept held-out contexts."""
        return (self.promise or {}).get("greedy")

    @property
    def greedy_blocks(self) -> dict[str, Blocks]:
        """Of the draft alone at T = 0, by task; empty for one that is not trained."""
        return (self.blocks or {}).get("greedy", {})

    @classmethod
    def read(cls, path: str | Path) -> Record:
        """Read a record from its file.

        Raises:
            DeepSpecError: no such file, not JSON, or not of the record's shape.
        """
        try:
            return cls.parse(json.loads(Path(path).read_text()), path)
        except FileNotFoundError:
            raise DeepSpecError(f"{path}: no such record; evaluate the drafter first (dvc repro)") from None
        except ValueError as error:
            raise DeepSpecError(f"{path}: not JSON ({error}); evaluate the drafter again") from None

    @classmethod
    def parse(cls, value: Any, path: str | Path) -> Record:
        """Return the record that a file's JSON holds. One of another version is read if it has this shape.

        Raises:
            DeepSpecError: it is not of the record's shape.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            version = value.get("eval_version") if isinstance(value, dict) else None
            if version not in (None, EVAL_VERSION):
                raise DeepSpecError(_other_version(path, version)) from None
            raise DeepSpecError(
                f"{path}: not an evaluation record: {first_mistake(error)}; evaluate the drafter again"
            ) from None

    def require_version(self, path: str | Path) -> None:
        """Raise DeepSpecError for a record of another version, whose numbers are not comparable with those of this."""
        if self.eval_version != EVAL_VERSION:
            raise DeepSpecError(_other_version(path, self.eval_version))

    def dump(self) -> dict[str, Any]:
        """Return the record as JSON holds it."""
        found = self.model_dump(mode="json")
        for name in _LATER:
            if found[name] is None:
                del found[name]
        besides = (beside for entry in found["tasks"].values() for beside in entry["beside"].values())
        for part in (*besides, found["sweeps"] or {}):
            if not part.get("computed", True):
                del part["computed"]  # which records of before lack
        return found

    def write(self, path: str | Path) -> None:
        """Write the record to its file."""
        write_json(path, self.dump())


def _other_version(path: str | Path, version: object) -> str:
    return f"{path}: of evaluation version {version}, not {EVAL_VERSION}; evaluate it again"


def first_mistake(error: ValidationError) -> str:
    """Return the place and the text of the first mistake: `tasks.sums@T=0.tau: Field required`."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else first["msg"]


def task_key(task: str, temperature: float) -> str:
    """Return the key of a task's entry: `humaneval@T=0`."""
    return f"{task}@T={temperature:g}"


def described(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Yield the key and the description of every field of a model, in the order of the file."""
    for name, info in model.model_fields.items():
        yield name, info.description or ""
