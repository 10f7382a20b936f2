"""The doctor finds what is broken and says what to mend."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from deepspec import kernels
from deepspec.commands import doctor
from deepspec.target.identity import directory_digest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path, tiny_target):
    """A checkout with a target and one draft of it."""
    for name in ("params.yaml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    target = shutil.copytree(tiny_target, tmp_path / "data/target")
    digest = directory_digest(target)
    (target / "deepspec.json").write_text(json.dumps({"source": "tiny", "digest": digest}))
    draft = tmp_path / "data/drafts/mine"
    draft.mkdir(parents=True)
    (draft / "deepspec.json").write_text(json.dumps({"target_digest": digest}))
    return tmp_path


def examined(root: Path) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.examine(root)}


def test_a_sound_checkout_passes(checkout, capsys):
    assert doctor.run(checkout)
    out = capsys.readouterr().out
    assert "data/drafts/mine" in out
    assert f"tiny, llama, digest {directory_digest(checkout / 'data/target')}" in out


def test_a_fresh_clone_passes_with_a_note(tmp_path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    check = examined(tmp_path)["data/target"]
    assert check.ok
    assert "dvc repro" in check.mend


def test_a_draft_of_another_target_must_be_trained_anew(checkout, capsys):
    (checkout / "data/drafts/mine/deepspec.json").write_text(json.dumps({"target_digest": "d2"}))
    check = examined(checkout)["data/drafts/mine"]
    assert not check.ok
    assert f"for target d2, not {directory_digest(checkout / 'data/target')}" in check.found
    assert check.mend == "dvc repro train@mine"
    assert not doctor.run(checkout)


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer.json", "model.safetensors"])
def test_a_target_whose_files_are_not_those_of_its_record_must_be_made_anew(file, checkout):
    path = checkout / "data/target" / file
    held = bytearray(path.read_bytes())
    if file.endswith(".json"):
        held += b"\n"
    else:
        held[-1] ^= 1
    path.write_bytes(held)
    checks = examined(checkout)
    for name in ("data/target", "data/drafts/mine"):
        assert not checks[name].ok and checks[name].mend == "dvc repro --force target"
        assert "its files were changed since they were written" in checks[name].found


def test_a_target_without_a_record_is_none_of_the_stage(checkout):
    (checkout / "data/target/deepspec.json").unlink()
    check = examined(checkout)["data/target"]
    assert not check.ok and "no record" in check.found and check.mend == "dvc repro --force target"


def test_a_target_that_cannot_be_loaded_is_named(checkout):
    (checkout / "data/target/config.json").write_text("{")
    check = examined(checkout)["data/target"]
    assert not check.ok
    assert check.mend == "dvc repro --force target"


def test_a_mistake_in_params_is_told_as_the_stages_tell_it(checkout):
    (checkout / "params.yaml").write_text("sed: 0\n")
    check = examined(checkout)["params.yaml"]
    assert not check.ok
    assert "unknown key 'sed'; did you mean 'seed'?" in check.found or "missing key" in check.found


def test_missing_and_other_packages_are_told_apart(checkout, monkeypatch):
    (checkout / "constraints.txt").write_text("numpy==0.0.1\n")
    monkeypatch.setattr(doctor, "PIPELINE", ("no-such-package",))
    checks = examined(checkout)
    assert checks["core packages"].ok
    assert "(tried: 0.0.1)" in checks["core packages"].found
    assert not checks["pipeline packages"].ok
    assert "missing: no-such-package" in checks["pipeline packages"].found


def test_an_old_python_and_a_full_disk_must_be_mended(checkout, monkeypatch):
    monkeypatch.setattr(doctor, "PYTHON", (sys.version_info.major, sys.version_info.minor + 1))
    monkeypatch.setattr(doctor, "DISK_GB", 1e9)
    checks = examined(checkout)
    assert not checks["python"].ok
    assert not checks["disk"].ok


@pytest.mark.parametrize("setting", ["always [madvise] never", "always madvise [never]"])
def test_it_says_where_large_pages_are_switched_off(
    checkout: Path, setting: str, monkeypatch: pytest.MonkeyPatch
):
    pages = checkout / "enabled"
    pages.write_text(setting)
    monkeypatch.setattr(doctor, "LARGE_PAGES", pages)
    monkeypatch.setattr(kernels, "_found", lambda: (object(), ""))
    check = examined(checkout)["kernels for this CPU"]
    off = "[never]" in setting
    assert check.ok and ("without large pages" in check.found) == (str(pages) in check.mend) == off
