"""Rotary embeddings of drafts: plain, over a part of a head, and scaled as transformers scales them.

`scaling` is what a `config.json` has in `rope_parameters` besides the base: its `rope_type` with that type's
parameters, and `partial_rotary_factor`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from deepspec.errors import DeepSpecError
from deepspec.target.fused import signed

TYPES = ("default", "linear", "llama3", "yarn")  # those that are the same for every length of text
Scaling = Mapping[str, object]


class Rotated(Protocol):
    """A configuration whose attention has a rotary embedding."""

    @property
    def rope_theta(self) -> float: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def rope_scaling(self) -> Scaling | None: ...
    @property
    def max_position_embeddings(self) -> int: ...


@dataclass(frozen=True)
class Rope:
    """A rotary embedding.

    Args:
        theta: its base.
        dim: of a head; a partial one rotates only the first places.
        scaling: None for a plain one.
        longest: `max_position_embeddings`, from which a scaling may take what it does not say.
    """

    theta: float
    dim: int
    scaling: Scaling | None = field(default=None, hash=False)
    longest: int = 8192

    @classmethod
    def of(cls, config: Rotated) -> Rope:
        """Return that of a draft's configuration."""
        return cls(config.rope_theta, config.head_dim, config.rope_scaling, config.max_position_embeddings)

    def rates(self, device: torch.device) -> tuple[Tensor, float]:
        """Return the rates float64 [rotated / 2] and the factor on cosine and sine."""
        if self.scaling is None or self.scaling["rope_type"] == "default":
            dim = int(self.dim * self._part)
            return self.theta ** (-torch.arange(0, dim, 2, device=device).double() / dim), 1.0
        config = LlamaConfig(
            hidden_size=self.dim,
            num_attention_heads=1,
            head_dim=self.dim,
            max_position_embeddings=self.longest,
            rope_parameters={**self.scaling, "rope_theta": self.theta},
        )
        rates, factor = ROPE_INIT_FUNCTIONS[str(self.scaling["rope_type"])](config, device)
        return rates.double(), float(factor)

    def operands(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the operands of `rotate` for positions [b, n]: each [b, n, 1, rotated]."""
        rates, factor = self.rates(positions.device)
        angles = (positions[..., None] * rates).repeat(1, 1, 2)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        return cos.to(dtype)[:, :, None], signed(sin).to(dtype)[:, :, None]

    @property
    def _part(self) -> float:
        return float(str((self.scaling or {}).get("partial_rotary_factor", 1.0)))


def read_rope(config: Mapping[str, object], theta: float = 10000.0) -> tuple[float, Scaling | None]:
    """
    Read the rotary embedding of a `config.json`: its base, and its scaling (None: plain).

    Args:
        config: with `rope_parameters` of transformers 5, or `rope_theta`, `rope_scaling` and
            `partial_rotary_factor` of earlier ones.
        theta: the base where `config` says none.

    Raises:
        DeepSpecError: a scaling that is not run here, or one without a parameter that it needs.
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise DeepSpecError(f"rope_parameters is {found!r}, not a mapping")
    nested = [
        kind for kind in ("full_attention", "sliding_attention") if isinstance(found.get(kind), Mapping)
    ]
    if nested:
        raise DeepSpecError(
            f"rope_parameters differ by kind of layer ({', '.join(nested)}), which is not run here"
        )
    scaling = {key: value for key, value in found.items() if value is not None and key not in _NO_PARAMETERS}
    kind = scaling.setdefault("rope_type", found.get("type") or "default")
    stated = scaling.pop("rope_theta", None) or config.get("rope_theta") or theta
    if partial := config.get("partial_rotary_factor"):
        scaling.setdefault("partial_rotary_factor", partial)
    if scaling.get("partial_rotary_factor") in (1, None):
        scaling.pop("partial_rotary_factor", None)
    if kind == "mrope":  # text alone has the same position on its three axes
        kind = scaling["rope_type"] = "default"
    if kind not in TYPES:
        raise DeepSpecError(f"rope_type {kind!r} is not run here; known: {', '.join(TYPES)}")
    if needed := [key for key in _NEEDED[str(kind)] if key not in scaling]:
        raise DeepSpecError(f"the rotary embedding of rope_type {kind!r} lacks {', '.join(needed)}")
    base = float(str(stated))
    return base, None if scaling == {"rope_type": "default"} else scaling


def followed_rope(config: object) -> Scaling | None:
    """
    Return the scaling of a target's rotary embedding that its draft follows; None where it has none that is run here.

    A draft rotates whole heads, and as full attention does where kinds of layers differ.

    Args:
        config: of the target, as transformers has it.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention") or rope
    if rope.get("rope_type", "default") in ("default", "mrope"):
        return None
    whole = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}
    try:
        return read_rope({"rope_parameters": whole})[1]
    except DeepSpecError:
        return None


def written_rope(config: Rotated) -> dict[str, object]:
    """Return the `rope_parameters` of transformers 5 for a draft's configuration."""
    return {"rope_type": "default", "rope_theta": config.rope_theta, **(config.rope_scaling or {})}


_NO_PARAMETERS = ("type", "mrope_section", "mrope_interleaved")
_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
