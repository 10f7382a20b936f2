"""MTP: a target's own next-token module as its draft, as it is or distilled further (DeepSeek-V3, arXiv 2412.19437).

The module reads W [norm(embed(x_{i+1})); norm(h_i)], h the target's post-norm state, at position i; its decoder layer
is of the target's own kind (latent attention, experts and gates included), run as transformers has it. The output
behind its norm gives the logits of x_{i+2} by the target's head, and takes h's place where the target has not been
yet, so one module drafts several tokens, as engines let it. Several modules of DeepSeek's names draft one token each
(`drafters/module_stack.py`); the first of them alone is trained.

Training unrolls those γ steps from the anchors with the true tokens fed (FastMTP, arXiv 2509.18362), as EAGLE-3's: a
query of step k sees the first step's keys up to its anchor, and one entry of each later step, its own. Without modules
in the target a draft begins as its last layer, or at random. Files carry the names that the target's checkpoint has for
the same parts, so what was trained goes back by name (`deepspec export`).
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from deepspec.drafters.algorithm import Algorithm
from deepspec.drafters.autoregressive import AutoregressiveDrafter
from deepspec.drafters.checkpoint import Checkpoint
from deepspec.drafters.eagle_network import rows
from deepspec.drafters.module_stack import ModuleStack
from deepspec.drafters.network import Network, missing_keys
from deepspec.drafters.origin import open_origin
from deepspec.drafters.params import MTPParams
from deepspec.errors import DeepSpecError
from deepspec.target.attention import NAME, ForwardPass
from deepspec.target.checkpoint import name_of
from deepspec.target.ends import H_LAST, Ends, final_norm
from deepspec.target.fused import FusedLayer, PackedLinear, fuse
from deepspec.target.model import Target
from deepspec.target.next_token import (
    Module,
    Parts,
    last_layer,
    modules_of,
    one_layer,
    places_of,
    read_layer,
    read_module,
    stack_of,
)
from deepspec.target.source import from_pretrained, local_directory

ARCHITECTURE = "DeepSpecMTPModel"


@dataclass(frozen=True)
class MTPConfig:
    """Sizes of the network.

    Args:
        style, prefix: what its weights are called; see `deepspec.target.next_token`.
        experts: whether its layer has them.
    """

    hidden_size: int
    vocab_size: int
    num_target_layers: int
    block_size: int
    style: str = "deepseek"
    prefix: str = ""
    experts: bool = False

    target_layer_ids = (H_LAST,)

    @property
    def draft_vocab_size(self) -> int:
        return self.vocab_size

    @property
    def module(self) -> Module:
        return Module(self.style, self.prefix)

    @classmethod
    def read(cls, config: dict[str, Any], target: Ends) -> MTPConfig:
        """From a `config.json` of ours; sizes that it leaves out are the target's.

        Raises:
            DeepSpecError: a missing key.
        """
        found = _sizes(target) | {"block_size": 3} | config
        if missing := missing_keys(cls, found):
            raise DeepSpecError(f"config.json of an MTP draft lacks {', '.join(missing)}")
        return cls(**{name: found[name] for name in cls.__dataclass_fields__ if name in found})

    def to_dict(self) -> dict[str, Any]:
        return {"architectures": [ARCHITECTURE], "model_type": "mtp", **asdict(self), "dtype": "bfloat16"}


def _sizes(target: Ends) -> dict[str, Any]:
    return {
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "num_target_layers": target.num_layers,
    }


class MTPModel(Network):
    """The module in training. Activations are kept whatever `checkpointing` says: later steps read its keys.

    Args:
        layer: the configuration of its decoder, from `one_layer`.
    """

    def __init__(self, config: MTPConfig, layer: PreTrainedConfig, start: str = "random"):
        super().__init__(config)
        self.start = start
        self.decoder: PreTrainedModel = AutoModel.from_config(layer, dtype=torch.float32)
        self.decoder.set_input_embeddings(nn.Identity())  # it reads what `joined` gives
        norm = final_norm(self.decoder, type(self.decoder).__name__)
        self.norm_name = f"{name_of(self.decoder, norm)}.weight"
        self.embedding_norm, self.hidden_norm = deepcopy(norm), deepcopy(norm)
        self.joins = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.initialise()

    def init_from_target(self, target: Ends, channel_std: Tensor) -> None:
        """Begin as the target's last layer, which reads the state alone."""
        found = _last_layer(target)
        if found is None:
            raise _no_layer(target)
        self._take_layer(read_layer(*found), target.source)
        with torch.no_grad():
            embedding, hidden = self.joins.weight.chunk(2, 1)
            if self.config.module.naming.hidden_first:
                embedding, hidden = hidden, embedding
            embedding.zero_()
            hidden.copy_(torch.eye(len(hidden)))

    def take(self, found: Parts, source: str) -> None:
        """Take the weights of a module.

        Raises:
            DeepSpecError: a weight that is missing, unknown, or of another shape.
        """
        for name in ("joins", "embedding_norm", "hidden_norm"):
            own = self.get_parameter(f"{name}.weight")
            if name not in found.parts or found.parts[name].shape != own.shape:
                said = list(found.parts[name].shape) if name in found.parts else "missing"
                raise DeepSpecError(f"{source}: {self._stored(name)} is {said}, expected {list(own.shape)}")
            own.data.copy_(found.parts[name])
        if "norm" not in found.parts:
            raise DeepSpecError(f"{source}: {self._stored('norm')} is missing")
        self._take_layer(found, source)
        rows_of = {"head": self.take_head, "embeddings": self.take_embeddings}
        for name, take in rows_of.items():
            if name in found.parts:
                take(found.parts[name][: self.config.vocab_size].float())

    def _take_layer(self, found: Parts, source: str) -> None:
        """Take a decoder layer, and the norm behind it where it is there, by the names of a checkpoint."""
        state = {f"layers.0.{name}": weight for name, weight in found.layer.items()}
        state |= {self.norm_name: found.parts["norm"]} if "norm" in found.parts else {}
        options = {"config": self.decoder.config, "state_dict": state, "dtype": torch.float32}
        try:
            loaded, info = from_pretrained(type(self.decoder), None, output_loading_info=True, **options)
        except DeepSpecError as error:
            why = " ".join(str(error.__cause__).split())[:160]
            said = f"{source}: its next-token module's layer is not of the target's kind: {why}"
            raise DeepSpecError(said) from None
        known = dict(self.decoder.named_parameters())
        missing = [name for name in sorted(info["missing_keys"]) if name in known and name != self.norm_name]
        wrong = {"missing": missing} | {
            what: sorted(map(str, info[f"{what}_keys"])) for what in ("unexpected", "mismatched")
        }
        for what, names in wrong.items():
            if names:
                raise DeepSpecError(f"{source}: {what} weights of its next-token module's layer: {names[:3]}")
        self.decoder.load_state_dict(loaded.state_dict(), strict=False)

    def _stored(self, part: str) -> str:
        module = self.config.module
        return f"{module.prefix}{getattr(module.naming, part)}.weight"

    def stored(self, written_out: bool = False) -> dict[str, Tensor]:
        """Return the weights by the names that the target's checkpoint has for them."""
        module = self.config.module
        layer = f"{module.prefix}{module.naming.layer}"
        found = revert_weight_conversion(self.decoder, self.decoder.state_dict())
        norm = found.pop(self.norm_name)
        named = {f"{layer}{name.removeprefix('layers.0.')}": weight for name, weight in found.items()}
        inputs = ("joins", "embedding_norm", "hidden_norm")
        parts: dict[str, Tensor] = {name: self.get_parameter(f"{name}.weight") for name in inputs}
        parts["norm"] = norm
        if written_out or self.own_embeddings:
            parts["embeddings"] = self.embed_tokens.weight
        if written_out or self.own_head is not None:
            parts["head"] = self.head
        return named | {self._stored(part): weight for part, weight in parts.items()}

    def blocks(self) -> list[nn.Module]:
        return [self.decoder.get_submodule("layers.0")]

    def joined(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Return what the layer reads [..., d] of embeddings and states [..., d]."""
        parts = (self.embedding_norm(embedded), self.hidden_norm(hidden))
        return self.joins(torch.cat(parts[::-1] if self.config.module.naming.hidden_first else parts, -1))

    def forward(self, features: Tensor, tokens: Tensor, anchors: Tensor) -> Tensor:
        """Hidden states of the drafts that start at the anchors, the true tokens fed.

        Args:
            features: h_last [batch, n, d] of every token of the sequences.
            tokens: int64 [batch, n].
            anchors: int64 [batch, blocks], positions of the anchors (>= 1).

        Returns:
            [batch, blocks, γ, d] behind the norm: row k predicts the token at anchor + k + 1.
        """
        n, first = tokens.shape[1], anchors - 1
        embedded = self.embed_tokens(tokens)
        places = torch.arange(n - 1, device=tokens.device)
        joined = self.joined(embedded[:, 1:], features[:, :-1].to(embedded))  # place i: x_{i+1} with h_i
        seen = (places <= places[:, None]).expand(len(tokens), -1, -1)
        hidden, cache = self._pass(joined, seen, places.expand(len(tokens), -1), None)
        steps = [rows(hidden, first)]
        seen = places <= first[..., None]  # [batch, blocks, n - 1]
        own = torch.eye(first.shape[1], dtype=torch.bool, device=tokens.device).expand(len(tokens), -1, -1)
        for k in range(1, self.config.block_size):
            fed = rows(embedded, (anchors + k).clamp(max=n - 1))
            seen = torch.cat((seen, own), -1)
            hidden, cache = self._pass(self.joined(fed, steps[-1]), seen, first + k, cache)
            steps.append(hidden)
        return torch.stack(steps, 2)

    def _pass(self, joined: Tensor, seen: Tensor, places: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Run the layer and the norm; seen bool [batch, m, keys]."""
        mask = torch.zeros(seen.shape, dtype=joined.dtype, device=joined.device)
        out = self.decoder(
            inputs_embeds=joined,
            attention_mask=mask.masked_fill_(~seen, torch.finfo(mask.dtype).min / 2)[:, None],
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
        )
        return out.last_hidden_state, out.past_key_values

    def description(self) -> dict[str, Any]:
        return self.config.to_dict()


class MTPDrafter(AutoregressiveDrafter):
    """Drafts from the target's last state and the module's own ones, a pass for each level of the tree."""

    layers = (H_LAST,)

    def __init__(self, model: MTPModel, target: Target):
        self.config = model.config
        self.block_size = model.config.block_size
        self.vocab_size = target.vocab_size
        self.device, self.dtype = target.device, target.dtype
        with torch.no_grad():
            model = model.for_drafting(target).eval()
            self._embed, self._head = model.embed_tokens.weight, PackedLinear(model.head)
            self._joined, self._decoder = model.joined, model.decoder
            self._decoder.set_attn_implementation(NAME)
            layers = cast(nn.ModuleList, self._decoder.get_submodule("layers"))
            fuse(layers)
        self._fused = all(isinstance(layer, FusedLayer) for layer in layers)
        self.vocabulary = model.vocabulary()

    def fuse(self, features: Tensor) -> Tensor:
        """h_last [n, d], which the module reads as it is."""
        return features

    def step(self, ids: Tensor, above: Tensor | None, step: ForwardPass) -> Tensor:
        if above is None:
            raise ValueError("each token is read below a state")
        x = self._joined(F.embedding(ids, self._embed), above)[None]
        # Fused layers ask the step for masks; others hand on what transformers makes of one that hides nothing.
        shape = (1, 1, 1, 1) if self._fused else x.shape[:2]
        out = self._decoder(
            inputs_embeds=x,
            attention_mask=torch.ones(shape, device=self.device),
            position_ids=step.positions,
            use_cache=False,
            step=step,
        )
        return out.last_hidden_state[0]

    def logits(self, outputs: Tensor) -> Tensor:
        return self._head(outputs)


@dataclass(frozen=True)
class ModuleOrigin:
    """A module that a draft begins as: the target's own, or that of a draft directory.

    Args:
        record: what a draft that began so says of it.
    """

    directory: Path
    module: Module
    vocab_size: int
    record: dict[str, Any]

    @property
    def ids(self) -> Tensor:
        return torch.arange(self.vocab_size)

    def give(self, network: Network) -> None:
        cast(MTPModel, network).take(read_module(self.directory, self.module), str(self.directory))


def own_module(target: Ends) -> ModuleOrigin | None:
    """Return the first next-token module in the target's own files; None where there is none."""
    directory = local_directory(target.source)
    modules = modules_of(places_of(directory)) if directory else []
    if directory is None or not modules:
        return None
    record = {"directory": target.source, "digest": target.digest, "module": modules[0].prefix.rstrip(".")}
    return ModuleOrigin(directory, modules[0], target.vocab_size, record)


def _has_experts(directory: Path, prefix: str) -> bool:
    return any(name.startswith(prefix) and ".experts." in name for name in places_of(directory))


def read(checkpoint: Checkpoint, target: Ends) -> MTPModel:
    """Return the network of a directory, in float32: a draft's, or the target's own.

    Raises:
        DeepSpecError: no module there, or an unknown, missing or misshapen weight.
    """
    return _read(checkpoint, _modules(checkpoint.directory)[0], target)


def _modules(directory: Path) -> list[Module]:
    modules = modules_of(places_of(directory))
    if not modules:
        raise DeepSpecError(f"{directory}: it has no next-token module (MTP)")
    return modules


def _read(checkpoint: Checkpoint, module: Module, target: Ends) -> MTPModel:
    directory = checkpoint.directory
    config = replace(
        MTPConfig.read(checkpoint.config, target),
        **asdict(module),
        experts=_has_experts(directory, module.prefix),
    )
    model = MTPModel(config, one_layer(target.config, config.experts))
    model.origin = ModuleOrigin(directory, module, target.vocab_size, {})
    model.share(target, torch.arange(target.vocab_size))
    return model


def load(checkpoint: Checkpoint, target: Target) -> MTPDrafter | ModuleStack:
    """Load a module, ours or the target's own, or several that draft together."""
    stacked = stack_of(_modules(checkpoint.directory))
    drafters = [MTPDrafter(_read(checkpoint, module, target), target) for module in stacked]
    return ModuleStack(drafters, target) if len(drafters) > 1 else drafters[0]


def network(params: MTPParams, target: Ends) -> MTPModel:
    """Make the network to train, or to be used as it is.

    Raises:
        DeepSpecError: a draft to go on from that is of another kind, or a module that is to be used as it is and is
            not there.
    """
    origin = None
    if (found := open_origin(params.start, ("mtp",), target)) is not None:
        directory = found.checkpoint.directory
        origin = ModuleOrigin(directory, modules_of(places_of(directory))[0], target.vocab_size, found.record)
    elif params.start == "auto":
        origin = own_module(target)
    if not params.finetune and origin is None:
        raise DeepSpecError(f"{target.source} has no next-token module (MTP) that could be used as it is")
    config = MTPConfig(**_sizes(target), block_size=params.block_size)
    if origin is not None:
        experts = _has_experts(origin.directory, origin.module.prefix)
        model = MTPModel(
            replace(config, **asdict(origin.module), experts=experts), one_layer(target.config, experts)
        )
        model.start, model.origin = str(origin.record["directory"]), origin
    else:
        model = _new(params, target, config)
    if not params.finetune:
        if not model.joins.weight.is_meta:
            model.share(target, torch.arange(target.vocab_size))
        model.requires_grad_(False)
    return model


def _new(params: MTPParams, target: Ends, config: MTPConfig) -> MTPModel:
    """Make a module for a target that has none: its last layer's copy, or random."""
    found = _last_layer(target) if params.start != "random" else None
    if found is None and params.start == "target":
        raise _no_layer(target)
    experts = found is not None and _has_experts(*found)
    config = replace(config, prefix=f"model.layers.{target.num_layers}.", experts=experts)
    return MTPModel(config, one_layer(target.config, experts), "random" if found is None else "target")


def _last_layer(target: Ends) -> tuple[Path, str] | None:
    """Return the directory of a target and how the names of its last layer begin there."""
    directory = local_directory(target.source)
    prefix = last_layer(places_of(directory), target.num_layers) if directory else None
    return (directory, prefix) if directory and prefix else None


def _no_layer(target: Ends) -> DeepSpecError:
    return DeepSpecError(f"{target.source}: no file says which layer is its last; use start: random")


ALGORITHM = Algorithm(MTPParams, (ARCHITECTURE,), load, network, read=read)
