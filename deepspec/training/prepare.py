"""Before the first step: sequences, held-out split, features, draft vocabulary, and a network that knows its target."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator

from deepspec.drafters.network import Network, NormalisedLinear
from deepspec.drafters.origin import Origin, keep_scale
from deepspec.drafters.registry import algorithms
from deepspec.drafters.start import channel_std, draft_vocabulary, match_head
from deepspec.errors import DeepSpecError
from deepspec.features.extract import Extractor
from deepspec.features.kept import KeptStates
from deepspec.features.local import CachedFeatures, Features, OnlineFeatures, Share, StateSource
from deepspec.features.read import read_sequences
from deepspec.features.sequences import Ints, Sequences
from deepspec.features.served import ServedFeatures, ServedStates
from deepspec.features.states import EngineStates, engine_layers
from deepspec.target.ends import H_LAST, Ends
from deepspec.target.memory import give_back_freed_memory
from deepspec.target.model import Target
from deepspec.training.batches import Batches

if TYPE_CHECKING:
    from deepspec.config import Params
    from deepspec.decoding.served import Servers
    from deepspec.training.params import TrainParams

logger = logging.getLogger(__name__)


WORK = Path(".deepspec")
DATA = Path("data/distill")
_BEGINS = {"target": "as the target's last layers", "random": "at random"}
_STD_SEQUENCES = 48  # over which deviations of states are taken


@dataclass(frozen=True)
class TrainingData:
    """Conversations, and the digest of the data set that they are from."""

    sequences: Sequences
    digest: str

    @classmethod
    def read(cls, train: TrainParams) -> TrainingData:
        """Read `data/distill`.

        Raises:
            DeepSpecError: no data set there, or no token to learn from.
        """
        return cls(*read_sequences(DATA, train.max_length, train.supervise, WORK / "sequences"))


# The engine's own ids of layers, the longest sequence, a form → servers that hand out their states in it.
Opens = Callable[[list[int], int, str], "AbstractContextManager[Servers]"]


@dataclass(frozen=True)
class Served:
    """Servers of the target.

    Args:
        open: gives the context in which servers run.
        during: closes, when training ends, those that are needed until then.
    """

    open: Opens
    during: ExitStack


@dataclass(frozen=True)
class Prepared:
    """A network and what it is to learn from.

    Attributes:
        params: with the drafter's own loss as that of `train`.
        body: gives the target with its layers.
        heldout: indices of the sequences that `batches` leaves out.
    """

    params: Params
    name: str
    target: Ends
    body: Callable[[], Target]
    network: Network
    data: TrainingData
    batches: Batches
    heldout: list[int]

    def heldout_prompts(self) -> list[list[int]]:
        """Return the tokens before the first answer of each held-out conversation."""
        sequences = self.data.sequences
        return [sequences.ids(i)[: int(sequences.answer(i).argmax())].tolist() for i in self.heldout]

    def row_tokens(self) -> dict[str, int]:
        """Return how long the rows are that it learns from: the longest, and what 95 % of them do not exceed."""
        lengths = sorted(self.data.sequences.lengths[self.batches.members].tolist())
        return {"common": lengths[-(-len(lengths) * 95 // 100) - 1], "longest": lengths[-1]}


def make_network(params: Params, name: str, target: Ends) -> Network:
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
    target: Ends,
    body: Callable[[], Target],
    data: TrainingData,
    accelerator: Accelerator,
    served: Served | None = None,
) -> Prepared:
    """Split the data, compute its features where they are cached, and give the network what it has of the target.

    Args:
        body: gives the target with its layers; asked only where features are to be computed here.
        served: gives servers that compute them; None: they are computed here.

    Raises:
        DeepSpecError: too few conversations, or features that are the same for every token.
    """
    config, sequences = network.config, data.sequences
    layers, chosen = config.target_layer_ids, params.train.features
    features: Features = (
        stored_features(params.train, target, body, data, layers, accelerator, served)
        if chosen.mode == "cached"
        else _online(chosen.form, target, body, data, layers, served)
    )
    heldout, members = split(sequences, params.train.heldout, params.seed)
    network.share(target, _vocabulary(network, sequences, members, target))
    _begin_low_rank(network, features, sequences, members)
    if network.start and accelerator.is_main_process:
        logger.info("%s begins %s", name, _BEGINS.get(network.start, f"as {network.start}"))
    joins: object = getattr(network, "fc", None)
    scaled = isinstance(joins, NormalisedLinear) and network.origin is not None and not network.norms_features
    if network.start == "target" or scaled:
        rows = [features.rows([i])[0] for i in members[:_STD_SEQUENCES].tolist()]
        deviation = channel_std(rows, features.layers)
        if isinstance(joins, NormalisedLinear) and scaled:
            keep_scale(joins, deviation)
        else:
            network.init_from_target(target, deviation)
    if network.origin is None:
        match_head(network, target)
    heldout = [i for i in heldout if sequences.answered[i]]
    batches = Batches(
        features,
        members,
        params.train.batch_size,
        params.train.anchors,
        config.block_size,
        params.seed,
        params.train.pass_tokens,
    )
    if not len(batches.members) or not heldout:
        raise DeepSpecError(f"{len(sequences)} conversations are too few to train on and hold some out")
    batches.check_alive()
    return Prepared(params, name, target, body, network, data, batches, heldout)


def split(sequences: Sequences, heldout: int, seed: int) -> tuple[list[int], Ints]:
    """Return the indices of the held-out sequences, at most a tenth of all, and those of the others.

    Rows of one conversation are on one side: they share their history.
    """
    groups = sequences.groups
    count = int(groups.max(initial=-1)) + 1
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
    kept_out = min(heldout, max(count // 10, 1))
    place = np.empty(count, np.int64)
    place[order] = np.arange(count)
    rows = np.argsort(place[groups], kind="stable")  # the rows of a conversation in their own order
    last = int((place[groups] < kept_out).sum())
    return rows[:last].tolist(), rows[last:]


def _vocabulary(network: Network, sequences: Sequences, members: Ints, target: Ends) -> torch.Tensor:
    """Return the draft vocabulary: the most frequent tokens, or that of the draft that it goes on from."""
    config, origin = network.config, network.origin
    if origin is not None and len(origin.ids) == config.draft_vocab_size:
        return origin.ids
    counts = sequences.learnt_counts(members, config.vocab_size)
    return draft_vocabulary(counts, config.draft_vocab_size, target.stop_ids)


def _begin_low_rank(network: Network, features: Features, sequences: Sequences, members: Ints) -> None:
    """Give a head of low rank its first weights, unless they are those of the draft that it goes on from."""
    origin = network.origin
    if network.low_rank_head is None or (isinstance(origin, Origin) and origin.config.get("head_rank")):
        return
    states = [features.rows([i])[0][H_LAST].float() for i in members[:_STD_SEQUENCES].tolist()]
    counts = sequences.learnt_counts(members, network.config.vocab_size)
    network.begin_low_rank(torch.cat(states), torch.from_numpy(counts))


def _online(
    form: str,
    target: Ends,
    body: Callable[[], Target],
    data: TrainingData,
    layers: tuple[int, ...],
    served: Served | None,
) -> Features:
    """Return the target's features, computed when they are needed."""
    if served is None:
        return OnlineFeatures(body(), data.sequences, layers)
    states = served.during.enter_context(_served_states(served, form, target, data, layers))
    return ServedFeatures(states, target, data.sequences, layers)


