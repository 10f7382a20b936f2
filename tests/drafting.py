"""Untrained networks of every trained algorithm, and how a test writes one as a draft directory."""

from __future__ import annotations

from deepspec.drafters.checkpoint import stored_weights, write_drafter
from deepspec.drafters.network import Network
from deepspec.target.model import Target
from tests.tiny import make_network

SMALL = {"draft_vocab_size": 128}
DRAFTS = {
    "dspark": {"layers": 1, "block_size": 3, "markov_rank": 4, "target_layer_ids": [0, 1], **SMALL},
    "dflash": {"layers": 1, "block_size": 3, "target_layer_ids": [0, 1], **SMALL},
    "eagle3": {"block_size": 3, **SMALL},
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
