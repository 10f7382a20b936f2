"""An independent draft language model: any smaller model of the target's tokenizer.

It is used as it is, or distilled on the target's answers (DistillSpec, arXiv 2310.08461), and comes from one of three
places: a model of its own (`source`), a choice of the target's own layers (`from_layers`, with its embeddings and head,
which stay frozen), or nothing (`hidden_size`: the target's architecture, smaller). Directories are plain Hugging Face
ones, which every engine loads.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from deepspec.decoding.tree import Vocabulary
from deepspec.drafters.algorithm import Algorithm
from deepspec.drafters.autoregressive import AutoregressiveDrafter
from deepspec.drafters.checkpoint import Checkpoint
from deepspec.drafters.network import Network, Outputs
from deepspec.drafters.params import LMParams
from deepspec.errors import DeepSpecError
from deepspec.target.attention import NAME, ForwardPass
from deepspec.target.checkpoint import stored_weights
from deepspec.target.ends import Ends
from deepspec.target.head import head_transform
from deepspec.target.model import Target
from deepspec.target.source import decoder_layers, from_pretrained, load_model


@dataclass(frozen=True)
class LMConfig:
    """What training needs to know; `hidden_size` and `vocab_size` are the target's.

    `draft_vocab_size` is smaller where the target's embeddings are padded further than the draft's.
    """

    hidden_size: int
    vocab_size: int
    block_size: int
    draft_vocab_size: int
    target_layer_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, target: Ends, model: PreTrainedModel, block_size: int) -> LMConfig:
        return cls(target.hidden_size, target.vocab_size, block_size, model.config.vocab_size)


class LMModel(Network):
    """A Hugging Face model in training, with the target's head beside it for the target's law."""

    def __init__(self, config: LMConfig, model: PreTrainedModel):
        nn.Module.__init__(self)
        self.config, self.model = config, model
        columns = config.draft_vocab_size
        self.lm_head = nn.Linear(config.hidden_size, columns, bias=False).requires_grad_(False)
        self.register_buffer("draft_ids", torch.arange(columns))
        self.low_rank_head = None

    maps_columns = False  # they are the target's ids, the padding of its vocabulary left out

    def share(self, target: Ends, draft_ids: Tensor) -> None:
        self.lm_head.weight.data = target.head_weight[: len(self.draft_ids)].to(torch.float32)
        self.target_transform = target.head_transform.rows(self.draft_ids)

    def blocks(self) -> list[nn.Module]:
        return list(decoder_layers(self.model, self.model.config.num_hidden_layers))

    def forward(self, features: Tensor, tokens: Tensor, anchors: Tensor) -> Tensor:
        """Return the post-norm states at the anchors and behind, [batch, blocks, γ, its own d], true tokens fed."""
        if self.checkpointing and not self.model.is_gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        tokens = known(tokens, self.config.draft_vocab_size)
        hidden = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        places = anchors[..., None] + torch.arange(self.config.block_size, device=anchors.device)
        places = places.clamp(max=tokens.shape[1] - 1)
        rows = torch.arange(len(tokens), device=anchors.device)[:, None, None]
        return hidden[rows, places]

    def outputs(self, hidden: Tensor, previous: Tensor) -> Outputs:
        scale = head_transform(self.model.config).scale  # as its own forward does: Granite, Cohere
        scaled = hidden if scale == 1.0 else hidden * scale
        return Outputs([(scaled, self.model.get_output_embeddings().weight)])

    def stored(self, written_out: bool = True) -> dict[str, Tensor]:
        return self.model.state_dict()

    def description(self) -> dict[str, Any]:
        described = {"architectures": [type(self.model).__name__], "block_size": self.config.block_size}
        return self.model.config.to_dict() | described | {"dtype": "bfloat16"}


def network(params: LMParams, target: Ends) -> LMModel:
    """Make the model that `params` describe, in float32.

    Raises:
        DeepSpecError: another tokenizer, a layer that the target lacks, or a width that it cannot be cut to.
    """
    if params.source is not None:
        check_tokenizer(params.source, target)
        model = load_model(params.source, dtype=torch.float32)
    elif params.hidden_size is not None:
        model = scratch(target, params.hidden_size, params.layers)
    else:
        model = cut_out(target, params.from_layers or [])
    cut_padding(model, target.vocab_size)
    if not params.finetune:
        model.requires_grad_(False)
    return LMModel(LMConfig.of(target, model, params.block_size), model)


def cut_padding(model: PreTrainedModel, vocab_size: int) -> None:
    """Cut embeddings and head to the target's: rows beyond are padding, since the two share a tokenizer."""
    if model.config.vocab_size > vocab_size:
        model.resize_token_embeddings(vocab_size)


