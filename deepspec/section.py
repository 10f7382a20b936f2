"""A section of params.yaml: a pydantic model that refuses unknown keys."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def options(self) -> dict[str, Any]:
        """All values but the tag `type`."""
        return self.model_dump(exclude={"type"})
