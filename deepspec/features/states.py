"""Hidden states that a serving engine wrote, proven to be those of the tokens and layers that were asked for.

The form is that of vLLM's `extract_hidden_states`: for each conversation a safetensors file with `hidden_states`
[tokens, layers, d] and `token_ids` int64 [tokens]. An engine's layer id i is the state *before* layer i: the output of
our layer i is its id i + 1, the embeddings are its id 0, and its id `num_layers` is the last state before the final
norm. Id 0 is always asked for: that it is the embedding of each token proves where tokens and layers begin.

DeepSpec's connector may encode them (`inside/deepspec_codec.py`): `codes` and `scales` are then of all layers but the
last, and `hidden_states` of that one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepspec.errors import DeepSpecError
from deepspec.features.codec import Codec, Encoded, codec
from deepspec.features.extract import LOG_NORM, Found
from deepspec.features.inside.deepspec_codec import packed
from deepspec.features.proof import check_layers, computed_states
from deepspec.features.sequences import Sequences
from deepspec.files import digest, replacing
from deepspec.target.ends import H_LAST, Ends

SAME = 0.98  # cosine of a token's embedding and the state under the first layer, in the mean; 16 bits leave 0.999


def engine_layers(layers: tuple[int, ...], num_layers: int) -> list[int]:
    """Return the engine's layer ids to ask for, ascending: that of the embeddings, our layers', and the last."""
    return sorted({0, num_layers, *(layer + 1 for layer in layers if layer != H_LAST)})


def file_name(ids: list[int]) -> str:
    """Return the name of the file of a conversation's states."""
    return f"{digest(json.dumps(ids))}.safetensors"


class EngineStates:
    """Reads the states of sequences from a folder.

    Args:
        target: whose states they are said to be; its layers are not needed.
        layers: our ids of the layers that are wanted beside the post-norm state.
        form: in which the states may be encoded, if they are at all.
    """

    def __init__(
        self, folder: Path, target: Ends, sequences: Sequences, layers: tuple[int, ...], form: str = "bf16"
    ):
        self.folder, self.target, self.sequences, self.layers = folder, target, sequences, layers
        self.asked, self.codec = engine_layers(layers, target.num_layers), codec(form, target.hidden_size)

    def check_complete(self, requests: Path) -> None:
        """Refuse a folder that lacks conversations, and write what is to be asked of an engine for them.

        Args:
            requests: JSON lines with `token_ids`, `layer_ids` and `file`.

        Raises:
            DeepSpecError: a file is missing.
        """
        here = {path.name for path in self.folder.glob("*.safetensors")}
        missing = [
            i for i in range(len(self.sequences)) if file_name(self.sequences.ids(i).tolist()) not in here
        ]
        if not missing:
            return
        with replacing(requests) as scratch, scratch.open("w") as file:
            file.writelines(f"{json.dumps(self.request(i))}\n" for i in missing)
        raise DeepSpecError(
            f"{self.folder}: no states of {len(missing)} of {len(self.sequences)} conversations; {requests} says what "
            "to ask of an engine for them"
        )

    def request(self, i: int) -> dict[str, object]:
        """Return what to ask of an engine for sequence i."""
        ids = self.sequences.ids(i).tolist()
        return {"token_ids": ids, "layer_ids": self.asked, "file": file_name(ids)}

    def rows(self, indices: list[int]) -> list[Found]:
        """Return the states of some sequences, as `Extractor.rows` does, or codes of them.

        Raises:
            DeepSpecError: states of other tokens, of other layers or of another target, or that are not finite.
        """
        found = []
        for i in indices:
            with self.file(i) as path:
                found.append(self.row(i, path))
        return found

    @contextmanager
    def file(self, i: int) -> Iterator[Path]:
        """Yield the file of a sequence's states."""
        yield self.folder / file_name(self.sequences.ids(i).tolist())

    def check_layers(self) -> None:
        """Compare the states of a conversation with those of its first tokens as they are computed here, by layer.

        Raises:
            DeepSpecError: states of other layers.
        """
        ids = self.sequences.ids(0).tolist()
        with self.file(0) as path:
            states = [decoded(x, self.codec) for x in self._read(0, path)]
        computed = computed_states(Path(self.target.source), ids, self.target.num_layers)
        if computed is not None:
            check_layers(torch.stack(states, 1)[: len(computed)], self.asked, computed, str(path))

    def log_norm(self, hidden: Tensor) -> Tensor:
        """Compute the log-normaliser of the law at post-norm states [n, d], in chunks."""
        return self.target.log_norm(hidden)

    def row(self, i: int, path: Path) -> Found:
        """Return the states of a sequence, which are in this file.

        Raises:
            DeepSpecError: as `rows`.
        """
        ends, read = self.target, zip(self.asked, self._read(i, path), strict=True)
        states = {
            layer: state if isinstance(state, dict) else state.to(ends.device, ends.dtype)
            for layer, state in read
        }
        found: dict[int | str, Tensor | Encoded] = {
            layer: states[layer + 1] for layer in self.layers if layer != H_LAST
        }
        last = ends.normed(decoded(states[ends.num_layers], self.codec))
        log_norm = self.log_norm(last)
        if not bool(torch.isfinite(log_norm).all()):
            raise DeepSpecError(f"{path}: the logits of its last states are not finite")
        return found | {H_LAST: last, LOG_NORM: log_norm}

    def _read(self, i: int, path: Path) -> list[Tensor | Encoded]:
        return read_states(path, self.sequences.ids(i).tolist(), self.asked, self.target, self.codec)


