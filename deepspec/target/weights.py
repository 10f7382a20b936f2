"""The weights of a directory: safetensors, PyTorch's own files read as weights only, whole or in shards.

All of them (`read_weights`), or some by name, so that nothing else of a checkpoint is touched (`read_named`).
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
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
_READ = (WEIGHTS, INDICES[0], "pytorch_model.bin", INDICES[1])  # by transformers, the first that is there
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


def read_by_transformers(directory: Path) -> Path | None:
    """Return the file of weights or the index of shards that transformers reads, whatever lies beside it."""
    return next((directory / name for name in _READ if (directory / name).is_file()), None)


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


def weight_places(directory: Path) -> dict[str, Path]:
    """Return the file of each weight of a target by its name; where an index names them, no shard is opened.

    Raises:
        DeepSpecError: no weights, or files that cannot be read.
    """
    path = read_by_transformers(directory) or weight_files(directory)[0]
    if path.name in INDICES:
        return {weight: directory / file for weight, file in _weight_map(path).items()}
    return dict.fromkeys(names_in(path), path)


def indexed_places(directory: Path) -> dict[str, Path]:
    """Return the file of each weight that an index names and that is there, whether transformers reads it or not.

    Raises:
        DeepSpecError: an index that cannot be read.
    """
    found: dict[str, Path] = {}
    for index in (directory / name for name in INDICES if (directory / name).exists()):
        places = {weight: directory / file for weight, file in _weight_map(index).items()}
        found |= {weight: path for weight, path in places.items() if path.exists()}
    return found


def names_in(path: Path) -> list[str]:
    """Return the names of the weights in a file.

    Raises:
        DeepSpecError: it cannot be read.
    """
    return list(_guarded(path, _names if path.suffix == ".safetensors" else _pickled_names))


def read_named(places: Mapping[str, Path], names: Iterable[str]) -> dict[str, Tensor]:
    """Read some weights by their names in the files. Files without any of them are not opened.

    Of safetensors only their bytes are read; of PyTorch's files too, where they can be memory-mapped.

    Args:
        places: from `weight_places`.

    Raises:
        DeepSpecError: a file that is missing or cannot be read.
    """
    wanted: dict[Path, list[str]] = {}
    for name in names:
        wanted.setdefault(places[name], []).append(name)
    found: dict[str, Tensor] = {}
    for path, here in wanted.items():
        read = _some if path.suffix == ".safetensors" else _some_pickled
        found |= _guarded(path, partial(read, names=here))
    return found


def dtype_of(weights: Iterable[Stored]) -> torch.dtype:
    """Return the dtype of the first float weight, float32 where there is none."""
    return next((weight.dtype for weight in weights if weight.dtype is not None), torch.float32)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text())["weight_map"].items())
    except (ValueError, KeyError, AttributeError, TypeError):
        raise DeepSpecError(f"{index}: not an index of shards (no weight_map in it)") from None


def _shards(index: Path) -> list[Path]:
    names = sorted(set(_weight_map(index).values()))
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


def _names(path: Path) -> dict[str, None]:
    with safe_open(path, "pt") as file:
        return dict.fromkeys(file.keys())


def _pickled_names(path: Path) -> dict[str, None]:
    return dict.fromkeys(_load_pickled(path))


def _some(path: Path, names: list[str]) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in names}


def _some_pickled(path: Path, names: list[str]) -> dict[str, Tensor]:
    found = _load_pickled(path, mapped=zipfile.is_zipfile(path))  # as PyTorch has written them since 1.6
    return {name: found[name].clone() for name in names}


def _pickled_header(path: Path) -> dict[str, Stored]:
    known = set(_DTYPES.values())
    return {
        name: _described(weight.shape, weight.dtype if weight.dtype in known else None)
        for name, weight in _load_pickled(path).items()
    }


def _described(shape: Iterable[int], dtype: torch.dtype | None) -> Stored:
    shape = tuple(shape)
    return Stored(shape, dtype, torch.Size(shape).numel())


def _load_pickled(path: Path, mapped: bool = False) -> dict[str, Tensor]:
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(weight, Tensor) for weight in found.values()):
        raise DeepSpecError(f"{path}: not a file of weights by name")
    return {name: weight.contiguous() for name, weight in found.items()}
