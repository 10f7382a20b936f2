"""Where a training run writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainingPaths:
    """The three outputs of a training run."""

    draft: Path
    history: Path  # metrics as JSON lines
    manifest: Path  # what the target's features were, and their checksums where they are kept

    @classmethod
    def of(cls, name: str) -> TrainingPaths:
        """Return the paths that dvc.yaml has for drafter `name`."""
        return cls(
            Path("data/drafts") / name,
            Path("reports/train") / f"{name}.jsonl",
            Path("data/features") / f"{name}.json",
        )
