"""A target's directory with the next-token module that was trained in the place of its own (MTP).

Engines take a target and its module from one checkpoint, so that is what is written: the target's files as they are,
the module in a file of its own under the names that the checkpoint has for it, and an index of all.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file

from deepspec.drafters.checkpoint import RECORD, stored_weights
from deepspec.export.draft import Draft
from deepspec.export.layout import CARD, Layout
from deepspec.export.suitable import Refused
from deepspec.target.next_token import FILE, places_of
from deepspec.target.source import local_directory
from deepspec.target.weights import INDICES, weight_files

INDEX = INDICES[0]
_COUNTS = {"qwen": "mtp_num_hidden_layers"}  # key of config.json that says how many modules there are
NOTE = "The directory is the whole target; of its next-token modules it has the one that was trained."


def stitched(draft: Draft, command: str) -> Layout:
    """Lay out the target with the draft's module."""
    module = draft.network.config.module
    source = local_directory(draft.target.source)
    if source is None:
        raise Refused(f"{draft.target.source} is no directory that could be written with its module")
    dense = {name: weight.to(draft.dtype) for name, weight in stored_weights(draft.network).items()}
    places = {name: path for name, path in places_of(source).items() if not name.startswith(module.prefix)}
    kept = set(places.values())
    mixed = [path for path in kept if not set(_names(path, places_of(source))) <= places.keys()]
    unwritten = {RECORD, CARD, FILE, "config.json", *INDICES, *(path.name for path in weight_files(source))}
    copies = {path.name: path for path in source.iterdir() if path.is_file() and path.name not in unwritten}
    copies |= {path.name: path for path in kept - set(mixed)}
    config = json.loads((source / "config.json").read_text())
    index = {name: path.name for name, path in sorted(places.items())} | dict.fromkeys(sorted(dense), FILE)
    return Layout(
        f"{config['architectures'][0]} with its next-token module",
        "next-token",
        command,
        {_COUNTS.get(module.style, "num_nextn_predict_layers"): 1} | config,
        dense,
        FILE,
        copies,
        texts={INDEX: {"metadata": {}, "weight_map": index}},
        make=partial(_without_modules, mixed, module.prefix) if mixed else None,
        notes=(NOTE,),
    )


def _names(path: Path, places: dict[str, Path]) -> list[str]:
    return [name for name, where in places.items() if where == path]


def _without_modules(shards: list[Path], prefix: str, directory: Path) -> None:
    """Write shards that hold other weights beside the target's own module."""
    for path in shards:
        kept = {name: weight for name, weight in load_file(path).items() if not name.startswith(prefix)}
        save_file(kept, directory / path.name, {"format": "pt"})
