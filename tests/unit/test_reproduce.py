"""A tag brought back, on a pipeline of two small scripts: what runs, what is pulled, what is told apart."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest

from deepspec.decoding import profiles
from deepspec.decoding.cost import CostCurve, read_points
from deepspec.decoding.drafter import settle
from deepspec.decoding.shapes import Auto
from deepspec.drafters.algorithms.lookup import LookupDrafter
from deepspec.errors import DeepSpecError
from deepspec.reproduce.checkout import STATE, Settings
from deepspec.reproduce.run import RESULT, plant_costs, run
from deepspec.reproduce.tolerance import _curve
from deepspec.target.model import load_target
from tests import repositories
from tests.dvc_here import make_repository
from tests.repositories import sh, succeed
from tests.tiny import cached_target

pytestmark = pytest.mark.usefixtures("dvc_here")
DVC_YAML = """
stages:
  data:
    cmd: python make.py data
    deps: [make.py]
    outs: [data.txt]
  measure:
    cmd: python make.py measure
    deps: [data.txt]
    outs:
      - reports/eval/a.json: {cache: false}
  report:
    cmd: python make.py report
    deps: [reports/eval/a.json]
    metrics:
      - metrics.json: {cache: false}
"""
MAKE = """
import json, pathlib, sys
log = pathlib.Path("ran.log"); log.open("a").write(sys.argv[1] + "\\n")
if pathlib.Path("broken").exists() and sys.argv[1] == "report": sys.exit("cannot report")
data, record = pathlib.Path("data.txt"), pathlib.Path("reports/eval/a.json")
record.parent.mkdir(parents=True, exist_ok=True)
if sys.argv[1] == "data": data.write_text("1.5")
if sys.argv[1] == "measure": record.write_text(json.dumps({"tau": float(data.read_text())}))
if sys.argv[1] == "report": pathlib.Path("metrics.json").write_text(record.read_text())
"""


def commit(root: Path, tag: str) -> None:
    repositories.commit(root, tag)
    sh(root, "git", "tag", tag)


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    """A repository with a tag `good`, pushed, a tag `never-run`, and one of a pipeline in a folder."""
    root = tmp_path_factory.mktemp("origin") / "repository"
    root.mkdir()
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / "make.py").write_text(MAKE)
    (root / "plain.yaml").write_text("none")
    make_repository(root)
    succeed(root, "remote", "add", "--default", "shared", "../remote")
    (root / ".gitignore").write_text("ran.log\n/.deepspec/\n/data.txt\n")
    commit(root, "never-run")
    succeed(root, "repro")
    commit(root, "good")
    succeed(root, "push")
    (root / "paper").mkdir()
    (root / "paper/dvc.yaml").write_text(DVC_YAML)
    (root / "paper/make.py").write_text(MAKE.replace("1.5", "2.5"))
    (root / "paper/.gitignore").write_text("/data.txt\n")
    succeed(root, "repro", "paper/dvc.yaml")
    commit(root, "unpushed")
    return root


@pytest.fixture
def settings(origin, tmp_path):
    """Settings of a reproduction into an empty directory, with changes."""
    return lambda tag, **changes: Settings(tag, str(origin), tmp_path / "clone", **changes)


def ran(chosen: Settings, folder: str = ".") -> list[str]:
    return (chosen.directory / folder / "ran.log").read_text().split()


def metric(chosen: Settings, name: str = "tau") -> dict:
    result = json.loads((chosen.directory / RESULT).read_text())
    return next(row for row in result["metrics"] if row["metric"] == name)


def test_pulled_data_is_measured_again_and_nothing_is_made_again(settings, capsys):
    """The remote stands beside the repository, by a path relative to it: the clone finds it all the same."""
    chosen = settings("good")
    assert run(chosen) is True
    assert ran(chosen) == ["measure", "report"]
    assert (metric(chosen)["committed"], metric(chosen)["now"], metric(chosen)["verdict"]) == (
        1.5,
        1.5,
        "same",
    )
    assert "good is reproduced" in capsys.readouterr().out


def test_everything_is_made_again_without_a_remote(settings):
    chosen = settings("good", recompute=True, remote="/nowhere")
    assert run(chosen) is True
    assert ran(chosen) == ["data", "measure", "report"]


def test_a_tampered_metric_is_caught_and_named(origin, settings, tmp_path, capsys):
    """By measuring again, and by what dvc.lock has of the file."""
    forged = tmp_path / "forged"
    sh(tmp_path, "git", "clone", "--quiet", "--branch", "good", str(origin), str(forged))
    (forged / "metrics.json").write_text('{"tau": 1.9}')
    commit(forged, "better")
    chosen = Settings("better", str(forged), tmp_path / "clone", remote=str(origin.parent / "remote"))
    assert run(chosen) is False
    assert metric(chosen)["verdict"] == metric(chosen, "metrics.json")["verdict"] == "DIFFERS"
    out = capsys.readouterr().out
    assert "better is NOT reproduced" in out
    assert "differs: tau: 1.9 committed, 1.5 now" in out


def test_a_run_that_was_stopped_goes_on(settings, caplog):
    caplog.set_level("INFO", "deepspec")
    chosen = settings("good")
    run(chosen)
    state = json.loads((chosen.directory / STATE).read_text())
    state["done"].remove("dvc.yaml:report")
    (chosen.directory / STATE).write_text(json.dumps(state))
    (chosen.directory / "broken").touch()
    with pytest.raises(DeepSpecError, match=r"stage dvc.yaml:report failed in .* run again to go on"):
        run(chosen)
    (chosen.directory / "broken").unlink()
    assert run(chosen) is True
    assert ran(chosen) == ["measure", "report", "report", "report"]
    assert "going on in" in caplog.text


def test_a_pipeline_in_a_folder_and_only_it(settings):
    chosen = settings("unpushed", pipeline="paper/dvc.yaml", recompute=True)
    assert run(chosen) is True
    assert ran(chosen, "paper") == ["data", "measure", "report"]
    assert not (chosen.directory / "ran.log").exists()
    assert metric(chosen)["now"] == 2.5


@pytest.mark.parametrize("recompute", [False, True])
def test_only_chosen_stages_run_and_what_they_read_is_pulled(settings, recompute):
    chosen = settings("good", stages=("measure",), recompute=recompute)
    assert run(chosen) is True
    assert ran(chosen) == ["measure"]


def test_a_directory_that_exists_and_is_empty_will_do(settings, monkeypatch):
    chosen = settings("good", stages=("report",))
    chosen.directory.mkdir()
    monkeypatch.chdir(chosen.directory)
    assert run(chosen) is True


@pytest.mark.parametrize(
    ("tag", "changes", "message"),
    [
        (
            "goof",
            {},
            "has no tag 'goof'; did you mean 'good'.*tags: good, never-run, unpushed; milestones: none",
        ),
        ("never-run", {}, "never-run has no committed metrics in metrics.json"),
        (
            "good",
            {"pipeline": "papers/dvc.yaml"},
            "good has no papers/dvc.yaml; name another with --pipeline",
        ),
        ("good", {"stages": ("mesure",)}, "dvc.yaml has no stage 'mesure'; did you mean 'measure'"),
        ("good", {"tolerances": ("tau",)}, "expected PATTERN=SHARE"),
        ("unpushed", {"pipeline": "paper/dvc.yaml"}, "the remote lacks data of unpushed .* use --recompute"),
    ],
)
def test_each_mistake_is_one_line(settings, tag, changes, message):
    with pytest.raises(DeepSpecError, match=message) as caught:
        run(settings(tag, **changes))
    assert "\n" not in str(caught.value)


def test_no_such_repository(tmp_path):
    with pytest.raises(DeepSpecError, match="git clone failed"):
        run(Settings("good", str(tmp_path / "none"), tmp_path / "clone"))
    assert not (tmp_path / "clone").exists()


def test_a_directory_that_holds_something_else_is_left_alone(settings):
    chosen = settings("good")
    chosen.directory.mkdir()
    (chosen.directory / "thesis.tex").write_text("mine")
    with pytest.raises(DeepSpecError, match="clone: not empty; choose another directory with --into"):
        run(chosen)
    assert [path.name for path in chosen.directory.iterdir()] == ["thesis.tex"]


def test_a_directory_of_another_reproduction_is_not_gone_on_with(settings):
    run(settings("good", stages=("report",)))
    with pytest.raises(DeepSpecError, match=r"holds another reproduction .* remove it"):
        run(settings("good", recompute=True))


def test_a_name_that_has_moved_is_not_the_old_reproduction(origin, settings):
    """A branch, here one that is not the origin's default: the first run is of its commit, the second sees another."""
    sh(origin, "git", "branch", "--force", "side", "good")
    chosen = settings("side", stages=("report",))
    assert run(chosen) is True
    sh(origin, "git", "branch", "--force", "side", "never-run")
    with pytest.raises(DeepSpecError, match=r"holds another reproduction .* and side is \w{7}"):
        run(chosen)


