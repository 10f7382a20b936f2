"""What DFlash 2 adds to a block drafter, written out: convolutions around each sublayer, scores of pairs of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec.export.readers.directory import Directory, Unreadable
from deepspec.export.readers.ops import Layer, attention, rms

SIZES = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")


class Convolution:
    """Weighs each place of a block and those before it; `side` 0 is before the sublayer, 1 behind it."""

    def __init__(self, source: Directory, name: str, d: int):
        self.taps, self.group = source.want("conv_kernel_size"), source.want("conv_group_size")
        if d % self.group:
            raise Unreadable(f"conv_group_size {self.group} does not divide the width {d}")
        self.base = source.take(f"{name}.base_kernel", 2, self.taps, d)
        rows = 2 * self.taps * d // self.group
        self.projection = source.take(f"{name}.kernel_projection.weight", rows, d)

    def __call__(self, side: int, x: Tensor, read: Tensor) -> Tensor:
        """Convolve x [size, d] with the kernel that `read` [size, d], what goes into the sublayer, says."""
        said = (read @ self.projection.T).view(len(x), 2, self.taps, -1)[:, side]
        kernel = self.base[side] + said.repeat_interleave(self.group, -1)  # [size, taps, d]
        out = kernel[:, 0] * x
        for back in range(1, self.taps):
            out[back:] += kernel[back:, back] * x[:-back]
        return out


class ConvolvedLayer:
    """A decoder layer whose sublayers stand between convolutions."""

    def __init__(self, source: Directory, prefix: str, layer: Layer, d: int):
        self.layer = layer
        self.attention = Convolution(source, f"{prefix}attention_conv", d)
        self.mlp = Convolution(source, f"{prefix}mlp_conv", d)

    def __call__(self, x: Tensor, context: Tensor, places: Tensor, seen: Tensor | None) -> Tensor:
        """Run over a block x [size, d] behind its context [n, d], at places [n + size]."""
        layer = self.layer
        normed = rms(x, layer.input_norm, layer.eps)
        read = self.attention(0, normed, normed)
        all_read = torch.cat((context, read))
        queries = layer.queries(read, places[len(context) :])
        attended = attention(queries, layer.keys(all_read, places), layer.values(all_read), seen)
        x = x + self.attention(1, attended @ layer.o.T, normed)
        normed = rms(x, layer.output_norm, layer.eps)
        read = self.mlp(0, normed, normed)
        gate = read @ layer.gate.T
        return x + self.mlp(1, (gate * gate.sigmoid() * (read @ layer.up.T)) @ layer.down.T, normed)


class Selector:
    """Scores of pairs, ⟨A(a) ⊙ H h, B(b)⟩; which tokens are compared at all, `selector_top_k` says."""

    def __init__(self, source: Directory, d: int, columns: int):
        rank = source.want("selector_rank")
        self.hidden = source.take("candidate_selector.hidden_projection.weight", rank, d)
        self.before = source.take("candidate_selector.predecessor_codebook", source.want("vocab_size"), rank)
        self.after = source.take("candidate_selector.successor_codebook", columns, rank)

    def correction(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """Return the scores [γ, columns] for states [γ, d] and the tokens before, int64 [γ]."""
        return (self.before[previous] * (hidden @ self.hidden.T)) @ self.after.T
