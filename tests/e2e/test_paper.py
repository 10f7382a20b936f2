"""paper/ from its first stage to its figures on a tiny random target: the commands of its dvc.yaml, in one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from dvc.repo import Repo

from tests.e2e.clone import make_clone
from tests.e2e.stages import alone, run_command
from tests.tiny import make_target

pytestmark = pytest.mark.e2e
DATA = ["target", "prompts", "generate", "validate"]
STAGES = [
    *DATA,
    *("train", "ablate", "evaluate"),
    *("answers", "expected", "ablations", "confidence", "beyond"),
    *("table", "figures"),
]


def test_every_stage_makes_what_it_declares_and_the_readme_gets_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make_clone(tmp_path, "llama")
    paper = tmp_path / "paper"
    shutil.rmtree(paper / "reports", ignore_errors=True)
    shutil.copy(paper / "params.smoke.yaml", paper / "params.yaml")
    make_target(paper / "data/smoke-target")
    monkeypatch.chdir(paper)
    stages = [stage for stage in Repo(tmp_path).index.stages if Path(stage.path) == paper / "dvc.yaml"]
    stages.sort(key=lambda stage: STAGES.index(stage.name.split("@")[0]))
    assert len(stages) == 22  # three drafters with two seeds, and an ablation
    for stage in stages:
        with alone():
            assert run_command(stage.cmd) == 0, stage.name
        assert all(out.exists for out in stage.outs), stage.name

    table = json.loads(Path("reports/table1.json").read_text())
    for by_domain in table["ratios"].values():
        assert set(by_domain) == {"math", "code", "chat", "mean"}
        assert all(len(ratio["by_seed"]) == 2 for ratio in by_domain.values())
    assert all(own["lossless"] for own in table["drafters"].values())
    (ablation,) = table["ablations"]
    assert (ablation["drafter"], ablation["partner"], ablation["values"]) == ("dspark_2", "dspark", [2, 1])
    ways = json.loads(Path("reports/beyond.json").read_text())["ways"]
    assert {way["way"] for way in ways} > {"chain, standard", "chain, block verification", "tree, sampled"}
    assert all(way["lossless"] and way["speedup"] for way in ways)
    assert Path("reports/table1.md").read_text() in Path("README.md").read_text()
    figures = {file.stem for file in Path("reports/figures").iterdir()}
    assert figures == {"figure2", "figure3", "figure4", "figure5", "figure6", "learning"}
