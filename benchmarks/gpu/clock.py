"""Times on a device: synchronised seconds, the time its kernels take, and its two ceilings."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

_COPIES = 8


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call, all that it launched included."""
    began = now(device)
    call()
    return now(device) - began


def median_seconds(call: Callable[[], Any], device: torch.device, repeats: int, untimed: int = 3) -> float:
    """The median of several calls, after some that make kernels and graphs."""
    for _ in range(untimed):
        call()
    return median(seconds(call, device) for _ in range(repeats))


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def kernel_seconds(call: Callable[[], Any], device: torch.device) -> float | None:
    """Seconds in which a kernel or a copy of one call ran, by the profiler; None where there is no GPU."""
    if device.type != "cuda":
        return None
    from torch.autograd import DeviceType

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize(device)
    events = [event for event in profile.key_averages() if event.device_type == DeviceType.CUDA]
    return sum(event.self_device_time_total for event in events) / 1e6


def host_share(call: Callable[[], Any], device: torch.device, wall: float) -> float | None:
    """The share of `wall` seconds of a call in which the device waits for its host; None where there is no GPU."""
    busy = kernel_seconds(call, device)
    return None if busy is None else max(1 - busy / wall, 0.0)


def copy_bandwidth(device: torch.device, megabytes: int) -> float:
    """Bytes read and written a second by a copy of random numbers on the device."""
    source = torch.randn(megabytes << 18, device=device)
    copy = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: copy.copy_(source), device, _COPIES)


def matrix_rate(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """FLOP a second of a product of two random matrices."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: left @ right, device, _COPIES)


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes that tensors took since `forget_peak`; None where there is no GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
