"""The report's charts, as Vega-Lite through altair: drawn by the page in the browser, and as PNGs without one.

A drafter or baseline has one colour in all charts. Colours and sizes suit light and dark, phone and desk; the page
sets the text's colours by theme.
"""

from __future__ import annotations

from collections.abc import Iterator

import altair as alt

from deepspec.report.drawing import (
    GREY,
    HEIGHT,
    PALETTE,
    Chart,
    Figure,
    among,
    chart_data,
    colour_key,
    tooltips,
    values_of,
    whole_axis,
    x_axis,
    y_axis,
)
from deepspec.report.tables import Rows

PARTS = {"draft": "#dd8324", "verify": "#3f83d1", "host": GREY}


def figures(tables: dict[str, Rows]) -> list[Figure]:
    """Return every figure that has data, in the order of the page."""
    colours = _colours(tables)
    return [*_speed(tables, colours), *_acceptance(tables, colours), *_shape(tables, colours),
            *_confidence(tables), *_batches(tables), *_training(tables, colours)]  # fmt: skip


def _colours(tables: dict[str, Rows]) -> alt.Scale:
    """Drafters in the palette's order, baselines grey; other controllers of a draft take further colours."""
    drafters = list(dict.fromkeys(row["drafter"] for row in tables["acceptance"] + tables["heldout"]))
    ways = list(dict.fromkeys([*drafters, *(row["way"] for row in tables["speedup"])]))
    coloured = [way for way in ways if not way.startswith("lookup ")]
    palette = {way: PALETTE[i % len(PALETTE)] for i, way in enumerate(coloured)}
    return alt.Scale(domain=ways, range=[palette.get(way, GREY) for way in ways])


def _bars(rows: Rows, colours: alt.Scale, field: str, bounds: tuple[str, str], title: str) -> Chart:
    ways = values_of(rows, "way")
    scale = among(colours, ways)
    base = alt.Chart(chart_data(rows)).encode(
        y=alt.Y("task:N", title=None, sort=None, axis=alt.Axis(labelLimit=130)),
        yOffset=alt.YOffset("way:N", sort=ways),
    )
    low, high = bounds
    tips = tooltips("task", "way", f"{field}:Q", f"{low}:Q", f"{high}:Q")
    bars = base.mark_bar(cornerRadiusEnd=2).encode(
        x=x_axis(field, title), color=colour_key("way", scale), tooltip=tips
    )
    whiskers = base.mark_rule(strokeWidth=1.5, opacity=0.75).encode(
        x=x_axis(low, title), x2=alt.X2(high), tooltip=tips
    )
    one = alt.Chart(alt.Data(values=[{"one": 1}])).mark_rule(strokeDash=[4, 3], opacity=0.6).encode(x="one:Q")
    height = max(len(values_of(rows, "task")) * len(ways) * 17, 70)
    return alt.layer(bars, whiskers, one).properties(height=height)


def _speed(tables: dict[str, Rows], colours: alt.Scale) -> Iterator[Figure]:
    for temperature in values_of(tables["speedup"], "temperature"):
        rows = [row for row in tables["speedup"] if row["temperature"] == temperature]
        at = f"T = {temperature:g}"
        timed = [row for row in rows if row["speedup"] is not None]
        if timed:
            yield Figure(
                f"speedup-{temperature:g}",
                "speed",
                f"Speed-up by task, {at}",
                "Seconds a token of plain decoding over seconds a token this way, in the same engine on the same "
                "prompts; whiskers are 95 % intervals of a paired bootstrap over prompts, the dashed line is plain "
                "decoding.",
                _bars(timed, colours, "speedup", ("low", "high"), "speed-up over plain decoding (×)"),
            )
        yield Figure(
            f"tau-{temperature:g}",
            "speed",
            f"τ by task, {at}",
            "Tokens committed per pass of the target, its own token included, counted over all rounds; whiskers as "
            "above.",
            _bars(rows, colours, "tau", ("tau_low", "tau_high"), "τ (tokens per verification)"),
        )


def _pooled(rows: Rows) -> Rows:
    """Pool the acceptance of all tasks, by drafter and position."""
    sums: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        total = sums.setdefault((row["drafter"], row["position"]), [0.0, 0])
        total[0] += row["accept_rate"] * row["blocks"]
        total[1] += row["blocks"]
    return [
        {"drafter": drafter, "position": position, "accept_rate": stood / blocks, "blocks": blocks}
        for (drafter, position), (stood, blocks) in sums.items()
    ]


