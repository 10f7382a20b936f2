"""Which package may import which: one direction, no circle."""

from __future__ import annotations

import pytest

from deepspec import lineage

# A package may import those of its own line and of all lines above it; packages of one line only what is said.
LAYERS = [
    {"target"},
    {"decoding"},
    {"messages"},
    {"drafters", "tasks", "features"},
    {"prompts", "answers", "evaluation", "export"},
    {"guard", "training", "serving", "report", "plan"},
    {"tracking", "reproduce"},
    {"commands", "stages"},
]
BESIDE = {"export": {"evaluation"}}  # within one line: what was measured of a draft
# Modules of the package's root: below every layer, but these two.
ABOVE = {"config", "cli"}


def layer(package: str) -> int:
    return next(i for i, packages in enumerate(LAYERS) if package in packages)


def wrong_way() -> list[str]:
    """`importer → imported` of every import against the layers."""
    found = []
    for name in lineage.modules():
        own = name.split(".")
        for other in lineage.imports(name):
            theirs = other.split(".")
            if theirs[0] == "paper" and own[0] != "paper":
                found.append(f"{name} → {other}")
            if own[0] != "deepspec" or theirs[0] != "deepspec" or len(theirs) < 2 or len(own) < 2:
                continue
            mine, its = (parts[1] if len(parts) > 2 else None for parts in (own, theirs))
            if its is None and theirs[1] in ABOVE:  # params.yaml is read by whoever is called by a person
                fine = mine in {"commands", "stages", "tracking", "serving", None}
            elif mine is None:
                fine = its is None or own[1] in ABOVE
            elif its is None or mine == its:
                fine = True
            else:
                fine = layer(its) < layer(mine) or its in BESIDE.get(mine, ())
            if not fine:
                found.append(f"{name} → {other}")
    return found


def test_every_import_points_down():
    assert wrong_way() == []


def test_every_package_has_a_layer():
    packages = {
        name.split(".")[1] for name in lineage.modules() if name.count(".") > 1 and name[:4] == "deep"
    }
    assert packages == set().union(*LAYERS)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("deepspec.target.model", "deepspec.decoding.engine"),
        ("deepspec.decoding.engine", "deepspec.drafters.checkpoint"),
        ("deepspec.files", "deepspec.target.model"),
        ("deepspec.report.charts", "paper.study"),
    ],
)
def test_an_import_against_the_layers_is_found(importer, imported, monkeypatch):
    real = lineage.imports
    monkeypatch.setattr(
        lineage, "imports", lambda name: real(name) | ({imported} if name == importer else set())
    )
    assert f"{importer} → {imported}" in wrong_way()


def test_no_file_imports_itself_through_others():
    for name in lineage.modules():
        seen: set[str] = set()
        open_ = list(lineage.imports(name))
        while open_:
            other = open_.pop()
            assert other != name, f"{name} is in a circle of imports"
            if other not in seen:
                seen.add(other)
                open_ += lineage.imports(other)
