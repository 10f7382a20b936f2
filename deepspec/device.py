"""What machine a number was measured on, in one line."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def describe_device(device: torch.device | str) -> str:
    """Describe a device: `AMD EPYC 9B14, 2 threads, Linux, torch 2.13.0`; a GPU stands with its CUDA version."""
    device = torch.device(device)
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return f"{name}, {platform.system()}, torch {torch.__version__}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
