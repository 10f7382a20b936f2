"""The target's states for some sequences, by a pass of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from deepspec.errors import DeepSpecError
from deepspec.features.codec import Encoded
from deepspec.features.sequences import Sequences
from deepspec.target.attention import ForwardPass, KVCache
from deepspec.target.ends import H_LAST
from deepspec.target.model import Target

LOG_NORM = "log_norm"
Row = dict[int | str, Tensor]  # layer → [n, d], `H_LAST` among them; LOG_NORM → float32 [n]
# A row, the states of its layers as codes where an engine has encoded them.
Found = Mapping[int | str, Tensor | Encoded]


class Extractor:
    """Runs a target over sequences.

    Args:
        target: with its layers.
        sequences: in the order of the data set.
        layers: whose states are wanted beside the post-norm one.
    """

    def __init__(self, target: Target, sequences: Sequences, layers: tuple[int, ...]):
        self.target, self.sequences, self.layers = target, sequences, layers

    def rows(self, indices: list[int]) -> list[Row]:
        """Compute the states of some sequences in one pass, on the target's device and in its dtype.

        Raises:
            DeepSpecError: the target's hidden states are not finite.
        """
        wanted = (*self.layers, H_LAST)
        sequences = [self.sequences[i].ids for i in indices]
        passed = self._packed(sequences, wanted) if self.target.native else self._padded(sequences, wanted)
        rows = []
        for i, found in zip(indices, passed, strict=True):
            found[LOG_NORM] = self.log_norm(found[H_LAST])
            if not bool(torch.isfinite(found[LOG_NORM]).all()):
                raise DeepSpecError(f"conversation {i}: the target's logits are not finite")
            rows.append(found)
        return rows

    def _padded(self, sequences: Sequence[Sequence[int]], wanted: tuple[int, ...]) -> list[Row]:
        """Run all as one rectangle."""
        ids = pad_sequence([torch.tensor(each) for each in sequences], batch_first=True)
        ids = ids.to(self.target.device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        step = ForwardPass(positions, wanted=wanted)  # causal: padding at the end is never seen
        self.target.forward(ids, step)
        return [
            {layer: step.features[layer][row, : len(each)] for layer in wanted}
            for row, each in enumerate(sequences)
        ]

    def _packed(self, sequences: Sequence[Sequence[int]], wanted: tuple[int, ...]) -> list[Row]:
        """Run all end to end, as in decoding."""
        counts = [len(each) for each in sequences]
        positions = torch.cat([torch.arange(count) for count in counts])[None]
        step = ForwardPass(positions, cache=KVCache(len(counts), max(counts)), counts=counts, wanted=wanted)
        self.target.forward(torch.tensor([[token for each in sequences for token in each]]), step)
        parts = {layer: step.features[layer][0].split(counts) for layer in wanted}
        return [{layer: parts[layer][row] for layer in wanted} for row in range(len(counts))]

    def log_norm(self, hidden: Tensor) -> Tensor:
        """Return the log-normaliser of the law at post-norm states [n, d]."""
        return self.target.log_norm(hidden)
