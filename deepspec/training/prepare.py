"""Before the first step: sequences, held-out split, features, draft vocabulary, and a network that knows its target."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from deepspec.drafters.network import Network, NormalisedLinear
from deepspec.drafters.origin import keep_scale
from deepspec.drafters.registry import algorithms
from deepspec.drafters.start import channel_std, draft_vocabulary, match_head
from deepspec.errors import DeepSpecError
from deepspec.features.local import CachedFeatures, Features, OnlineFeatures
from deepspec.features.sequences import Sequence, read_sequences
from deepspec.target.model import Target
from deepspec.training.batches import Batches

if TYPE_CHECKING:
    from deepspec.config import Params
    from deepspec.training.params import TrainParams

logger = logging.getLogger(__name__)


WORK = Path(".deepspec")
DATA = Path("data/distill")
_BEGINS = {"target": "as the target's last layers", "random": "at random"}
_STD_SEQUENCES = 48  # over which the deviation of the features' channels is taken


@dataclass(frozen=True)
class TrainingData:
    """Conversations, and the digest of the data set that they are from."""

    sequences: list[Sequence]
    digest: str

    @classmethod
    def read(cls, train: TrainParams) -> TrainingData:
        """Read `data/distill`.

        Raises:
            DeepSpecError: no data set there, or no token to learn from.
        """
        return cls(*read_sequences(DATA, train.max_length, train.supervise))


@dataclass(frozen=True)
class Prepared:
    """A network and what it is to learn from.

    Attributes:
        params: with the drafter's own loss as that of `train`.
        heldout: indices of the sequences that `batches` leaves out.
    """

    params: Params
    name: str
    target: Target
    network: Network
    data: TrainingData
    batches: Batches
    heldout: list[int]

    def heldout_prompts(self) -> list[list[int]]:
        """Return the tokens before the first answer of each held-out conversation."""
        chosen = [self.data.sequences[i] for i in self.heldout]
        return [sequence.ids[: sequence.answer.index(1)] for sequence in chosen]

    def row_tokens(self) -> dict[str, int]:
        """Return how long the rows are that it learns from: the longest, and what 95 % of them do not exceed."""
        lengths = sorted(len(self.data.sequences[i].ids) for i in self.batches.members)
        return {"common": lengths[-(-len(lengths) * 95 // 100) - 1], "longest": lengths[-1]}


def make_network(params: Params, name: str, target: Target) -> Network:
    """Return the network of drafter `name`, its weights drawn from the seed."""
    torch.manual_seed(params.seed)
    drafter = params.drafters[name]
    network = algorithms()[drafter.type].network
    if network is None:
        raise DeepSpecError(f"drafter {name!r} is a {drafter.type}, which is not trained")
    return network(drafter, target)


def prepare(
    params: Params,
    name: str,
    network: Network,
    target: Target,
    data: TrainingData,
    accelerator: Accelerator,
) -> Prepared:
    """Split the data, compute its features where they are cached, and give the network what it has of the target.

    Raises:
        DeepSpecError: too few conversations, or features that are the same for every token.
    """
    config, sequences = network.config, data.sequences
    features = _features(params.train, target, data, config.target_layer_ids, accelerator)
    heldout, members = split(sequences, params.train.heldout, params.seed)
    learnt = _learnt_tokens(sequences, members)
    network.share(target, _vocabulary(network, learnt, target))
    if network.start and accelerator.is_main_process:
        logger.info("%s begins %s", name, _BEGINS.get(network.start, f"as {network.start}"))
    joins: object = getattr(network, "fc", None)
    scaled = isinstance(joins, NormalisedLinear) and network.origin is not None and not network.norms_features
    if network.start == "target" or scaled:
        rows = [features.rows([i])[0] for i in members[:_STD_SEQUENCES]]
        deviation = channel_std(rows, features.layers)
        if isinstance(joins, NormalisedLinear) and scaled:
            keep_scale(joins, deviation)
        else:
            network.init_from_target(target, deviation)
    if network.origin is None:
        match_head(network, target)
    heldout = [i for i in heldout if any(sequences[i].answer[2:])]
    batches = Batches(
        features,
        members,
        params.train.batch_size,
        params.train.anchors,
        config.block_size,
        params.seed,
        params.train.pass_tokens,
    )
    if not batches.members or not heldout:
        raise DeepSpecError(f"{len(sequences)} conversations are too few to train on and hold some out")
    batches.check_alive()
    return Prepared(params, name, target, network, data, batches, heldout)


def split(sequences: list[Sequence], heldout: int, seed: int) -> tuple[list[int], list[int]]:
    """Return the indices of the held-out sequences, at most a tenth of all, and those of the others.

    Rows of one conversation are on one side: they share their history.
    """
    groups: dict[str | int, list[int]] = {}
    for i, sequence in enumerate(sequences):
        groups.setdefault(sequence.conversation or i, []).append(i)
    members = list(groups.values())
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist()
    kept_out = min(heldout, max(len(members) // 10, 1))
    chosen = [members[group] for group in order]
    return [i for group in chosen[:kept_out] for i in group], [
        i for group in chosen[kept_out:] for i in group
    ]


def _learnt_tokens(sequences: list[Sequence], members: list[int]) -> Iterator[int]:
    for i in members:
        pairs = zip(sequences[i].ids, sequences[i].learnt, strict=True)
        yield from (token for token, learnt in pairs if learnt)


def _vocabulary(network: Network, learnt: Iterable[int], target: Target) -> torch.Tensor:
    """Return the draft vocabulary: the most frequent tokens, or that of the draft that it goes on from."""
    config, origin = network.config, network.origin
    if origin is not None and len(origin.ids) == config.draft_vocab_size:
        return origin.ids
    return draft_vocabulary(learnt, config.draft_vocab_size, config.vocab_size, target.stop_ids)


def _features(
    train: TrainParams,
    target: Target,
    data: TrainingData,
    layers: tuple[int, ...],
    accelerator: Accelerator,
) -> Features:
    """Return the target's features, cached or computed when they are needed."""
    chosen = train.features
    if chosen.mode == "online":
        return OnlineFeatures(target, data.sequences, layers)
    what = (target, data.sequences, layers, data.digest, chosen.form)
    if chosen.directory:
        features = CachedFeatures(Path(chosen.directory), *what)
    else:
        features = CachedFeatures.below(WORK / "features", *what)
    with accelerator.main_process_first():
        features.build()
    return features
