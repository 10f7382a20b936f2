"""What the report's charts are drawn with: a figure, its colours, axes, keys and tooltips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import altair as alt

from deepspec.report.tables import Rows

PALETTE = ("#3f83d1", "#dd8324", "#2b9f79", "#c8578f", "#8570d6", "#a8872b")
GREY = "#8b919c"
HEIGHT = 240
PNG_WIDTH, PNG_SCALE = 560, 1.5
LIGHT = {
    "background": "white",
    "view": {"stroke": None},
    "axis": {
        "gridColor": "#e6e8eb",
        "domainColor": "#c4c8ce",
        "tickColor": "#c4c8ce",
        "labelColor": "#454b54",
    },
    "legend": {"orient": "bottom"},
}
Chart = alt.Chart | alt.LayerChart | alt.FacetChart


@dataclass(frozen=True)
class Figure:
    """A chart with its heading and one sentence on what it shows and how that is computed."""

    name: str
    section: str
    title: str
    text: str
    chart: Chart

    @property
    def spec(self) -> dict[str, Any]:
        """Vega-Lite, as wide as its place in the page."""
        return self.chart.properties(width="container", description=f"{self.title}. {self.text}").to_dict()

    def png(self) -> bytes:
        """Render the figure as PNG for light backgrounds."""
        import vl_convert

        chart = self.chart.properties(width=PNG_WIDTH, title=self.title)
        version = ".".join(alt.VEGALITE_VERSION.split(".")[:2])
        return vl_convert.vegalite_to_png(chart.to_dict(), vl_version=version, scale=PNG_SCALE, config=LIGHT)


def among(colours: alt.Scale, names: list[str]) -> alt.Scale:
    """Return the same colours for these alone, so that the legend names no others."""
    return alt.Scale(domain=names, range=[colours.range[colours.domain.index(name)] for name in names])


def chart_data(rows: Rows, **match: Any) -> alt.Data:
    """Return the rows with these values as a chart holds them: numbers in five digits."""
    chosen = [row for row in rows if all(row[key] == value for key, value in match.items())]
    return alt.Data(values=[{key: _short(value) for key, value in row.items()} for row in chosen])


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def values_of(rows: Rows, key: str) -> list:
    """Return the values of a column, each once, in their order."""
    return list(dict.fromkeys(row[key] for row in rows))


def x_axis(field: str, title: str, **options: Any) -> alt.X:
    """Make a quantitative axis."""
    return alt.X(field, type="quantitative", title=title, **options)


def y_axis(field: str, title: str, **options: Any) -> alt.Y:
    """Make a quantitative axis."""
    return alt.Y(field, type="quantitative", title=title, **options)


def whole_axis(title: str, field: str) -> alt.X:
    """Make an axis of small whole numbers."""
    return x_axis(
        field, title, axis=alt.Axis(tickMinStep=1, format="d"), scale=alt.Scale(nice=False, padding=12)
    )


def colour_key(field: str, scale: alt.Scale | None = None, title: str | None = None) -> alt.Color:
    """Make the colours of a column, with their legend below."""
    legend = alt.Legend(title=title, orient="bottom", columns=2, labelLimit=260)
    return alt.Color(field, type="nominal", legend=legend, scale=scale or alt.Scale(range=list(PALETTE)))


def tooltips(*fields: str) -> list[alt.Tooltip]:
    """Make tooltips of fields by name; with `:Q` a number in three digits."""
    return [
        alt.Tooltip(field, format=".3~r") if field.endswith(":Q") else alt.Tooltip(field, type="nominal")
        for field in fields
    ]
