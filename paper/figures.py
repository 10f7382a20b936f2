"""Figures 2 to 6 of the paper, of this folder's records, and the held-out τ in training: reports/figures/*.png."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import vl_convert
from scipy.stats import binomtest

from deepspec.files import replacing
from deepspec.report.drawing import GREY, LIGHT, PALETTE, PNG_SCALE
from deepspec.stages.common import stage
from paper import ablations
from paper.params import PaperParams
from paper.study import MEAN, Study, load

FEW = 20  # observations, or expected ones: a share of fewer is not drawn
PANEL, WIDE, HEIGHT = 210, 420, 220
COLOURS = [*PALETTE, "#c0504d", "#4bacc6", "#7f6084", "#5b6b7b"]  # as many as a profile has drafters
Rows = list[dict[str, Any]]
Chart = alt.Chart | alt.LayerChart | alt.HConcatChart


def acceptance(study: Study) -> Rows:
    """Figure 2: acceptance given all before, mean over seeds and a domain's tasks; intervals are over prompts."""
    rows, bootstrap = [], study.expected().bootstrap
    for role, name in study.params.study.roles.items():
        for k in range(study.params.drafters[name].block_size):
            tables = study.counts(name, lambda prompt, k=k: (prompt["stood"][k], prompt["reached"][k]))
            for domain, tasks in study.groups.items():
                reached = min(tables[task][..., 1].sum(1).min() for task in tasks)
                if domain == MEAN or reached < FEW:
                    continue
                rate = bootstrap.interval(bootstrap.quotient(tables, tasks), tasks, 0.0)
                at = {"drafter": role, "domain": domain, "position": k + 1, "reached": float(reached)}
                rows.append(at | {"rate": rate.value, "low": rate.low, "high": rate.high})
    return rows


def depth(study: Study) -> Rows:
    """Figure 3: mean τ of whole blocks by layers, of the drafters that differ from the table's in depth alone."""
    names = {own for own, _, key in study.params.changes() if key == "layers"}
    rows: Rows = []
    for name in [*study.params.study.roles.values(), *names]:
        layers = getattr(study.params.drafters[name], "layers", 1)
        rows.append({"drafter": _family(study, name), "layers": layers, **_tau(study, name)})
    roles = list(study.params.study.roles)
    return sorted(rows, key=lambda row: (roles.index(row["drafter"]), row["layers"]))


def lengths(study: Study) -> Rows:
    """Figure 4: mean τ by tokens verified of a block."""
    return [
        {"drafter": name, "length": n, **_tau(study, name, n)}
        for name in ablations.drafters(study.params)
        for n in range(1, study.params.drafters[name].block_size + 1)
    ]


def _tau(study: Study, name: str, length: int | None = None) -> dict[str, float]:
    tau = study.expected(length).tau(study.tables(name, length), study.groups[MEAN])
    return {"tau": tau.value, "low": tau.low, "high": tau.high}


def thresholds(parts: list[dict[str, Any]]) -> Rows:
    """Figure 5: tokens that stand and fall at each threshold, by domain; summed over seeds."""
    rows: Rows = []
    for domain in (key for key in parts[0] if key != "all"):
        for points in zip(*(part[domain]["thresholds"] for part in parts), strict=True):
            stood, fell = (sum(point[key] for point in points) for key in ("accepted", "rejected"))
            at = {"domain": domain, "threshold": points[0]["threshold"]}
            rate = stood / (stood + fell) if stood + fell else None
            rows += [at | {"outcome": "accepted", "tokens": stood, "rate": rate}]
            rows += [at | {"outcome": "rejected", "tokens": fell, "rate": rate}]
    return rows


