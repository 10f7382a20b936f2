"""Table 1 beside the published one: reports/table1.json, its numbers as metrics, reports/table1.md and the marked part
of README.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from deepspec.errors import DeepSpecError
from deepspec.evaluation.record import LOOKUP
from deepspec.evaluation.stats import Interval
from deepspec.files import write_json, write_text
from deepspec.markdown import markdown_table
from deepspec.stages.common import stage
from paper import ablations
from paper.params import PaperParams
from paper.study import MEAN, Draft, Study, by_seed, load

TEMPERATURE = 1.0
OURS, RIVALS = "DSpark", ("EAGLE-3", "DFlash")
BEGIN, END = "<!-- table 1: written by paper/table.py -->", "<!-- end of table 1 -->"


def published(path: Path = Path("published.yaml")) -> dict[str, Any]:
    """Name → domain → τ, the ratios between them, and the gains over three targets."""
    raw = yaml.safe_load(path.read_text())
    groups = raw["categories"] | {MEAN: [task for tasks in raw["categories"].values() for task in tasks]}
    tau = {
        name: {domain: fmean(rows[task] for task in tasks) for domain, tasks in groups.items()}
        for name, rows in raw["tau"].items()
    }
    ratios = {
        rival: {domain: tau[OURS][domain] / value for domain, value in tau[rival].items()} for rival in RIVALS
    }
    return {
        "source": raw["source"],
        "target": raw["target"],
        "tau": tau,
        "ratios": ratios,
        "gain": raw["gain"],
    }


def ratios(study: Study, ours: str, rival: str) -> dict[str, Any]:
    """Domain → the ratio of mean expected τ with its interval, that of each seed, whether ours is ahead; and the ratio
    of decoding."""
    found, expected, decoded = {}, study.expected(), study.decoded(TEMPERATURE)
    above, below = (expected.drafters[name] for name in (ours, rival))
    for domain, tasks in study.groups.items():
        ratio = expected.ratio(above, below, tasks)
        found[domain] = {
            **asdict(ratio),
            "by_seed": (by_seed(above, tasks) / by_seed(below, tasks)).tolist(),
            "ahead": verdict(ratio),
            "decoded": asdict(decoded.ratio(decoded.drafters[ours], decoded.drafters[rival], tasks)),
        }
    return found


def verdict(ratio: Interval) -> str:
    """Of a ratio whose interval lies above 1, below 1, or across it."""
    if ratio.bounds is None:
        return "not told apart"
    if ratio.low > 1:
        return "yes"
    return "no" if ratio.high < 1 else "not told apart"


def make(study: Study, known: dict[str, Any]) -> dict[str, Any]:
    """Everything that the Markdown says, as data."""
    expected = study.expected()
    tau = {
        name: {domain: asdict(expected.tau(own, tasks)) for domain, tasks in study.groups.items()}
        for name, own in expected.drafters.items()
    }
    roles = study.params.study.roles
    found = {rival: ratios(study, roles[OURS], roles[rival]) for rival in RIVALS}
    return {
        "published": known,
        "roles": roles,
        "tau": tau,
        "ratios": found,
        "drafters": {name: drafter(study, name) for name in study.drafts},
        "lookup": lookup(study),
    }


def drafter(study: Study, name: str) -> dict[str, Any]:
    """Of one drafter, over its seeds: what it is, decoded τ and speed-up at each temperature, losslessness."""
    chosen, drafts = study.params.drafters[name], study.drafts[name]
    lossless = all(draft.lossless for draft in drafts)
    temperatures = study.params.evaluate.temperatures
    decoded = {t: study.decoded(t) for t in temperatures}
    tau = {t: own.tau(own.drafters[name], study.groups[MEAN]) for t, own in decoded.items()}
    return {
        "type": chosen.type,
        "layers": getattr(chosen, "layers", 1),
        "head": getattr(chosen, "markov_head", None),
        "block_size": chosen.block_size,
        "lossless": lossless,
        "lossless_checked": sum(checked(draft) for draft in drafts),
        "tau": {f"{t:g}": asdict(found) for t, found in tau.items()},
        "speedup": {f"{t:g}": speedup(drafts, t) if lossless else None for t in temperatures},
    }


def speedup(drafts: Iterable[Draft], temperature: float) -> float | None:
    """Mean over seeds of the records' mean over tasks; None where one has none, as it is not lossless."""
    return _mean(draft.record.summary.by_temperature[f"{temperature:g}"].speedup for draft in drafts)