def test_a_remote_may_be_named_as_dvc_names_it(origin, settings):
    assert run(settings("good", stages=("measure",), remote="shared")) is True


def test_a_folder_that_a_web_server_shows_is_a_remote(origin, settings):
    """What people without a cloud have; `dvc push` writes the folder itself."""
    show = functools.partial(http.server.SimpleHTTPRequestHandler, directory=origin.parent / "remote")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), show) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        chosen = settings("good", stages=("measure",), remote=f"http://127.0.0.1:{server.server_port}")
        assert run(chosen) is True
        server.shutdown()


def test_after_a_wrong_remote_the_right_one_is_taken(origin, settings, tmp_path):
    with pytest.raises(DeepSpecError, match="the remote lacks data of good"):
        run(settings("good", remote=str(tmp_path / "empty")))
    assert run(settings("good", remote=str(origin.parent / "remote"))) is True


def missing(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swapped(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[::-1])


def unreadable(path: Path) -> None:
    """A link to itself, which root cannot read either."""
    path.unlink()
    path.symlink_to(path.name)


DAMAGES = (missing, truncated, swapped, unreadable)


def refused(chosen: Settings) -> str:
    with pytest.raises(DeepSpecError) as caught:
        run(chosen)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_the_remote_has_damaged_is_one_line_and_does_not_stay(origin, settings, tmp_path, damage):
    remote, whole = tmp_path / "remote", origin.parent / "remote"
    shutil.copytree(whole, remote)
    for file in (file for file in remote.rglob("*") if file.is_file() and file.read_text() == "1.5"):
        damage(file)
    assert "the remote lacks data of good" in refused(settings("good", remote=str(remote)))
    assert run(settings("good", remote=str(whole))) is True


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["dvc.yaml", "dvc.lock", "metrics.json", "reports/eval/a.json"])
def test_what_is_committed_damaged_is_one_line_or_measured_again(origin, tmp_path, name, damage):
    forged = tmp_path / "forged"
    sh(tmp_path, "git", "clone", "--quiet", "--branch", "good", str(origin), str(forged))
    damage(forged / name)
    commit(forged, "damaged")
    chosen = Settings("damaged", str(forged), tmp_path / "clone", remote=str(origin.parent / "remote"))
    if name.startswith("reports/"):
        assert run(chosen) is (damage is missing) and metric(chosen)["now"] == 1.5
    elif name == "dvc.lock" and damage is truncated:  # what is cut off is what was never run
        assert run(chosen) is True
    else:
        assert name in refused(chosen)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_clone_whose_state_is_damaged_is_left_alone(settings, damage):
    chosen = settings("good", stages=("report",))
    run(chosen)
    damage(chosen.directory / STATE)
    before = sorted(chosen.directory.rglob("*"))
    assert "not empty; choose another directory with --into" in refused(chosen)
    assert sorted(chosen.directory.rglob("*")) == before


