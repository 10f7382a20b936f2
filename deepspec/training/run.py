"""From the distillation data to a draft directory: one training run of one drafter."""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from deepspec.decoding import train_parity as promise
from deepspec.decoding.calibration import TEMPERATURES, calibrate, save
from deepspec.decoding.engine import generate
from deepspec.drafters.checkpoint import stored_weights, write_drafter
from deepspec.drafters.load import load_drafter
from deepspec.drafters.network import Network
from deepspec.drafters.registry import algorithms
from deepspec.errors import DeepSpecError
from deepspec.features.local import CachedFeatures, Features, OnlineFeatures
from deepspec.features.sequences import Sequence, read_sequences
from deepspec.files import digest, write_json
from deepspec.lineage import code_digest
from deepspec.provenance import provenance
from deepspec.target.model import Target, load_target
from deepspec.training.batches import Batches
from deepspec.training.objective import BlockObjective
from deepspec.training.trainer import Trainer, write_history

if TYPE_CHECKING:
    from deepspec.config import Params

logger = logging.getLogger(__name__)

WORK = Path(".deepspec")
DATA = Path("data/distill")
CALIBRATION_TOKENS = 64  # of each held-out conversation's answer
DECODED_PROMPTS, DECODED_TOKENS = 8, 48
LOUDNESS_SEQUENCES = 48
BEGINS = {"target": "as the target's last layers", "random": "at random"}
PROMISED_SEQUENCES, PROMISED_ANCHORS = 16, 6  # held-out conversations, and blocks of each


@dataclass(frozen=True)
class Outputs:
    """Where a training run writes."""

    draft: Path
    history: Path  # metrics as JSON lines
    manifest: Path  # what the target's features were, and their checksums where they are kept

    @classmethod
    def of(cls, name: str) -> Outputs:
        """As dvc.yaml has them."""
        return cls(
            Path("data/drafts") / name,
            Path("reports/train") / f"{name}.jsonl",
            Path("data/features") / f"{name}.json",
        )


def train(params: Params, name: str, target_directory: Path, outputs: Outputs) -> None:
    """Train drafter `name`.

    Raises:
        DeepSpecError: no such drafter, no usable data, or a loss that is not finite.
    """
    if name not in params.drafters:
        raise DeepSpecError(f"params.yaml has no drafter {name!r}; it has {', '.join(params.drafters)}")
    drafter, params = params.drafters[name], own_loss(params, name)
    algorithm = algorithms()[drafter.type]
    if algorithm.network is None:
        target = load_target(target_directory)
        write_drafter(outputs.draft, algorithm.make(drafter).config, {}, target, {"data_digest": None})
        return _untrained(outputs)
    accelerator = _accelerator(params, name)
    target = load_target(target_directory, device=str(accelerator.device))
    network = make_network(params, name, target)
    if not any(p.requires_grad for p in network.parameters()):  # a model that is used as it is
        record = _record(params, None)
        write_drafter(outputs.draft, network.description(), stored_weights(network), target, record)
        return _untrained(outputs)
    sequences, data_digest = read_sequences(DATA, params.train.max_length, params.train.supervise)
    trainer = make_trainer(params, name, network, target, sequences, data_digest, accelerator)
    trainer.run()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        best = make_network(params, name, target)  # whole, where the trained one may be sharded
        best.share(target, trainer.raw.draft_ids)
        best.take_buffers(network)
        best.load_state_dict(
            {name.removeprefix("model."): w for name, w in trainer.best_weights().items()}, strict=False
        )
        made = {"drafter": name, "heldout_tau": trainer.best_tau}
        made |= {"start": network.start} if network.start else {}
        record = _record(params, data_digest) | made
        weights = stored_weights(best, params.train.written_out)
        write_drafter(outputs.draft, best.description(), weights, target, record)
        prompts = [_prompt(sequences[i]) for i in trainer.heldout]
        if best.confident:
            _calibrate(outputs.draft, target, prompts, params.seed)
        objective = BlockObjective(best.to(target.device), params.train.loss).to(target.device)
        promise.save(outputs.draft, _kept(objective, trainer.batches, trainer.heldout, target))
        trainer.history[-1] |= _decoded(outputs.draft, target, prompts, params.seed)
        write_json(outputs.manifest, trainer.batches.store.describe())
        write_history(outputs.history, trainer.history)
    accelerator.end_training()


def own_loss(params: Params, name: str) -> Params:
    """With the loss of the drafter's own section, where it has one, as that of `train`."""
    loss = getattr(params.drafters[name], "loss", None)
    return (
        params.model_copy(update={"train": params.train.model_copy(update={"loss": loss})})
        if loss
        else params
    )


def make_network(params: Params, name: str, target: Target) -> Network:
    """The network of drafter `name`, its weights drawn from the seed."""
    torch.manual_seed(params.seed)
    drafter = params.drafters[name]
    return algorithms()[drafter.type].network(drafter, target)


def _accelerator(params: Params, name: str) -> Accelerator:
    """With metrics to MLflow where its environment variable names a server."""
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))  # one process extracts, the others wait
    tracked = bool(os.environ.get("MLFLOW_TRACKING_URI"))
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


def _untrained(outputs: Outputs) -> None:
    write_json(outputs.manifest, {"mode": "none"})
    write_history(outputs.history, [{"step": 0}])


def _decoded(draft: Path, target: Target, prompts: list[list[int]], seed: int) -> dict[str, float]:
    """τ of a small real decode of held-out prompts: what training expects is checked before anything relies on it."""
    drafter = load_drafter(draft, target)
    found = {}
    for mode, temperature in TEMPERATURES.items():
        answers = generate(
            target,
            drafter,
            prompts[:DECODED_PROMPTS],
            max_new_tokens=DECODED_TOKENS,
            temperature=temperature,
            seed=seed,
        )
        rounds = sum(answer.stats.rounds for answer in answers)
        found[f"decoded_tau_{mode}"] = sum(answer.stats.committed for answer in answers) / max(rounds, 1)
    logger.info("a real decode: %s", ", ".join(f"{name} {tau:.3f}" for name, tau in found.items()))
    return found


