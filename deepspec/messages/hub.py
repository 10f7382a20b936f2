"""Datasets of the Hugging Face hub, or directories with a copy of one, loaded by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepspec.errors import DeepSpecError

_ROWS = 16  # of a dataset that are held at once
FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_split(
    name: str,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    files: Sequence[str] = (),
) -> Any:
    """Load one split of a dataset, by hub name or directory. `datasets` is imported here: the core runs without it.

    Args:
        files: data files inside the dataset, or addresses; they alone are read, and make up the split.

    Raises:
        DeepSpecError: it cannot be loaded.
    """
    try:
        import datasets
    except ImportError:
        raise DeepSpecError(f"hub:{name} needs the package `datasets`: install deepspec[pipeline]") from None
    try:
        if files:
            places = [_place(name, revision, file) for file in files]
            return datasets.load_dataset(_file_type(files[0]), data_files={split: places}, split=split)
        if (Path(name) / "state.json").exists():
            return datasets.load_from_disk(name)
        if (Path(name) / "dataset_dict.json").exists():
            return datasets.load_from_disk(name)[split]
        return datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # datasets raises dozens of types, all of which mean: check the name
        part = f"{config}/{split}" if config else split
        if "://" in name:
            where, check = f"url:{name}", "its address"
        else:
            where, check = f"hub:{name}:{part}", "its name, its split (hub:<dataset>:<config>/<split>)"
        why = " ".join(str(error).split()) or type(error).__name__
        raise DeepSpecError(
            f"{where}: the dataset could not be loaded ({why}); check {check} and the network"
        ) from None


def stored_rows(dataset: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split; images, sounds and the like as they are stored, since nobody looks at them."""
    features = type(dataset.features)({name: _undecoded(kind) for name, kind in dataset.features.items()})
    for table in dataset.with_format("arrow").iter(batch_size=_ROWS):
        for row in table.to_pylist():
            yield features.decode_example(row)


def _undecoded(kind: Any) -> Any:
    """Return a column's type with media undecoded: their decoders are packages of their own."""
    if isinstance(kind, dict):
        return {name: _undecoded(part) for name, part in kind.items()}
    if hasattr(kind, "feature"):
        return replace(kind, feature=_undecoded(kind.feature))
    media = hasattr(kind, "decode") and type(kind).__name__ != "Json"
    return replace(kind, decode=False) if media else kind


def without_nulls(value: Any) -> Any:
    """Return a row without the fields that are null: a table gives each struct the fields of all of a column."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [without_nulls(part) for part in value]
    return value


def _place(name: str, revision: str | None, file: str) -> str:
    """Return where a data file is: an address, a path in a directory, or a place on the hub."""
    if "://" in file:
        return file
    if Path(name).is_dir():
        return str(Path(name) / file)
    return f"hf://datasets/{name}{f'@{revision}' if revision else ''}/{file}"


def _file_type(file: str) -> str:
    suffix = Path(file.removesuffix(".gz")).suffix
    if suffix not in FILE_TYPES:
        raise ValueError(f"{file}: not one of {', '.join(FILE_TYPES)}")
    return FILE_TYPES[suffix]