def stored_features(
    train: TrainParams,
    target: Ends,
    body: Callable[[], Target],
    data: TrainingData,
    layers: tuple[int, ...],
    accelerator: Accelerator,
    served: Served | None = None,
) -> CachedFeatures:
    """Return the target's features from their shards, of which all processes compute what is not there.

    Args:
        body, served: as for `prepare`.

    Raises:
        DeepSpecError: another target's or another data set's shards, or states that are not this target's.
    """
    chosen = train.features
    elsewhere = "engine" if chosen.states or served else None
    what = (target, data.sequences, layers, data.digest, chosen.form, elsewhere)
    share = Share(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
    if chosen.directory:
        features = CachedFeatures(Path(chosen.directory), *what)
    else:
        if elsewhere is None:
            _store_kept(target, body, data, layers, chosen.form, share)
        features = CachedFeatures.below(WORK / "features", *what)

    def source() -> StateSource:
        if chosen.states is None:
            return Extractor(body(), data.sequences, layers)
        found = EngineStates(Path(chosen.states), target, data.sequences, layers, chosen.form)
        found.check_complete(WORK / "states-requests.jsonl")
        found.check_layers()
        return found

    if served is None or chosen.states or features.complete:
        features.build(source, share)
    else:
        with _served_states(served, chosen.form, target, data, layers) as states:
            features.build(lambda: states, share)
    give_back_freed_memory()  # the target's layers, if they were there
    return features


def _store_kept(
    target: Ends,
    body: Callable[[], Target],
    data: TrainingData,
    layers: tuple[int, ...],
    form: str,
    share: Share,
) -> None:
    """Make shards of the states that were kept while the target answered, of all their layers; they go then."""
    kept = KeptStates.find(data.digest, target, body, data.sequences, layers, form)
    share.wait()  # until all have looked
    if kept is None:
        return

    def cache(layers: tuple[int, ...]) -> CachedFeatures:
        return CachedFeatures.below(WORK / "features", target, data.sequences, layers, data.digest, form)

    there = cache(layers).complete
    share.wait()
    if not there:
        cache(kept.layers).build(lambda: kept, share)
        share.wait()
    if share.rank == 0:
        kept.remove()


@contextmanager
def _served_states(
    served: Served, form: str, target: Ends, data: TrainingData, layers: tuple[int, ...]
) -> Iterator[ServedStates]:
    """Open servers that hand out the states of these layers, and hold them to the target's own."""
    longest = int(data.sequences.lengths.max()) + 1  # a request answers a token
    asked = engine_layers(layers, target.num_layers), min(longest, target.max_length), form
    with served.open(*asked) as servers:
        states = ServedStates(servers, target, data.sequences, layers, form)
        states.check_layers()
        yield states
