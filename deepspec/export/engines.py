"""Which engines there are, and the export of one draft to some of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deepspec.errors import DeepSpecError, nearest
from deepspec.export import gguf, hf, sglang, tgi, vllm
from deepspec.export.advice import Advice, advise
from deepspec.export.card import card
from deepspec.export.draft import TRAINED, Draft
from deepspec.export.layout import Layout, Refused, write
from deepspec.export.parity import Parity, check
from deepspec.export.sample import samples

EXPORT_VERSION = "1"
Plan = Callable[
    [Draft, str, int], Layout
]  # (draft, where it will be, tokens to draft) → what to write, or Refused
ENGINES: dict[str, Mapping[str, Plan]] = {
    "hf": hf.PLANS,
    "vllm": vllm.PLANS,
    "speculators": vllm.SPECULATORS,
    "sglang": sglang.PLANS,
    "tgi": tgi.PLANS,
    "gguf": gguf.PLANS,
}


def chosen(names: list[str] | None) -> list[str]:
    """Return the engines that `--to` names; all of them where it names none.

    Raises:
        DeepSpecError: an unknown one.
    """
    if not names or "all" in names:
        return list(ENGINES)
    for name in names:
        if name not in ENGINES:
            known = ", ".join(ENGINES)
            raise DeepSpecError(f"unknown engine {name!r}; known: {known}, all{nearest(name, ENGINES)}")
    return list(dict.fromkeys(names))


def export(draft: Draft, names: list[str], directory: Path) -> dict[str, Any]:
    """Write the draft for each engine below `directory` and check what was written.

    Returns:
        the export record: `passed` where at least one directory was written and every written one passed parity.
    """
    advice = advise(draft.evaluation, draft.kind, draft.block_size)
    found = samples(draft) if draft.kind in TRAINED else []
    engines = {}
    for name in names:
        try:
            engines[name] = _export(draft, name, directory / name, advice, found)
        except Refused as refusal:
            engines[name] = {"refused": str(refusal)}
            shutil.rmtree(directory / name, ignore_errors=True)  # of an earlier draft, which was not refused
    return {
        "export_version": EXPORT_VERSION,
        "drafter": draft.name,
        "draft_digest": draft.digest,
        "target_digest": draft.target.digest,
        "passed": _passed(engines),
        "generation": advice.to_dict(),
        "engines": engines,
    }


def with_others(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """Add to a record the engines not asked for now, from the one at `path` if it is of the same draft."""
    try:
        known = json.loads(path.read_text())
        same = all(known[key] == value for key, value in record.items() if key not in ("engines", "passed"))
        engines = known["engines"] | record["engines"]
    except (OSError, ValueError, KeyError):
        return record
    if not same:
        return record
    ordered = {name: engines[name] for name in ENGINES if name in engines}
    return record | {"passed": _passed(ordered), "engines": ordered}


def _passed(engines: dict[str, Any]) -> bool:
    written = [entry for entry in engines.values() if "refused" not in entry]
    return bool(written) and all(entry["parity"]["passed"] for entry in written)


def _export(draft: Draft, engine: str, directory: Path, advice: Advice, found: list) -> dict[str, Any]:
    plan = ENGINES[engine].get(draft.kind)
    if plan is None:
        raise Refused(REFUSALS[engine].format(kind=draft.kind))
    layout = plan(draft, str(directory), advice.tokens)
    files = write(layout, directory, card(draft, layout, advice))
    parity: Parity = check(draft, layout, directory, found)
    return {
        "path": str(directory),
        "format": layout.format,
        "files": files,
        "parity": parity.to_dict(),
        "command": layout.command,
    }


REFUSALS = {
    "hf": "transformers has no use for a draft of type {kind}; train an lm",
    "vllm": "vLLM has no method for a draft of type {kind}; train eagle3, dflash, dspark, medusa or lm",
    "speculators": "the speculators format has no {kind}; train eagle3, dflash or dspark, or export --to vllm",
    "sglang": "SGLang has no method for a draft of type {kind}; train eagle3, dflash, dspark or lm",
    "tgi": "TGI knows Medusa and n-gram drafts, not {kind}; train medusa",
    "gguf": "llama.cpp drafts with a model of its own, not with {kind}; train an lm",
}
