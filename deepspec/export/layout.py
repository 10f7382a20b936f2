"""What an export directory is to hold, and how it is written: whole or not at all, the same bytes every time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from deepspec.drafters.network import Network
from deepspec.files import file_digest, replacing

SUMS = "SHA256SUMS"
CARD = "README.md"
WEIGHTS = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class Layout:
    """A directory for one engine, before it is written.

    Args:
        format: what the engine calls it.
        reader: by which the directory is read back, a name in `readers.READERS`.
        command: that serves the target with the draft.
        config: of config.json; None writes none.
        weights: by the engine's names.
        weights_file: where they go.
        copies: further files, name → source.
        settings: of settings.json, for what has no weights.
        texts: further JSON files.
        make: writes further files into the directory (GGUF).
        notes: what a reader of the card should know.
        network: the draft as this engine runs it, where the files round its weights; None: as it was trained.
    """

    format: str
    reader: str
    command: str
    config: dict[str, Any] | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    weights_file: str = WEIGHTS
    copies: dict[str, Path] = field(default_factory=dict)
    settings: dict[str, Any] | None = None
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    make: Callable[[Path], None] | None = None
    notes: tuple[str, ...] = ()
    network: Callable[[], Network] | None = None


def write(layout: Layout, directory: Path, card: str) -> dict[str, str]:
    """Write the directory in one rename; return name → SHA-256 of its files."""
    with replacing(directory) as scratch:
        scratch.mkdir()
        fill(layout, scratch)
        (scratch / CARD).write_text(card)
        for path in scratch.iterdir():
            path.chmod(0o644)
        sums = {path.name: file_digest(path) for path in sorted(scratch.iterdir())}
        (scratch / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    return sums


def fill(layout: Layout, directory: Path, put: Callable[[Path, Path], object] = shutil.copyfile) -> None:
    """Write a layout's files into an empty directory.

    Args:
        put: lays a further file, (source, place).
    """
    for name, source in sorted(layout.copies.items()):
        put(source, directory / name)
    texts = {"config.json": layout.config, "settings.json": layout.settings, **layout.texts}
    for name, value in texts.items():
        if value is not None:
            (directory / name).write_text(_json(value))
    if layout.weights:
        contiguous = {name: layout.weights[name].contiguous() for name in sorted(layout.weights)}
        save_file(contiguous, directory / layout.weights_file, {"format": "pt"})
    if layout.make:
        layout.make(directory)


def tokenizer_files(target: Path) -> dict[str, Path]:
    """Return the target's tokenizer and template, which every engine must see unchanged."""
    return {name: target / name for name in TOKENIZER_FILES if (target / name).exists()}


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
