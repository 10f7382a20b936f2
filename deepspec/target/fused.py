"""Inference layers that spend their time reading weights: prepacked matrices and few operations.

`PackedLinear` holds a weight in the layout of our kernels (`deepspec.target.native`), or where they are not, in
oneDNN's, so that a bfloat16 product on a CPU does not repack it every time (2× at one row); `Int4Linear` holds it in
blocks of 4 bits. `fuse` replaces the decoder layers of Llama-shaped targets (Llama, SmolLM, Mistral, Qwen2, Qwen3) by
one that joins the q/k/v and gate/up projections and folds the residual additions into the products; with our kernels it
is one call. Layers of any other shape keep their own forward, with packed projections.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.target.attention import ForwardPass, OneWay, Rule, attend
from deepspec.target.native.layer import NativeLayers, Norm, Parts
from deepspec.target.native.matrix import Matrix, can_hold, dense, quantised, undone


def can_pack(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class PackedLinear(nn.Module):
    """y = x Wᵀ + b for inference. x [..., in] → [..., out]; optionally y + residual in the same kernel."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        takes = weight.dtype == torch.bfloat16 and can_hold(weight)
        self.native = dense(weight, self.bias) if takes else None
        self.packed = self.native is None and can_pack(weight)
        if self.native is not None:
            self.weight = self.native.weight
        elif self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
        else:
            self.weight = weight

    @property
    def dense(self) -> Tensor:
        """W [out, in], as it came."""
        if self.native is not None:
            return undone(self.native)
        return self.weight.to_dense() if self.packed else self.weight

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.native is not None:
            return self.native.product(x, residual)
        if not self.packed:
            out = F.linear(x, self.weight, self.bias)
            return out if residual is None else out + residual
        if residual is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")


class Int4Linear(nn.Module):
    """Weight-only 4 bits, for inference on a CPU.

    w = (q − 8)·scale + zero in blocks of 32 along the inputs, each block spanning its own smallest to largest weight.
    These are the blocks of GGUF's Q4_1, so that weights which were dequantised from it come back as they were, but for
    scales in bfloat16. The activations stay bfloat16.

    x [..., in] → [..., out]; optionally y + residual.
    """

    BLOCK = 32

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        blocks = weight.detach().float().unflatten(1, (-1, self.BLOCK))  # [out, blocks, 32]
        low, high = blocks.amin(-1), blocks.amax(-1)
        scale = ((high - low) / 15).clamp_min(1e-8)
        levels = ((blocks - low[..., None]) / scale[..., None]).round().clamp_(0, 15)
        zero = low + 8 * scale
        self.bias = None if bias is None else bias.detach().to(torch.bfloat16)
        self.native: Matrix | None = None
        if can_hold(weight):
            self.native = quantised(levels.flatten(1), scale, zero, self.bias)
            self.weight = self.native.weight
            return
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.flatten(1).int(), 1)
        self.blocks = torch.stack((scale, zero), -1).transpose(0, 1).to(torch.bfloat16).contiguous()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.native is not None:
            return self.native.product(x, residual)
        rows = x.reshape(-1, self.in_features)
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, self.BLOCK, self.blocks)
        out = out.view(*x.shape[:-1], self.out_features)
        if self.bias is not None:
            out = out + self.bias
        return out if residual is None else out + residual


Make = type[PackedLinear] | type[Int4Linear]


class LlamaNorm(Protocol):
    """RMSNorm as transformers has it."""

    weight: nn.Parameter
    variance_epsilon: float


class LlamaAttention(Protocol):
    """What `FusedLayer` reads of a Llama-shaped attention; norms of queries and keys (Qwen3) may be there."""

    layer_idx: int
    head_dim: int
    scaling: float
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear


