"""A tag of the real pipeline, pushed, then brought back in an empty directory; and the same with a forged metric."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from click.testing import Result

from deepspec.report.inputs import load_inputs, metrics
from tests.e2e.clone import Clone, make_clone

pytestmark = pytest.mark.e2e
ANY_TIME = [
    f"--tolerance={name}=1000" for name in ("*speedup*", "*tokens_per_second")
]  # the clock may say anything


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A repository with a finished run, tagged and pushed; its remote is named in its own config.local alone."""
    root = tmp_path_factory.mktemp("tagged")
    clone = make_clone(root / "repository", "llama")
    clone.set("pipeline", ["dspark"])
    clone.set("prompts.mix", {"seed": 1.0})
    clone.set("train.steps", 4)
    clone.set("evaluate.tasks", ["word_problems"])
    clone.set("evaluate.sweeps", None)
    clone.set("evaluate.throughput", None)
    clone.repro()
    commit(clone, "v1")
    assert (
        clone.run("dvc", "remote", "modify", "--local", "local", "url", str(root / "remote")).returncode == 0
    )
    pushed = clone.run("dvc", "push")
    assert pushed.returncode == 0, pushed.stderr
    return clone


def commit(clone: Clone, tag: str) -> None:
    who = ["-c", "user.name=tests", "-c", "user.email=tests@example.org"]
    for words in (["add", "-A"], [*who, "commit", "-qm", tag], ["tag", tag]):
        subprocess.run(["git", *words], cwd=clone.root, check=True)


def reproduce(clone: Clone, into: Path, *words: str) -> tuple[Result, dict]:
    done = clone.ask("reproduce", "--into", str(into), *ANY_TIME, *words)
    assert (into / "reproduce.json").exists(), done.output[-3000:]
    return done, json.loads((into / "reproduce.json").read_text())


def test_a_tag_is_measured_again_from_the_pulled_draft(tagged: Clone, tmp_path: Path, monkeypatch):
    """Without a cost curve of this machine: the one in the record decides, and τ is the same to the last bit."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done, found = reproduce(tagged, tmp_path / "again", "v1")
    assert done.exit_code == 0, done.stdout[-3000:]
    assert found["passed"] is True and found["differences"] == {"dspark": []}
    assert found["measured"] == [f"dvc.yaml:{name}" for name in ("validate", "evaluate@dspark", "report")]
    verdicts = {row["metric"]: row["verdict"] for row in found["metrics"]}
    committed = metrics(load_inputs(["dspark"], tagged.root))
    assert set(committed) < set(verdicts)
    assert all(verdicts[name] == "same" for name in committed if name.endswith(("tau", "lossless")))
    assert verdicts["dspark.word_problems@T=1.outputs"] == "same"
    assert "v1 is reproduced" in done.stdout
    record = json.loads((tmp_path / "again/reports/eval/dspark.json").read_text())
    assert (
        record["provenance"]["git_commit"]
        != tagged.report("reports/eval/dspark.json")["provenance"]["git_commit"]
    )


def test_a_forged_metric_is_caught(tagged: Clone, tmp_path: Path):
    file = tagged.root / "reports/metrics.json"
    honest = file.read_text()
    file.write_text(json.dumps(json.loads(honest) | {"dspark.tau": 4.2}))
    commit(tagged, "v2")
    file.write_text(honest)
    done, found = reproduce(tagged, tmp_path / "again", "v2", "--stages", "report")
    assert done.exit_code == 1
    wrong = [row["metric"] for row in found["metrics"] if row["verdict"] == "DIFFERS"]
    assert wrong == ["reports/metrics.json", "dspark.tau"]
    assert "differs: dspark.tau: 4.2 committed" in done.stdout
