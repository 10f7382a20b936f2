"""The target's view of the distillation data, computed once and memory-mapped.

For every token: the chosen layers' hidden states, the post-norm hidden state (with the head it gives the target's
whole law) and the log-normaliser of that law. Kept outside DVC under a key of everything that it depends on; an
interrupted extraction goes on at the sequence where it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from deepspec.attention import Step
from deepspec.data.sequences import Sequence
from deepspec.errors import DeepSpecError
from deepspec.files import digest, source_digest, write_json
from deepspec.target import Target

BATCH_TOKENS = 2048
DONE = "done.json"
_FILES = ("features", "hidden", "log_norm")


class FeatureStore:
    """Flat files of bfloat16 rows, one a token: features [N, layers·d], hidden [N, d], log_norm float32 [N].

    Args:
        root: where stores live (outside DVC outputs).
        sequences: in the order of the data set.
        layers: target layer ids, concatenated in this order.
    """

    def __init__(self, root: str | Path, target: Target, sequences: list[Sequence], layers: tuple[int, ...]):
        lengths = [len(sequence.ids) for sequence in sequences]
        self.offsets = np.concatenate(([0], np.cumsum(lengths))).tolist()
        content = "".join(str(sequence.ids) for sequence in sequences)
        code = source_digest("data/features.py", "attention.py", "fused.py", "target.py")
        key = digest(f"{target.digest} {target.dtype} {layers} {digest(content)} {code}")
        self.directory = Path(root) / key
        self.target, self.sequences, self.layers = target, sequences, layers
        self.widths = {
            "features": len(layers) * target.hidden_size,
            "hidden": target.hidden_size,
            "log_norm": 2,
        }
        self._maps: dict[str, Tensor] = {}

    def build(self) -> None:
        """Compute what is missing, in batches of like length, longest first.

        Raises:
            DeepSpecError: the target's hidden states are not finite.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self._open()
        batches = list(_like_lengths(self.sequences))
        progress_file = self.directory / DONE
        done = json.loads(progress_file.read_text()) if progress_file.exists() else 0
        if done == len(batches):
            return
        columns = (TextColumn("features"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            bar = progress.add_task("", total=len(batches), completed=done)
            for i in range(done, len(batches)):
                self._extract(batches[i])
                if i % 8 == 7 or i == len(batches) - 1:
                    write_json(progress_file, i + 1)
                progress.advance(bar)

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """features [b, n, layers·d], hidden [b, n, d] and log_norm [b, n] of some sequences, zero-padded."""
        parts = []
        for name in _FILES:
            rows = [self._maps[name][self.offsets[i] : self.offsets[i + 1]] for i in indices]
            parts.append(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
        features, hidden, log_norm = parts
        return features, hidden, log_norm.view(torch.float32)[..., 0]

    def _open(self) -> None:
        total = self.offsets[-1]
        for name, width in self.widths.items():
            path, size = self.directory / f"{name}.bin", total * width * 2
            if not path.exists() or path.stat().st_size != size:
                (self.directory / DONE).unlink(missing_ok=True)
                with path.open(
                    "wb"
                ) as file:  # claimed now: a full disk under a mapped file would kill the process
                    if size:
                        os.posix_fallocate(file.fileno(), 0, size)
            mapped = np.memmap(path, dtype=np.int16, mode="r+", shape=(total, width))
            self._maps[name] = torch.from_numpy(mapped).view(torch.bfloat16)

    def _extract(self, indices: list[int]) -> None:
        rows = [torch.tensor(self.sequences[i].ids) for i in indices]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.target.device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        step = Step(positions, wanted=self.layers)  # causal: padding at the end is never seen
        hidden = self.target.forward(ids, step)
        features = torch.cat([step.features[layer] for layer in self.layers], -1) if self.layers else None
        for row, i in enumerate(indices):
            n = len(self.sequences[i].ids)
            here = slice(self.offsets[i], self.offsets[i + 1])
            last = hidden[row, :n]
            log_norm = torch.cat([self.target.logits(part).float().logsumexp(-1) for part in last.split(256)])
            if not bool(torch.isfinite(log_norm).all()):
                raise DeepSpecError(f"conversation {i}: the target's logits are not finite")
            self._maps["hidden"][here] = last.to("cpu", torch.bfloat16)
            self._maps["log_norm"][here] = log_norm.cpu()[:, None].view(torch.bfloat16)
            if features is not None:
                self._maps["features"][here] = features[row, :n].to("cpu", torch.bfloat16)


def _like_lengths(sequences: list[Sequence]) -> Iterator[list[int]]:
    """Indices in batches of similar length, at most BATCH_TOKENS tokens with padding."""
    batch: list[int] = []
    for i in sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids)):
        if batch and len(sequences[batch[0]].ids) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