def read_states(
    path: Path, ids: list[int], layers: list[int], target: Ends, codec: Codec
) -> list[Tensor | Encoded]:
    """Return the states of a file, of each layer [tokens, d] or its codes, if they are those of these tokens.

    Args:
        layers: the engine's ids that were asked for, 0 first.
        codec: of states that are encoded.

    Raises:
        DeepSpecError: a file that cannot be read, or states of something else.
    """
    try:
        with safe_open(path, "pt") as file:
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            said = file.metadata() or {}  # of DeepSpec's connector
        tokens = kept["token_ids"].tolist()
    except (OSError, SafetensorError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DeepSpecError(f"{path}: not a file of an engine's states: {reason}") from None
    if tokens != ids:
        raise DeepSpecError(f"{path}: states of other tokens: {_difference(tokens, ids)}")
    written, form = said.get("layer_ids"), said.get("form", "bf16")
    if written is not None and json.loads(written) != layers:
        raise DeepSpecError(f"{path}: states of the engine's layers {written}, and {layers} were asked for")
    if form not in ("bf16", codec.name):
        raise DeepSpecError(f"{path}: states in {form}, and train.features.form is {codec.name}")
    _check_shapes(path, kept, layers, target.hidden_size, form)
    whole = kept["hidden_states"].unbind(1)
    coded = [
        {part: kept[part][:, i] for part in ("codes", "scales")} for i in range(len(layers) - len(whole))
    ]
    states: list[Tensor | Encoded] = [*coded, *whole]
    lowest = decoded(states[0], codec).float()
    embedded = target.embeddings[kept["token_ids"].to(target.embeddings.device)].float().to(lowest.device)
    if likeness(lowest, embedded) < SAME:
        raise DeepSpecError(f"{path}: {_misalignment(lowest, embedded)}")
    return states


def decoded(state: Tensor | Encoded, codec: Codec) -> Tensor:
    """Return a state [tokens, d] that may be codes."""
    return codec.decode(state) if isinstance(state, dict) else state


def _check_shapes(path: Path, kept: Encoded, layers: list[int], width: int, form: str) -> None:
    """Refuse tensors that are not of so many tokens, layers and values."""
    tokens = len(kept["token_ids"])
    for name, one in packed(torch.zeros(1, len(layers), width), form).items():
        found = list(kept[name].shape) if name in kept else None
        if found != (wanted := [tokens, *one.shape[1:]]):
            raise DeepSpecError(
                f"{path}: {name} of shape {found}, and {wanted} was asked for "
                f"(tokens, layers {', '.join(map(str, layers))}, width)"
            )


def likeness(states: Tensor, embedded: Tensor) -> float:
    """Return the mean cosine of two [tokens, d]; their sizes do not count, since many targets scale embeddings."""
    return float(F.cosine_similarity(states, embedded, dim=-1, eps=1e-6).mean())


def _difference(found: list[int], wanted: list[int]) -> str:
    for place, (theirs, ours) in enumerate(zip(found, wanted, strict=False)):
        if theirs != ours:
            return f"{theirs} in place of {ours} at position {place}"
    return f"{len(found)} of them in place of {len(wanted)}"


def _misalignment(lowest: Tensor, embedded: Tensor) -> str:
    """Say what states under the first layer are, which are not the embeddings of their tokens."""
    for by, name in ((1, "before"), (-1, "after")):
        mine = lowest[1:] if by > 0 else lowest[:-1]
        theirs = embedded[:-1] if by > 0 else embedded[1:]
        if len(mine) and likeness(mine, theirs) >= SAME:
            return f"its states are shifted: each is that of the token {name} it"
    return (
        "the state under its first layer is not the embedding of its tokens: layer ids that are off by one, or another "
        "target"
    )
