"""The target: the model that verifies, and whose distribution is never changed.

`resolve_target` turns a source (embedded, directory, hub id) into a Hugging Face directory; `load_target` loads
one for inference. A `Target` runs any decoder-only model through our attention (`attention.py`) and hands out what
drafters need: hidden features of chosen decoder layers, the post-norm hidden state, and the head.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from deepspec.errors import DeepSpecError
from deepspec.files import replacing
from deepspec.target.attention import CACHE_LENGTH, NAME, ForwardPass, KVCache
from deepspec.target.embedded import PREFIX, write_embedded
from deepspec.target.fused import FusedLayer, Int4Linear, PackedLinear, fuse
from deepspec.target.graphs import GraphedPasses
from deepspec.target.memory import reuse_freed_memory

RECORD = "deepspec.json"
H_LAST = -2  # as a layer id: h_last, after the final norm
_FOUR_DIMENSIONAL = torch.zeros(
    1, 1, 1, 1
)  # transformers leaves a 4-D mask alone, and ours comes with the ForwardPass


def resolve_target(source: str, revision: str | None, dtype: str, directory: str | Path) -> None:
    """Write the target named by `source` as a Hugging Face directory, whole or not at all.

    Args:
        source: `embedded:<name>`, a local directory, or a hub id.
        revision: pinned hub revision.
        dtype: of the written weights.

    Raises:
        DeepSpecError: unknown embedded name, no such directory or hub model, or no tokenizer in it.
    """
    torch_dtype = _dtype(dtype)
    with replacing(directory) as scratch:
        if source.startswith(PREFIX):
            write_embedded(source, torch_dtype, scratch)
        else:
            _check_directory(source)
            tokenizer = from_pretrained(AutoTokenizer, source, revision=revision)
            model = from_pretrained(AutoModelForCausalLM, source, revision=revision, dtype=torch_dtype)
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        record = {"source": source, "revision": revision, "dtype": dtype, "digest": _digest(scratch)}
        (scratch / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def load_target(
    source: str | Path,
    dtype: str | None = None,
    device: str | None = None,
    weights: str = "dense",
    graphs: bool = False,
) -> Target:
    """Load a target for inference.

    Args:
        source: a Hugging Face directory, a hub id, or `embedded:<name>` (fetched once into the user's cache).
        dtype: None keeps the directory's own; "float32" and "float64" are for checks.
        device: None takes a GPU where there is one.
        weights: "dense" as they are; "int4" rounds the decoder's projections to 4 bits in blocks of 32
            (`Int4Linear`; a CPU only). That is *another target*, and its outputs are its own; the embedded targets
            were published in such blocks, so for them it is the published precision.
        graphs: replay small passes as CUDA graphs (`deepspec.target.graphs`; a GPU only).

    Raises:
        DeepSpecError: nothing loadable there, no tokenizer, no chat template, an unsupported attention, or weights
            that this device or target cannot have.
    """
    reuse_freed_memory()
    source = str(source)
    if source.startswith(PREFIX):
        cached = Path.home() / ".cache" / "deepspec" / source.replace(":", "-")
        if not (cached / RECORD).exists():
            resolve_target(source, None, "bfloat16", cached)
        source = str(cached)
    _check_directory(source)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = from_pretrained(AutoTokenizer, source)
    wanted = "auto" if dtype is None else _dtype(dtype)
    model = from_pretrained(AutoModelForCausalLM, source, dtype=wanted, attn_implementation=NAME)
    if not tokenizer.chat_template:
        raise DeepSpecError(
            f"{source}: the tokenizer has no chat template; add the one the target was trained with"
        )
    if weights not in WEIGHTS:
        raise DeepSpecError(f"unknown weights {weights!r}; known: {', '.join(WEIGHTS)}")
    if weights == "int4":
        _check_int4(model, device, source)
    if graphs and torch.device(device).type != "cuda":
        raise DeepSpecError(f"CUDA graphs need a GPU; the target would run on {device}")
    return Target(model.to(device).eval(), tokenizer, source, weights, graphs)


WEIGHTS = {"dense": PackedLinear, "int4": Int4Linear}


class Target:
    """A loaded verifier. Not trainable: its layers are fused and packed for inference where that pays."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, source: str, weights: str = "dense", graphs: bool = False
    ):
        self.tokenizer = tokenizer
        self.source = source
        self.weights = weights
        self.config = model.config.get_text_config()
        self.generation_config = model.generation_config
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.vocab_size: int = self.config.vocab_size
        self.hidden_size: int = self.config.hidden_size
        self.num_layers: int = self.config.num_hidden_layers
        self.max_length: int = getattr(self.config, "max_position_embeddings", 1 << 20)
        self.digest = (
            _digest(Path(source))
            if Path(source).is_dir()
            else hashlib.sha256(source.encode()).hexdigest()[:16]
        )
        self.embeddings: Tensor = model.get_input_embeddings().weight.detach()  # [vocab, d]
        self.head_weight: Tensor = model.get_output_embeddings().weight.detach()  # [vocab, d]
        self._embed = model.get_input_embeddings()
        head = model.get_output_embeddings()
        self._head = PackedLinear(head.weight, head.bias)
        self._model = model.model if hasattr(model, "model") else model.base_model
        self._layers = decoder_layers(self._model, self.num_layers)
        with torch.no_grad():
            fuse(self._layers, WEIGHTS[weights])
        self._hooked: set[int] = set()
        self._checked = False
        self.graphs = graphs
        self._graphs = GraphedPasses(self._run) if graphs else None

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every token that ends an answer: the generation config's and the tokenizer's own."""
        stops = self.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        return frozenset(i for i in (*stops, self.tokenizer.eos_token_id) if i is not None)

    @torch.inference_mode()
    def forward(self, ids: Tensor, step: ForwardPass) -> Tensor:
        """One pass over new tokens.

        Args:
            ids: [batch, n].
            step: positions, mask and cache; its `features` are filled with [batch, n, d] for each wanted layer
                (`H_LAST` is the returned state itself).

        Returns:
            h_last [batch, n, d], after the final norm.
        """
        for layer in step.wanted - self._hooked - {H_LAST}:
            self._hook(layer)
        hidden = self._graphs(ids, step) if self._graphs else self._run(ids, step)
        if H_LAST in step.wanted:
            step.features[H_LAST] = hidden
        if not self._checked:
            self._check_attention(step)
        return hidden

    def cache(self, slots: int, owner: object) -> KVCache:
        """A KV cache of so many slots, in use while `owner` lives."""
        return self._graphs.cache(slots, owner) if self._graphs else KVCache(slots, CACHE_LENGTH)

    def _run(self, ids: Tensor, step: ForwardPass) -> Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=_FOUR_DIMENSIONAL,
            position_ids=step.positions,
            use_cache=False,
            step=step,
        )
        return output.last_hidden_state

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """h_last [..., d] → logits [..., vocab] in the target's dtype."""
        logits = self._head(hidden)
        if scaling := getattr(self.config, "logits_scaling", None):  # Granite
            logits = logits / scaling
        if scale := getattr(self.config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if softcap := getattr(self.config, "final_logit_softcapping", None):  # Gemma
            logits = torch.tanh(logits / softcap) * softcap
        return logits

    @property
    def precision(self) -> str:
        """How it computes, for records: "bfloat16", or "int4 weights, bfloat16"."""
        return (
            _name(self.dtype) if self.weights == "dense" else f"{self.weights} weights, {_name(self.dtype)}"
        )

    @property
    def rope_theta(self) -> float:
        """Base of the rotary embedding, of the full-attention layers where there are several kinds."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        rope = rope.get("full_attention", rope)
        return float(rope.get("rope_theta", 10000.0))

    @property
    def plain_head(self) -> bool:
        """Whether logits are the head's product with h_last and nothing else."""
        transforms = ("logits_scaling", "logit_scale", "final_logit_softcapping")
        return self._head.bias is None and not any(getattr(self.config, name, None) for name in transforms)

    def last_layers(self, count: int) -> list[FusedLayer]:
        """The last decoder layers, lowest first.

        Raises:
            DeepSpecError: there are fewer, or they are of another shape than Llama's, or in 4 bits.
        """
        if count > self.num_layers:
            raise DeepSpecError(f"{self.source} has {self.num_layers} layers, {count} were asked for")
        layers = list(self._layers[-count:])
        if self.weights != "dense" or not all(isinstance(layer, FusedLayer) for layer in layers):
            raise DeepSpecError(
                f"{self.source}: a draft cannot begin as layers of this shape; use `start: random`"
            )
        return layers

    @property
    def last_norm(self) -> Tensor:
        """Weight [d] of the norm behind the last of `last_layers`."""
        return self._model.norm.weight.detach()

    def check_layers(self, layer_ids: Iterable[int]) -> None:
        """Feature layers are -1 (embeddings) to num_layers − 2: engines hand out the last one normed."""
        for layer in layer_ids:
            if not -1 <= layer < self.num_layers - 1:
                raise DeepSpecError(
                    f"target layer {layer} cannot be a feature: this target has layers -1 to {self.num_layers - 2}"
                )

    def chat_ids(self, messages: list[dict], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation under the target's own template."""
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
        )

    def user_prefix_ids(self) -> list[int]:
        """The template up to where the user's words begin: from here the target writes a user turn (Magpie)."""
        marker = "\u2063deepspec\u2063"
        text = self.tokenizer.apply_chat_template([{"role": "user", "content": marker}], tokenize=False)
        return self.tokenizer(text[: text.index(marker)], add_special_tokens=False)["input_ids"]

    def _check_attention(self, step: ForwardPass) -> None:
        """Every layer must have come through our attention: a recurrent one would lose its state unseen."""
        if step.stored != set(range(self.num_layers)):
            missing = sorted(set(range(self.num_layers)) - step.stored)
            raise DeepSpecError(
                f"{self.source}: layers {missing[:4]} of this target do not use plain attention; it is not supported"
            )
        self._checked = True

    def _hook(self, layer: int) -> None:
        """Keep the raw output of decoder layer `layer` in the ForwardPass that asks for it."""
        self.check_layers([layer])

        def keep(module, args, kwargs, output):
            step = kwargs["step"]
            if layer in step.wanted:
                step.features[layer] = output[0] if isinstance(output, tuple) else output

        def keep_input(module, args, kwargs):
            step = kwargs["step"]
            if -1 in step.wanted:
                step.features[-1] = args[0] if args else kwargs["hidden_states"]

        if layer == -1:
            self._layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)
        else:
            self._layers[layer].register_forward_hook(keep, with_kwargs=True)
        self._hooked.add(layer)