def _accepted(data: alt.Data, colour: alt.Color, by: str) -> Chart:
    line = alt.Chart(data).mark_line(point=alt.OverlayMarkDef(size=55))
    return line.encode(
        x=whole_axis("position in the block", "position"),
        y=y_axis("accept_rate", "accepted", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])),
        color=colour,
        tooltip=tooltips(by, "position", "accept_rate:Q", "blocks"),
    ).properties(height=HEIGHT)


ALONG = {  # table → name, x axis, title, text
    "output_position": (
        "position",
        "tokens of the answer so far",
        "τ along the answer",
        "τ of the rounds that begin when so many tokens of the answer are there, in steps of 16, over all tasks: "
        "a draft that is good on short answers alone falls to the right.",
    ),
    "contexts": (
        "context",
        "tokens of prompt and answer so far",
        "τ by context",
        "τ of the rounds that begin behind so many tokens, in bins of doubling length, over all tasks: a draft "
        "falls where contexts are longer than those it was trained on.",
    ),
}


def _along(tables: dict[str, Rows], colours: alt.Scale) -> Iterator[Figure]:
    """Make τ over where rounds begin, in the answer and in the context."""
    for table, (name, axis, title, text) in ALONG.items():
        for temperature in values_of(tables[table], "temperature"):
            rows = [row for row in tables[table] if row["temperature"] == temperature]
            mean = alt.Chart(chart_data(rows)).encode(x=x_axis("start", axis))
            chart = mean.mark_line(point=alt.OverlayMarkDef(size=55)).encode(
                y=y_axis("mean_tau", "τ", scale=alt.Scale(zero=False)),
                color=colour_key("drafter", among(colours, values_of(rows, "drafter"))),
                tooltip=tooltips("drafter", "start", "mean_tau:Q", "all_rounds:Q"),
            )
            weighted = (
                chart.transform_calculate(sum="datum.tau * datum.rounds")
                .transform_aggregate(total="sum(sum)", all_rounds="sum(rounds)", groupby=["drafter", "start"])
                .transform_calculate(mean_tau="datum.total / datum.all_rounds")
            )
            heading = f"{title}, T = {temperature:g}"
            figure = f"{name}-{temperature:g}"
            yield Figure(figure, "acceptance", heading, text, weighted.properties(height=HEIGHT))


def _acceptance(tables: dict[str, Rows], colours: alt.Scale) -> Iterator[Figure]:
    text = (
        "Of the blocks whose earlier tokens were all accepted, the share whose token here was accepted too: of a "
        "trained draft alone, with whole blocks, no lookup and no controller"
    )
    drafters = values_of(tables["acceptance"], "drafter")
    for mode in values_of(tables["acceptance"], "mode"):
        rows = [row for row in tables["acceptance"] if row["mode"] == mode]
        if len(drafters) > 1:
            chart = _accepted(
                chart_data(_pooled(rows)), colour_key("drafter", among(colours, drafters)), "drafter"
            )
            title = f"Acceptance by position, all drafts, {mode}"
            yield Figure(f"acceptance-{mode}", "acceptance", title, f"{text}; all tasks together.", chart)
        for drafter in drafters:
            own = [row for row in rows if row["drafter"] == drafter]
            if own:
                chart = _accepted(chart_data(own), colour_key("task"), "task")
                title = f"Acceptance by position: {drafter}, {mode}"
                yield Figure(f"acceptance-{drafter}-{mode}", "acceptance", title, f"{text}.", chart)
    yield from _along(tables, colours)
    for temperature in values_of(tables["round_time"], "temperature"):
        rows = [row for row in tables["round_time"] if row["temperature"] == temperature]
        chart = (
            alt.Chart(chart_data(rows))
            .mark_bar()
            .encode(
                y=alt.Y("way:N", title=None, sort=None, axis=alt.Axis(labelLimit=150)),
                x=x_axis("ms", "milliseconds a round", stack=True),
                color=colour_key("part", alt.Scale(domain=list(PARTS), range=list(PARTS.values()))),
                order=alt.Order("place:Q"),
                tooltip=tooltips("way", "part", "ms:Q"),
            )
            .transform_calculate(place="indexof(['draft', 'verify', 'host'], datum.part)")
        )
        yield Figure(
            f"round-{temperature:g}",
            "acceptance",
            f"Where a round's time goes, T = {temperature:g}",
            "Drafting, the target's pass with the verdict, and Python around them: medians over prompts, mean of "
            "tasks.",
            chart.properties(height=max(34 * len(values_of(rows, "way")), 70)),
        )


