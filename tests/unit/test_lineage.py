"""What a result depends on is computed from the imports, and dvc.yaml names all of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from deepspec import lineage
from deepspec.config import Params
from deepspec.section import Section
from paper.params import PaperParams

ROOT = Path(__file__).parents[2]
PIPELINES = {"dvc.yaml": Params, "paper/dvc.yaml": PaperParams}
STAGES = [
    (file, name)
    for file in PIPELINES
    for name in yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))["stages"]
]


def stage_of(file: str, name: str) -> dict:
    return yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))["stages"][name]


def root_module(stage: dict) -> str:
    """The module that the stage's command runs."""
    return re.findall(r"-m ((?:deepspec|paper)[.\w]*)", stage["cmd"])[-1]


def covered(path: Path, deps: list[Path]) -> bool:
    return any(path == dep or dep in path.parents for dep in deps)


def code_deps(file: str, stage: dict) -> list[Path]:
    folder = (ROOT / file).parent
    deps = [(folder / dep).resolve() for dep in stage["deps"] if "$" not in dep]
    return [dep for dep in deps if dep.is_relative_to(ROOT / "deepspec") or dep.suffix == ".py"]


def uncovered(file: str, stage: dict) -> set[str]:
    """Modules that decide the stage's output and that none of its deps covers."""
    deps = code_deps(file, stage)
    return {m for m in lineage.closure(root_module(stage)) if not covered(lineage.modules()[m], deps)}


@pytest.mark.parametrize(("file", "name"), STAGES)
def test_a_stages_deps_cover_the_code_that_decides_its_output(file, name):
    assert uncovered(file, stage_of(file, name)) == set()


@pytest.mark.parametrize(("file", "name"), STAGES)
def test_no_dep_is_of_code_that_the_stage_does_not_run(file, name):
    stage = stage_of(file, name)
    files = [lineage.modules()[m] for m in lineage.closure(root_module(stage))]
    for dep in code_deps(file, stage):
        if dep.name == "params.py":  # defaults of tracked keys
            continue
        assert any(covered(path, [dep]) for path in files), f"{name}: {dep.relative_to(ROOT)}"


def section(model: type[Section], key: str) -> type[Section] | None:
    """The section class that holds a dotted key's defaults; None where the key is no section of its own."""
    owner: type[Section] | None = model
    for part in key.split("."):
        fields = {(f.alias or name): f for name, f in owner.model_fields.items()} if owner else {}
        annotation = fields[part].annotation if part in fields else None
        owner = annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None
    return owner


@pytest.mark.parametrize(("file", "name"), STAGES)
def test_the_defaults_of_a_tracked_section_are_a_dep(file, name):
    """A key left out of params.yaml has the default of its section's module, which DVC watches as code."""
    stage = stage_of(file, name)
    deps = code_deps(file, stage)
    for key in stage.get("params", []):
        if owner := section(PIPELINES[file], key):
            assert covered(lineage.modules()[owner.__module__], deps), f"{name}: {key}"


def test_single_keys_that_are_tracked_are_spelled_out():
    for file in PIPELINES:
        folder = (ROOT / file).parent
        for profile in folder.glob("params*.yaml"):
            values = yaml.safe_load(profile.read_text(encoding="utf-8"))
            for name in yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))["stages"]:
                for key in stage_of(file, name).get("params", []):
                    node = values
                    for part in key.split(".") if "$" not in key else []:
                        assert part in node, f"{profile.name}: {key}, which {name} tracks"
                        node = node[part]


def depending(*modules: str) -> set[str]:
    """Stages of the main pipeline that DVC runs again when these modules are edited."""
    paths = [lineage.modules()[module] for module in modules]
    stages = {name: stage_of(file, name) for file, name in STAGES if file == "dvc.yaml"}
    return {
        name for name, s in stages.items() if any(covered(path, code_deps("dvc.yaml", s)) for path in paths)
    }


def test_a_fix_in_attention_reruns_whatever_decodes():
    assert {"prompts", "generate", "train", "evaluate"} <= depending("deepspec.target.attention")


def test_a_chart_reruns_the_report_alone():
    assert depending("deepspec.report.charts") == {"report"}


def test_serving_and_commands_rerun_nothing_but_what_is_measured_in_an_engine():
    names = ("evaluation", "protocols", "record")
    measuring = [f"deepspec.serving.{name}" for name in names]
    assert depending(*measuring) == {"evaluate"}
    outside = ("deepspec.serving", "deepspec.commands")
    commands = [m for m in lineage.modules() if m.startswith(outside) and m not in measuring]
    assert depending("deepspec.cli", *commands) == set()


def test_an_exporter_measures_nothing_again():
    exporters = [m for m in lineage.modules() if m.startswith("deepspec.export.")]
    assert depending(*exporters) == {"export", "target"}  # where `suitable` says what could serve it
    assert depending("deepspec.export.vllm", "deepspec.export.engines") == {"export"}


def test_inert_modules_are_there_and_have_a_reason():
    for name, reason in lineage.INERT.items():
        assert name in lineage.modules() and reason


def test_proven_imports_are_there_and_have_a_reason():
    for (name, other), reason in lineage.PROVEN.items():
        assert other in lineage.imports(name) and reason


def test_a_module_that_no_dep_covers_is_found():
    stage = stage_of("dvc.yaml", "train")
    stage["deps"].remove("deepspec/features")
    assert "deepspec.features.codec" in uncovered("dvc.yaml", stage)


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A package `deepspec` of its own."""
    files = {
        "__init__.py": "",
        "a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from deepspec import typed\n"
        "def f():\n    from deepspec.inner import late\n",
        "typed.py": "",
        "scan.py": "import pkgutil\nimport deepspec.inner\npkgutil.iter_modules(deepspec.inner.__path__)\n",
        "inner/__init__.py": "",
        "inner/late.py": "import deepspec.b\n",
        "inner/plugin.py": "",
        "b.py": "import json\n",
    }
    for name, text in files.items():
        path = tmp_path / "deepspec" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(lineage, "ROOT", tmp_path)
    caches = (lineage.modules, lineage.imports, lineage.code_digest)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path / "deepspec"
    for cached in caches:
        cached.cache_clear()


def test_imports_inside_functions_count_and_those_for_types_do_not(planted):
    assert lineage.closure("deepspec.a") == {
        "deepspec.a",
        "deepspec.inner.late",
        "deepspec.b",
    }


def test_a_proven_import_is_not_followed(planted, monkeypatch):
    monkeypatch.setattr(lineage, "PROVEN", {("deepspec.inner.late", "deepspec.b"): "a reason"})
    assert lineage.closure("deepspec.a") == {"deepspec.a", "deepspec.inner.late"}
    assert lineage.closure("deepspec.inner.late", "deepspec.b") == {"deepspec.inner.late", "deepspec.b"}


def test_a_folder_that_is_scanned_counts_whole(planted):
    assert "deepspec.inner.plugin" in lineage.closure("deepspec.scan")


def test_the_digest_sees_a_change_below_a_folder_and_none_elsewhere(planted):
    before = lineage.code_digest("deepspec.a")
    (planted / "typed.py").write_text("x = 1\n")
    lineage.code_digest.cache_clear()
    assert lineage.code_digest("deepspec.a") == before
    (planted / "inner" / "late.py").write_text("import deepspec.b\nx = 1\n")
    lineage.code_digest.cache_clear()
    assert lineage.code_digest("deepspec.a") != before