def known(tokens: Tensor, size: int) -> Tensor:
    """Return token ids as a draft of `size` embeddings takes them: padding of the target's becomes its last row."""
    return tokens.clamp(max=size - 1)


def cut_out(target: Ends, layers: list[int]) -> PreTrainedModel:
    """Make a model of some of the target's layers, in their order; embeddings and head are the target's, and frozen."""
    for layer in layers:
        if not 0 <= layer < target.num_layers:
            raise DeepSpecError(
                f"from_layers: the target has layers 0 to {target.num_layers - 1}, not {layer}"
            )
    prefixes = tuple(f".layers.{layer}." for layer in layers)
    state = None
    if Path(target.source).is_dir():
        state = stored_weights(
            Path(target.source),
            lambda name: ".layers." not in name or any(prefix in name for prefix in prefixes),
        )
    if state is None:
        state = load_model(target.source, dtype=torch.float32).state_dict()
    model = AutoModelForCausalLM.from_config(_config(target, layers), dtype=torch.float32)
    kept = {name: tensor for name, tensor in state.items() if ".layers." not in name}
    for place, layer in enumerate(layers):
        prefix = f".layers.{layer}."
        kept |= {
            name.replace(prefix, f".layers.{place}."): tensor
            for name, tensor in state.items()
            if prefix in name
        }
    model.load_state_dict(kept)
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        part.requires_grad_(False)
    return model


def scratch(target: Ends, hidden_size: int, layers: int) -> PreTrainedModel:
    """Make a model of the target's architecture with random weights, narrower and shallower."""
    config = _config(target, [0] * layers)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or target.hidden_size // heads
    share = hidden_size / target.hidden_size
    config.num_key_value_heads = max(round(kv_heads * share), 1)
    config.num_attention_heads = config.num_key_value_heads * (heads // kv_heads)
    config.head_dim, config.hidden_size = head_dim, hidden_size
    config.intermediate_size = max(round(config.intermediate_size * share), 8)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _config(target: Ends, layers: list[int]) -> Any:
    """Return the target's configuration with other layers."""
    config = deepcopy(from_pretrained(AutoConfig, target.source).get_text_config())
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
    return config


def check_tokenizer(source: str | Path, target: Ends) -> None:
    """Refuse a draft model that does not cut text as its target does."""
    tokenizer = from_pretrained(AutoTokenizer, str(source))
    ours, theirs = target.tokenizer.get_vocab(), tokenizer.get_vocab()
    if ours != theirs:
        token = min(set(ours.items()) ^ set(theirs.items()))[0]
        raise DeepSpecError(
            f"{source}: another tokenizer than the target's (they differ at {token!r}); a draft must share it"
        )


class LMDrafter(AutoregressiveDrafter):
    """Drafts with a model of its own, through the attention and the packed layers that targets run on."""

    on_features = False

    def __init__(self, model: Target, block_size: int, target: Target):
        self.model = model
        self.block_size = block_size
        self.vocab_size = target.vocab_size
        self.device = target.device
        columns = model.vocab_size
        self.vocabulary = (
            Vocabulary(target.vocab_size)
            if columns == target.vocab_size
            else Vocabulary(target.vocab_size, torch.arange(columns), list(range(columns)))
        )

    def step(self, ids: Tensor, above: Tensor | None, step: ForwardPass) -> Tensor:
        return self.model.forward(known(ids, self.model.vocab_size)[None], step)[0]

    def logits(self, outputs: Tensor) -> Tensor:
        return self.model.logits(outputs)


def read(checkpoint: Checkpoint, target: Ends) -> LMModel:
    """Return the network of a directory, in float32."""
    model = load_model(str(checkpoint.directory), dtype=torch.float32)
    cut_padding(model, target.vocab_size)
    return LMModel(LMConfig.of(target, model, checkpoint.config.get("block_size", 5)), model)


def load(checkpoint: Checkpoint, target: Target) -> LMDrafter:
    """Load a model directory.

    Raises:
        DeepSpecError: another tokenizer, or an unknown or missing weight.
    """
    directory = checkpoint.directory
    check_tokenizer(directory, target)
    model, info = from_pretrained(
        AutoModelForCausalLM,
        str(directory),
        dtype=target.dtype,
        attn_implementation=NAME,
        output_loading_info=True,
    )
    for what in ("unexpected_keys", "missing_keys", "mismatched_keys"):
        if info[what]:
            raise DeepSpecError(f"{directory}: {what.replace('_', ' ')}: {sorted(info[what])[:3]}")
    cut_padding(model, target.vocab_size)
    runner = Target(model.to(target.device).eval(), target.tokenizer, str(directory))
    return LMDrafter(runner, checkpoint.config.get("block_size", 5), target)


ALGORITHM = Algorithm(LMParams, ("*ForCausalLM",), load, network, standalone=True, read=read)