def _mean(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else fmean(known)


def lookup(study: Study) -> dict[str, dict[str, float | None]]:
    """What needs no training and was decoded beside every draft, by temperature: τ and speed-up, mean over records."""
    every = [draft.record.summary.by_temperature for own in study.drafts.values() for draft in own]
    return {
        t: {
            key: _mean(getattr(record[t].beside[LOOKUP], key) for record in every)
            for key in ("tau", "speedup")
        }
        for t in every[0]
    }


def checked(draft: Draft) -> int:
    """Prompts whose tokens were compared in float32."""
    entries = [e for e in draft.record.tasks.values() if e.temperature == draft.record.summary.temperature]
    return sum(entry.lossless_checked.prompts for entry in entries)


def settings(study: Study, root: Path) -> dict[str, Any]:
    """What was trained on what, for the line under the table."""
    train, manifest = study.params.train, json.loads((root / "data/distill/manifest.json").read_text())
    seen = manifest["rows"] - min(train.heldout, max(manifest["rows"] // 10, 1))  # as training holds them out
    every = [draft for own in study.drafts.values() for draft in own]
    record = every[0].record
    return {
        "target": record.target,
        "dtype": record.dtype,
        "device": record.device,
        "seeds": study.params.study.seeds,
        "steps": train.steps,
        "batch_size": train.batch_size,
        "anchors": train.anchors,
        "blocks": train.steps * train.batch_size * train.anchors,
        "epochs": round(train.steps * train.batch_size / seen, 1),
        "conversations": manifest["rows"],
        "answer_tokens": manifest["answer_tokens"],
        "prompts": {key: entry.prompts for key, entry in record.tasks.items()},
        "texts": {task: len(own) for task, own in next(iter(study.rounds[0].values())).items()},
        "samples": study.params.study.samples,
        "max_new_tokens": study.params.evaluate.max_new_tokens,
        "heldout_tau": {name: heldout(study, root, name) for name in study.drafts},
        "commits": sorted({own.record.provenance.git_commit or "unknown" for own in every}),
    }


def heldout(study: Study, root: Path, name: str) -> float:
    """Expected τ of the weights that were kept, mean over seeds."""
    files = [root / f"reports/train/seed-{seed}/{name}.jsonl" for seed in study.params.study.seeds]
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return fmean(max(line["heldout_tau"] for line in own) for own in lines)


def metrics(found: dict[str, Any]) -> dict[str, Any]:
    """The table's numbers under the names by which `deepspec reproduce` knows how exactly they come back: τ of a domain
    is expected, that of a temperature was decoded."""
    own = {
        name: {"lossless": drafter["lossless"]}
        | {
            f"T={t}": {"tau": tau["value"], "speedup": drafter["speedup"][t]}
            for t, tau in drafter["tau"].items()
        }
        | {domain: _bounded("tau", tau) for domain, tau in found["tau"][name].items()}
        for name, drafter in found["drafters"].items()
    }
    over = {
        f"over {rival}": {domain: _bounded("ratio", ratio) for domain, ratio in by_domain.items()}
        for rival, by_domain in found["ratios"].items()
    }
    return own | over


def _bounded(name: str, interval: dict[str, Any]) -> dict[str, float]:
    """A metric and the ends of its interval, by whose overlap a table made again is judged."""
    ends = {end: interval[end] for end in ("low", "high") if interval[end] is not None}
    return {name: interval["value"]} | ends


def markdown(found: dict[str, Any], beyond: dict[str, Any]) -> str:
    """The tables as Markdown."""
    parts = [_taus(found), _ratios(found), _settings(found["settings"]), _drafters(found)]
    parts += [_ablations(found["ablations"])] if found["ablations"] else []
    parts.append(_beyond(beyond))
    return "\n\n".join(parts) + "\n"


def _taus(found: dict[str, Any]) -> str:
    domains = list(next(iter(found["tau"].values())))
    known, rows = found["published"], []
    for role, name in found["roles"].items():
        here = [_interval(found["tau"][name][domain], 2) for domain in domains]
        there = [_number(known["tau"][role].get(domain), 2) for domain in domains]
        rows.append([role, *(cell for both in zip(there, here, strict=True) for cell in both)])
    heads = [cell for d in domains for cell in (f"{_titled(d)}, published", f"{_titled(d)}, here")]
    title = (
        f"**Accepted length τ at T = 1** (published: {known['target']}; here: {found['settings']['target']}, in "
        "expectation over what is drafted)"
    )
    return f"{title}\n\n{_table(['', *heads], rows)}"


def _ratios(found: dict[str, Any]) -> str:
    known, rows = found["published"], []
    for rival, by_domain in found["ratios"].items():
        for domain, ratio in by_domain.items():
            there = _number(known["ratios"][rival].get(domain), 2)
            if domain == MEAN:
                low, high = min(known["gain"][rival]), max(known["gain"][rival])
                there += f" (1.{low:02d} to 1.{high:02d} over three targets)"
            each = " / ".join(f"{value:.3f}" for value in ratio["by_seed"])
            cells = [f"{OURS} / {rival}", _titled(domain), there, _interval(ratio, 3), each, ratio["ahead"]]
            cells.append(_interval(ratio["decoded"], 2))
            rows.append([f"**{cell}**" for cell in cells] if domain == MEAN else cells)
    heads = ["ratio of τ", "domain", "published", "here (95 %)", "by seed", f"{OURS} ahead", "decoded"]
    return _table(heads, rows, text=2)


def _settings(s: dict[str, Any]) -> str:
    prompts, texts = (
        " to ".join(str(n) for n in sorted({min(own.values()), max(own.values())}))
        for own in (s["prompts"], s["texts"])
    )
    return (
        f"{s['conversations']} conversations ({s['answer_tokens']} answer tokens), {s['steps']} steps of "
        f"{s['batch_size']} conversations and {s['anchors']} blocks each ({s['epochs']} epochs), seeds "
        f"{', '.join(map(str, s['seeds']))}; τ is expected on {s['samples']} answers to each of "
        f"{texts} first turns a task, and decoded for all turns of {prompts} prompts a task; answers of at "
        f"most {s['max_new_tokens']} tokens; {s['dtype']}, {s['device']}; records of "
        f"{' and '.join(f'`{commit[:7]}`' for commit in s['commits'])}. "
        f"Intervals are over prompts{' and seeds' if len(s['seeds']) > 1 else ': one seed says nothing of others'}."
    )


def _drafters(found: dict[str, Any]) -> str:
    rows = []
    for name, own in found["drafters"].items():
        kind = f"{own['type']}, {own['head']}" if own["head"] else own["type"]
        cells = [
            name,
            kind,
            str(own["layers"]),
            str(own["block_size"]),
            _number(found["settings"]["heldout_tau"][name], 2),
        ]
        for t, tau in own["tau"].items():
            cells += [_interval(tau, 2), _speed(own["speedup"][t])]
        lossless = f"yes ({own['lossless_checked']} prompts)" if own["lossless"] else "**no**"
        rows.append([*cells, lossless])
    temperatures = list(next(iter(found["drafters"].values()))["tau"])
    alone = [found["lookup"][t] for t in temperatures]
    figures = [cell for own in alone for cell in (_number(own["tau"], 2), _speed(own["speedup"]))]
    rows.append(["lookup alone", "no training", "", "", "", *figures, ""])
    heads = ["drafter", "type", "layers", "γ", "expected τ, held out"]
    heads += [head for t in temperatures for head in (f"τ, T = {t}", f"speed-up, T = {t}")]
    title = (
        "**Every drafter** as it decoded, mean of tasks; speed-up over plain decoding in the same engine, no lookup, "
        "whole blocks"
    )
    return f"{title}\n\n{_table([*heads, 'lossless'], rows, text=2)}"


def _ablations(rows: list[dict[str, Any]]) -> str:
    cells = [
        [
            row["drafter"],
            f"{row['key']} {_value(row['values'][0])}, not {_value(row['values'][1])}",
            _interval(row["tau"], 2),
            f"{_interval(row['ratio'], 3)} of {row['partner']}",
            *(_interval(ratio, 3) for ratio in row["of"].values()),
        ]
        for row in rows
    ]
    heads = ["drafter", "what differs", "τ", "× τ", *(f"× {role}'s" for role in rows[0]["of"])]
    title = (
        "**Ablations**, expected τ of whole blocks at T = 1, mean of tasks (the first seed; what seeds of the table's "
        "drafters differ by is in the intervals)"
    )
    return f"{title}\n\n{_table(heads, cells, text=2)}"


def _value(value: Any) -> str:
    """Of a drafter's section; a loss by its terms, none as the one of `train`."""
    if value is None:
        return "of `train`"
    if isinstance(value, dict):
        terms = {term: value[term] for term in ("ce", "kl", "tv", "lk", "lk_mixed") if value[term]}
        return " + ".join(term if weight == 1 else f"{weight:g}·{term}" for term, weight in terms.items())
    return str(value)


def _beyond(beyond: dict[str, Any]) -> str:
    rows = [
        [
            way["drafter"],
            way["way"],
            f"{way['temperature']:g}",
            _interval(way["tau"], 2),
            _interval(way["against_standard"], 3),
            _interval(way["speedup"], 2) if way["speedup"] else "none",
            "yes" if way["lossless"] else "**no**",
        ]
        for way in beyond["ways"]
    ]
    heads = [
        "drafter",
        "verified as",
        "T",
        "τ",
        "× the standard chain's τ",
        "speed-up",
        "shape lossless, T = 0",
    ]
    count = " and ".join(sorted({str(n) for n in beyond["prompts"].values()}))
    title = (
        f"**The same drafts otherwise** (seed {beyond['seed']}, {count} prompts a task, trees of {beyond['nodes']} "
        "nodes; intervals over prompts)"
    )
    return f"{title}\n\n{_table(heads, rows, text=2)}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """The first `text` columns are text, the others numbers."""
    return markdown_table(heads, rows, "t" * text + "n")


def _titled(domain: str) -> str:
    return "mean of tasks" if domain == MEAN else domain


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _interval(found: dict[str, Any], digits: int) -> str:
    if found["low"] is None:  # one prompt alone
        return f"{found['value']:.{digits}f}"
    return f"{found['value']:.{digits}f} ({found['low']:.{digits}f}–{found['high']:.{digits}f})"


def _speed(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}×"


def between(text: str, body: str) -> str:
    """A README with `body` between its markers.

    Raises:
        DeepSpecError: the markers are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise DeepSpecError(f"README.md has no place for the table: {BEGIN!r} and after it {END!r}")
    return f"{before}{begin}\n\n{body}\n{end}{after}"


def main(params: PaperParams, flags: argparse.Namespace) -> None:
    root = Path(".")
    study = load(params, root)
    found = make(study, published()) | {"settings": settings(study, root)}
    found |= {"ablations": ablations.ratios(study)}
    text = markdown(found, json.loads((root / "reports/beyond.json").read_text()))
    write_json(root / "reports/table1.json", found)
    write_json(root / "reports/metrics.json", metrics(found))
    write_text(root / "reports/table1.md", text)
    readme = root / "README.md"
    write_text(readme, between(readme.read_text(), text))
    print(text)


if __name__ == "__main__":
    stage(main, params=PaperParams)
