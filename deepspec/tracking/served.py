"""What a registered version runs: the target and its draft, loaded and asked for text.

MLflow stores this file with the version ("models from code") and executes it to load one; the package as it was then
is stored beside it, so that a version answers as it did when it was registered.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

EVALUATION = "evaluation.json"  # in the artifact "evidence"
FILES = "files.json"  # beside it: SHA-256 of every other file of the version's artifacts
AGAIN = "`deepspec register` makes the version again"
ELSEWHERE = (
    "its target was evaluated in a serving engine, so its layers are not loaded here: serve the export there; or load "
    'the version with model_config={"engine": "local"}, where they fit in memory'
)


class SpeculativeModel(PythonModel):
    """Each prompt is a user's turn; a row's text depends on that row, the parameters and nothing else."""

    def load_context(self, context: Any) -> None:
        """From the version's own files, without a network; `model_config` names another target, dtype or device.

        Where the controller decides by measured costs, those of this machine are read from the user's cache, or
        measured in some seconds and kept there. Of a target that was evaluated in a serving engine the ends alone are
        loaded, and the draft on them: the version is whole, and answers nothing (`{"engine": "local"}` loads all).

        Raises:
            DeepSpecError: a file of the version is missing, cannot be read or is another one.
        """
        from deepspec import load_target
        from deepspec.drafters.deployment import Deployment
        from deepspec.drafters.params import DecodeParams

        config = context.model_config or {}
        check_files(context.artifacts, {"target"} if config.get("target") else set())
        record = json.loads((Path(context.artifacts["evidence"]) / EVALUATION).read_text())
        place = config.get("target") or context.artifacts.get("target") or _resolved(config["reference"])
        self.deployment: Any = None
        if record.get("engine") and config.get("engine") != "local":
            self.target = _ends_with_draft(Path(place), Path(context.artifacts["draft"]))
            return
        self.target = load_target(place, config.get("dtype"), config.get("device"))
        decode = DecodeParams.model_validate(record["decode"])
        self.deployment = Deployment.of(self.target, context.artifacts["draft"], decode)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict | None = None) -> pd.DataFrame:
        """Answer each `prompt` with `text` and `tau`: tokens committed per target pass.

        Raises:
            MlflowException: a prompt that is no text, or parameters that cannot be. MLflow's server tells this one
                error in its own words.
        """
        from deepspec.errors import DeepSpecError

        if self.deployment is None:
            raise MlflowException.invalid_parameter_value(ELSEWHERE)
        prompts = list(model_input["prompt"])
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt, str) or not prompt.strip():
                raise MlflowException.invalid_parameter_value(f"prompt {row} is {prompt!r}; expected text")
        try:
            rows = [self._answer(prompt, **(params or {})) for prompt in prompts]
        except DeepSpecError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
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


def _ends_with_draft(target: Path, draft: Path) -> Any:
    """Load the ends of a target, and a draft on them to see that it is one of this target; return the ends.

    Raises:
        DeepSpecError: no target there, or a draft that does not load.
    """
    from deepspec.export.draft import load_draft
    from deepspec.target.ends import load_ends

    ends = load_ends(target)
    found = load_draft(draft.name, draft, ends)
    if found.trained:
        _ = found.network  # reads every weight
    return ends


def check_files(artifacts: dict[str, str], left_out: set[str]) -> None:
    """Check that a version's files are those that were registered, by their digests.

    Args:
        artifacts: part of the version → its directory.
        left_out: parts that are not used.

    Raises:
        DeepSpecError: one is missing, cannot be read or is another one.
    """
    from deepspec.errors import DeepSpecError, os_reason
    from deepspec.files import file_digest

    listed = Path(artifacts["evidence"]) / FILES
    try:
        known = dict(json.loads(listed.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DeepSpecError(f"the version has no list of its files, {FILES} ({error}); {AGAIN}") from None
    for name, expected in known.items():
        part, _, rest = name.partition("/")
        if part in left_out:
            continue
        try:
            found = file_digest(Path(artifacts[part]) / rest)
        except KeyError:
            raise DeepSpecError(f"{name} of the version: not among its artifacts; {AGAIN}") from None
        except OSError as error:
            raise DeepSpecError(f"{name} of the version: {os_reason(error)}; {AGAIN}") from None
        if found != expected:
            raise DeepSpecError(f"{name} of the version is not the file that was registered; {AGAIN}")


def _resolved(reference: dict[str, Any]) -> Path:
    """Fetch a target kept by reference once into the user's cache.

    Raises:
        DeepSpecError: it cannot be fetched, or is another one by now.
    """
    from deepspec.errors import DeepSpecError
    from deepspec.target.identity import RECORD, directory_digest
    from deepspec.target.model import resolve_target
    from deepspec.target.unloaded import resolve_unloaded

    place = Path.home() / ".cache/deepspec" / f"target-{reference['digest']}"
    if not (place / RECORD).exists():
        what = (
            reference["source"],
            reference["revision"],
            reference["dtype"],
            place,
            reference.get("template_date"),
            reference.get("chat_template_kwargs"),
        )
        if reference.get("unloaded"):
            resolve_unloaded(*what, reference.get("quantization"))
        else:
            resolve_target(*what)
    if (found := directory_digest(place)) != reference["digest"]:
        raise DeepSpecError(
            f"{reference['source']}: is target {found} now, but the version is of {reference['digest']}; name a "
            'directory of that one with model_config={"target": ...}'
        )
    return place


set_model(SpeculativeModel())
