"""transformers and DeepSpec itself: an assistant model, or the draft's own directory as it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from deepspec.export.draft import Draft
from deepspec.export.formats import lm_layout, shared
from deepspec.export.layout import Layout
from deepspec.export.next_token import stitched
from deepspec.target.weights import weight_files

ALONG = ("deepspec.json", "calibration.json")  # what our engine reads besides


def lm(draft: Draft, where: str, tokens: int) -> Layout:
    """Lay out an assistant model; transformers reads how many tokens to draft from its generation_config.json."""
    stops = sorted(draft.target.stop_ids)
    generation: dict[str, Any] = {
        "eos_token_id": stops if len(stops) > 1 else stops[0],
        "num_assistant_tokens": tokens,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    command = (
        f"AutoModelForCausalLM.from_pretrained({draft.target_path!r}).generate(..., "
        f"assistant_model=AutoModelForCausalLM.from_pretrained({where!r}))"
    )
    return replace(lm_layout(draft, command), texts={"generation_config.json": generation})


def native(draft: Draft, where: str, tokens: int) -> Layout:
    """Lay out a draft as it is; one that another trainer wrote in its own way or with other padding is written anew."""
    command = f"deepspec chat --target {draft.target_path} --drafter {where}"
    reader, architecture = f"native-{draft.kind}", draft.config["architectures"][0]
    as_it_is = draft.checkpoint.padding is None and (draft.record or draft.checkpoint.names is None)
    if as_it_is:
        copies = {path.name: path for path in weight_files(draft.directory)}
        copies |= {name: draft.directory / name for name in ("config.json", *ALONG)}
        copies = {name: path for name, path in copies.items() if path.exists()} | draft.tokenizer_files
        return Layout(architecture, reader, command, copies=copies)
    config = draft.network.description() | {"dtype": draft.dtype_name}
    return Layout(architecture, reader, command, config, shared(draft), copies=draft.tokenizer_files)


def training_free(draft: Draft, where: str, tokens: int) -> Layout:
    copies = {name: draft.directory / name for name in ("config.json", "deepspec.json")}
    settings = {
        "prompt_lookup_num_tokens": draft.block_size,
        "max_matching_ngram_size": draft.config["min_match"],
    }
    command = f"generate(..., prompt_lookup_num_tokens={draft.block_size})"
    return Layout("prompt lookup settings", "settings", command, copies=copies, settings=settings)


def mtp(draft: Draft, where: str, tokens: int) -> Layout:
    return stitched(draft, f"deepspec chat --target {where} --drafter {where}")


PLANS = {
    "lm": lm,
    "mtp": mtp,
    "eagle3": native,
    "peagle": native,
    "dspark": native,
    "dflash": native,
    "dflash2": native,
    "medusa": native,
    "lookup": training_free,
    "suffix": training_free,
}
