"""How hidden states are kept: bfloat16, or with a scale for each token (fp8, int8) or 32 values (int4).

A row of d values is cut into groups; a group's scale is its largest magnitude over the largest code. Codes are stored
as they are, int4 in pairs (the even value in the low half of a byte, offset by 8).

A serving engine's processes load this module too: it imports torch and nothing of this project.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Encoded = dict[str, Tensor]  # part → [n, ...]; the parts of a codec are always the same


@dataclass(frozen=True)
class Codec:
    """One form of storage.

    Args:
        group: values that share a scale; 0: the whole row; None: no scale.
        most: the largest code.
        dtype: of the codes.
    """

    name: str
    group: int | None
    most: float
    dtype: torch.dtype

    def encode(self, x: Tensor) -> Encoded:
        """Encode x [..., d] as codes and scales; d is a multiple of the group."""
        if self.group is None:
            return {"codes": x.to(self.dtype)}
        grouped = x.float().unflatten(-1, (-1, self.group or x.shape[-1]))
        scales = (grouped.abs().amax(-1) / self.most).clamp(min=1e-12).to(torch.bfloat16)
        codes = (grouped / scales.float()[..., None]).clamp(-self.most, self.most)
        if not self.dtype.is_floating_point:
            codes = codes.round()
        codes = codes.flatten(-2)
        if self.dtype == torch.uint8:
            low, high = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
            return {"codes": low | high << 4, "scales": scales}
        return {"codes": codes.to(self.dtype), "scales": scales}

    def decode(self, encoded: Encoded) -> Tensor:
        """Decode to bfloat16 [..., d]."""
        codes = encoded["codes"]
        if self.group is None:
            return codes
        if self.dtype == torch.uint8:
            codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).to(torch.int8) - 8
        scales = encoded["scales"]
        grouped = codes.to(torch.bfloat16).unflatten(-1, (scales.shape[-1], -1))
        return (grouped * scales[..., None]).flatten(-2)


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("bf16", None, 0.0, torch.bfloat16),
        Codec("fp8", 0, 448.0, torch.float8_e4m3fn),
        Codec("int8", 0, 127.0, torch.int8),
        Codec("int4", 32, 7.0, torch.uint8),
    )
}


def packed(states: Tensor, form: str) -> Encoded:
    """Return what a file of an engine's has of states [tokens, layers, d].

    All but the last layer are encoded; that one, whose norm is still to be applied, stays as it is. In bf16 nothing is
    encoded.
    """
    codec = CODECS[form]
    if codec.group is None:
        return {"hidden_states": states}
    return {"hidden_states": states[:, -1:].contiguous(), **codec.encode(states[:, :-1])}
