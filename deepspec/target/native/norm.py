"""RMSNorm with its gradients, a call each: what training runs of it, where our kernels are."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepspec.kernels import function, kernels
from deepspec.target.native.matrix import LANES

_Pointer, _Long, _Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def can_norm(x: Tensor, weight: Tensor) -> bool:
    """Return whether the kernels are there and take the norm of x [..., n] under weight [n]."""
    return (
        x.is_cpu
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.shape[-1:] == weight.shape
        and weight.shape[0] % LANES == 0
        and kernels() is not None
    )


def learnt_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight of x [..., n] that can be normed, with gradients of both."""
    return _LearntNorm.apply(x, weight, eps)


class _LearntNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        made, rates = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        function("norm_rows")(*_at(x, weight), _bits(x), *_at(made, rates), _Float(eps), *_sizes(x))
        ctx.save_for_backward(x, weight, rates)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rates = ctx.saved_tensors
        slope = gradients[0].contiguous()
        by_x = torch.empty_like(x)
        by_weight = x.new_zeros(torch.get_num_threads(), x.shape[-1], dtype=torch.float32)
        read, made = _at(slope, x, weight), _at(rates, by_x, by_weight)
        function("norm_gradients")(*read, _bits(x), *made, *_sizes(x))
        return by_x, by_weight.sum(0).to(weight.dtype), None


def _at(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [_Pointer(each.data_ptr()) for each in tensors]


def _bits(x: Tensor) -> ctypes.c_int64:
    return _Long(x.element_size() * 8)


def _sizes(x: Tensor) -> tuple[ctypes.c_int64, ...]:
    """Rows, their width, and threads."""
    return _Long(x.numel() // x.shape[-1]), _Long(x.shape[-1]), _Long(torch.get_num_threads())