def reliability(parts: list[dict[str, Any]]) -> tuple[Rows, dict[str, float]]:
    """Figure 6: the bins before and after calibration, pooled over seeds, and the mean ECE of each."""
    rows: Rows = []
    for when in ("before", "after"):
        pooled: dict[float, list[float]] = {}
        for part in parts:
            for own in part["all"]["reliability"][when]:
                sums = pooled.setdefault(own["low"], [0, 0.0, 0.0])
                values = (1, own["predicted"], own["observed"])
                for i, value in enumerate(values):
                    sums[i] += own["count"] * value
        rows += [
            {"when": when, "predicted": predicted / count, "observed": observed / count, "count": count}
            for _, (count, predicted, observed) in sorted(pooled.items())
        ]
    ece = {when: float(np.mean([part["all"]["ece"][when] for part in parts])) for when in ("before", "after")}
    return rows, ece


def learning(study: Study, root: Path) -> Rows:
    """Expected τ on held-out conversations by step, mean over seeds."""
    rows: Rows = []
    for name in study.drafts:
        by_step: dict[int, list[float]] = {}
        for seed in study.params.study.seeds:
            for line in (root / f"reports/train/seed-{seed}/{name}.jsonl").read_text().splitlines():
                found = json.loads(line)
                by_step.setdefault(found["step"], []).append(found["heldout_tau"])
        rows += [{"drafter": name, "step": s, "tau": float(np.mean(v))} for s, v in by_step.items()]
    return rows


def drawn(rows: Rows, share: str, of: str) -> Rows:
    """Those whose share is one of enough, each with Wilson's 95 % interval: `low` and `high`."""
    found = []
    for row in rows:
        if row[of] >= FEW:
            low, high = binomtest(round(row[share] * row[of]), row[of]).proportion_ci(method="wilson")
            found.append(row | {"low": low, "high": high})
    return found


def _family(study: Study, name: str) -> str:
    kind = study.params.drafters[name].type
    roles = {study.params.drafters[own].type: role for role, own in study.params.study.roles.items()}
    return roles.get(kind, kind)


def charts(study: Study, confidence: list[dict[str, Any]], root: Path) -> Iterator[tuple[str, Chart]]:
    """Name of the file → the chart."""
    yield (
        "figure2",
        _panels(
            acceptance(study),
            "drafter",
            "position",
            "position in the block",
            "rate",
            "accepted, given all before",
        ),
    )
    yield "figure3", _lines(depth(study), "layers", "layers of the draft", "τ, mean of tasks")
    yield (
        "figure4",
        _lines(lengths(study), "length", "tokens verified of a block", "τ, mean of tasks"),
    )
    name = study.params.study.dspark
    confident = [part["drafters"][name] for part in confidence if name in part["drafters"]]
    if confident:
        yield "figure5", _sweep(thresholds(confident))
        yield "figure6", _reliability(*reliability(confident))
    rows = learning(study, root)
    yield "learning", _lines(rows, "step", "training steps", "expected τ, held out", band=False)


def _key(field: str) -> alt.Color:
    scale, legend = alt.Scale(range=COLOURS), alt.Legend(title=None, orient="bottom", columns=3)
    return alt.Color(field, type="nominal", scale=scale, legend=legend, sort=None)


def _axis(field: str, title: str, ticks: list[int] | None = None) -> alt.X:
    axis = alt.Axis(values=ticks, format="d") if ticks else alt.Axis()
    scale = alt.Scale(nice=False, zero=False, padding=12)
    return alt.X(field, type="quantitative", title=title, axis=axis, scale=scale)


def _panels(rows: Rows, colour: str, x: str, x_title: str, y: str, y_title: str) -> Chart:
    panels = []
    for domain in _values(rows, "domain"):
        data = alt.Data(values=[row for row in rows if row["domain"] == domain])
        base = alt.Chart(data).encode(x=_axis(x, x_title, sorted(_values(rows, x))), color=_key(colour))
        panel = _with_intervals(base, y, y_title)
        panels.append(panel.properties(width=PANEL, height=HEIGHT, title=domain))
    return alt.hconcat(*panels)


def _with_intervals(base: alt.Chart, y: str, y_title: str) -> Chart:
    """A line of shares, and at each point a rule from `low` to `high`."""
    percent = {"title": y_title, "scale": alt.Scale(domain=[0, 1]), "axis": alt.Axis(format="%")}
    low = alt.Y("low", type="quantitative", **percent)
    return alt.layer(
        base.mark_rule(opacity=0.5).encode(y=low, y2=alt.Y2("high")),
        base.mark_line(point=True).encode(y=alt.Y(y, type="quantitative", **percent)),
    )


