"""From the distillation data to a draft directory: one training run of one drafter."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from deepspec.data.features import CachedFeatures, Features, OnlineFeatures
from deepspec.data.sequences import Sequence, read_sequences
from deepspec.decoding.calibration import calibrate, save
from deepspec.drafters.checkpoint import load_drafter, stored_weights, write_drafter
from deepspec.drafters.network import Network
from deepspec.drafters.registry import algorithms
from deepspec.errors import DeepSpecError
from deepspec.files import digest, source_digest
from deepspec.target import Target, load_target
from deepspec.training.batches import Batches
from deepspec.training.objective import BlockObjective
from deepspec.training.trainer import Trainer, write_history

if TYPE_CHECKING:
    from deepspec.config import Params

WORK = Path(".deepspec")
DATA = Path("data/distill")
CALIBRATION_TOKENS = 64  # of each held-out conversation's answer


def train(params: Params, name: str, target_directory: Path, out: Path, history: Path) -> None:
    """Train drafter `name` and write it to `out`, its metrics to `history` (JSON lines).

    Raises:
        DeepSpecError: no such drafter, no usable data, or a loss that is not finite.
    """
    if name not in params.drafters:
        raise DeepSpecError(f"params.yaml has no drafter {name!r}; it has {', '.join(params.drafters)}")
    drafter = params.drafters[name]
    algorithm = algorithms()[drafter.type]
    if algorithm.network is None:
        target = load_target(target_directory)
        write_drafter(out, algorithm.make(drafter).config, {}, target, {"data_digest": None})
        write_history(history, [{"step": 0}])
        return
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))  # one process extracts, the others wait
    accelerator = Accelerator(mixed_precision=params.train.mixed_precision, kwargs_handlers=[patience])
    target = load_target(target_directory, device=str(accelerator.device))
    sequences, data_digest = read_sequences(DATA, params.train.max_length, params.train.supervise)
    torch.manual_seed(params.seed)
    network = algorithm.network(drafter, target)
    if not any(p.requires_grad for p in network.parameters()):  # a model that is used as it is
        write_drafter(out, network.description(), stored_weights(network), target, provenance(params, None))
        write_history(history, [{"step": 0}])
        return
    trainer = make_trainer(params, name, network, target, sequences, data_digest, accelerator)
    trainer.run()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        torch.manual_seed(params.seed)
        best = algorithm.network(drafter, target)  # whole, where the trained one may be sharded
        best.share(target, trainer.raw.draft_ids)
        best.load_state_dict(
            {name.removeprefix("model."): w for name, w in trainer.best_weights().items()}, strict=False
        )
        record = provenance(params, data_digest) | {"heldout_tau": trainer.best_tau, "drafter": name}
        weights = stored_weights(best, params.train.written_out)
        write_drafter(out, best.description(), weights, target, record)
        _calibrate(out, target, [_prompt(sequences[i]) for i in trainer.heldout], params.seed)
        write_history(history, trainer.history)
    accelerator.end_training()


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
        print(f"confidence not calibrated: {error}")
        return
    save(draft, found)
    for mode, ece in found["ece"].items():
        blocks = found["blocks"][mode]
        print(f"confidence ({mode}): ECE {ece['before']:.3f} → {ece['after']:.3f}, {blocks} blocks")


def draft_vocabulary(sequences: list[Sequence], size: int, vocab_size: int) -> torch.Tensor:
    """The `size` most frequent learnt tokens, as ascending target ids; rarer ids fill up from the lowest."""
    counts: Counter[int] = Counter()
    for sequence in sequences:
        counts.update(token for token, learnt in zip(sequence.ids, sequence.learnt, strict=True) if learnt)
    ranked = sorted(range(vocab_size), key=lambda token: (-counts[token], token))
    return torch.tensor(sorted(ranked[:size]))


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
    heldout = [i for i in heldout if any(sequences[i].answer[2:])]
    code = source_digest("training", "drafters", "data/codec.py", "data/features.py", "data/sequences.py")
    settings = (params.train, params.drafters[name], target.digest, data_digest, params.seed, code)
    work = WORK / "train" / f"{name}-{digest(repr(settings))}"
    batches = Batches(
        features, members, params.train.batch_size, params.train.anchors, config.block_size, params.seed
    )
    if not batches.members or not heldout:
        raise DeepSpecError(f"{len(sequences)} conversations are too few to train on and hold some out")
    network.checkpointing = params.train.gradient_checkpointing
    if params.train.compile:
        network.compile()
    objective = BlockObjective(network, params.train.loss).to(accelerator.device)
    return Trainer(objective, batches, heldout, params.train, accelerator, work)


def provenance(params: Params, data_digest: str | None) -> dict:
    """How a draft was made, for its deepspec.json."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "data_digest": data_digest,
        "git_commit": commit.stdout.strip() or None,
        "packages": {name: version(name) for name in ("torch", "transformers", "accelerate", "safetensors")},
        "seed": params.seed,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "train": params.train.model_dump(),
    }
