"""What the checks of the distillation data found, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from deepspec.markdown import markdown_table


@dataclass(frozen=True)
class Check:
    """One expectation and what was found.

    Args:
        examples: `{"id", "found"}`, rows that broke it.
        params: keys of params.yaml that set the bound.
        expectation: as Great Expectations has it: `type` and `kwargs`.
    """

    name: str
    meaning: str
    bound: str
    observed: str
    passed: bool
    examples: list[dict[str, str]] = field(default_factory=list)
    params: tuple[str, ...] = ()
    expectation: dict[str, Any] = field(default_factory=dict)

    def finding(self) -> dict[str, Any]:
        """Return all but how the expectation is written: training depends on what was found, not on that."""
        return {key: value for key, value in asdict(self).items() if key not in ("params", "expectation")}


@dataclass(frozen=True)
class Validation:
    target: str
    rows: int
    failures: int
    checks: list[Check]
    facts: dict[str, str] = field(default_factory=dict)  # what the data is made of
    warnings: list[str] = field(default_factory=list)  # allowed, and worth a second look

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    def summary(self) -> str:
        """Return the failed checks and their example rows, in one line."""
        return "; ".join(_failure(check) for check in self.failed)

    def to_dict(self) -> dict[str, Any]:
        facts = {"target": self.target, "rows": self.rows, "failures": self.failures}
        said = {"facts": self.facts, "warnings": self.warnings}
        return {
            "passed": not self.failed,
            **facts,
            **said,
            "checks": [check.finding() for check in self.checks],
        }

    def to_markdown(self) -> str:
        count = len(self.checks)
        verdict = (
            f"{len(self.failed)} of {count} checks failed" if self.failed else f"all {count} checks passed"
        )
        lines = [
            "# Validation of the distillation data",
            "",
            f"{self.rows} rows, {self.failures} failures, target `{self.target}`: {verdict}.",
            "",
            *(f"**Warning**: {warning}\n" for warning in self.warnings),
            markdown_table(
                ("", "check", "what it means", "bound", "observed", "examples"), map(_cells, self.checks)
            ),
        ]
        if self.facts:
            lines += [
                "",
                "## What it is made of",
                "",
                *(f"- {name}: {value}" for name, value in self.facts.items()),
            ]
        return "\n".join(lines) + "\n"


def _failure(check: Check) -> str:
    ids = ", ".join(dict.fromkeys(example["id"] for example in check.examples[:3]))
    return f"{check.name} ({check.observed}, allowed: {check.bound}{f'; e.g. {ids}' if ids else ''})"


def _cells(check: Check) -> tuple[str, ...]:
    examples = "; ".join(f"{example['id']}: {example['found']}" for example in check.examples)
    return (
        "ok" if check.passed else "FAILED",
        check.name,
        check.meaning,
        check.bound,
        check.observed,
        examples,
    )
