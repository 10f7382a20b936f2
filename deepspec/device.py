"""What machine a number was measured on, in one line."""

from __future__ import annotations

import platform

import torch

from deepspec.kernels import kernels, with_tiles
from deepspec.provenance import cpu_facts


def describe_device(device: torch.device | str) -> str:
    """Describe a device: `AMD EPYC 9B14, 2 threads, our kernels, Linux, torch 2.13.0`; a GPU with its CUDA version."""
    device = torch.device(device)
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        cpu = cpu_facts().get("model name") or platform.processor() or platform.machine()
        ours = (", our kernels with AMX" if with_tiles() else ", our kernels") if kernels() else ""
        name = f"{cpu}, {torch.get_num_threads()} threads{ours}"
    return f"{name}, {platform.system()}, torch {torch.__version__}"
