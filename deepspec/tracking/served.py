"""What a registered version runs: the target and its draft, loaded and asked for text.

MLflow stores this file with the version ("models from code") and executes it to load one; the package as it was then
is stored beside it, so that a version answers as it did when it was registered.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

EVALUATION = "evaluation.json"  # in the artifact "evidence"


class SpeculativeModel(PythonModel):
    """Each prompt is a user's turn; a row's text depends on that row, the parameters and nothing else."""

    def load_context(self, context: Any) -> None:
        """From the version's own files, without a network; `model_config` names another target, dtype or device.

        Where the controller decides by measured costs, those of this machine are read from the user's cache, or
        measured in some seconds and kept there.
        """
        from deepspec import load_target
        from deepspec.drafters.deployment import DecodeParams, Deployment

        config = context.model_config or {}
        record = json.loads((Path(context.artifacts["evidence"]) / EVALUATION).read_text())
        place = config.get("target") or context.artifacts.get("target") or _resolved(config["reference"])
        self.target = load_target(place, config.get("dtype"), config.get("device"))
        decode = DecodeParams.model_validate(record["decode"])
        self.deployment = Deployment.of(self.target, context.artifacts["draft"], decode)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict | None = None) -> pd.DataFrame:
        """Answer each `prompt` with `text` and `tau`: tokens committed per target pass."""
        rows = [self._answer(prompt, **(params or {})) for prompt in model_input["prompt"]]
        return pd.DataFrame(rows, columns=["text", "tau"])

    def _answer(
        self, prompt: str, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0
    ) -> tuple[str, float]:
        (out,) = self.deployment.generate(
            self.target.chat_ids([{"role": "user", "content": prompt}]),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        return self.target.tokenizer.decode(out.tokens, skip_special_tokens=True), out.stats.tau


def _resolved(reference: dict[str, Any]) -> Path:
    """Fetch a target kept by reference once into the user's cache. The draft checks that it is the same one."""
    from deepspec.target.model import resolve_target
    from deepspec.target.source import RECORD

    place = Path.home() / ".cache/deepspec" / f"target-{reference['digest']}"
    if not (place / RECORD).exists():
        resolve_target(reference["source"], reference["revision"], reference["dtype"], place)
    return place


set_model(SpeculativeModel())
