"""From the distillation data to a draft directory: one training run of one drafter, in the order it happens.

`prepare` (prepare.py) splits the data and makes features and network, `fit` trains (trainer.py), `finish` (finish.py)
writes the draft and checks it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator, InitProcessGroupKwargs

from deepspec.drafters.checkpoint import stored_weights
from deepspec.drafters.registry import algorithms
from deepspec.errors import DeepSpecError
from deepspec.files import digest
from deepspec.lineage import code_digest
from deepspec.target.ends import Ends, load_ends
from deepspec.target.model import Target, load_target
from deepspec.training.finish import finish, training_record, write_untrained
from deepspec.training.objective import BlockObjective
from deepspec.training.paths import TrainingPaths
from deepspec.training.prepare import (
    WORK,
    Opens,
    Prepared,
    Served,
    TrainingData,
    make_network,
    prepare,
    stored_features,
)
from deepspec.training.trainer import Trainer

if TYPE_CHECKING:
    from deepspec.config import Params

logger = logging.getLogger(__name__)


def train(
    params: Params,
    name: str,
    target_directory: Path,
    paths: TrainingPaths,
    engine: Opens | None = None,
) -> None:
    """Train drafter `name`, or write it down where there is nothing to train.

    Args:
        engine: gives servers that hand out the target's states; None: they are computed here.

    Raises:
        DeepSpecError: no such drafter, no usable data, or a loss that is not finite.
    """
    _check_named(params, name)
    drafter, params = params.drafters[name], own_loss(params, name)
    algorithm = algorithms()[drafter.type]
    if algorithm.network is None:
        description = algorithm.make(drafter).config
        return write_untrained(paths, description, {}, load_ends(target_directory), {"data_digest": None})
    accelerator = make_accelerator(params, name)
    device, online = str(accelerator.device), params.train.features.mode == "online" and engine is None
    target, body = open_target(target_directory, online, device)
    network = make_network(params, name, target)
    if not any(p.requires_grad for p in network.parameters()):  # a model that is used as it is
        record = training_record(params, None)
        return write_untrained(paths, network.description(), stored_weights(network), target, record)
    with accelerator.main_process_first():
        data = TrainingData.read(params.train)
    with tracked_to_its_end(accelerator), ExitStack() as during:
        served = Served(engine, during) if engine else None
        prepared = prepare(params, name, network, target, body, data, accelerator, served)
        trainer = fit(prepared, accelerator)
        if accelerator.is_main_process:
            finish(prepared, trainer, paths)


def store_features(params: Params, name: str, target_directory: Path, engine: Opens | None = None) -> None:
    """Compute and store the features that drafter `name` is trained on, by all processes; train nothing.

    Args:
        engine: as for `train`.

    Raises:
        DeepSpecError: no such drafter, features that nothing stores, or no usable data.
    """
    _check_named(params, name)
    if (mode := params.train.features.mode) != "cached":
        raise DeepSpecError(f"train.features.mode: {mode} stores no features")
    accelerator = make_accelerator(params)
    target, body = open_target(target_directory, False, str(accelerator.device))
    layers = make_network(params, name, target).config.target_layer_ids
    with accelerator.main_process_first():
        data = TrainingData.read(params.train)
    with ExitStack() as during:
        served = Served(engine, during) if engine else None
        found = stored_features(params.train, target, body, data, layers, accelerator, served)
    if accelerator.is_main_process:
        logger.info("features of %d conversations are in %s", len(data.sequences), found.directory)


def _check_named(params: Params, name: str) -> None:
    if name not in params.drafters:
        raise DeepSpecError(f"params.yaml has no drafter {name!r}; it has {', '.join(params.drafters)}")


@contextmanager
def tracked_to_its_end(accelerator: Accelerator) -> Iterator[None]:
    """End what is tracked, as failed where training fails: MLflow shows it so, and this process may begin anew."""
    try:
        yield
    except BaseException:
        if any(tracker.name == "mlflow" for tracker in accelerator.trackers):
            import mlflow

            mlflow.end_run("FAILED")
        raise
    accelerator.end_training()


def open_target(directory: Path, online: bool, device: str) -> tuple[Ends, Callable[[], Target]]:
    """Return what training needs of the target, and what gives it with its layers.

    These are only its ends, and it is loaded each time that its layers are asked for; with features that it computes
    here, `online`, it is loaded once.
    """
    if online:
        whole = load_target(directory, device=device)
        return whole, lambda: whole
    return load_ends(directory, device), lambda: load_target(directory, device=device)


def own_loss(params: Params, name: str) -> Params:
    """Return the parameters with the loss of the drafter's own section, where it has one, as that of `train`."""
    loss = getattr(params.drafters[name], "loss", None)
    return (
        params.model_copy(update={"train": params.train.model_copy(update={"loss": loss})})
        if loss
        else params
    )


def make_accelerator(params: Params, name: str | None = None) -> Accelerator:
    """Return accelerate's state, with metrics to MLflow where its environment variable names a server.

    Args:
        name: of the drafter that is trained; None: nothing is, and nothing is tracked.

    Raises:
        DeepSpecError: the variable is set and MLflow cannot be used.
    """
    patience = InitProcessGroupKwargs(
        timeout=timedelta(days=7)
    )  # the quickest to extract waits for the slowest
    tracked = name is not None and bool(os.environ.get("MLFLOW_TRACKING_URI"))
    try:
        accelerator = Accelerator(
            mixed_precision=params.train.mixed_precision,
            kwargs_handlers=[patience],
            log_with="mlflow" if tracked else None,
        )
    except ValueError as error:
        raise DeepSpecError(f"$MLFLOW_TRACKING_URI is set: {error}") from None
    if tracked:
        settings = {key: str(value) for key, value in params.train.model_dump().items()}
        accelerator.init_trackers("deepspec", settings, {"mlflow": {"run_name": f"train {name}"}})
    return accelerator


def make_trainer(prepared: Prepared, accelerator: Accelerator) -> Trainer:
    """Return the trainer of a prepared network, its checkpoints under a digest of all that decides its weights."""
    params, network = prepared.params, prepared.network
    code = code_digest(__name__)
    drafter = params.drafters[prepared.name]
    settings: tuple[object, ...] = (
        params.train,
        drafter,
        prepared.target.digest,
        prepared.data.digest,
        params.seed,
        code,
    )
    if network.origin is not None:
        settings += (network.origin.record["digest"],)
    work = WORK / "train" / f"{prepared.name}-{digest(repr(settings))}"
    network.checkpointing = params.train.gradient_checkpointing
    if params.train.compile:
        network.compile()
    objective = BlockObjective(network, params.train.loss).to(accelerator.device)
    return Trainer(objective, prepared.batches, prepared.heldout, params.train, accelerator, work)


def fit(prepared: Prepared, accelerator: Accelerator) -> Trainer:
    """Train to the end, going on from the last checkpoint.

    Raises:
        DeepSpecError: the loss is not finite.
    """
    trainer = make_trainer(prepared, accelerator)
    trainer.run()
    accelerator.wait_for_everyone()
    return trainer
