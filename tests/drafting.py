"""Untrained networks of every trained algorithm, how a test writes one as a draft, and a drafter that knows answers."""

from __future__ import annotations

from deepspec.decoding.drafter import Drafter, Proposal, Session
from deepspec.drafters.checkpoint import stored_weights, write_drafter
from deepspec.drafters.network import Network
from deepspec.target.model import Target
from tests.tiny import make_network

SMALL = {"draft_vocab_size": 128}
DRAFTS = {
    "dspark": {"layers": 1, "block_size": 3, "markov_rank": 4, "target_layer_ids": [0, 1], **SMALL},
    "dflash": {"layers": 1, "block_size": 3, "target_layer_ids": [0, 1], **SMALL},
    "dflash2": {
        "layers": 1,
        "block_size": 3,
        "target_layer_ids": [0, 1],
        "selector_rank": 8,
        "selector_top_k": 6,
        **SMALL,
    },
    "dspark-low-rank": {
        "layers": 1,
        "block_size": 3,
        "markov_rank": 4,
        "target_layer_ids": [0, 1],
        "head_rank": 8,
        "draft_vocab_size": 0,
    },
    "dflash2-low-rank": {
        "layers": 1,
        "block_size": 3,
        "target_layer_ids": [0, 1],
        "selector_rank": 8,
        "selector_top_k": 6,
        "head_rank": 8,
        "draft_vocab_size": 0,
    },
    "dspark-causal": {
        "layers": 2,
        "block_size": 3,
        "markov_rank": 4,
        "target_layer_ids": [0, 1],
        "causal": True,
        "sliding_window": 6,
        **SMALL,
    },
    "eagle3": {"block_size": 3, **SMALL},
    "eagle3-3.1": {"block_size": 3, "version": "3.1", "sliding_window": 6, **SMALL},
    "peagle": {"block_size": 3, "sliding_window": 6, **SMALL},
    "peagle-1": {"block_size": 3, "layers": 1, "qk_norm": True, **SMALL},
    "mtp": {"block_size": 3, "start": "random"},
    "medusa": {"heads": 3, "layers": 2, **SMALL},
    "lm": {"block_size": 3, "from_layers": [0, 3]},
    "lm-scratch": {"block_size": 3, "hidden_size": 32, "layers": 1},
}


def make(name: str, target: Target) -> Network:
    """An untrained network whose weights are all random."""
    return make_network(target, name.split("-")[0], **DRAFTS[name])


def write(model: Network, target: Target, path, written_out: bool = False):
    """A draft directory in float32, so that what is read back can be compared closely."""
    weights = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in stored_weights(model, written_out).items()
    }
    own = {name: tensor for name, tensor in model.stored(written_out).items() if name in weights}
    write_drafter(path, model.description(), weights | {n: t.clone() for n, t in own.items()}, target, {})
    return path


class Guesser(Drafter):
    """Proposes the tokens of known answers, of which one in `every` is spoiled.

    Args:
        answers: prompt → (answer, every).
    """

    block_size = 6

    def __init__(self, answers: dict[tuple[int, ...], tuple[list[int], int]]):
        self.answers = answers

    def session(self, slots: int) -> Session:
        return _Guesses(self, slots)


class _Guesses(Session):
    def __init__(self, drafter: Guesser, slots: int):
        self.drafter, self.rows = drafter, [[] for _ in range(slots)]

    def begin(self, row: int) -> None:
        self.rows[row] = []

    def extend(self, row: int, tokens: list[int], features) -> None:
        self.rows[row] += tokens

    def move(self, source: int, destination: int) -> None:
        self.rows[destination] = self.rows[source]

    def propose(self, asks) -> list[Proposal]:
        return [Proposal.chain(self._guess([*self.rows[ask.row], ask.anchor])[: ask.room]) for ask in asks]

    def _guess(self, tokens: list[int]) -> list[int]:
        for prompt, (answer, every) in self.drafter.answers.items():
            if tuple(tokens[: len(prompt)]) == prompt:
                first = len(tokens) - len(prompt)
                coming = list(enumerate(answer))[first : first + self.drafter.block_size]
                return [(token + 3) % 500 if i % every == 2 else token for i, token in coming]
        return []
