"""`deepspec promote`: through the gate, the challenger becomes champion; `--rollback` takes that back.

What is to be the champion is loaded and asked first (`trial.py`), whatever the gate says. A promotion moves the aliases
in an order that may be cut off anywhere: the next call finds the challenger still there and does it again.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from deepspec.errors import DeepSpecError
from deepspec.files import file_digest
from deepspec.report import compare
from deepspec.tracking import trial
from deepspec.tracking.gate import Evidence, Verdict, judge, passes
from deepspec.tracking.params import PromoteParams
from deepspec.tracking.register import CHALLENGER, CHAMPION, EXPORT, LISTED, PREVIOUS
from deepspec.tracking.served import AGAIN, EVALUATION, FILES, check_files
from deepspec.tracking.store import Store

REFUSED, REASON = "refused", "reason"
WORK = Path(".deepspec")  # takes a copy of what is tried


@dataclass(frozen=True)
class Decision:
    """Of one promotion. Without verdicts there was no challenger."""

    name: str
    version: str
    champion: str | None  # before
    verdicts: list[Verdict]

    @property
    def promoted(self) -> bool:
        return passes(self.verdicts)

    @property
    def line(self) -> str:
        """Return the outcome in one line."""
        if not self.verdicts:
            return f"{self.name}: no challenger; version {self.version} is the champion"
        failed = [f"{v.rule} ({v.found})" for v in self.verdicts if v.passed is False]
        if failed:
            return f"refused: {self.name} version {self.version}: {'; '.join(failed)}"
        instead = f", in place of version {self.champion}" if self.champion else ", the first"
        return f"{self.name}: version {self.version} is the champion{instead}"


def promote(name: str, params: PromoteParams, store: Store, afresh: bool = False) -> Decision:
    """Judge the challenger of model `name`; if it passes it is the champion, and else it is tagged `refused`.

    Raises:
        DeepSpecError: no such model, it has neither challenger nor champion, or the challenger cannot be used. Nothing
            was changed then.
    """
    client, aliases = store.client, _aliases(store.client, name)
    champion, challenger = aliases.get(CHAMPION), aliases.get(CHALLENGER)
    if challenger is None:
        if champion is None:
            raise DeepSpecError(f"{name} has no challenger; run `deepspec register`")
        return Decision(name, champion, champion, [])
    if challenger == champion:  # cut off at its last step
        client.delete_registered_model_alias(name, CHALLENGER)
        return Decision(name, champion, champion, [])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:  # threads may still download
        ours = evidence(client, name, challenger, Path(scratch) / challenger)
        theirs = _of_champion(client, name, champion, Path(scratch), afresh)
        verdicts = judge(ours, theirs, params, afresh)
    decision = Decision(name, challenger, champion, verdicts)
    if decision.promoted:
        _try(name, challenger, store)
        _crown(client, decision)
    else:
        _refuse(client, decision)
    return decision


def rollback(name: str, store: Store) -> str:
    """Champion and previous change places; the line that says so.

    Raises:
        DeepSpecError: there is no previous champion, or it cannot be used. Nothing was changed then.
    """
    client, aliases = store.client, _aliases(store.client, name)
    champion, previous = aliases.get(CHAMPION), aliases.get(PREVIOUS)
    if previous is None or champion is None or previous == champion:
        raise DeepSpecError(f"{name} has no previous champion to go back to")
    _try(name, previous, store)
    now = _now()
    _tag(client, name, previous, {"promoted_at": now, REASON: f"rollback from version {champion}"})
    _tag(client, name, champion, {"rolled_back_at": now, REASON: f"rolled back to version {previous}"})
    client.set_registered_model_alias(name, CHAMPION, previous)
    client.set_registered_model_alias(name, PREVIOUS, champion)
    return f"{name}: version {previous} is the champion again, in place of version {champion}"


def evidence(client: MlflowClient, name: str, version: str, folder: Path) -> Evidence:
    """Return the evidence that the version was registered with, from its own artifacts.

    Raises:
        DeepSpecError: a file of it is missing, cannot be read or is another one.
    """
    tags = client.get_model_version(name, version).tags
    folder.mkdir(parents=True)
    uri = f"models:/{name}/{version}/artifacts/evidence"
    try:
        found = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)))
        check_files({"evidence": str(found)}, {"target", "draft", "exports"})
        if file_digest(found / FILES) != tags[LISTED]:
            raise DeepSpecError(f"{FILES} is not the list that was registered; {AGAIN}")
        export = found / EXPORT
        return Evidence(
            version,
            tags["draft_digest"],
            compare.load(found / EVALUATION),
            json.loads(export.read_text()) if export.exists() else None,
        )
    except KeyError as error:
        raise DeepSpecError(f"{name} version {version}: it has no tag {error}; {AGAIN}") from None
    except (DeepSpecError, MlflowException, OSError, ValueError) as error:
        told = " ".join(str(error).split()).replace(str(folder), "...")
        raise DeepSpecError(f"{name} version {version}: its evidence cannot be read: {told}") from None


def _of_champion(
    client: MlflowClient, name: str, version: str | None, folder: Path, afresh: bool
) -> Evidence | None:
    """Return the champion's evidence; None if there is no champion, or `afresh` passes over one that is damaged."""
    if version is None:
        return None
    try:
        return evidence(client, name, version, folder / version)
    except DeepSpecError as error:
        if not afresh:
            raise DeepSpecError(f"{error} (--afresh passes over this champion)") from None
        return None


