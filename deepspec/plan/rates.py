"""What a machine does in a second and how much it holds: measured in a few seconds, or stated in a file."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import yaml
from pydantic import Field, ValidationError

from deepspec.errors import DeepSpecError
from deepspec.section import Section
from deepspec.target.fused import PackedLinear

NARROW = 0.2  # of `flops`, where a file of rates does not say it
ROWS = 64  # of a narrow product
_SIDE = 2048  # of the matrices that are multiplied
_WEIGHTS = 32  # of them one after the other, more than a cache holds
_BLOCK = 1 << 28  # bytes that are read, and written to the disk
_SECONDS = 0.5  # of each measurement, at least


class Rates(Section):
    """A machine's, all in SI units."""

    flops: float = Field(gt=0, description="Floating-point operations a second of a large matrix product.")
    bandwidth: float = Field(gt=0, description="Bytes a second that one device reads of its memory.")
    narrow: float | None = Field(
        None,
        gt=0,
        description=f"Floating-point operations a second of products of {ROWS} rows; absent: {NARROW:g} of flops.",
    )
    disk: float = Field(gt=0, description="Bytes a second that the disk takes.")
    memory: float = Field(gt=0, description="Bytes of one device: the GPU's, or the machine's.")
    free_disk: float = Field(gt=0, description="Bytes that the disk has room for.")
    devices: int = Field(1, ge=1, description="That work together (`accelerate launch`).")
    kernels: bool = Field(False, description="Our kernels run the target (bfloat16 on such a CPU).")
    tiles: bool = Field(False, description="A CPU with AMX multiplies (bfloat16).")

    @property
    def narrow_flops(self) -> float:
        """Return floating-point operations a second of products as decoding has them: a row for each request."""
        return NARROW * self.flops if self.narrow is None else self.narrow

    @classmethod
    def read(cls, path: Path) -> Rates:
        """Read a YAML file of rates.

        Raises:
            DeepSpecError: no such file, or not these keys.
        """
        try:
            return cls.model_validate(yaml.safe_load(path.read_text()))
        except FileNotFoundError:
            raise DeepSpecError(f"{path}: no such file of rates") from None
        except yaml.YAMLError as error:
            raise DeepSpecError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
        except ValidationError as error:
            first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
            key = ".".join(map(str, first["loc"])) or "the file"
            known = ", ".join(cls.model_fields)
            raise DeepSpecError(f"{path}: {key}: {first['msg'].lower()}; the keys are {known}") from None


def measure(dtype: torch.dtype, root: Path) -> Rates:
    """Measure this machine, in about four seconds.

    Args:
        dtype: of the target.
        root: a directory on the disk that is written to.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    a, b = (torch.randn(_SIDE, _SIDE, device=device).to(dtype) for _ in range(2))
    block = torch.zeros(_BLOCK // 4, device=device)  # a CPU's sum of integers is not bound by memory
    weights = [PackedLinear(b.clone()) for _ in range(_WEIGHTS)]
    memory = torch.cuda.get_device_properties(device).total_memory if cuda else psutil.virtual_memory().total

    def narrow() -> None:
        for weight in weights:
            weight(a[:ROWS])

    return Rates(
        flops=2 * _SIDE**3 / _seconds(lambda: a @ b, device),
        bandwidth=_BLOCK / _seconds(lambda: block.sum(), device),
        narrow=2 * ROWS * _WEIGHTS * _SIDE**2 / _seconds(narrow, device),
        disk=_BLOCK / _written(root),
        memory=memory,
        free_disk=shutil.disk_usage(root).free,
        devices=torch.cuda.device_count() if cuda else 1,
        kernels=weights[0].native is not None and not cuda,
        tiles=bool(torch.cpu.get_capabilities().get("amx_bf16")) and dtype == torch.bfloat16 and not cuda,
    )


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call, the first one left out."""
    call()
    _wait(device)
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < _SECONDS:
        call()
        _wait(device)
        calls += 1
    return (time.perf_counter() - began) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _written(root: Path) -> float:
    """Return the seconds until `_BLOCK` bytes are on the disk."""
    data = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=root) as file:
        began = time.perf_counter()
        for _ in range(_BLOCK >> 20):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - began
