"""Which engines there are, and the export of one draft to some of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepspec.errors import DeepSpecError, nearest
from deepspec.export import hf, llamacpp, sglang, suitable, tgi, vllm
from deepspec.export.advice import Advice, advise
from deepspec.export.card import card
from deepspec.export.draft import Draft
from deepspec.export.layout import Layout, write
from deepspec.export.parity import Parity, check
from deepspec.export.sample import samples
from deepspec.export.suitable import Refused
from deepspec.target.template import is_pinned

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
    "llamacpp": llamacpp.PLANS,
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


def export(
    draft: Draft, names: list[str], directory: Path, options: llamacpp.Options | None = None
) -> dict[str, Any]:
    """Write the draft for each engine below `directory` and check what was written.

    Args:
        options: of llama.cpp's files.

    Returns:
        the export record: `passed` where at least one directory was written and every written one passed parity.
    """
    advice = advise(draft.evaluation, draft.kind, draft.block_size, draft.record)
    found = samples(draft) if draft.trained else []
    engines = {}
    for name in names:
        try:
            engines[name] = _export(draft, name, directory / name, advice, found, options)
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


def _export(
    draft: Draft,
    engine: str,
    directory: Path,
    advice: Advice,
    found: list,
    options: llamacpp.Options | None,
) -> dict[str, Any]:
    layout = plan(draft, engine, str(directory), advice.tokens, options)
    layout = with_template(layout, engine, str(directory))
    files = write(layout, directory, card(draft, layout, advice))
    parity: Parity = check(draft, layout, directory, found)
    return {
        "path": str(directory),
        "format": layout.format,
        "files": files,
        "parity": parity.to_dict(),
        "command": layout.command,
    }


MULTIPLIED_OUT = (
    "Its head of low rank is multiplied out, as this engine reads a head: each pass reads the whole matrix, where "
    "DeepSpec reads two small ones."
)
TEMPLATE_FLAGS = {
    "vllm": "--chat-template",
    "speculators": "--chat-template",
    "sglang": "--chat-template",
    "llamacpp": "--jinja --chat-template-file",
}


def plan(
    draft: Draft, engine: str, where: str, tokens: int, options: llamacpp.Options | None = None
) -> Layout:
    """Return what an engine is to be given of a draft that drafts `tokens` tokens.

    Raises:
        Refused: the engine cannot serve it.
    """
    suitable.check(engine, draft)
    plans = llamacpp.plans(options) if options and engine == "llamacpp" else ENGINES[engine]
    make = plans[draft.kind]
    if engine == "hf" or not draft.config.get("head_rank"):
        return make(draft, where, tokens)
    dense = replace(draft, dense_head=True)
    layout = make(dense, where, tokens)
    network = layout.network or (lambda: dense.network)
    return replace(layout, network=network, notes=(*layout.notes, MULTIPLIED_OUT))


def with_template(layout: Layout, engine: str, where: str) -> Layout:
    """Let the command give the engine the target's pinned template, which the published target does not have."""
    template = layout.copies.get("chat_template.jinja")
    if template is None or engine not in TEMPLATE_FLAGS or not is_pinned(template.read_text()):
        return layout
    flag = f"{TEMPLATE_FLAGS[engine]} {where}/chat_template.jinja"
    command, note, rest = layout.command.partition(" (TARGET.gguf")
    return replace(layout, command=f"{command} {flag}{note}{rest}")
