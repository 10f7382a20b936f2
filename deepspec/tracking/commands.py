"""The commands `deepspec track`, `register` and `promote`: for the drafters named, or all of the pipeline."""

from __future__ import annotations

from pathlib import Path

from deepspec.config import Params, load_params
from deepspec.errors import DeepSpecError, nearest
from deepspec.tracking import promote as promoting
from deepspec.tracking.register import Parts, register
from deepspec.tracking.result import model_name, read_result
from deepspec.tracking.store import connect
from deepspec.tracking.track import track


def run_track(drafters: list[str], params_file: Path) -> None:
    """Track the results. Raise DeepSpecError as `read_result` and `connect` do; so do the others."""
    results = [read_result(name) for name in _chosen(drafters, load_params(params_file))]
    with connect() as store:
        for result in results:
            found = track(result, store)
            said = "tracked" if found.new else "tracked before; nothing was changed"
            print(f"{result.drafter}: {said}: run {found.run_id}, {found.link}")
        print(f"all runs: {store.runs}")


def run_register(drafters: list[str], params_file: Path, parts: Parts) -> None:
    results = [read_result(name) for name in _chosen(drafters, load_params(params_file))]
    with connect() as store:
        for result in results:
            found = register(result, store, parts)
            said = "registered" if found.new else "registered before"
            role = "the challenger" if found.challenger else "the champion already"
            print(f"{found.name}: version {found.version} {said}; it is {role}: {found.link}")


def run_promote(drafters: list[str], params_file: Path, margin: float | None, afresh: bool) -> bool:
    """Promote what passes the gate; return True if no drafter was refused."""
    params = load_params(params_file)
    names = [model_name(params.target.source, drafter) for drafter in _chosen(drafters, params)]
    rules = params.promote if margin is None else params.promote.model_copy(update={"margin": margin})
    with connect() as store:
        decisions = []
        for name in names:  # each told when it is made: the next one may end in an error
            decisions.append(promoting.promote(name, rules, store, afresh))
            promoting.show(decisions[-1])
    return all(decision.promoted for decision in decisions)


def run_rollback(drafters: list[str], params_file: Path) -> None:
    params = load_params(params_file)
    with connect() as store:
        for drafter in _chosen(drafters, params):
            print(promoting.rollback(model_name(params.target.source, drafter), store))


def _chosen(drafters: list[str], params: Params) -> list[str]:
    for name in drafters:
        if name not in params.drafters:
            raise DeepSpecError(f"unknown drafter {name!r}{nearest(name, params.drafters)}")
    return drafters or params.pipeline
