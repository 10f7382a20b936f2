"""Faults planted in a GGUF file: it is read, its keys and tensors changed, and written again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter

Keys = dict[str, Any]
Tensors = dict[str, np.ndarray]
COUNTED = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture")


def rewrite(
    file: Path,
    keys: Callable[[Keys], object] = lambda keys: None,
    tensors: Callable[[Tensors], object] = lambda tensors: None,
) -> None:
    """Change a file of F16 and F32 matrices; arrays of numbers that become floats are written in F32."""
    reader = GGUFReader(file)
    types = {name: field.types for name, field in reader.fields.items()}
    known = {name: field.contents() for name, field in reader.fields.items()}
    held = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    del reader
    keys(known)
    tensors(held)
    writer = GGUFWriter(file, known["general.architecture"])
    for name, value in known.items():
        if name not in COUNTED:
            kind, *rest = types.get(name) or [GGUFValueType.UINT32]
            writer.add_key_value(name, value, kind, rest[0] if rest else None)
    for name, array in held.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
