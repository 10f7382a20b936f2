"""Draft directories: `config.json`, `model.safetensors`, tokenizer files, and `deepspec.json` (how it was made).

Written whole or not at all, read strictly: every weight is accounted for, and a draft of another target is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from deepspec.decoding.calibration import CALIBRATION
from deepspec.drafters.network import SHARED, Network
from deepspec.drafters.padding import Padding
from deepspec.drafters.published.vocabulary import draft_ids
from deepspec.errors import DeepSpecError
from deepspec.files import digest, file_digest, replacing
from deepspec.target.ends import Ends
from deepspec.target.weights import WEIGHTS, read_weights

N = TypeVar("N", bound=Network)

DRAFTS = Path("data/drafts")
RECORD = "deepspec.json"


@dataclass(frozen=True)
class Checkpoint:
    """A draft directory as an algorithm loads it, whoever wrote it.

    Args:
        config: its config.json, in the keys of the drafts that are written here.
        names: of the weights, in the files → as written here; None: they are the same.
        padding: how its vocabulary is made to fit the target's, where the two are padded differently.
    """

    directory: Path
    config: dict[str, Any]
    names: Mapping[str, str] | None = None
    padding: Padding | None = None

    @classmethod
    def own(cls, directory: Path) -> Checkpoint:
        """Return a directory that was written here."""
        return cls(directory, read_config(directory))

    def weights(self) -> dict[str, Tensor]:
        """Return its weights by the names of those that are written here.

        Raises:
            DeepSpecError: no weights, or files that cannot be read.
        """
        found = read_weights(self.directory, self.names)
        return found if self.padding is None else self.padding.fit(found, self.directory)


def read_config(directory: Path) -> dict:
    path = directory / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise DeepSpecError(f"{directory}: not a draft directory: config.json is missing") from None
    except json.JSONDecodeError as error:
        raise DeepSpecError(f"{path}: not valid JSON: {error}") from None


def check_target(directory: Path, config: dict, target: Ends, standalone: bool = False) -> None:
    """Refuse a draft that was made for another target; a standalone one shares its tokenizer alone, padding apart."""
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
    if standalone:
        return
    expected = {"hidden_size": target.hidden_size, "num_target_layers": target.num_layers}
    for key, found in expected.items():
        if key in config and config[key] != found:
            raise DeepSpecError(
                f"{directory}: {key} is {config[key]}, but the target {target.source} has {found}"
            )


def write_drafter(
    directory: Path, config: dict, weights: dict[str, Tensor], target: Ends, record: dict
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


def stored_weights(network: Network, written_out: bool = False) -> dict[str, Tensor]:
    """Return what a draft's file holds, in bfloat16; a reduced vocabulary as offsets. See `Network.stored`."""
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in network.stored(written_out).items()
    }
    if network.maps_columns and network.config.draft_vocab_size < network.config.vocab_size:
        ids = network.draft_ids.cpu()
        weights["d2t"] = ids - torch.arange(len(ids))
        weights["t2d"] = torch.zeros(network.config.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    return weights


def load_network(network: N, checkpoint: Checkpoint, target: Ends) -> N:
    """Fill a fresh network with the weights of a directory, ours or a published one; float32.

    Raises:
        DeepSpecError: unreadable file, or an unknown, missing or misshapen weight.
    """
    weights, config = checkpoint.weights(), network.config
    columns, known = weights.pop("d2t", None), weights.pop("t2d", None)
    try:
        ids = draft_ids(columns, known, config.draft_vocab_size, config.vocab_size)
    except DeepSpecError as error:
        raise DeepSpecError(f"{checkpoint.directory}: {error}") from None
    network.share(target, ids)
    _fill(network, weights, checkpoint.directory)
    return network


def without_ones(weight: Tensor, shape: torch.Size) -> Tensor:
    """Return a weight in a shape that differs from its own in leading ones alone; any other as it is."""
    same = weight.numel() == shape.numel() and [n for n in weight.shape if n > 1] == [
        n for n in shape if n > 1
    ]
    return weight.view(shape) if same else weight


def draft_directory(name: str) -> Path:
    """Where the draft called `name` is: below data/drafts, or a path."""
    for path in (DRAFTS / name, Path(name)):
        if path.is_dir():
            return path
    known = ", ".join(sorted(path.name for path in DRAFTS.glob("*") if path.is_dir())) or "none"
    raise DeepSpecError(f"no such draft: {name} (in {DRAFTS}: {known})")


def draft_digest(directory: Path) -> str:
    """Return the identity of a draft: of all files of its directory but the record of how it was made.

    Trained again to the same weights, it is the same draft.
    """
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name != RECORD)
    return digest("".join(f"{path.name} {file_digest(path)}\n" for path in files))


def temperatures(directory: Path) -> dict[str, list[float]]:
    """Of the confidence head, by mode; none for a draft that was never calibrated (a published one)."""
    path = directory / CALIBRATION
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        return {mode: [float(t) for t in found[mode]] for mode in ("greedy", "sampled")}
    except (ValueError, KeyError, TypeError):
        raise DeepSpecError(f"{path}: not a calibration (temperatures `greedy` and `sampled`)") from None


def _fill(model: Network, weights: dict[str, Tensor], path: Path) -> None:
    """Copy the weights in; what is neither in the file nor shared with the target is an error."""
    names = {model.stored_name(name): name for name in model.state_dict() if name != "draft_ids"}
    expected = {stored: model.state_dict()[name] for stored, name in names.items()}
    unknown = sorted(set(weights) - set(expected))
    missing = sorted(set(expected) - set(weights) - SHARED)
    if unknown or missing:
        what = f"unknown weights {unknown[:3]}" if unknown else f"missing weights {missing[:3]}"
        raise DeepSpecError(f"{path}: {what}")
    weights = {name: without_ones(tensor, expected[name].shape) for name, tensor in weights.items()}
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise DeepSpecError(
                f"{path}: {name} is {list(tensor.shape)}, expected {list(expected[name].shape)}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DeepSpecError(f"{path}: {name} holds values that are not finite")
    model.load_state_dict({names[name]: tensor for name, tensor in weights.items()}, strict=False)
