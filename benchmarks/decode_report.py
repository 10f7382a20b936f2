"""What `benchmarks/decode.py` makes of its runs: the figures, and the Markdown that shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.common import DecodingConfig, Prompt, Run, compared, pass_seconds, rate, tau
from deepspec.evaluation.stats import Interval
from deepspec.markdown import markdown_table


def figures(
    configs: Sequence[DecodingConfig],
    runs: Mapping[str, Sequence[Run]],
    prompts: Sequence[Prompt],
    bandwidths: Sequence[float],
) -> dict[str, Any]:
    """Everything the report says, as plain data. The floor goes by the median of the bandwidths (bytes a second)."""
    bandwidth = median(bandwidths)
    sources = list(dict.fromkeys(prompt.source for prompt in prompts))
    return {
        "prompts": {source: sum(p.source == source for p in prompts) for source in sources},
        "read_bandwidth": [bandwidth, min(bandwidths), max(bandwidths)],
        "contestants": {
            config.name: _figures(
                config, runs[config.name], runs[config.reference], prompts, sources, bandwidth
            )
            for config in configs
        },
        "duels": _duels(configs, runs),
    }


def _figures(
    config: DecodingConfig,
    mine: Sequence[Run],
    reference: Sequence[Run],
    prompts: Sequence[Prompt],
    sources: Sequence[str],
    bandwidth: float,
) -> dict[str, Any]:
    seconds = pass_seconds(mine)
    floor = config.step_bytes / bandwidth if config.step_bytes else None
    parts = {part: [getattr(run, part) for run in mine] for part in ("draft_s", "verify_s", "host_s")}
    known = None not in parts["draft_s"]
    total = sum(map(sum, parts.values())) if known else 0.0
    by_source = {
        source: [i for i, prompt in enumerate(prompts) if prompt.source == source] for source in sources
    }
    return {
        "tokens_per_second": rate(mine),
        "reference": config.reference,
        "ratio": _interval(compared(mine, reference)),
        "ratio_by_source": {
            source: _interval(compared([mine[i] for i in rows], [reference[i] for i in rows]))
            for source, rows in by_source.items()
        },
        "tau": tau(mine),
        "shares": {part: sum(values) / total for part, values in parts.items()} if total else None,
        "pass_seconds": seconds,
        "floor_seconds": floor,
        "times_floor": seconds / floor if seconds and floor else None,
        "same_answers": sum(a.output == b.output for a, b in zip(mine, reference, strict=True)),
        "tokens": sum(run.tokens for run in mine),
    }


def _duels(configs: Sequence[DecodingConfig], runs: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """The fastest of ours against the fastest of each other engine, and plain against plain, on the same weights."""
    duels = []
    for engine in ("Hugging Face", "llama.cpp"):
        theirs = [config for config in configs if config.name.startswith(engine)]
        for reference in dict.fromkeys(config.reference for config in theirs):
            weights = reference.partition(":")[0]
            ours = [config for config in configs if config.runtime == weights]
            rivals = [config for config in theirs if config.reference == reference]
            best = [max(side, key=lambda config: rate(runs[config.name])).name for side in (ours, rivals)]
            plain = [reference, next(config.name for config in rivals if config.name.endswith("plain"))]
            for a, b in (plain, best):
                duels.append({"ours": a, "theirs": b, "ratio": _interval(compared(runs[a], runs[b]))})
    return duels


def body(data: dict[str, Any]) -> str:
    """The report in Markdown."""
    entries, sources = data["contestants"], list(data["prompts"])
    count = sum(data["prompts"].values())
    header = (
        "way",
        "tokens/s",
        "× plain",
        "τ",
        "draft / verify / host",
        "ms a pass",
        "× floor",
        "same answers",
    )
    rows = [
        (
            name,
            f"{entry['tokens_per_second']:.1f}",
            _ratio(entry["ratio"]),
            f"{entry['tau']:.2f}",
            " / ".join(f"{100 * share:.0f}" for share in entry["shares"].values()) + " %"
            if entry["shares"]
            else "–",
            f"{1000 * entry['pass_seconds']:.1f}" if entry["pass_seconds"] else "–",
            f"{entry['times_floor']:.2f}" if entry["times_floor"] else "–",
            f"{entry['same_answers']}/{count}",
        )
        for name, entry in entries.items()
    ]
    by_source = [
        (name, *(_ratio(entry["ratio_by_source"][source]) for source in sources))
        for name, entry in entries.items()
    ]
    duels = [f"- {duel['ours']} against {duel['theirs']}: {_ratio(duel['ratio'])}×" for duel in data["duels"]]
    lines = [
        markdown_table(header, rows, "tn"),
        "",
        _notes(data),
        "",
        markdown_table(("× plain", *sources), by_source, "tn"),
    ]
    if duels:
        lines += ["", "Plain against plain and the fastest of each side on these prompts:", "", *duels]
    return "\n".join(lines)


def _notes(data: dict[str, Any]) -> str:
    bandwidth = "{:.1f} GB/s (median; {:.1f} – {:.1f})".format(*(b / 1e9 for b in data["read_bandwidth"]))
    notes = (
        "× plain: our plain decoding on the same weights (of Hugging Face: dense). "
        "A pass is one of the target's with all that belongs to it; the floor is the time in which memory delivers its "
        f"weights once, at the {bandwidth} measured between the runs. Same answers: prompts with exactly the plain "
        "run's tokens."
    )
    if idle := data.get("idle_cpu"):
        notes += (
            f" llama.cpp: {data['llama_cpp']}. While the other side worked, it used {idle['llama_cpp']:.3f} of a core "
            f"and this process {idle['deepspec']:.3f}."
        )
    return notes


def _interval(interval: Interval | None) -> list[float] | None:
    return interval and [interval.value, *(interval.bounds or [])]


def _ratio(values: list[float] | None) -> str:
    if values is None:
        return "–"
    value, *bounds = values
    return f"{value:.2f}" + (f" ({bounds[0]:.2f} – {bounds[1]:.2f})" if bounds else "")
