"""What a style's module says of a directory: our own configuration for it, and what its weights are called here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deepspec.target.weights import Stored


@dataclass(frozen=True)
class Found:
    """A directory before it is understood.

    Args:
        config: its config.json.
        weights: what its files hold, by name.
        target_layers: of the target that it is to draft for; None where no target is given.
    """

    config: Mapping[str, Any]
    weights: Mapping[str, Stored]
    target_layers: int | None = None

    @property
    def architecture(self) -> str:
        """Return what its config.json calls it; "" where it has no architectures."""
        return str((self.config.get("architectures") or [""])[0])

    def has(self, part: str) -> bool:
        """Return whether a weight's name contains `part`."""
        return any(part in name for name in self.weights)


@dataclass(frozen=True)
class Plan:
    """How a directory is loaded.

    Args:
        style: who writes such directories.
        what: the algorithm in words.
        kind: of the algorithm that loads it; None for one that no algorithm here runs.
        config: in the keys of the drafts that are written here; without what only the target can say.
        names: of the weights, in the files → here; None: the same.
        made_for: what it calls its target; None if it says nothing.
        assumed: what it does not say, and was taken.
        left_out: weights that are the target's own, or of no use here.
        needs_target: what cannot be said without the target.
        refusal: why it does not load.
    """

    style: str
    what: str
    kind: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] | None = None
    made_for: str | None = None
    assumed: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    needs_target: tuple[str, ...] = ()
    refusal: str | None = None


Recognise = Callable[[Found], Plan | None]  # None: of another style
