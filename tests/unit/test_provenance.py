"""Where a result comes from, without what is nobody's business."""

from __future__ import annotations

import subprocess
import sys

from deepspec.provenance import CODE, describe_cpu, provenance


def test_the_command_has_no_folders_of_this_machine(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/somewhere/bin/deepspec evaluate", "--output", "/home/me/out", "data/x"]
    )
    assert provenance()["command"] == "deepspec evaluate --output .../out data/x"


def test_commit_and_changes_are_those_of_the_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (provenance()["git_commit"], provenance()["git_dirty"]) == (None, False)
    who = ["-c", "user.name=tests", "-c", "user.email=tests@example.org"]
    for name in CODE:
        (tmp_path / name.removeprefix(":(top)")).write_text("a")
    (tmp_path / "dvc.lock").write_text("a")
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], check=True)
    made = provenance()
    assert len(made["git_commit"]) == 40 and not made["git_dirty"]
    (tmp_path / "dvc.lock").write_text("b")
    assert not provenance()["git_dirty"]
    (tmp_path / "deepspec").write_text("b")
    (tmp_path / "paper").mkdir()
    for folder in (tmp_path, tmp_path / "paper"):  # a pipeline of its own in the same repository
        monkeypatch.chdir(folder)
        assert provenance()["git_dirty"]


def test_the_packages_that_decide_a_result_are_named():
    packages = provenance()["packages"]
    assert packages["python"] and all(packages[name] for name in ("torch", "transformers", "numpy"))


def test_the_cpu_is_told_by_what_rounds_its_sums(tmp_path):
    file = tmp_path / "cpuinfo"
    one = "vendor_id : Maker\ncpu family : 25\nmodel : 17\nmodel name : Cloud\nstepping : 1\nflags : fpu avx2 avx512f"
    file.write_text(f"{one}\n\n{one}\n")
    assert describe_cpu(file).endswith(" Maker 25 17 1, avx2 avx512f")
    assert "," not in describe_cpu(tmp_path / "absent")
    assert provenance()["cpu"] == describe_cpu()
