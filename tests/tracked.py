"""A working tree as `dvc repro` leaves it, of one drafter: made up, but the target and the draft load."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import yaml
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.tree import Tree

from deepspec.drafters.checkpoint import draft_digest, stored_weights, write_drafter
from deepspec.files import file_digest
from deepspec.target.model import load_target
from deepspec.tracking import fresh
from tests.records import prompt_lines, record, write
from tests.tiny import make_draft

ROOT = Path(__file__).parents[1]
NAME = "dspark"
MODEL = "deepspec-smoke-target-dspark"
DEVICE = "AMD EPYC, 2 threads, Linux, torch 2.13.0"


def lay_out(
    root: Path,
    target_directory: Path,
    variant: str = "first",
    gain: float = 2.0,
    accepted: int = 2,
    speedup: float | None = 2.0,
    parity: bool | None = True,
    **changes,
) -> None:
    """Write target, draft, reports and dvc.lock below `root`, in place of what is there.

    Args:
        variant: a file of the draft: another one makes another draft.
        gain, accepted: of the measurements prompt by prompt; see `prompt_lines`.
        speedup: of the record; None: it is not lossless.
        parity: of the export; None: there is none.
        changes: of the record.
    """
    for name in ("data/target", f"data/drafts/{NAME}", "data/exports", "reports"):
        shutil.rmtree(root / name, ignore_errors=True)
    shutil.copytree(target_directory, root / "data/target")
    target = load_target(root / "data/target")
    identity = {"source": "data/smoke-target", "revision": None, "dtype": "float32", "digest": target.digest}
    (root / "data/target/deepspec.json").write_text(json.dumps(identity))
    draft = root / "data/drafts" / NAME
    network = make_draft(target)
    write_drafter(draft, network.description(), stored_weights(network), target, {})
    (draft / "variant").write_text(variant)
    changes = {
        "draft_digest": draft_digest(draft),
        "target_digest": target.digest,
        "device": DEVICE,
    } | changes
    write(root, {NAME: record(NAME, speedup, **changes)})
    lines = "".join(json.dumps(line) + "\n" for line in prompt_lines(gain, accepted))
    (root / f"reports/eval/{NAME}.prompts.jsonl").write_text(lines)
    manifest = {"rows": 123, "failures": 0, "digest": 64 * "a", "target": target.digest}
    (root / "data/distill/manifest.json").write_text(json.dumps(manifest))
    (root / "reports/report.html").write_text("<html></html>")
    if parity is not None:
        write_export(root, parity)
    lock(root)


def ask_here(uri: str, folder: str, store: str) -> str | None:
    """As `trial.ask_in_fresh_process`, in this one, where torch and MLflow are loaded."""
    try:
        fresh.ask(uri, folder)
    except Exception as error:
        return " ".join(str(error).split())
    return None


def write_export(root: Path, parity: bool, **changes) -> None:
    folder = root / "data/exports" / NAME / "vllm"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    engine = {
        "path": f"data/exports/{NAME}/vllm",
        "format": "speculators",
        "files": {"config.json": file_digest(folder / "config.json")},
        "parity": {"passed": parity, "max_abs_error": 0.0, "checks": []},
        "command": "vllm serve ...",
    }
    made = {
        "export_version": "1",
        "drafter": NAME,
        "draft_digest": draft_digest(root / "data/drafts" / NAME),
        "target_digest": "abc",
        "passed": parity,
        "engines": {"vllm": engine, "tgi": {"refused": "no such head"}},
    } | changes
    path = root / f"reports/export/{NAME}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made))


def lock(root: Path, source: str | None = None) -> None:
    """dvc.lock for what is there, and the smoke profile as params.yaml; `source` is another one of the target."""
    params = yaml.safe_load((ROOT / "params.smoke.yaml").read_text()) | {"pipeline": [NAME]}
    params["promote"] = {}
    params["target"]["source"] = source or params["target"]["source"]
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    own = {"seed": params["seed"], f"drafters.{NAME}": params["drafters"][NAME]}
    stages = {
        "target": _stage(root, ["data/target"], params, ["target"]),
        "prompts": _stage(root, ["data/prompts"], params, ["prompts", "evaluate.tasks"], ["data/target"]),
        "generate": _stage(root, ["data/distill"], params, ["generate"], ["data/prompts"]),
        "validate": _stage(root, ["reports/validation.json"], params, ["validate"], ["data/distill"]),
        f"train@{NAME}": _stage(
            root,
            [f"data/drafts/{NAME}", f"reports/train/{NAME}.jsonl"],
            params,
            ["train"],
            ["data/distill/manifest.json", "reports/validation.json"],
            own,
        ),
        f"evaluate@{NAME}": _stage(
            root,
            [f"reports/eval/{NAME}.json", f"reports/eval/{NAME}.prompts.jsonl"],
            params,
            ["evaluate"],
            [f"data/drafts/{NAME}"],
        ),
        "report": _stage(root, ["reports/report.html"], params, [], ["reports/eval"]),
        "train@other": _stage(root, ["data/drafts/other"], params, [], ["data/distill"]),
    }
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))


def _stage(root: Path, outs, params, keys, deps=(), own=None) -> dict:
    chosen = {key: params["evaluate"]["tasks"] if key == "evaluate.tasks" else params[key] for key in keys}
    return {
        "cmd": "made up",
        "deps": [{"path": path} for path in deps],
        "params": {"params.yaml": {**chosen, **(own or {})}},
        "outs": [{"path": path, "md5": _md5(root / path)} for path in outs],
    }


def _md5(path: Path) -> str:
    """As DVC has it: of a directory, that of the list of its files."""
    if path.is_file():
        return hashlib.md5(path.read_bytes()).hexdigest()
    tree = Tree()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        tree.add(file.relative_to(path).parts, None, HashInfo("md5", _md5(file)))
    tree.digest()
    return tree.hash_info.value
