"""No tool reports home: one table says how, and everything that starts one follows it."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deepspec.entry import TELEMETRY_OFF

ROOT = Path(__file__).parents[2]
SHARED = {"common", "body"}  # by stages, none themselves
STAGES = sorted({path.stem for path in (ROOT / "deepspec/stages").glob("[a-z]*.py")} - SHARED)
OF_A_DRAFTER = {"train", "evaluate", "export"}
BARE = {key: value for key, value in os.environ.items() if key not in TELEMETRY_OFF}


def environment_after(code: str, *words: str) -> dict[str, str]:
    """What of the table is set in a fresh process that has run `code`, from an environment without it."""
    report = f"import json, os; print(json.dumps({{n: os.environ.get(n) for n in {list(TELEMETRY_OFF)}}}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}", *words],
        cwd=ROOT,
        env=BARE | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_command_of_the_cli_runs_in_a_quiet_environment():
    """Whatever the command is: the application sets it before any."""
    code = """
from deepspec.cli import app
app.command("nothing")(lambda: None)
try:
    app(["nothing"])
except SystemExit as end:
    assert not end.code
"""
    assert environment_after(code) == TELEMETRY_OFF


def test_a_stage_runs_in_a_quiet_environment():
    code = """
from deepspec.stages.common import stage
def main(params, flags): pass
try:
    stage(main, argv=["--params", "params.smoke.yaml"])
except SystemExit as end:
    assert not end.code
"""
    assert environment_after(code) == TELEMETRY_OFF


@pytest.mark.parametrize("name", STAGES)
def test_each_stage_runs_in_it(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    drafter = ["--drafter", "dspark"] if name in OF_A_DRAFTER else []
    monkeypatch.setattr(sys, "argv", [name, "--params", "nowhere.yaml", *drafter])
    for setting in TELEMETRY_OFF:
        monkeypatch.setenv(setting, "unset")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"deepspec.stages.{name}", run_name="__main__", alter_sys=True)
    assert ended.value.code == 2
    assert TELEMETRY_OFF.items() <= os.environ.items()


@pytest.mark.skipif(not (ROOT / "flows").is_dir(), reason="no flows in this checkout")
def test_flows_are_quiet_before_any_of_their_modules_imports_prefect():
    assert environment_after("import flows") == TELEMETRY_OFF


def test_the_makefile_exports_the_same():
    exported = re.findall(r"^export (\w+) := (\S+)$", (ROOT / "Makefile").read_text(), re.M)
    assert TELEMETRY_OFF.items() <= dict(exported).items()


def test_the_example_for_ones_own_shell_says_the_same():
    lines = re.findall(r"^(\w+)=(\S+)$", (ROOT / ".env.example").read_text(), re.M)
    assert TELEMETRY_OFF.items() <= dict(lines).items()


@pytest.mark.skipif(not (ROOT / "docker/Dockerfile").exists(), reason="no images in this checkout")
def test_the_images_say_the_same():
    text = (ROOT / "docker/Dockerfile").read_text()
    for name, value in TELEMETRY_OFF.items():
        assert re.search(rf"\b{name}[= ]\"?{value}\b", text), f"docker/Dockerfile does not set {name}={value}"


def test_dvc_is_quiet_even_where_it_is_started_by_hand():
    config = (ROOT / ".dvc/config").read_text()
    assert "analytics = false" in config and "check_update = false" in config


def test_nothing_that_is_shipped_names_a_place_that_counts_visits():
    """The pages we write load nothing; the table above is about tools, this about us."""
    for path in (ROOT / "deepspec").rglob("*.html"):
        assert not re.search(r"""(src|href)=["']?https?://""", path.read_text()), path


def test_great_expectations_is_quiet_before_it_is_imported():
    code = "import deepspec.guard.suite, great_expectations"
    assert environment_after(code)["GX_ANALYTICS_ENABLED"] == "false"


def test_ci_and_compose_files_override_nothing():
    for path in [ROOT / ".ci/run", *ROOT.glob("docker/*.y*ml")]:
        text = path.read_text()
        if path.suffix in (".yml", ".yaml"):
            text = json.dumps(yaml.safe_load(text))
        for name, value in TELEMETRY_OFF.items():
            for found in re.findall(rf'{name}[=:"\s]+(\w+)', text):
                assert found == value, f"{path.name}: {name} is {found}"
