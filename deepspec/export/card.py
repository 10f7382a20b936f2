"""The model card of an export: what it is, how it was made, what was measured, how it is served."""

from __future__ import annotations

import json
from typing import Any

from deepspec.evaluation.parts import TaskEntry
from deepspec.export.advice import Advice
from deepspec.export.draft import Draft
from deepspec.export.layout import SUMS, Layout
from deepspec.markdown import markdown_table


def card(draft: Draft, layout: Layout, advice: Advice) -> str:
    """Write the README.md of a directory; the same draft gives the same text."""
    sections = [
        _front(draft),
        f"# {draft.name}: a draft for {_target(draft)}",
        f"A speculative-decoding draft of type {draft.kind}, in the format *{layout.format}*. It proposes tokens; the "
        "target checks them, and what is written stays the target's own.",
        "## Serve",
        f"    {layout.command}",
        *layout.notes,
        f"Tokens to draft: **{advice.tokens}**, {advice.reason}.",
        *_choices(advice),
        *_contexts(advice),
        "## How it was made",
        markdown_table(("", ""), _making(draft)),
        *_evaluation(draft),
        "## Licence",
        f"Distilled from the target, whose licence applies: {draft.licence}.",
        f"`sha256sum -c {SUMS}` checks the files.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front(draft: Draft) -> str:
    licence = draft.licence.lower() if " " not in draft.licence else "other"
    return f"---\nlicense: {licence}\nbase_model: {_target(draft)}\ntags: [speculative-decoding, {draft.kind}]\n---"


def _target(draft: Draft) -> str:
    return draft.evaluation.target if draft.evaluation else draft.target_path


def _making(draft: Draft) -> list[tuple[str, str]]:
    record = draft.record
    train = record.get("train") or {}
    rows = {
        "target digest": draft.target.digest,
        "draft digest": draft.digest,
        "data digest": record.get("data_digest"),
        "template arguments": json.dumps(draft.target.chat_template_kwargs)
        if draft.target.chat_template_kwargs
        else None,
        "began as": "; ".join(_parent(parent) for parent in record.get("parents") or ()),
        "commit": record.get("git_commit"),
        "command": record.get("command"),
        "seed": record.get("seed"),
        "steps": train.get("steps"),
        "sequences a step": train.get("batch_size"),
        "tokens of a row, at most": train.get("max_length"),
        "tokens of the longest row": (record.get("row_tokens") or {}).get("longest"),
        "learning rate": train.get("lr"),
        "loss": ", ".join(
            f"{k} {v:g}" for k, v in (train.get("loss") or {}).items() if isinstance(v, float) and v
        ),
        "expected τ on held-out conversations": record.get("heldout_tau"),
        "versions": ", ".join(
            f"{name} {version}" for name, version in (record.get("packages") or {}).items()
        ),
    }
    return [
        (key, f"{x:.4g}" if isinstance(x, float) else str(x))
        for key, x in rows.items()
        if x not in (None, "")
    ]


def _parent(parent: dict[str, Any]) -> str:
    """Say what draft a draft began as, and what that one began as."""
    data = f", data {parent['data_digest']}" if parent.get("data_digest") else ""
    earlier = "".join(f", itself from {_parent(each)}" for each in parent.get("parents") or ())
    return f"{parent['directory']} ({parent['digest']}{data}){earlier}"


def _choices(advice: Advice) -> list[str]:
    if not advice.choices:
        return []
    rows = [(str(c.drafted), f"{c.tau:.2f}", f"{c.tokens_per_second:.1f}") for c in advice.choices]
    head = ("tokens drafted", "τ", "tokens/s at one request")
    return [
        markdown_table(head, rows),
        "From the measured acceptance by position and cost of a pass and a draft, greedy.",
    ]


def _contexts(advice: Advice) -> list[str]:
    found = [advice.reach.sentence()]
    if advice.reach.measured:
        rows = [
            (f"{each.start} to {each.end}", str(each.rounds), f"{each.tau:.2f}")
            for each in advice.reach.measured
        ]
        found.append(markdown_table(("tokens of prompt and answer before", "rounds", "τ"), rows))
    return found


def _evaluation(draft: Draft) -> list[str]:
    record = draft.evaluation
    if not record:
        return []
    rows = [_entry(key, entry) for key, entry in record.tasks.items()]
    head = ("task", "τ", "tokens/s plain", "tokens/s with draft", "speed-up", "lossless")
    where = f"In DeepSpec's own engine, {record.device}, {record.dtype}."
    if record.decode.lookup:
        where += " A lookup was asked first, so another engine accepts less of the draft alone:"
        alone = ", ".join(
            f"{task} {_number(entry.tau, '.2f')}" for task, entry in record.greedy_blocks.items()
        )
        where += f" its own τ at T = 0 is {alone}." if alone else ""
    return ["## Evaluation", markdown_table(head, rows), where]


def _entry(key: str, entry: TaskEntry) -> tuple[str, ...]:
    rates = (_number(entry.baseline_tokens_per_second, ".1f"), _number(entry.tokens_per_second, ".1f"))
    speedup = _number(entry.speedup, ".2f") + ("×" if entry.speedup is not None else "")
    return (key, _number(entry.tau, ".2f"), *rates, speedup, "yes" if entry.lossless else "no")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