def test_a_cost_curve_of_this_machine_is_planted_where_there_is_none(tmp_path, monkeypatch):
    """Under the names by which `decoding/profiles.py` finds it; what the machine measured itself stays."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shared = {"device": "A CPU", "precision": "bfloat16", "target": "t"}
    identity = shared | {"drafter": "d", "drafter_code": "c", "shape": "Chain()"}
    passes, drafts = {"1": [[1.0, 0.02], [2.0, 0.021]]}, {"1": 0.003}
    plant_costs({"round_costs": {"identity": identity, "passes": passes, "drafts": drafts}})

    def kept(owner, parse):
        return profiles.kept(
            profiles.profiles_folder(), owner, [1], False, lambda missing: {1: "measured"}, parse
        )

    assert kept(shared, read_points) == {1: [(1.0, 0.02), (2.0, 0.021)]}
    assert kept(identity, float) == {1: pytest.approx(0.003 / 0.02)}  # of a pass over one token
    plant_costs({"round_costs": {"identity": identity, "passes": passes, "drafts": {"1": 9.0}}})
    assert kept(identity, float) == {1: pytest.approx(0.003 / 0.02)}  # of a pass over one token
    plant_costs({"round_costs": {}})
    assert len(list(profiles.profiles_folder().iterdir())) == 2


def test_a_planted_curve_is_the_recorded_one(tmp_path, monkeypatch):
    """All that a controller decides by: contexts, verdicts, and chains where trees may be drafted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = cached_target("llama")
    loaded = load_target(target)
    drafter = LookupDrafter(4, 1)
    monkeypatch.setattr(LookupDrafter, "digest", "abc")
    monkeypatch.setattr(LookupDrafter, "grows_trees", True)
    shape = Auto()
    identity = profiles._identity(loaded, drafter, settle(shape, loaded, drafter))
    passes = {1: [(1.0, 0.02), (2.0, 0.021)], 4: [(4.0, 0.03), (8.0, 0.04)]}
    slopes = [(1.0, 1e-6), (8.0, 3e-6)]
    curve = CostCurve(passes, {1: 0.003, 4: 0.009}, identity, 256, slopes, {1: 0.002, 4: 0.004}, 5e-5)
    plant_costs({"round_costs": curve.to_json()})
    for measure in ("measure_passes", "measure_slopes", "measure_verdict", "measure_drafts"):
        monkeypatch.setattr(profiles, measure, None)
    found = profiles.load_or_measure(loaded, drafter, batches=(1, 4), shape=shape)
    assert (found.passes, found.context, found.identity) == (curve.passes, curve.context, curve.identity)
    assert found.drafts == pytest.approx(curve.drafts)
    assert found.chain_drafts == pytest.approx(curve.chain_drafts)
    assert found.slopes == [(width, pytest.approx(more)) for width, more in slopes]
    assert found.verdict == pytest.approx(curve.verdict)
    assert _curve({"round_costs": found.to_json()}) == _curve({"round_costs": curve.to_json()})
    other = curve.to_json() | {"verdict": 6e-5}
    assert _curve({"round_costs": other}) != _curve({"round_costs": curve.to_json()})


def test_the_result_says_what_was_asked_and_what_was_not_as_it_was(settings, monkeypatch):
    monkeypatch.setattr("deepspec.reproduce.run.plant_costs", lambda record: None)
    chosen = settings("good", stages=("report",))
    run(chosen)
    result = json.loads((chosen.directory / RESULT).read_text())
    assert (result["tag"], result["mode"], result["measured"]) == ("good", "pull", ["dvc.yaml:report"])
    assert result["passed"] is True and result["differences"] == {} and result["uncommitted_code"] == []
    assert str(chosen.directory) not in json.dumps(result)