def _try(name: str, version: str, store: Store) -> None:
    if reason := trial.fault(f"models:/{name}/{version}", store, WORK):
        raise DeepSpecError(f"{name} version {version} cannot be used: {reason}")


def show(decision: Decision) -> None:
    """Print every rule with its verdict, then the outcome in one line."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    if decision.verdicts:
        title = f"{decision.name}: version {decision.version} against {decision.champion or 'no champion'}"
        grid = Table("rule", "", "found", title=title)
        marks = {True: "[green]passed[/green]", False: "[red]failed[/red]", None: "[dim]not asked[/dim]"}
        for verdict in decision.verdicts:
            grid.add_row(verdict.rule, marks[verdict.passed], verdict.found)
        console.print(grid)
    console.print(decision.line, highlight=False, soft_wrap=True)


def _crown(client: MlflowClient, decision: Decision) -> None:
    name, version = decision.name, decision.version
    found = {verdict.rule: verdict.found for verdict in decision.verdicts if verdict.passed}
    compared: dict[str, str] = {
        rule: found[rule] for rule in ("tau_not_worse", "speedup_not_worse") if rule in found
    }
    reason = f"passed the gate against version {decision.champion}" if decision.champion else "the first"
    skipped = [v.rule for v in decision.verdicts if v.passed is None and decision.champion]
    if skipped:
        reason = f"in place of version {decision.champion}, with which it could not be compared"
    _tag(client, name, version, {"promoted_at": _now(), REASON: reason, **compared})
    client.delete_model_version_tag(name, version, REFUSED)
    if decision.champion:
        client.set_registered_model_alias(name, PREVIOUS, decision.champion)
    client.set_registered_model_alias(name, CHAMPION, version)
    client.delete_registered_model_alias(name, CHALLENGER)


def _refuse(client: MlflowClient, decision: Decision) -> None:
    failed = ", ".join(verdict.rule for verdict in decision.verdicts if verdict.passed is False)
    _tag(client, decision.name, decision.version, {REFUSED: failed})


def _aliases(client: MlflowClient, name: str) -> dict[str, str]:
    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise DeepSpecError(f"{name} is not registered; run `deepspec register`") from None
    return {alias: str(version) for alias, version in model.aliases.items()}


def _tag(client: MlflowClient, name: str, version: str, tags: dict[str, str]) -> None:
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