def _shape(tables: dict[str, Rows], colours: alt.Scale) -> Iterator[Figure]:
    titles = {
        "block_length": ("Length of chains", "tokens drafted", "Chains of so many tokens, all verified."),
        "depth": ("Depth of trees", "levels", "Best-first trees of one node budget, cut at so many levels."),
        "nodes": ("Nodes of trees", "nodes", "Best-first trees of so many nodes, as deep as the block."),
    }
    for sweep, (title, axis, text) in titles.items():
        rows = [row for row in tables["sweeps"] if row["sweep"] == sweep]
        if not rows:
            continue
        names = {"tau": "τ", "speedup": "speed-up (×)"}
        chart = (
            alt.Chart(chart_data(rows))
            .transform_fold(list(names), as_=["figure", "y"])
            .transform_filter("isValid(datum.y)")
            .mark_line(point=alt.OverlayMarkDef(size=55))
            .encode(
                x=whole_axis(axis, "value"),
                y=y_axis("y", "τ, speed-up (×)", scale=alt.Scale(zero=False)),
                color=colour_key("drafter", among(colours, values_of(rows, "drafter"))),
                strokeDash=alt.StrokeDash(
                    "figure:N",
                    legend=alt.Legend(
                        title=None,
                        orient="bottom",
                        symbolType="stroke",
                        labelExpr="datum.label == 'tau' ? 'τ' : 'speed-up'",
                    ),
                    scale=alt.Scale(domain=list(names), range=[[1, 0], [5, 4]]),
                ),
                tooltip=tooltips("drafter", "value", "tau:Q", "speedup:Q"),
            )
        )
        yield Figure(
            f"sweep-{sweep}",
            "shape",
            title,
            f"{text} Solid is τ, dashed the speed-up, of the draft alone at T = 0 on a few prompts of each task: "
            "what is verified costs time, so the best τ is seldom the best speed.",
            chart.properties(height=HEIGHT),
        )


def _confidence(tables: dict[str, Rows]) -> Iterator[Figure]:
    predicted, came = "predicted chance that the path is accepted", "share that was accepted"
    for drafter in values_of(tables["reliability"], "drafter"):
        for mode in values_of(tables["reliability"], "mode"):
            curve = chart_data(tables["reliability"], drafter=drafter, mode=mode)
            line = alt.Chart(alt.Data(values=[{"p": 0}, {"p": 1}])).mark_line(strokeDash=[4, 3], opacity=0.6)
            diagonal = line.encode(x=x_axis("p", predicted), y=y_axis("p", came))
            percent = {"axis": alt.Axis(format="%"), "scale": alt.Scale(domain=[0, 1])}
            points = (
                alt.Chart(curve)
                .mark_line(point=alt.OverlayMarkDef(size=55))
                .encode(
                    x=x_axis("predicted", predicted, **percent),
                    y=y_axis("observed", came, **percent),
                    color=colour_key("when", alt.Scale(domain=["before", "after"], range=[GREY, PALETTE[0]])),
                    tooltip=tooltips("when", "predicted:Q", "observed:Q", "count"),
                )
            )
            yield Figure(
                f"reliability-{drafter}-{mode}",
                "confidence",
                f"Reliability: {drafter}, {mode}",
                "Blocks in bins of the predicted chance that all tokens up to a position are accepted, against the "
                "share of which that came true, before and after sequential temperature scaling; on the dashed line "
                "a prediction means what it says.",
                alt.layer(diagonal, points).properties(height=HEIGHT),
            )
            bars = (
                alt.Chart(chart_data(tables["thresholds"], drafter=drafter, mode=mode))
                .mark_area(opacity=0.85)
                .encode(
                    x=x_axis("threshold", "confidence below which a block is cut"),
                    y=y_axis("tokens", "drafted tokens", stack=True),
                    color=colour_key(
                        "outcome", alt.Scale(domain=["accepted", "rejected"], range=[PALETTE[2], GREY])
                    ),
                    order=alt.Order("outcome:O"),
                    tooltip=tooltips("outcome", "threshold:Q", "tokens"),
                )
            )
            yield Figure(
                f"threshold-{drafter}-{mode}",
                "confidence",
                f"What a threshold would verify: {drafter}, {mode}",
                "Drafted tokens that are verified, and stand or fall, where each block is cut at the first position "
                "whose own calibrated chance is below the threshold.",
                bars.properties(height=HEIGHT),
            )


