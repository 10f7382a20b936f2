"""Resolve a target that only an engine can hold: its files as they are, nothing of its layers loaded.

The weights are links to the source's files where the file system has them. Configuration, tokenizer and template are
copies, since the dtype and the template's date are written into them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from deepspec.errors import DeepSpecError
from deepspec.files import replacing
from deepspec.target import template
from deepspec.target.chat import check_renders
from deepspec.target.checkpoint import skeleton
from deepspec.target.checks import check_vocabulary, whole_directory
from deepspec.target.embedded import PREFIX, write_embedded
from deepspec.target.ends import Ends, load_ends
from deepspec.target.identity import (
    RECORD,
    TEXT,
    WEIGHTS,
    directory_digest,
    kept_date,
    write_record,
)
from deepspec.target.source import dtype_named, from_pretrained


def resolve_unloaded(
    source: str,
    revision: str | None,
    dtype: str,
    directory: str | Path,
    template_date: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    quantization: str | None = None,
) -> Ends:
    """Write the target named by `source` as a Hugging Face directory, whole or not at all; return its ends.

    Args:
        source, revision, template_date, chat_template_kwargs: as `resolve_target` takes them.
        dtype: that the engine computes in; the files keep theirs.
        quantization: the engine's own, which makes another target of the same files.

    Raises:
        DeepSpecError: no target there, or files that are broken.
    """
    day = template_date or kept_date(Path(directory), source) or template.today()
    with replacing(directory) as scratch:
        if source.startswith(PREFIX):
            write_embedded(source, dtype_named(dtype), scratch)
        else:
            local, revision = whole_directory(source, revision)
            _bring(local, scratch)
            _set_dtype(scratch / "config.json", dtype)
        tokenizer = from_pretrained(AutoTokenizer, str(scratch))
        template.check_there(source, tokenizer)
        check_vocabulary(source, skeleton(source, from_pretrained(AutoConfig, str(scratch))), tokenizer)
        if template.asks_for_date(tokenizer):
            template.pin(tokenizer, day)
            tokenizer.save_pretrained(scratch)
        options = dict(chat_template_kwargs or {})
        check_renders(source, tokenizer, options)
        made = {"source": source, "revision": revision, "dtype": dtype, "engine": "vllm"}
        write_record(
            scratch, made, directory_digest(scratch), options, template.pinned(tokenizer), quantization
        )
    return load_ends(directory)


def _bring(source: Path, directory: Path) -> None:
    """Bring a target's files into a directory: weights as links, where they can be, the others as copies."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        place = directory / path.name
        if path.suffix in WEIGHTS:
            try:
                os.link(path.resolve(), place)
            except OSError:  # another file system
                shutil.copyfile(path, place)
        elif path.suffix in TEXT and path.name != RECORD:
            shutil.copyfile(path, place)


def _set_dtype(path: Path, dtype: str) -> None:
    """Write the dtype that the engine computes in into a configuration."""
    config = json.loads(path.read_text())
    if not isinstance(config, dict):
        raise DeepSpecError(f"{path}: not an object of settings")
    config.pop("torch_dtype", None)
    path.write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n")