class LlamaMLP(Protocol):
    """What `FusedLayer` reads of a SwiGLU."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear


class LlamaLayer(Protocol):
    """What `FusedLayer` reads of a Llama-shaped decoder layer."""

    @property
    def self_attn(self) -> LlamaAttention: ...

    @property
    def mlp(self) -> LlamaMLP: ...

    @property
    def input_layernorm(self) -> LlamaNorm: ...

    @property
    def post_attention_layernorm(self) -> LlamaNorm: ...


def qk_norms(attention: LlamaAttention) -> tuple[LlamaNorm, LlamaNorm] | None:
    """Return the norms of queries and keys, where an attention has them."""
    queries, keys = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return None if queries is None or keys is None else (queries, keys)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the halves of the last dimension; `sin` has its first half negated (see `signed`).

    Operands that are narrower than a head rotate its first places and leave the others.
    """
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((rotate(x[..., :width], cos, sin), x[..., width:]), -1)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def signed(sin: Tensor) -> Tensor:
    half = sin.shape[-1] // 2
    return torch.cat((-sin[..., :half], sin[..., half:]), -1)


def _window(attention: LlamaAttention) -> int | Rule | None:
    """Return the sliding window of an attention, or a rule in its place.

    Qwen's keeps its own, Mistral's asks the configuration at call time. One that never speaks of a window has none,
    whatever its configuration says (Llama's).
    """
    module = cast(nn.Module, attention)
    code = inspect.unwrap(type(module).forward).__code__
    asks = "sliding_window" in (*code.co_names, *code.co_consts)
    config = getattr(attention, "config", None) if asks else None
    return getattr(attention, "sliding_window", getattr(config, "sliding_window", None))


