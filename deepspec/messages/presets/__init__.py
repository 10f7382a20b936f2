"""Presets: a small YAML says where a common dataset lies and what its columns hold."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field

from deepspec.errors import DeepSpecError, nearest
from deepspec.messages.rows import Columns

PRESETS = Path(__file__).parent


class Preset(BaseModel):
    """What a preset's YAML may say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str = Field(description="Its name on the hub.")
    description: str
    config: str | None = None
    split: str = "train"
    columns: Columns = Columns()

    @classmethod
    def named(cls, name: str) -> Preset:
        """Read a preset of the project.

        Raises:
            DeepSpecError: there is none of this name.
        """
        if name not in preset_names():
            raise DeepSpecError(
                f"unknown preset {name!r}{nearest(name, preset_names())}; known: {', '.join(preset_names())}"
            )
        return cls.model_validate(yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8")))


def preset_names() -> list[str]:
    """Return the names of the presets that come with the project."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))
