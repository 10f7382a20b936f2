"""The weights of a directory: safetensors, PyTorch's own files read as weights only, whole or in shards."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from deepspec.errors import DeepSpecError, os_reason

WEIGHTS = "model.safetensors"
FILES = (WEIGHTS, "pytorch_model.bin", "medusa_lm_head.safetensors", "medusa_lm_head.pt")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
T = TypeVar("T")
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Stored:
    """What is known of a weight before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: neither float32, float16 nor bfloat16
    size: int  # numbers in it


def weight_files(directory: Path) -> list[Path]:
    """Return the files that hold a directory's weights.

    Raises:
        DeepSpecError: there is none, or a shard of an index is missing.
    """
    for name in INDICES:
        index = directory / name
        if index.exists():
            return _shards(index)
    for name in FILES:
        if (directory / name).exists():
            return [directory / name]
    found = sorted(path.name for path in directory.glob("*.safetensors"))
    if len(found) == 1:
        return [directory / found[0]]
    said = f"; it has {', '.join(found)} and no index" if found else ""
    raise DeepSpecError(f"{directory}: no weights ({', '.join(FILES)}, or an index of shards){said}")


def stored(directory: Path) -> dict[str, Stored]:
    """Return shape and dtype of all weights by name; of safetensors only the headers are read."""
    found: dict[str, Stored] = {}
    for path in weight_files(directory):
        found |= _guarded(path, _header if path.suffix == ".safetensors" else _pickled_header)
    return found


def read_weights(directory: Path, names: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Read the weights of a directory.

    Args:
        names: name in the files → name to return it by; others are not returned. None returns all as they are.

    Raises:
        DeepSpecError: no such file, or one that cannot be read.
    """
    found: dict[str, Tensor] = {}
    for path in weight_files(directory):
        found |= _guarded(path, load_file if path.suffix == ".safetensors" else _load_pickled)
    return found if names is None else {ours: found[theirs] for theirs, ours in names.items()}


def dtype_of(weights: Iterable[Stored]) -> torch.dtype:
    """Return the dtype of the first float weight, float32 where there is none."""
    return next((weight.dtype for weight in weights if weight.dtype is not None), torch.float32)


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError):
        raise DeepSpecError(f"{index}: not an index of shards (no weight_map in it)") from None
    paths = [index.parent / name for name in names]
    if missing := [path.name for path in paths if path.parent != index.parent or not path.exists()]:
        raise DeepSpecError(f"{index}: names {missing[0]}, which is not there; fetch the directory again")
    return paths


def _guarded(path: Path, read: Callable[[Path], dict[str, T]]) -> dict[str, T]:
    try:
        path.open("rb").close()  # what may not be read, safetensors calls missing
    except OSError as error:
        raise DeepSpecError(f"{path}: cannot be read: {os_reason(error)}") from None
    try:
        return read(path)
    except pickle.UnpicklingError as error:
        said = str(error).splitlines()[0]
        raise DeepSpecError(
            f"{path}: holds more than weights, and is not run ({said[:120]}); ask for safetensors"
        ) from error
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, KeyError) as error:
        said = " ".join(str(error).split())[:160]
        raise DeepSpecError(f"{path}: corrupt checkpoint: {said}") from error


def _header(path: Path) -> dict[str, Stored]:
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: _described(part.get_shape(), _DTYPES.get(part.get_dtype())) for name, part in slices.items()
        }


def _pickled_header(path: Path) -> dict[str, Stored]:
    known = set(_DTYPES.values())
    return {
        name: _described(weight.shape, weight.dtype if weight.dtype in known else None)
        for name, weight in _load_pickled(path).items()
    }


def _described(shape: Iterable[int], dtype: torch.dtype | None) -> Stored:
    shape = tuple(shape)
    return Stored(shape, dtype, torch.Size(shape).numel())


def _load_pickled(path: Path) -> dict[str, Tensor]:
    found = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(weight, Tensor) for weight in found.values()):
        raise DeepSpecError(f"{path}: not a file of weights by name")
    return {name: weight.contiguous() for name, weight in found.items()}