def _batches(tables: dict[str, Rows]) -> Iterator[Figure]:
    for drafter in values_of(tables["throughput"], "drafter"):
        for temperature in values_of(tables["throughput"], "temperature"):
            rows = [
                r for r in tables["throughput"] if (r["drafter"], r["temperature"]) == (drafter, temperature)
            ]
            if not rows:
                continue
            names = values_of(rows, "name")
            scale = alt.Scale(domain=names, range=[GREY, *PALETTE][: len(names)])
            batch = x_axis("batch", "requests in flight", axis=alt.Axis(values=values_of(rows, "batch"), format="d"),
                       scale=alt.Scale(type="log", base=2, padding=12))  # fmt: skip
            line = alt.Chart(chart_data(rows)).mark_line(point=alt.OverlayMarkDef(size=55))
            yield Figure(
                f"throughput-{drafter}-{temperature:g}",
                "batches",
                f"Throughput: {drafter}, T = {temperature:g}",
                "Tokens a second of a full batch, prefill left out: plain decoding, fixed lengths, and the prefix "
                "scheduler, which decides by measured costs how much of which draft to verify.",
                line.encode(
                    x=batch,
                    y=y_axis("tokens_per_second", "tokens/s", scale=alt.Scale(zero=True)),
                    color=colour_key("name", scale),
                    tooltip=tooltips("name", "batch", "tokens_per_second:Q", "speedup:Q"),
                ).properties(height=HEIGHT),
            )
            drafted = [row for row in rows if row["verified_per_request"] is not None]
            yield Figure(
                f"budget-{drafter}-{temperature:g}",
                "batches",
                f"Verification budget: {drafter}, T = {temperature:g}",
                "Drafted tokens verified per request and round: the scheduler's falls as the batch fills the machine "
                "and a verified token is no longer free.",
                alt.Chart(chart_data(drafted))
                .mark_line(point=alt.OverlayMarkDef(size=55))
                .encode(
                    x=batch,
                    y=y_axis("verified_per_request", "verified a request"),
                    color=colour_key("name", scale),
                    tooltip=tooltips("name", "batch", "verified_per_request:Q"),
                )
                .properties(height=HEIGHT),
            )


def _training(tables: dict[str, Rows], colours: alt.Scale) -> Iterator[Figure]:
    kinds = {
        "training": (
            "loss",
            "Training loss",
            "The mixture that params.yaml asks for, mean since the line before.",
        ),
        "heldout": (
            "heldout_tau",
            "Expected τ on held-out conversations",
            "Mean over blocks of 1 + Σ Π α, by which the best checkpoint is chosen; α is the chance that a token drawn "
            "from the draft is accepted.",
        ),
    }
    for table, (field, title, text) in kinds.items():
        rows = tables[table]
        if rows:
            chart = (
                alt.Chart(chart_data(rows))
                .mark_line(point=alt.OverlayMarkDef(size=40))
                .encode(
                    x=x_axis("step", "step"),
                    y=y_axis(
                        field,
                        title.lower() if table == "training" else "expected τ",
                        scale=alt.Scale(zero=False),
                    ),
                    color=colour_key("drafter", among(colours, values_of(rows, "drafter"))),
                    tooltip=tooltips("drafter", "step", f"{field}:Q"),
                )
            )
            yield Figure(table, "training", title, text, chart.properties(height=HEIGHT))


def pngs(found: list[Figure]) -> dict[str, bytes]:
    """Name → PNG of the main figures."""
    wanted = ("speedup-", "acceptance-", "reliability-", "throughput-", "training", "heldout")
    main = [
        figure for figure in found if figure.name.startswith(wanted) and not figure.name.endswith("-sampled")
    ]
    return {f"{figure.name}.png": figure.png() for figure in main}
