"""A progress artifact in the UI, moved by the counts that a stage prints."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from deepspec.following import Count

INTERVAL_S = 5.0


class ProgressArtifact:
    """Made at the first count; a stage of several jobs, one after the other, moves it once for each."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._id: UUID | None = None
        self._said = 0.0
        self._label = ""

    def __call__(self, progress: Count) -> None:
        now = time.monotonic()
        if now - self._said < INTERVAL_S and progress.label == self._label and progress.done < progress.total:
            return
        self._said, self._label = now, progress.label
        self._show(progress.percent, f"{self.stage}: {progress.label} {progress.done}/{progress.total}")

    def finish(self) -> None:
        if self._id:
            self._show(100.0, f"{self.stage}: done")

    def _show(self, percent: float, description: str) -> None:
        with best_effort(f"progress of {self.stage}"):
            if self._id is None:
                key = re.sub(r"[^a-z0-9]+", "-", f"progress-{self.stage}".lower()).strip("-")
                made = create_progress_artifact(percent, key=key, description=description)
                self._id = cast("UUID", made)  # no coroutine outside a loop
            else:
                update_progress_artifact(self._id, percent, description=description)


@contextmanager
def best_effort(what: str) -> Iterator[None]:
    """For pictures of the work: a server that is away for a while stops no training."""
    try:
        yield
    except Exception as error:
        logging.getLogger(__name__).warning("not shown: %s (%s)", what, error)
