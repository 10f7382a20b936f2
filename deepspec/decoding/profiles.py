"""Cost curves kept in the user's cache: measured once a machine, so that every later run decides with the same numbers.

A file stands under everything its figures depend on (device, precision, target, versions, threads, code, drafter);
what is corrupt or belongs to something else is measured again. So a seed reproduces its tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepspec.decoding.cost import CostCurve, Points, keyed, read_points
from deepspec.decoding.drafter import Drafter, settle
from deepspec.decoding.pass_times import (
    BATCHES,
    CONTEXT,
    Watch,
    measure_drafts,
    measure_passes,
    measure_slopes,
    measure_verdict,
)
from deepspec.decoding.shapes import CHAIN, Shape
from deepspec.device import describe_device
from deepspec.files import digest, write_json
from deepspec.lineage import code_digest
from deepspec.target.model import Target

# Where a table of passes by requests has what more context adds to them, and what a drawn token does, in plain passes.
SLOPES, VERDICT = 0, -1


def load_or_measure(
    target: Target,
    drafter: Drafter | None = None,
    path: str | Path | None = None,
    batches: Sequence[int] = BATCHES,
    shape: Shape = CHAIN,
    force: bool = False,
    watch: Watch | None = None,
) -> CostCurve:
    """Return the stored curve of this target and drafter on this device; measure and store what is missing of it.

    A file that is corrupt, or belongs to something else, is measured again. A drafter without a `digest` cannot be
    told from another: its time is measured each time.

    Args:
        path: a folder for the files; None: `profiles` in the user's cache.
        batches: requests in flight that must have been measured; others are interpolated.
        shape: of the trees that are drafted.
        force: measure all anew.
        watch: called with (passes done, passes in all) during a measurement.
    """
    folder = profiles_folder() if path is None else Path(path)
    identity = _identity(target)
    passes = kept(
        folder,
        identity,
        (*batches, SLOPES, VERDICT),
        force,
        lambda missing: _measured_passes(target, missing, watch),
        read_points,
    )
    slopes, ((_, verdict),) = passes.pop(SLOPES, []), passes.pop(VERDICT)
    fewest = min(passes)
    plain_s = CostCurve(passes).verify(fewest, fewest)
    contexts = [(width, ratio * plain_s) for width, ratio in slopes]
    curve = CostCurve(passes, {}, identity, CONTEXT, contexts, {}, verdict * plain_s)
    if drafter is None:
        return curve
    shape = settle(shape, target, drafter)

    def drafts(shape: Shape) -> dict[int, float]:
        own = _identity(target, drafter, shape)
        ratios = kept(
            folder if own["drafter"] else None,
            own,
            batches,
            force,
            lambda missing: measure_drafts(target, drafter, missing, shape=shape),
            float,
        )
        return {requests: ratio * curve.verify(requests, requests) for requests, ratio in ratios.items()}

    chain = shape.settled(False)
    chains = {} if chain is shape else drafts(chain)
    own = _identity(target, drafter, shape)
    return replace(curve, drafts=drafts(shape), identity=own, chain_drafts=chains)


def _measured_passes(target: Target, missing: list[int], watch: Watch | None) -> dict[int, Points]:
    batches = [requests for requests in missing if requests > 0]
    found = measure_passes(target, batches, watch=watch) if batches else {}
    if SLOPES in missing and (slopes := measure_slopes(target)):
        found[SLOPES] = slopes
    if VERDICT in missing:
        found[VERDICT] = [(1, measure_verdict(target))]
    return found


def profiles_folder() -> Path:
    """Where curves are kept: `$XDG_CACHE_HOME/deepspec/profiles`, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepspec" / "profiles"


def profile_path(target: Target, drafter: Drafter | None = None, shape: Shape = CHAIN) -> Path:
    """Where the passes of this target are kept, or, with a drafter, its drafting times."""
    return profiles_folder() / file_name(_identity(target, drafter, settle(shape, target, drafter)))


def _identity(target: Target, drafter: Drafter | None = None, shape: Shape | None = None) -> dict[str, Any]:
    """Everything the figures depend on; the code itself is part of it."""
    identity = {
        "device": describe_device(target.device),  # with the threads and torch's version
        "precision": target.precision,
        "graphs": target.graphs,
        "target": target.digest,
        "code": code_digest(__name__),
    }
    if drafter is None:
        return identity
    drafter = drafter.trained
    return identity | {
        "drafter": drafter.digest,
        "drafter_code": code_digest("deepspec.drafters.registry"),
        "shape": repr(shape),
    }


def kept(
    folder: Path | None,
    identity: dict[str, Any],
    batches: Sequence[int],
    force: bool,
    measure: Callable[[list[int]], dict[int, Any]],
    parse: Callable[[Any], Any],
) -> dict[int, Any]:
    """Return the table stored under `identity`; measure and add the batches that it lacks. No folder: keep nothing."""
    path = folder and folder / file_name(identity)
    table = _read(path, identity, parse) if path and not force else {}
    if missing := [requests for requests in batches if requests not in table]:
        # As it will be read, in floats: what is keyed by a curve finds the same one in the next run.
        table |= {requests: parse(value) for requests, value in measure(missing).items()}
        if path:
            _write(path, {"identity": identity, "measured": keyed(table)})
    return table


def _read(path: Path, identity: dict[str, Any], parse: Callable[[Any], Any]) -> dict[int, Any]:
    """Return what the file holds of this identity; nothing if it is absent, corrupt or foreign."""
    with suppress(OSError, AttributeError, KeyError, TypeError, ValueError):
        stored = json.loads(path.read_text())
        if stored["identity"] == identity:
            return {int(requests): parse(value) for requests, value in stored["measured"].items()}
    return {}


def _write(path: Path, value: dict[str, Any]) -> None:
    with suppress(OSError):  # a read-only home costs a measurement in each run, no more
        write_json(path, value)


def file_name(identity: Mapping[str, Any]) -> str:
    """Return the name of the file that figures of this identity stand in."""
    return f"{digest(json.dumps(identity, sort_keys=True))}.json"
