"""What is refused before a target's weights are read, or as soon as they are: each in one line.

transformers loads many a broken directory without a word: it draws weights that are not there, takes defaults for a
file that it cannot read, and leaves out an adapter where PEFT is not installed.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepspec.errors import DeepSpecError, os_reason
from deepspec.target.identity import check_readable
from deepspec.target.source import hub_directory, is_hub_id
from deepspec.target.weights import read_by_transformers

READ = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
ADAPTER, INDEX = "adapter_config.json", ".index.json"
_FLOATS = frozenset(["F64", "F32", "F16", "BF16"])
_SCALES = ("scale", "scales", "scale_inv", "absmax", "zeros")  # beside weights that are quantised
_CHANGING = {  # settings of `generate` → what changes nothing
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1,
    "num_beams": 1,
}
_DENSE = ("bitnet",)  # methods whose files may hold weights as they were trained


def check_source(source: str) -> None:
    """Refuse a path that is no target directory; a hub id looks like `owner/name` and is not a path."""
    path = Path(source)
    if not path.is_dir():
        if is_hub_id(source):
            return
        raise DeepSpecError(f"{source}: no such target directory (and not a hub id like owner/name)")
    if (path / ADAPTER).exists():
        raise DeepSpecError(f"{source}: {_unmerged(path / ADAPTER)}")
    if not (path / "config.json").exists():
        raise DeepSpecError(f"{source}: not a target directory: config.json is missing")
    if not any((path / name).exists() for name in TOKENIZERS):
        raise DeepSpecError(
            f"{source}: the target has no tokenizer (tokenizer.json); add the one it was trained with"
        )


def whole_directory(source: str, revision: str | None) -> tuple[Path, str | None]:
    """Return the directory of a target's source, its files whole; of a hub id, that of its copy, and its commit.

    Raises:
        DeepSpecError: no target there, or files that are broken or may not be read.
    """
    check_source(source)
    local = Path(source)
    if is_hub_id(source):
        local = hub_directory(source, revision)
        revision = local.name
        check_source(str(local))
    check_readable(local)
    check_files(local)
    return local, revision


def check_files(directory: Path) -> None:
    """Refuse a directory whose files are broken, incomplete, or not what its configuration says they are.

    Weights that transformers does not read are let be: an index of others that were not fetched, another layout's.

    Raises:
        DeepSpecError: settings that cannot be read, a shard that is not there or was cut short, or dense weights
            under a configuration of quantised ones.
    """
    settings = {name: _settings(directory / name) for name in READ if (directory / name).exists()}
    first = read_by_transformers(directory)
    files = [] if first is None else _shards(first) if first.name.endswith(INDEX) else [first]
    headers = {path.name: _header(path) for path in files if path.suffix == ".safetensors"}
    _check_quantised(directory, settings.get("config.json", {}), headers)


def check_vocabulary(source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse stop tokens and a tokenizer beyond the vocabulary.

    A special token beyond it that the template does not write is let be, as Gemma 3's image tokens are: a prompt that
    holds one is refused by itself.
    """
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    for stop in stop_tokens(model.generation_config):
        if not isinstance(stop, int) or not 0 <= stop < rows:
            raise DeepSpecError(
                f"{source}: eos_token_id {stop!r} is no token of a vocabulary of {rows}; mend generation_config.json"
            )
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= rows}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i for i, token in added.items() if token.special}
    written = str(tokenizer.chat_template)
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    wanted = sorted(i for i, token in beyond.items() if i not in special or token in written or i in ends)
    if wanted:
        raise DeepSpecError(
            f"{source}: its tokenizer writes {beyond[wanted[0]]!r} as {wanted[0]}, and it has {rows} embeddings, for "
            f"tokens below; take the tokenizer that it was trained with, or resize its embeddings and train them"
        )


def stop_tokens(generation: Any) -> tuple[Any, ...]:
    """Return the stop tokens of a generation config, which names one, several or none."""
    stops = getattr(generation, "eos_token_id", None)
    return tuple(i for i in (stops if isinstance(stops, (list, tuple)) else [stops]) if i is not None)


def not_applied(generation: Any) -> tuple[str, ...]:
    """Return the settings of a generation config that change greedy answers of `generate`, and that nothing here reads.

    Here a target's law is its model's own.
    """
    held = {name: getattr(generation, name, None) for name in _CHANGING}
    return tuple(f"{name} {x}" for name, x in held.items() if x not in (None, [], _CHANGING[name]))


def _unmerged(path: Path) -> str:
    base = _settings(path).get("base_model_name_or_path")
    return (
        f"holds an adapter ({path.name}) that is not merged{f' into {base}' if base else ''}; merge it "
        "(PEFT's merge_and_unload), write the whole model and remove the adapter's files"
    )


def _settings(path: Path) -> dict[str, Any]:
    """Return a JSON object, which transformers may take for absent where it cannot read it."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise DeepSpecError(f"{path}: cannot be read: {os_reason(error)}") from None
    except ValueError as error:
        raise DeepSpecError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise DeepSpecError(f"{path}: not an object of settings, but {type(found).__name__}")
    return found


def _shards(index: Path) -> list[Path]:
    """Return the shards of an index, all of which must be there."""
    named = _settings(index).get("weight_map")
    if not isinstance(named, dict):
        raise DeepSpecError(f"{index}: not an index of shards (no weight_map in it)")
    paths = [index.parent / name for name in sorted(set(map(str, named.values())))]
    for path in paths:
        if not path.is_file():
            raise DeepSpecError(f"{index}: names {path.name}, which is not there; fetch the directory again")
    return paths


def _header(path: Path) -> dict[str, Any]:
    """Return what a safetensors file says of its tensors; the file must be as long as that."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            found = json.loads(file.read(length) if length < size else b"")
        tensors = {name: tensor for name, tensor in found.items() if name != "__metadata__"}
        wanted = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except OSError as error:
        raise DeepSpecError(f"{path}: cannot be read: {os_reason(error)}") from None
    except (struct.error, ValueError, AttributeError, LookupError, TypeError):
        raise DeepSpecError(f"{path}: cannot be loaded: not a safetensors file; fetch it again") from None
    if size != wanted:
        raise DeepSpecError(f"{path}: cannot be loaded: it has {size} of {wanted} bytes; fetch it again")
    return tensors


def _check_quantised(directory: Path, config: dict[str, Any], headers: dict[str, dict[str, Any]]) -> None:
    """Refuse dense weights under a configuration of quantised ones: what loads depends on device and library."""
    method = _method(config) or _method(config.get("text_config"))
    tensors = {
        name: str(tensor.get("dtype")) for header in headers.values() for name, tensor in header.items()
    }
    if method is None or method in _DENSE or not tensors:
        return
    if set(tensors.values()) <= _FLOATS and not any(name.endswith(_SCALES) for name in tensors):
        kinds = ", ".join(sorted(set(tensors.values())))
        raise DeepSpecError(
            f"{directory / 'config.json'}: quantization_config says {method}, but the weights are dense ({kinds}); "
            "remove it, or take the files that were quantised"
        )


def _method(config: Any) -> str | None:
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return str(found.get("quant_method", "an unknown method")) if isinstance(found, dict) else None
