"""After the last step: the draft's directory, its calibration, its held-out blocks, and a small real decode."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepspec.decoding import train_parity
from deepspec.decoding.calibration import TEMPERATURES, calibrate, save
from deepspec.decoding.engine import generate
from deepspec.drafters.checkpoint import stored_weights, write_drafter
from deepspec.drafters.load import load_drafter
from deepspec.drafters.network import Network
from deepspec.errors import DeepSpecError
from deepspec.files import write_json
from deepspec.provenance import provenance
from deepspec.target.ends import Ends
from deepspec.target.model import Target
from deepspec.training.held_out import draft_held_out_blocks
from deepspec.training.objective import BlockObjective
from deepspec.training.paths import TrainingPaths
from deepspec.training.prepare import Prepared, make_network
from deepspec.training.trainer import Trainer, write_history

if TYPE_CHECKING:
    from deepspec.config import Params

logger = logging.getLogger(__name__)


_CALIBRATION_TOKENS = 64  # of each held-out conversation's answer
_DECODED_PROMPTS, _DECODED_TOKENS = 8, 48


def finish(prepared: Prepared, trainer: Trainer, paths: TrainingPaths) -> None:
    """Write the draft with the best weights, and all that is said of it. For the main process alone.

    With `train.real_decode` the target is loaded with its layers once more.
    """
    params, target = prepared.params, prepared.target
    best = _best_network(prepared, trainer)
    made = {"drafter": prepared.name, "heldout_tau": trainer.best_tau}
    made |= {"start": best.start} if best.start else {}
    made |= {"parents": [best.origin.record]} if best.origin is not None else {}
    made |= {"row_tokens": prepared.row_tokens()}
    record = training_record(params, prepared.data.digest) | made
    weights = stored_weights(best, params.train.written_out)
    write_drafter(paths.draft, best.description(), weights, target, record)
    whole = prepared.body() if params.train.real_decode else None
    prompts = prepared.heldout_prompts()
    if best.confident and whole is not None:
        _calibrate(paths.draft, whole, prompts, params.seed)
    objective = BlockObjective(best.to(target.device), params.train.loss).to(target.device)
    blocks = draft_held_out_blocks(objective, prepared.batches, prepared.heldout, target)
    train_parity.save(paths.draft, blocks)
    if whole is not None:
        trainer.history[-1] |= _decoded_tau(paths.draft, whole, prompts, params.seed)
    write_json(paths.manifest, prepared.batches.store.describe())
    write_history(paths.history, trainer.history)


def write_untrained(
    paths: TrainingPaths, description: dict[str, Any], weights: dict, target: Ends, record: dict[str, Any]
) -> None:
    """Write a draft that is used as it is, without features and history."""
    write_drafter(paths.draft, description, weights, target, record)
    write_json(paths.manifest, {"mode": "none"})
    write_history(paths.history, [{"step": 0}])


def training_record(params: Params, data_digest: str | None) -> dict[str, Any]:
    """Return how a draft was made, for its deepspec.json."""
    return {
        "data_digest": data_digest,
        **provenance(),
        "seed": params.seed,
        "train": params.train.model_dump(),
    }


def _best_network(prepared: Prepared, trainer: Trainer) -> Network:
    """Return a whole network with the best weights, where the trained one may be sharded."""
    best = make_network(prepared.params, prepared.name, prepared.target)
    best.share(prepared.target, trainer.raw.draft_ids)
    best.take_buffers(prepared.network)
    weights = {name.removeprefix("model."): w for name, w in trainer.best_weights().items()}
    best.load_state_dict(weights, strict=False)
    return best


def _calibrate(draft: Path, target: Target, prompts: list[list[int]], seed: int) -> None:
    """Fit the confidence head's temperatures on a small real decode of held-out prompts."""
    try:
        found = calibrate(target, load_drafter(draft, target), prompts, _CALIBRATION_TOKENS, seed)
    except DeepSpecError as error:  # too little data: the confidence stays as trained
        logger.warning("confidence not calibrated: %s", error)
        return
    save(draft, found)
    for mode, quality in found["quality"].items():
        ece, blocks = quality["ece"], quality["blocks"]
        logger.info("confidence (%s): ECE %.3f → %.3f, %d blocks", mode, ece["before"], ece["after"], blocks)


def _decoded_tau(draft: Path, target: Target, prompts: list[list[int]], seed: int) -> dict[str, float]:
    """Return τ of a small real decode of held-out prompts, which checks what training expects."""
    drafter = load_drafter(draft, target)
    found = {}
    for mode, temperature in TEMPERATURES.items():
        answers = generate(
            target,
            drafter,
            prompts[:_DECODED_PROMPTS],
            max_new_tokens=_DECODED_TOKENS,
            temperature=temperature,
            seed=seed,
        )
        rounds = sum(answer.stats.rounds for answer in answers)
        found[f"decoded_tau_{mode}"] = sum(answer.stats.committed for answer in answers) / max(rounds, 1)
    logger.info("a real decode: %s", ", ".join(f"{name} {tau:.3f}" for name, tau in found.items()))
    return found
