"""benchmarks/finetuning.py on a tiny target: a draft of code goes on with chat, and its record says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from benchmarks import finetuning
from deepspec.files import write_json

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tiny_target, tmp_path, monkeypatch) -> Path:
    """A data set of twelve prompts of each kind, with random answers."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_target, finetuning.TARGET)
    shutil.copy(ROOT / "params.smoke.yaml", "params.yaml")
    kinds = finetuning.seed_kinds(0)
    ids = [[id for id, kind in kinds.items() if kind == wanted][:12] for wanted in ("code", "chat", "math")]
    names = [*(id for own in ids for id in own), *(f"m{i}" for i in range(12))]
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 500, (24,), generator=rng).tolist() for _ in names]
    columns = {
        "id": names,
        "source": ["seed"] * 36 + ["magpie"] * 12,
        "input_ids": rows,
        "loss_mask": [[0] * 6 + [1] * 18] * len(rows),
    }
    finetuning.DATA.mkdir(parents=True)
    pyarrow.parquet.write_table(pa.table(columns), finetuning.DATA / "train.parquet")
    write_json(finetuning.DATA / "manifest.json", {"digest": "d"})
    return tmp_path


def test_rows_are_of_the_kind_of_their_prompt(data):
    found = finetuning.row_kinds(finetuning.DATA, 0)
    assert found == ["code"] * 12 + ["chat"] * 12 + ["math"] * 12 + ["magpie"] * 12


def test_the_last_draft_goes_on_from_the_first_and_its_record_says_both(data, monkeypatch, empty_store):
    shutil.copy(empty_store, "mlflow.db")
    # Each training is a run of MLflow's that ends, or the next could not begin.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{data}/mlflow.db")
    flags = ["--steps", "20", "--measured", "3", "--then", "chat", "magpie", "--output", "out"]
    assert finetuning.main(flags) == 0
    found = json.loads((data / "out/finetuning.json").read_text())
    runs = found["runs"]
    assert [(name, runs[name]["steps"]) for name in runs] == [
        ("code", 20),
        ("chat+magpie", 20),
        ("chat+magpie, a tenth", 2),
        ("code, then chat+magpie", 2),
    ]
    assert all(set(run["tau"]) == {"code", "chat+magpie"} for run in runs.values())
    (parent,) = found["record"]["parents"]
    code = json.loads((Path(parent["directory"]) / "deepspec.json").read_text())
    assert parent["data_digest"] == code["data_digest"] != found["record"]["data_digest"]
    assert "Rows learnt from: 9 of code, 21 of chat+magpie" in (data / "out/finetuning.md").read_text()
    monkeypatch.setattr(finetuning, "fit", lambda *_: pytest.fail("what is there is trained again"))
    assert finetuning.main(flags) == 0


def test_ratios_are_paired_by_conversation():
    """Twice the τ of each conversation is a ratio of two, however much conversations differ."""
    theirs = np.array([[10.0, 10], [30, 10], [15, 10]])
    found = finetuning.compared(theirs * [2, 1], theirs)
    assert found is not None and found.bounds == pytest.approx([2, 2])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--first", "cod"], "has no conversation of kind 'cod'"),
        (["--measured", "12"], "code: 12 conversations, of which 12 are to be measured on"),
        (["--drafter", "lm"], "'lm' is of type lm, which cannot go on from a draft"),
        (["--drafter", "dsparc"], "no drafter 'dsparc'"),
    ],
)
def test_what_cannot_be_compared_is_refused(data, flags, says, capsys):
    assert finetuning.main(flags) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
