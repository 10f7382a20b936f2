"""The benchmarks of drafters at toy size: τ by context with windows, and the table of several seeds and ways."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import contexts, drafters
from benchmarks.common import Prompt
from deepspec.config import load_params

ROOT = Path(__file__).parents[2]


def test_tau_by_context_is_of_windows_that_matter_only_beyond_them(tmp_path):
    flags = ["--row", "24", "--rows", "8", "--steps", "4", "--texts", "2"]
    assert (
        contexts.main([*flags, "--lengths", "16", "300", "--windows", "0", "200", "--output", str(tmp_path)])
        == 0
    )
    found = json.loads((tmp_path / "contexts.json").read_text())
    for name in contexts.DRAFTERS:
        whole, windowed = found[f"{name} 0"], found[f"{name} 200"]
        assert whole["16"] == pytest.approx(windowed["16"], abs=1e-5)
        assert whole["300"] != pytest.approx(windowed["300"], abs=1e-5)
        assert all(1 <= tau <= 6 for row in (whole, windowed) for taus in row.values() for tau in taus)


def test_the_table_of_drafters_pairs_seeds_and_says_how_much_faster():
    """Twice the tokens of a verification in the time of one are twice the speed."""
    prompts = [Prompt("math", [1]), Prompt("code", [2])] * 2  # two seeds
    ones = np.array([[10, 10, 1.0, 10, 1.0]] * 4)
    twos = np.array([[20, 10, 1.0, 10, 1.0]] * 4)
    ways = [("chain", 0.0), ("tree", 1.0)]
    results = {"one": dict.fromkeys(ways, ones), "two": dict.fromkeys(ways, twos)}
    training = {name: {"steps": 3, "step_s": 0.5, "heldout": 1.5} for name in results}
    table, data = drafters.report(results, training, prompts)
    for way in ("T=0", "tree, T=1"):
        assert data["two"][way]["tau"] == 2 and data["two"][way]["ratio"]["value"] == 2
        assert data["two"][way]["speedup"]["value"] == 2 and data["one"][way]["speedup"]["value"] == 1
    assert table.count("speed-up") == 2 and "τ, tree, T=1" in table


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks/variants").glob("*.yaml")), ids=lambda path: path.stem
)
def test_variants_are_read(path):
    assert drafters.read_variants(path, load_params(ROOT / "params.yaml"))
