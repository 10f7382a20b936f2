"""Draft directories: `config.json`, `model.safetensors`, tokenizer files, and `deepspec.json` (how it was made).

Written whole or not at all, read strictly: every weight is accounted for, and a draft of another target is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepspec.drafters.dspark import OURS, PUBLISHED, DSparkConfig, DSparkDrafter, DSparkModel
from deepspec.drafters.lookup import LookupDrafter, TrainingFreeDrafter
from deepspec.drafters.suffix import SuffixDrafter
from deepspec.errors import DeepSpecError
from deepspec.files import digest, file_digest, replacing
from deepspec.target import Target

if TYPE_CHECKING:
    from deepspec.config import LookupParams, SuffixParams

DRAFTS = Path("data/drafts")
RECORD = "deepspec.json"
CALIBRATION = "calibration.json"  # see `decoding.calibration`
WEIGHTS = "model.safetensors"
TRAINING_FREE = {"lookup": LookupDrafter, "suffix": SuffixDrafter}  # by their type in params.yaml
_SHARED = {"embed_tokens.weight", "lm_head.weight"}  # absent from a file: the target's own


def read_config(directory: Path) -> dict:
    path = directory / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise DeepSpecError(f"{directory}: not a draft directory: config.json is missing") from None
    except json.JSONDecodeError as error:
        raise DeepSpecError(f"{path}: not valid JSON: {error}") from None


def check_target(directory: Path, config: dict, target: Target) -> None:
    """Refuse a draft that was made for another target."""
    record = directory / RECORD
    if record.exists():
        try:
            made_for = json.loads(record.read_text())["target_digest"]
        except (ValueError, KeyError):
            raise DeepSpecError(f"{record}: not a draft's record (no target_digest in it)") from None
        if made_for != target.digest:
            raise DeepSpecError(
                f"{directory}: made for target {made_for}, but {target.source} is {target.digest}; train a draft for it"
            )
    for key, found in (
        ("vocab_size", target.vocab_size),
        ("hidden_size", target.hidden_size),
        ("num_target_layers", target.num_layers),
    ):
        if key in config and config[key] != found:
            raise DeepSpecError(
                f"{directory}: {key} is {config[key]}, but the target {target.source} has {found}"
            )


def write_drafter(
    directory: Path, config: dict, weights: dict[str, Tensor], target: Target, record: dict
) -> None:
    """Write a draft directory in one rename. `record` becomes deepspec.json beside the target's identity."""
    identity = {"target": target.source, "target_digest": target.digest}
    with replacing(directory) as scratch:
        scratch.mkdir()
        (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (scratch / RECORD).write_text(json.dumps(identity | record, indent=2) + "\n")
        if weights:
            save_file(weights, scratch / WEIGHTS)
            target.tokenizer.save_pretrained(scratch)


def dspark_weights(model: DSparkModel) -> dict[str, Tensor]:
    """What a DSpark directory stores: all but the embeddings, which are the target's, and d2t as offsets."""
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in ("embed_tokens.weight", "draft_ids")
    }
    if model.config.draft_vocab_size < model.config.vocab_size:
        ids = model.draft_ids.cpu()
        weights["d2t"] = ids - torch.arange(len(ids))
        weights["t2d"] = torch.zeros(model.config.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    return weights


def load_dspark(directory: Path, target: Target) -> DSparkModel:
    """A DSpark network from DeepSeek's format, ours or a published one, in float32.

    Raises:
        DeepSpecError: unreadable file, or an unknown, missing or misshapen weight.
    """
    config = read_config(directory)
    check_target(directory, config, target)
    model = DSparkModel(DSparkConfig.read(config))
    weights = _read_weights(directory / WEIGHTS)
    weights.pop("t2d", None)
    offsets = weights.pop("d2t", torch.zeros(model.config.draft_vocab_size, dtype=torch.int64))
    model.share(target, offsets + torch.arange(model.config.draft_vocab_size))
    _fill(model, weights, directory)
    return model


def load_drafter(path: str | Path, target: Target, decode=None):
    """Load any draft directory for decoding.

    Args:
        path: a draft directory, ours or a published one.
        decode: `DecodeParams`; its `lookup` is asked before a trained draft.

    Raises:
        DeepSpecError: not a draft directory, unknown architecture, corrupt weights, or another target's draft.
    """
    from deepspec.drafters.combined import LookupFirst

    directory = Path(path)
    config = read_config(directory)
    architecture = (config.get("architectures") or ["none named"])[0]
    for kind in TRAINING_FREE.values():
        if architecture == kind.architecture:
            check_target(directory, config, target)
            return kind(config["block_size"], config["min_match"])
    if architecture not in (PUBLISHED, OURS):
        raise DeepSpecError(f"{directory}: unknown draft architecture {architecture!r}")
    drafter = DSparkDrafter(load_dspark(directory, target), target, _temperatures(directory))
    drafter.digest = draft_digest(directory)
    if decode is None or decode.lookup is None:
        return drafter
    return LookupFirst(make_lookup(decode.lookup), drafter)


def make_lookup(params: LookupParams | SuffixParams) -> TrainingFreeDrafter:
    """The training-free drafter that a section of params.yaml describes."""
    return TRAINING_FREE[params.type](params.block_size, params.min_match)


def draft_directory(name: str) -> Path:
    """Where the draft called `name` is: below data/drafts, or a path."""
    for path in (DRAFTS / name, Path(name)):
        if path.is_dir():
            return path
    known = ", ".join(sorted(path.name for path in DRAFTS.glob("*") if path.is_dir())) or "none"
    raise DeepSpecError(f"no such draft: {name} (in {DRAFTS}: {known})")


def draft_digest(directory: Path) -> str:
    """Identity of a draft: all files of its directory."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return digest("".join(f"{path.name} {file_digest(path)}\n" for path in files))


def _temperatures(directory: Path) -> dict[str, list[float]]:
    """Of the confidence head, by mode; none for a draft that was never calibrated (a published one)."""
    path = directory / CALIBRATION
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        return {mode: [float(t) for t in found[mode]] for mode in ("greedy", "sampled")}
    except (ValueError, KeyError, TypeError):
        raise DeepSpecError(f"{path}: not a calibration (temperatures `greedy` and `sampled`)") from None


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise DeepSpecError(f"{path}: no such file; the draft has no weights")
    try:
        return load_file(path)
    except Exception as error:
        raise DeepSpecError(f"{path}: corrupt checkpoint: {error}") from error


def _fill(model: DSparkModel, weights: dict[str, Tensor], directory: Path) -> None:
    """Copy the weights in; what is neither in the file nor shared with the target is an error."""
    expected = {name: tensor for name, tensor in model.state_dict().items() if name != "draft_ids"}
    unknown = sorted(set(weights) - set(expected))
    missing = sorted(set(expected) - set(weights) - _SHARED)
    if unknown or missing:
        what = f"unknown weights {unknown[:3]}" if unknown else f"missing weights {missing[:3]}"
        raise DeepSpecError(f"{directory / WEIGHTS}: {what}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise DeepSpecError(
                f"{directory / WEIGHTS}: {name} is {list(tensor.shape)}, expected {list(expected[name].shape)}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DeepSpecError(f"{directory / WEIGHTS}: {name} holds values that are not finite")
    model.load_state_dict(weights, strict=False)
