"""One GGUF file: keys, tensors in a precision, the target's tokenizer. The same contents give the same bytes.

Matrices are written in the file's precision, rows that its blocks of 32 do not divide in F16; vectors in float32, maps
of tokens in int64. `rounded` says what an engine gets back of a matrix: a file in Q8_0 is held to that.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from deepspec.export.suitable import Refused, split_name

FILE_TYPES = {  # precision → the name of llama.cpp's file type
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
    "q4_1": "MOSTLY_Q4_1",
}
BLOCKED = ("q8_0", "q4_0", "q4_1")
BLOCK = 32
LARGEST_F16 = 65504.0
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # llama.cpp's token types
Key = bool | int | float | str | list[int] | list[bool] | list[str]


@dataclass(frozen=True)
class Gguf:
    """What a file holds.

    Args:
        keys: name → value; a whole number is written as uint32.
        matrices: name → [out, in], in `precision`.
        vectors: name → tensor, floats in float32, whole numbers in int64.
    """

    architecture: str
    name: str
    precision: str
    keys: dict[str, Key]
    matrices: dict[str, Tensor]
    vectors: dict[str, Tensor] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the file."""
        from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType
        from gguf.quants import quantize

        writer = GGUFWriter(path, self.architecture)
        writer.add_name(self.name)
        writer.add_file_type(LlamaFileType[FILE_TYPES[self.precision]])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        for key, value in self.keys.items():
            _add(writer, key, value)
        for name, tensor in sorted((self.vectors | self.matrices).items()):
            if name in self.vectors:
                writer.add_tensor(name, (tensor.float() if tensor.is_floating_point() else tensor).numpy())
                continue
            kind = GGMLQuantizationType[stored_as(tensor, self.precision).upper()]
            writer.add_tensor(name, quantize(tensor.float().contiguous().numpy(), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def check_precision(precision: str) -> None:
    """Check that files can be written in this precision.

    Raises:
        Refused: an unknown one.
    """
    if precision not in FILE_TYPES:
        raise Refused(
            f"GGUF is written in {', '.join(FILE_TYPES)}, not {precision!r}; for another, write f16 and run "
            "llama.cpp's llama-quantize"
        )


def stored_as(matrix: Tensor, precision: str) -> str:
    """Return the precision in which a matrix goes into a file of this precision."""
    return "f16" if precision in BLOCKED and matrix.shape[-1] % BLOCK else precision


def rounded(matrix: Tensor, precision: str) -> Tensor:
    """Return what is read back of a matrix, in float32.

    Raises:
        Refused: it has numbers that F16 has not.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    kind = stored_as(matrix, precision)
    if kind == "f16" and float(matrix.abs().max()) > LARGEST_F16:
        raise Refused("a weight is too large for F16; export with --precision bf16")
    plain, quant = matrix.detach().float().contiguous().numpy(), GGMLQuantizationType[kind.upper()]
    return torch.from_numpy(dequantize(quantize(plain, quant), quant).copy()).reshape(matrix.shape)


def tokenizer_keys(
    source: Path, size: int, specials: dict[str, int | None], template: str | None
) -> dict[str, Key]:
    """
    Return the keys that describe a byte-level BPE tokenizer.

    Args:
        source: directory with tokenizer.json.
        size: of the vocabulary.
        specials: ids of bos, eos, unknown, padding, mask; None leaves one out.

    Raises:
        Refused: a tokenizer that cannot be written here.
    """
    known = json.loads((source / "tokenizer.json").read_text())
    split = split_name(known)
    added = {token["id"]: token for token in known["added_tokens"]}
    names = {i: token for token, i in known["model"]["vocab"].items()}
    names |= {i: token["content"] for i, token in added.items()}
    ordinary = {i for i in names if i not in added}
    special = {i for i in range(size) if added.get(i, {}).get("special", True)} - ordinary
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in known["model"]["merges"]]
    keys: dict[str, Key] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": [names.get(i, f"[PAD{i}]") for i in range(size)],
        "tokenizer.ggml.token_type": [
            NORMAL if i in ordinary else CONTROL if i in special else USER_DEFINED for i in range(size)
        ],
        "tokenizer.ggml.merges": merges,
    }
    ids = {f"tokenizer.ggml.{name}_token_id": i for name, i in specials.items() if i is not None}
    keys |= {**ids, "tokenizer.ggml.add_bos_token": False}
    return keys | ({"tokenizer.chat_template": template} if template else {})


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Interleave the rows of each head's two halves: llama.cpp's `llama` and `eagle3` rotate neighbouring pairs."""
    rows = weight.unflatten(0, (heads, 2, -1))
    return torch.movedim(rows, 1, 2).flatten(0, 2)


def _add(writer, key: str, value: Key) -> None:  # type: ignore[no-untyped-def]
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