def _check_int4(model: nn.Module, device: str, source: str) -> None:
    if torch.device(device).type != "cpu":
        raise DeepSpecError("int4 weights run on a CPU only; load the target with device='cpu'")
    if model.dtype != torch.bfloat16:
        raise DeepSpecError(f"int4 weights go with bfloat16 activations; {source} is in {_name(model.dtype)}")
    layers = decoder_layers(model, model.config.get_text_config().num_hidden_layers)
    sizes = {m.in_features for m in layers.modules() if isinstance(m, nn.Linear)}
    if uneven := sorted(size for size in sizes if size % Int4Linear.BLOCK):
        raise DeepSpecError(
            f"{source}: int4 weights need input sizes divisible by {Int4Linear.BLOCK}, found {uneven[0]}"
        )


def decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise DeepSpecError(f"{type(model).__name__}: found no list of {count} decoder layers")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise DeepSpecError(f"unknown dtype {name!r}; use bfloat16, float16 or float32")
    return dtype


def _check_directory(source: str) -> None:
    """A path must be a complete target directory; a hub id looks like `owner/name` and is not a path."""
    path = Path(source)
    if not path.is_dir():
        if source.count("/") == 1 and not source.startswith((".", "/")) and not path.parent.is_dir():
            return
        raise DeepSpecError(f"{source}: no such target directory (and not a hub id like owner/name)")
    if not (path / "config.json").exists():
        raise DeepSpecError(f"{source}: not a target directory: config.json is missing")
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise DeepSpecError(
            f"{source}: the target has no tokenizer (tokenizer.json); add the one it was trained with"
        )


def from_pretrained(cls: Any, source: str, **options: Any) -> Any:
    """`from_pretrained`, its many errors turned into one line."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return cls.from_pretrained(source, **options)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DeepSpecError(f"{source}: cannot be loaded as a target: {first}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _digest(directory: Path) -> str:
    """Identity of a target: its configuration, tokenizer, template and weights (many gigabytes are sampled)."""
    recorded = directory / RECORD
    if recorded.exists() and "digest" in (
        record := json.loads(recorded.read_text())
    ):  # a draft's record has none
        return record["digest"]
    state = hashlib.sha256()
    for path in sorted(p for pattern in ("*.json", "*.jinja", "*.model") for p in directory.glob(pattern)):
        state.update(path.name.encode() + path.read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        step = max(size // 4096, 1 << 20)
        with path.open("rb") as file:
            for start in range(0, size, step):
                file.seek(start)
                state.update(file.read(1 << 20))
    return state.hexdigest()[:16]