def _features(
    params: Params,
    target: Target,
    sequences: list[Sequence],
    layers: tuple[int, ...],
    data_digest: str,
    accelerator: Accelerator,
) -> Features:
    """The target's hidden states, cached or as they are needed."""
    chosen = params.train.features
    if chosen.mode == "online":
        return OnlineFeatures(target, sequences, layers)
    what = (target, sequences, layers, data_digest, chosen.form)
    if chosen.directory:
        features = CachedFeatures(Path(chosen.directory), *what)
    else:
        features = CachedFeatures.below(WORK / "features", *what)
    with accelerator.main_process_first():
        features.build()
    return features


def _prompt(sequence: Sequence) -> list[int]:
    """The tokens before the first answer."""
    return sequence.ids[: sequence.answer.index(1)]


def _calibrate(draft: Path, target: Target, prompts: list[list[int]], seed: int) -> None:
    """Fit the confidence head's temperatures on a small real decode of held-out prompts."""
    try:
        found = calibrate(target, load_drafter(draft, target), prompts, CALIBRATION_TOKENS, seed)
    except DeepSpecError as error:  # too little data: the confidence stays as trained
        logger.warning("confidence not calibrated: %s", error)
        return
    save(draft, found)
    for mode, quality in found["quality"].items():
        ece, blocks = quality["ece"], quality["blocks"]
        logger.info("confidence (%s): ECE %.3f → %.3f, %d blocks", mode, ece["before"], ece["after"], blocks)


def _kept(
    objective: BlockObjective, batches: Batches, heldout: list[int], target: Target
) -> list[promise.Kept]:
    """Blocks of held-out conversations as the network that was trained drafts them."""
    kept = []
    for i in heldout[:PROMISED_SEQUENCES]:
        ids = batches.store.sequences[i].ids
        starts = [start for start in batches.starts(i, answers_only=True) if start + batches.gamma < len(ids)]
        if not starts:
            continue
        anchors = torch.tensor(starts[:: -(-len(starts) // PROMISED_ANCHORS)])
        batch = batches.at([i] * len(anchors), anchors[:, None], answers_only=True).to(target.device)
        chains = objective.greedy_chains(batch)
        with torch.no_grad():
            after = target.logits(batch.hidden[0, anchors].to(target.dtype)).argmax(-1)
        accepted = (chains[:, 0] == after).int().tolist()
        kept.append(promise.Kept(ids, anchors.tolist(), chains.tolist(), accepted))
    return kept


def draft_vocabulary(sequences: list[Sequence], size: int, vocab_size: int) -> torch.Tensor:
    """The `size` most frequent learnt tokens, as ascending target ids; rarer ids fill up from the lowest."""
    counts: Counter[int] = Counter()
    for sequence in sequences:
        counts.update(token for token, learnt in zip(sequence.ids, sequence.learnt, strict=True) if learnt)
    ranked = sorted(range(vocab_size), key=lambda token: (-counts[token], token))
    return torch.tensor(sorted(ranked[:size]))


def loudness(features: Features, indices: list[int]) -> torch.Tensor:
    """Standard deviation of each channel of the concatenated layers over some sequences, float32 [layers·d]."""
    rows = [features.rows([i])[0] for i in indices]
    of_layers = (torch.cat([row[layer].float() for row in rows]).std(0) for layer in features.layers)
    return torch.cat(list(of_layers))


def make_trainer(
    params: Params,
    name: str,
    network: Network,
    target: Target,
    sequences: list[Sequence],
    data_digest: str,
    accelerator: Accelerator,
) -> Trainer:
    """A trainer of drafter `name` on the target's features, which are computed first where they are cached.

    Raises:
        DeepSpecError: too few conversations.
    """
    config = network.config
    features = _features(params, target, sequences, config.target_layer_ids, data_digest, accelerator)
    members = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(params.seed)).tolist()
    kept_out = min(params.train.heldout, max(len(members) // 10, 1))
    heldout, members = members[:kept_out], members[kept_out:]
    learnt = [sequences[i] for i in members]
    draft_ids = draft_vocabulary(learnt, config.draft_vocab_size, config.vocab_size)
    network.share(target, draft_ids)
    if network.start and accelerator.is_main_process:
        logger.info("%s begins %s", name, BEGINS[network.start])
    if network.start == "target":
        network.begin(target, loudness(features, members[:LOUDNESS_SEQUENCES]))
    heldout = [i for i in heldout if any(sequences[i].answer[2:])]
    code = code_digest(__name__)
    settings = (params.train, params.drafters[name], target.digest, data_digest, params.seed, code)
    work = WORK / "train" / f"{name}-{digest(repr(settings))}"
    batches = Batches(
        features, members, params.train.batch_size, params.train.anchors, config.block_size, params.seed
    )
    if not batches.members or not heldout:
        raise DeepSpecError(f"{len(sequences)} conversations are too few to train on and hold some out")
    batches.check_alive()
    network.checkpointing = params.train.gradient_checkpointing
    if params.train.compile:
        network.compile()
    objective = BlockObjective(network, params.train.loss).to(accelerator.device)
    return Trainer(objective, batches, heldout, params.train, accelerator, work)


def _record(params: Params, data_digest: str | None) -> dict:
    """How a draft was made, for its deepspec.json."""
    return {
        "data_digest": data_digest,
        **provenance(),
        "seed": params.seed,
        "train": params.train.model_dump(),
    }
