"""What the data is made of, for a person to read beside what was checked: shares, lengths, and what was left out."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pandas

STRANGE = -0.25  # nats a token of mean surprise; words drawn from the target's own law have 0
_SCRIPTS = {"CJK": "Chinese characters", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean"}


def facts(table: pandas.DataFrame, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return name → value in words of what a data set is made of.

    Args:
        table: flat rows.
        manifest: of the data set.
    """
    if table.empty:
        return {}
    tokens = table["tokens"]
    found = {
        "sources": _shares(table["source"]),
        "scripts of the user's turns": _shares(table["script"].dropna()),
        "tokens of a row": f"median {tokens.median():.0f}, "
        f"95 % up to {tokens.quantile(0.95):.0f}, longest {tokens.max()}",
        "with a system prompt": _share(table["system"]),
        "with a thought": _share(table["thinks"]),
        "with tools": _share(table["tools"]),
        "with a tool call": _share(table["calls"]),
    }
    for entry in manifest.get("template") or []:
        what = f"{entry['chat_template_kwargs'] or 'no arguments'}{', tools' if entry['tools'] else ''}"
        found[f"history under the template ({what})"] = entry["history"]
    for name in ("endings", "failure_reasons"):
        if manifest.get(name):
            found[name.replace("_", " ")] = _counts(manifest[name])
    if table["surprise"].notna().any():
        found["log-probability of a given answer's token"] = _spread(table["logprob"])
        found["surprise of a given answer's token"] = _spread(table["surprise"])
    return found


def prompt_facts(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return name → value in words of what the prompts' sources could not give, and what the filters rejected.

    Args:
        manifest: of the prompts.
    """
    found = {}
    for name, source in (manifest.get("sources") or {}).items():
        if kinds := source.get("unusable"):
            found[f"rows of {name} that cannot be used"] = _counts(
                {kind: each["rows"] for kind, each in kinds.items()}
            )
    if manifest.get("left_out"):
        found["left out of prompts"] = _counts(manifest["left_out"])
    if manifest.get("rejected"):
        found["prompts that were rejected"] = _counts(manifest["rejected"])
    return found


def warnings(table: pandas.DataFrame, manifest: Mapping[str, Any]) -> list[str]:
    """Return what is allowed and yet worth a second look."""
    if table.empty:
        return []
    found = []
    templates = manifest.get("template") or []
    if any(entry["tools"] and not entry["shows_calls"] for entry in templates):
        found.append(
            f"{int(table['tools'].sum())} rows offer tools, and the target's chat template shows no tool calls: it "
            "never saw the tools; give it the template that it was trained with, or leave these rows out"
        )
    return found + _strangers(table, manifest)


def _strangers(table: pandas.DataFrame, manifest: Mapping[str, Any]) -> list[str]:
    said = (manifest.get("settings") or {}).get("answered_by")
    known = table[table["surprise"].notna()]
    if known.empty:
        return []
    mean = float((known["surprise"] * known["answer_tokens"]).sum() / known["answer_tokens"].sum())
    if said == "target" and mean < STRANGE:
        worst = known.nsmallest(3, "surprise")["id"]
        return [
            "the given answers are said to be the target's, and it finds them strange: mean surprise "
            f"{mean:.2f} nats a token, where its own words have 0 or more (e.g. {', '.join(worst)}). They are another "
            "model's, another template's or another temperature's: say generate.given.answered_by: another, or let the "
            "target answer"
        ]
    return []


def script(text: str) -> str | None:
    """Return the script that most letters of a text are in; None where it has no letter."""
    names: Counter[str] = Counter()
    for char, count in Counter(text[:2000]).items():
        if char.isalpha():
            names[unicodedata.name(char, "").split(" ")[0]] += count
    if not names:
        return None
    most = names.most_common(1)[0][0]
    if most == "CJK" and (names["HIRAGANA"] or names["KATAKANA"]):
        return "Japanese"
    return _SCRIPTS.get(most, most.capitalize())


def _share(flags: pandas.Series) -> str:
    return f"{flags.mean():.1%}"


def _shares(values: Iterable[str]) -> str:
    counts = Counter(values)
    total = sum(counts.values())
    return ", ".join(f"{name} {count / total:.1%}" for name, count in counts.most_common(8)) or "none"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} × {why}" for why, n in counts.items())


def _spread(values: pandas.Series) -> str:
    low, middle, high = values.quantile([0.05, 0.5, 0.95])
    return f"median {middle:.2f}, 90 % between {low:.2f} and {high:.2f} nats"