class FusedLayer(nn.Module):
    """A Llama-shaped decoder layer: norm, attention, norm, SwiGLU. x [batch, n, d] → the same."""

    def __init__(self, layer: LlamaLayer, make: Make = PackedLinear):
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.index = attention.layer_idx
        self.head_dim = attention.head_dim
        self.scale = attention.scaling
        self.window = _window(attention)
        self.heads = attention.q_proj.out_features // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        self.qkv = _joined(make, attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = _joined(make, attention.o_proj)
        self.gate_up = _joined(make, mlp.gate_proj, mlp.up_proj)
        self.down = _joined(make, mlp.down_proj)
        self.norms = (inference_norm(layer.input_layernorm), inference_norm(layer.post_attention_layernorm))
        norms = qk_norms(attention)
        self.qk_norms = None if norms is None else (inference_norm(norms[0]), inference_norm(norms[1]))

    @cached_property
    def native(self) -> NativeLayers | None:
        """The layer as one call; None where a part of it is not the kernels'."""
        projections = [
            getattr(part, "native", None) for part in (self.qkv, self.out, self.gate_up, self.down)
        ]
        qkv, out, gate_up, down = projections
        rule = self.window
        window = rule.window if isinstance(rule, OneWay) else rule
        if qkv is None or out is None or gate_up is None or down is None or callable(window):
            return None
        parts = Parts(
            qkv,
            out,
            gate_up,
            down,
            self.norms,
            self.qk_norms,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.scale,
            window or 0,
            isinstance(rule, OneWay),
        )
        return NativeLayers((parts,), self.index) if parts.suits else None

    def forward(self, x: Tensor, position_embeddings=None, *, step: ForwardPass, **_) -> Tensor:
        if step.cache is not None and (native := self.native):
            rope = step.once("rope", lambda: rope_operands(position_embeddings))
            return native(None, x, rope, step)[0]
        return self.block(self.norms[0](x), x, position_embeddings, step)

    def block(self, normed: Tensor, x: Tensor, position_embeddings, step: ForwardPass) -> Tensor:
        """Run the layer on what its attention reads, normed [batch, n, ·], and what its residuals add to."""
        if step.cache is not None and (native := self.native):
            rope = step.once("rope", lambda: rope_operands(position_embeddings))
            return native(normed, x, rope, step)[0]
        batch, n, _ = x.shape
        qkv = self.qkv(normed).view(batch, n, -1, self.head_dim)
        rotated, values = qkv.split((self.heads + self.kv_heads, self.kv_heads), 2)
        if self.qk_norms is not None:
            queries, keys = rotated.split((self.heads, self.kv_heads), 2)
            rotated = torch.cat((self.qk_norms[0](queries), self.qk_norms[1](keys)), 2)
        cos, sin = step.once("rope", lambda: rope_operands(position_embeddings))
        queries, keys = rotate(rotated, cos, sin).split((self.heads, self.kv_heads), 2)
        keys, values = step.store(self.index, keys.transpose(1, 2), values.transpose(1, 2))
        mask = step.mask(x.dtype, self.heads // self.kv_heads, self.window)
        queries = step.spread(queries).transpose(1, 2)
        attended = step.gather(attend(queries, keys, values, mask, self.scale))
        x = self.out(attended.reshape(batch, n, -1), x)
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
        return self.down(F.silu(gate).mul_(up), x)


def rope_operands(position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return cos and signed sin as layers rotate with them, [batch, n, 1, width]."""
    cos, sin = position_embeddings  # [batch, n, head_dim]
    return cos[:, :, None], signed(sin)[:, :, None]


class RotaryTable:
    """Operands of `rotate` for inference, from a table that grows by doubling.

    Args:
        operands: positions [1, n] → cos and signed sin, each [1, n, 1, width].
    """

    def __init__(self, operands: Callable[[Tensor], tuple[Tensor, Tensor]], device: torch.device):
        self._operands, self._device = operands, device
        self._table = torch.empty(2, 0, 0, device=device)

    def __call__(self, positions: Tensor, largest: int) -> tuple[Tensor, Tensor]:
        """Return the operands of positions [b, n], none above `largest`."""
        self.rows(largest)
        cos, sin = self._table.index_select(1, positions.flatten()).unbind()
        shape = (*positions.shape, 1, -1)
        return cos.view(shape), sin.view(shape)

    def rows(self, largest: int) -> tuple[Tensor, Tensor]:
        """Return the operands of every position up to `largest` or beyond, each [positions, width]."""
        if largest >= self._table.shape[1]:
            every = torch.arange(max(512, 2 * largest), device=self._device)[None]
            self._table = torch.stack(self._operands(every))[:, 0, :, 0]  # [2, positions, width]
        return self._table[0], self._table[1]


class DecoderRotary:
    """Operands of `rotate` of a decoder's rotary embedding.

    Where the rates change with the length of a text (dynamic, longrope) they are computed for every pass.
    """

    def __init__(self, rotary: Any, like: Tensor):
        self._rotary, self._like = rotary, like[:0]
        static = rotary.rope_type not in ("dynamic", "longrope")
        self._table = RotaryTable(self._computed, like.device) if static else None

    def __call__(self, step: ForwardPass) -> tuple[Tensor, Tensor]:
        """Return cos and signed sin of every position, [positions, width], or of the pass's own, [1, n, 1, width]."""
        return self._table.rows(step.largest) if self._table else self._computed(step.positions)

    def _computed(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rope_operands(self._rotary(self._like, positions))


def _joined(make: Make, *linears: nn.Linear) -> PackedLinear | Int4Linear:
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    return make(torch.cat([linear.weight for linear in linears]), bias)


def inference_norm(norm: LlamaNorm) -> Norm:
    """Take an RMSNorm for inference."""
    return Norm(norm.weight.detach(), norm.variance_epsilon)


LLAMA_SHAPED = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
BARE = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}


def fuse(layers: nn.ModuleList, make: Make = PackedLinear) -> None:
    """Replace Llama-shaped layers by fused ones, and the projections of the others by packed ones, in place."""
    for i, layer in enumerate(layers):
        if is_llama_shaped(layer):
            layers[i] = FusedLayer(cast("LlamaLayer", layer), make)  # its name says so
        elif make is not PackedLinear or can_pack(next(layer.parameters())):
            pack(layer, make)


def is_llama_shaped(layer: nn.Module) -> bool:
    """Return whether a decoder layer of transformers' computes what `FusedLayer` does."""
    if type(layer).__name__ not in LLAMA_SHAPED:
        return False
    config: Any = layer.get_submodule("self_attn").config
    return config.hidden_act == "silu"


def is_bare(decoder: nn.Module) -> bool:
    """Return whether a decoder of transformers' embeds, runs its layers and norms, and does nothing else."""
    kind = type(decoder)
    return kind.__module__.startswith("transformers.models.") and kind.__name__ in BARE


def pack(module: nn.Module, make: Make = PackedLinear) -> None:
    """Replace every `nn.Linear` below `module` by one that `make` builds, in place."""
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, make(child.weight, child.bias))
        else:
            pack(child, make)
