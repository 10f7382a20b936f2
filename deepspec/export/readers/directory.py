"""A directory as an engine opens it, with an account of which weights were read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor


class Unreadable(Exception):
    """The engine would not load this, or would leave a weight at its initial value."""


@dataclass(frozen=True)
class Facts:
    """What an engine takes from the configuration, in one convention: layer i means the output of decoder layer i."""

    layer_ids: tuple[int, ...] | None = None
    rope_theta: float | None = None
    rms_norm_eps: float | None = None
    mask_token_id: int | None = None
    max_position_embeddings: int | None = None
    sample_from_anchor: bool | None = None  # whether the anchor's own place predicts the first token
    norms: tuple[str, ...] | None = None  # those that only some EAGLE-3 drafts have
    causal: bool | None = None  # whether a block's places see only those before them
    window: int | None = None  # how many places back a block drafter's layers see
    candidates: int | None = None  # tokens of a place that DFlash 2 compares
    draft_ids: Tensor | None = None  # int64, target ids of the columns; None: all


@dataclass(frozen=True)
class Reading:
    logits: Tensor  # [anchors, γ, target's vocabulary], -inf where the draft has no column
    facts: Facts


@dataclass
class Directory:
    config: dict[str, Any]
    weights: dict[str, Tensor]
    path: Path | None = None
    used: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, path: Path, file: str = "model.safetensors") -> Directory:
        config, weights = path / "config.json", path / file
        for needed in (config, weights):
            if not needed.exists():
                raise Unreadable(f"{needed.name} is missing")
        return cls(json.loads(config.read_text()), load_file(weights), path)

    def take(self, name: str, *shape: int) -> Tensor:
        """Take a weight in float32, in the shape that the engine wants."""
        if name not in self.weights:
            raise Unreadable(f"{name} is missing: an engine would leave it at its initial value")
        weight = self.weights[name]
        if shape and tuple(weight.shape) != shape:
            hint = "; it is transposed" if tuple(weight.shape) == shape[::-1] else ""
            raise Unreadable(f"{name} is {list(weight.shape)}, the engine wants {list(shape)}{hint}")
        self.used.add(name)
        return weight.float() if weight.is_floating_point() else weight

    def optional(self, name: str, *shape: int) -> Tensor | None:
        return self.take(name, *shape) if name in self.weights else None

    def has(self, name: str) -> bool:
        return name in self.weights

    def unread(self) -> list[str]:
        """Return the weights of the file that the engine reads nowhere."""
        return sorted(set(self.weights) - self.used)

    def want(self, name: str) -> Any:
        if self.config.get(name) is None:
            raise Unreadable(f"config.json lacks {name}")
        return self.config[name]

    def changed(
        self, config: dict[str, Any] | None = None, weights: dict[str, Tensor] | None = None
    ) -> Directory:
        """Return a copy with some keys or weights replaced, to find what explains a difference."""
        return replace(
            self, config=self.config | (config or {}), weights=self.weights | (weights or {}), used=set()
        )