def _lines(rows: Rows, x: str, x_title: str, y_title: str, band: bool = True) -> Chart:
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=_axis(x, x_title, sorted(_values(rows, x)) if band else None), color=_key("drafter")
    )
    scale = alt.Scale(zero=False)
    line = base.mark_line(point=True).encode(y=alt.Y("tau", type="quantitative", title=y_title, scale=scale))
    if band:
        low = alt.Y("low", type="quantitative", title=y_title, scale=scale)
        line = alt.layer(base.mark_rule(opacity=0.5).encode(y=low, y2=alt.Y2("high")), line)
    return line.properties(width=WIDE, height=HEIGHT)


def _sweep(rows: Rows) -> Chart:
    panels = []
    for domain in _values(rows, "domain"):
        data = alt.Data(values=[row for row in rows if row["domain"] == domain])
        x = alt.X("threshold", type="quantitative", title="confidence below which a block is cut")
        colours = alt.Scale(domain=["accepted", "rejected"], range=[PALETTE[2], GREY])
        legend = alt.Legend(title="drafted tokens", orient="bottom")
        area = (
            alt.Chart(data)
            .mark_area(opacity=0.85)
            .encode(
                x=x,
                y=alt.Y("tokens", type="quantitative", title="drafted tokens", stack=True),
                color=alt.Color("outcome", type="nominal", scale=colours, legend=legend),
            )
        )
        rate = (
            alt.Chart(data)
            .transform_filter("datum.outcome == 'accepted'")
            .mark_line(color=PALETTE[3])
            .encode(
                x=x,
                y=alt.Y(
                    "rate",
                    type="quantitative",
                    title="acceptance rate",
                    scale=alt.Scale(domain=[0, 1]),
                    axis=alt.Axis(format="%", titleColor=PALETTE[3]),
                ),
            )
        )
        both = alt.layer(area, rate).resolve_scale(y="independent")
        panels.append(both.properties(width=PANEL, height=HEIGHT, title=domain))
    return alt.hconcat(*panels)


def _reliability(rows: Rows, ece: dict[str, float]) -> Chart:
    percent = {"axis": alt.Axis(format="%"), "scale": alt.Scale(domain=[0, 1])}
    line = alt.Chart(alt.Data(values=[{"p": 0}, {"p": 1}])).mark_line(strokeDash=[4, 3], color=GREY)
    diagonal = line.encode(x=alt.X("p", type="quantitative"), y=alt.Y("p", type="quantitative"))
    names = {when: f"{when} (ECE {100 * value:.1f} %)" for when, value in ece.items()}
    data = [row | {"when": names[row["when"]]} for row in drawn(rows, "observed", "count")]
    x = alt.X("predicted", type="quantitative", title="predicted chance that the path is accepted", **percent)
    base = alt.Chart(alt.Data(values=data)).encode(x=x, color=_key("when"))
    points = _with_intervals(base, "observed", "share that was")
    return alt.layer(diagonal, points).properties(width=WIDE, height=HEIGHT)


def _values(rows: Rows, key: str) -> list:
    return list(dict.fromkeys(row[key] for row in rows))


def png(chart: Chart) -> bytes:
    """On a light background."""
    version = ".".join(alt.VEGALITE_VERSION.split(".")[:2])
    return vl_convert.vegalite_to_png(chart.to_dict(), vl_version=version, scale=PNG_SCALE, config=LIGHT)


def main(params: PaperParams, flags: argparse.Namespace) -> None:
    root = Path(".")
    study = load(params, root)
    files = [root / f"reports/confidence/seed-{seed}.json" for seed in params.study.seeds]
    confidence = [json.loads(file.read_text()) for file in files]
    with replacing(root / "reports/figures") as folder:
        folder.mkdir()
        for name, chart in charts(study, confidence, root):
            (folder / f"{name}.png").write_bytes(png(chart))


if __name__ == "__main__":
    stage(main, params=PaperParams)
