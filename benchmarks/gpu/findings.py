"""What the steps are given, and what they found: one JSON file a step, written piece by piece."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from deepspec.device import describe_device
from deepspec.errors import DeepSpecError
from deepspec.files import write_json
from deepspec.provenance import provenance

SECONDS = 8 * 60  # a step ends within these


class OutOfTime(Exception):
    """The next piece would start after the step's time was over."""


@dataclass(frozen=True)
class Setting:
    """What a step is given.

    Args:
        dry: small sizes, on the CPU.
        output: folder of the JSON files.
        target: directory of a real target; None leaves out what needs one.
        draft: directory of a draft of that target; None takes untrained ones.
        data: directory of distillation data of that target; None leaves out its training.
        seconds: after which a step starts no further piece.
    """

    dry: bool
    output: Path
    target: Path | None = None
    draft: Path | None = None
    data: Path | None = None
    seconds: float = SECONDS

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def work(self) -> Path:
        """Folder of models and checkpoints; it need not be kept."""
        return self.output / "work"

    @property
    def graphs(self) -> tuple[bool, ...]:
        """Whether passes are replayed as CUDA graphs; a CPU has none."""
        return (False,) if self.dry else (False, True)

    def pick(self, dry: Any, real: Any) -> Any:
        """The size of the dry run, or the real one."""
        return dry if self.dry else real

    @property
    def name(self) -> str:
        return describe_device(self.device)


class Findings:
    """The pieces of one step. Those that were found before are kept; failed ones are tried again.

    Raises:
        DeepSpecError: the folder holds what another device, or a dry run, found.
    """

    def __init__(self, setting: Setting, number: int, title: str):
        self.path = setting.output / f"step-{number}.json"
        self.began, self.seconds = time.monotonic(), setting.seconds
        self.record: dict[str, Any] = {
            "step": number,
            "title": title,
            "device": setting.name,
            "dry": setting.dry,
            "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
            "provenance": provenance(),
            "seconds": 0.0,
            "finished": False,
            "pieces": {},
        }
        if self.path.exists():
            kept = json.loads(self.path.read_text())
            if (kept["device"], kept["dry"]) != (setting.name, setting.dry):
                raise DeepSpecError(
                    f"{self.path}: found on {kept['device']}{' in a dry run' * kept['dry']}; give another --output"
                )
            self.record |= {name: kept[name] for name in ("pieces", "seconds", "finished", "when")}
        self.before = self.record["seconds"]

    @property
    def left(self) -> float:
        """Seconds until no further piece is started."""
        return self.began + self.seconds - time.monotonic()

    @property
    def complete(self) -> bool:
        return self.record["finished"] and not self.failed

    @property
    def failed(self) -> dict[str, str]:
        """What went wrong, by piece."""
        return {key: piece["error"] for key, piece in self.record["pieces"].items() if "error" in piece}

    def piece(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` finds, kept under `key`; its error is a finding too, and the step goes on.

        Raises:
            OutOfTime: the step's time is over.
        """
        kept = self.record["pieces"].get(key)
        if kept is not None and "error" not in kept:
            return kept
        if self.left <= 0:
            raise OutOfTime
        print(f"  {key}", flush=True)
        began = time.monotonic()
        try:
            found = make()
        except OutOfTime:
            raise
        except Exception as error:  # whatever a device thinks of; the other pieces are worth having
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
            print(f"  {key}: {found['error']}", flush=True)
        self.record["pieces"][key] = {**found, "took": round(time.monotonic() - began, 2)}
        self._write()
        return self.record["pieces"][key]

    def finish(self) -> None:
        self.record["finished"] = True
        self._write()

    def _write(self) -> None:
        self.record["seconds"] = round(self.before + time.monotonic() - self.began, 1)
        write_json(self.path, self.record)


def read_findings(output: Path) -> list[dict[str, Any]]:
    """The records of all steps that have found something, in order."""
    return [json.loads(path.read_text()) for path in sorted(output.glob("step-*.json"))]
