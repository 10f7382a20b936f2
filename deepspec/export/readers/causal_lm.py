"""An independent draft model as transformers reads it, from a Hugging Face directory or from GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from deepspec.export.readers.directory import Facts, Reading, Unreadable
from deepspec.export.readers.sample import Sample


def directory(path: Path, sample: Sample) -> Reading:
    return _read(str(path), sample)


def gguf(file: Path, sample: Sample) -> Reading:
    """Read a GGUF file; transformers undoes llama.cpp's order of query and key rows."""
    return _read(str(file.parent), sample, gguf_file=file.name)


@torch.no_grad()
def _read(path: str, sample: Sample, **options: Any) -> Reading:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise Unreadable(str(error).strip().splitlines()[0]) from error
    finally:
        logging.set_verbosity(verbosity)
    model, info = loaded  # the second because it was asked for
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise Unreadable(f"{what.replace('_', ' ')}: {sorted(info[what])[:3]}")
    logits = model.eval()(input_ids=sample.tokens[None], use_cache=False).logits[0].float()
    places = sample.anchors[:, None] + torch.arange(sample.gamma)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Reading(logits[places], Facts(max_position_embeddings=limit))
