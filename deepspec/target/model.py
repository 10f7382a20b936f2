"""The target: the model that verifies, and whose distribution is never changed.

`resolve_target` turns a source (embedded, directory, hub id) into a Hugging Face directory; `load_target` loads
one for inference. A `Target` runs any decoder-only model through our attention (`attention.py`) and hands out what
drafters need: hidden features of chosen decoder layers, the post-norm hidden state, and the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from deepspec.errors import DeepSpecError
from deepspec.files import replacing
from deepspec.target import template
from deepspec.target.attention import CACHE_LENGTH, NAME, ForwardPass, KVCache
from deepspec.target.chat import check_renders
from deepspec.target.checks import check_files, check_source, check_vocabulary, whole_directory
from deepspec.target.embedded import PREFIX, write_embedded
from deepspec.target.ends import H_LAST, Ends, final_norm, load_ends
from deepspec.target.fused import (
    DecoderRotary,
    FusedLayer,
    Int4Linear,
    Make,
    PackedLinear,
    fuse,
    inference_norm,
    is_bare,
)
from deepspec.target.graphs import GraphedPasses
from deepspec.target.head import head_transform
from deepspec.target.identity import (
    RECORD,
    directory_digest,
    kept_date,
    target_record,
    write_record,
)
from deepspec.target.inference import inference
from deepspec.target.memory import reuse_freed_memory
from deepspec.target.native.layer import NativeLayers, Norm, as_one
from deepspec.target.next_token import keep_modules
from deepspec.target.reaches import resized
from deepspec.target.selftest import STEPS, Verdict, examine, refuse
from deepspec.target.source import (
    decoder_layers,
    dtype_name,
    dtype_named,
    from_pretrained,
    hub_directory,
    is_hub_id,
    load_model,
    moved,
    text_decoder,
)
from deepspec.target.states import OwnPasses, StateCache

_FOUR_DIMENSIONAL = torch.zeros(
    1, 1, 1, 1
)  # transformers leaves a 4-D mask alone, and ours comes with the ForwardPass


def resolve_target(
    source: str,
    revision: str | None,
    dtype: str,
    directory: str | Path,
    template_date: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Verdict:
    """Write the target named by `source` as a Hugging Face directory, whole or not at all, if it passes its self-test.

    Args:
        source: `embedded:<name>`, a local directory, or a hub id.
        revision: pinned hub revision; the commit that it stands for is recorded.
        dtype: of the written weights.
        template_date: for a chat template that asks for the date: the day it is pinned to. None keeps that of the
            target which the directory holds, if it has the same source, and else takes today.
        chat_template_kwargs: kept beside it; every conversation is rendered with them, and they are a part of what the
            target is.

    Raises:
        DeepSpecError: unknown embedded name, no such directory or hub model, no tokenizer in it, or a target whose
            output here would not be its own.
    """
    torch_dtype = dtype_named(dtype)
    day = template_date or kept_date(Path(directory), source) or template.today()
    with replacing(directory) as scratch:
        if source.startswith(PREFIX):
            write_embedded(source, torch_dtype, scratch)
        else:
            local, revision = whole_directory(source, revision)
            tokenizer = from_pretrained(AutoTokenizer, str(local))
            model = load_model(str(local), dtype=torch_dtype)
            check_vocabulary(source, model, tokenizer)
            model.save_pretrained(scratch)
            keep_modules(local, scratch, torch_dtype)
            tokenizer.save_pretrained(scratch)
        written = from_pretrained(AutoTokenizer, str(scratch))
        template.check_there(source, written)
        if template.asks_for_date(written):
            template.pin(written, day)
            written.save_pretrained(scratch)
        digest = directory_digest(scratch)
        options = dict(chat_template_kwargs or {})
        check_renders(source, written, options)
        verdict = _examine(str(scratch), source, digest, written)
        refuse(source, verdict)
        made = {"source": source, "revision": revision, "dtype": dtype}
        write_record(scratch, made, digest, options, template.pinned(written))
    return verdict


def _examine(
    directory: str, source: str, digest: str, tokenizer: PreTrainedTokenizerBase, fresh: bool = False
) -> Verdict:
    """Self-test of a directory; see `deepspec.target.selftest`."""

    def load(attention: str | None, dtype: torch.dtype | None, sizes: Mapping[str, int]) -> PreTrainedModel:
        options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
        if sizes:
            options["config"] = resized(from_pretrained(AutoConfig, directory), sizes)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(directory, dtype=dtype or "auto", **options)
        return moved(model, device, directory)

    def wrap(model: PreTrainedModel, verdict: Verdict) -> Target:
        return Target(model, tokenizer, source, verdict=verdict)

    return examine(digest, load, wrap, fresh)


def examine_target(source: str | Path, fresh: bool = False) -> Verdict:
    """Return what the self-test says of a directory or hub id; a refusal is in the verdict, not raised."""
    directory = _directory(str(source))
    digest = directory_digest(directory, check_files)
    return _examine(
        str(directory), str(source), digest, from_pretrained(AutoTokenizer, str(directory)), fresh
    )


def _directory(source: str) -> Path:
    """Return the directory of a source that is one, or of a hub id."""
    check_source(source)
    if not is_hub_id(source):
        return Path(source)
    directory = hub_directory(source)
    check_source(str(directory))
    return directory


def load_target(
    source: str | Path,
    dtype: str | torch.dtype | None = None,
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
    directory = _directory(source)
    digest = directory_digest(directory, check_files)
    wanted = None if dtype is None else dtype_named(dtype)
    tokenizer = from_pretrained(AutoTokenizer, str(directory))
    verdict = _examine(str(directory), source, digest, tokenizer)
    refuse(source, verdict)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    attention = {"attn_implementation": NAME} if verdict.trees else {}
    model = load_model(str(directory), dtype=wanted or "auto", **attention)
    template.check_there(source, tokenizer)
    check_vocabulary(source, model, tokenizer)
    if weights not in WEIGHTS:
        raise DeepSpecError(f"unknown weights {weights!r}; known: {', '.join(WEIGHTS)}")
    if weights == "int4":
        _check_int4(model, device, source)
    if graphs and torch.device(device).type != "cuda":
        raise DeepSpecError(f"CUDA graphs need a GPU; the target would run on {device}")
    if not verdict.trees and (graphs or weights != "dense"):
        raise DeepSpecError(
            f"{source}: neither CUDA graphs nor {weights} weights go with {verdict.body}: {verdict.reason}"
        )
    options = target_record(directory).get("chat_template_kwargs")
    return Target(moved(model, device, source), tokenizer, source, weights, graphs, verdict, digest, options)


def load_where_it_runs(directory: str | Path) -> Ends:
    """Load a target, or where vLLM runs it, as its record says, what is known of it without its layers.

    Raises:
        DeepSpecError: as `load_target` and `load_ends`.
    """
    served = target_record(Path(directory)).get("engine") == "vllm"
    return load_ends(directory) if served else load_target(directory)


WEIGHTS: dict[str, Make] = {"dense": PackedLinear, "int4": Int4Linear}


class Target(Ends):
    """A loaded verifier. Not trainable: its layers are fused and packed for inference where that pays."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        weights: str = "dense",
        graphs: bool = False,
        verdict: Verdict | None = None,
        digest: str = "",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        config = model.config.get_text_config()
        super().__init__(
            config,
            model.generation_config,
            tokenizer,
            source,
            weights,
            verdict,
            digest,
            chat_template_kwargs,
        )
        head = model.get_output_embeddings()
        self.dtype = model.dtype
        self.device = model.device
        self.embeddings = model.get_input_embeddings().get_parameter("weight").detach()
        self.head_weight = head.get_parameter("weight").detach()
        self.head_transform = head_transform(config, getattr(head, "bias", None))
        self._model = text_decoder(model)
        self.layers = decoder_layers(self._model, config.num_hidden_layers)
        self.num_layers = len(self.layers)
        if self.verdict.trees:
            with torch.no_grad():
                fuse(self.layers, WEIGHTS[weights])
        self._fused = all(isinstance(layer, FusedLayer) for layer in self.layers)
        self._hooked: set[int] = set()
        self._recording: Any = None  # the step whose features are being computed
        self._states = (
            None if self.verdict.trees else OwnPasses(self._model, self._record, self.verdict.body == STEPS)
        )
        self._joined = True  # unless somebody looks between layers
        self.graphs = graphs
        self._graphs = GraphedPasses(self._run) if graphs else None

    @inference
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
        if self._states:
            hidden = self._states(ids, step)
        else:
            hidden = self._graphs(ids, step) if self._graphs else self._run(ids, step)
        if H_LAST in step.wanted:
            step.features[H_LAST] = hidden
        return hidden

    @cached_property
    def native(self) -> bool:
        """Whether our kernels run every layer, so that a pass over packed requests costs no padding."""
        return self._fused and all(cast(FusedLayer, layer).native for layer in self.layers)

    @cached_property
    def _stack(self) -> NativeLayers | None:
        """All layers as one call; None where they are not the kernels', or not all that the decoder does."""
        if not self.native or not is_bare(self._model) or not self._last_norm.suits:
            return None
        return as_one([cast(FusedLayer, layer).native for layer in self.layers])

    @property
    def joined(self) -> bool:
        """Whether all layers of a pass are one call."""
        return self._joined and self._stack is not None

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """Run every layer by itself, for hooks that stand between them."""
        before, self._joined = self._joined, False
        try:
            yield
        finally:
            self._joined = before

    def cache(self, slots: int, owner: object) -> KVCache:
        """Return a KV cache of so many slots, in use while `owner` lives."""
        if self._states:
            return StateCache(slots)
        return self._graphs.cache(slots, owner) if self._graphs else KVCache(slots, CACHE_LENGTH)

    def _run(self, ids: Tensor, step: ForwardPass) -> Tensor:
        if step.cache is not None and self.joined:
            return self._run_stack(cast(NativeLayers, self._stack), ids, step)
        self._record(step)
        # Fused layers ask the step for masks; others hand on what transformers makes of one that hides nothing.
        mask = _FOUR_DIMENSIONAL if self._fused else torch.ones_like(ids)
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=step.positions,
            use_cache=False,
            step=step,
        )
        return output.last_hidden_state

    def _run_stack(self, stack: NativeLayers, ids: Tensor, step: ForwardPass) -> Tensor:
        """Do what the decoder does with a pass, its layers as one call."""
        head = self._head.native if step.judged and self.head_transform.plain else None
        run = stack.decode(ids, self.embeddings, self._last_norm, self._rope(step), step, head)
        step.logits = run.logits
        wanted = step.wanted - {H_LAST}
        step.features |= {layer: run.made[layer] if layer >= 0 else run.embedded for layer in wanted}
        return run.last

    @cached_property
    def _rope(self) -> DecoderRotary:
        return DecoderRotary(cast(Any, self._model).rotary_emb, self.embeddings)

    @cached_property
    def _last_norm(self) -> Norm:
        return inference_norm(cast(Any, self._model).norm)

    def _record(self, step: Any) -> None:
        self._recording = step

    def _last(self, count: int) -> Sequence[nn.Module]:
        return list(self.layers[-count:])

    @torch.inference_mode()
    def normed(self, hidden: Tensor) -> Tensor:
        return final_norm(self._model, self.source)(hidden)

    @property
    def last_norm(self) -> Tensor:
        return self._model.get_parameter("norm.weight").detach()

    def _hook(self, layer: int) -> None:
        """Keep the raw output of decoder layer `layer` in the ForwardPass that asks for it."""
        self.check_layers([layer])

        def keep(module, args, output):
            if layer in self._recording.wanted:
                self._recording.features[layer] = output[0] if isinstance(output, tuple) else output

        def keep_input(module, args, kwargs):
            if -1 in self._recording.wanted:
                self._recording.features[-1] = args[0] if args else kwargs["hidden_states"]

        if layer == -1:
            self.layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)
        else:
            self.layers[layer].register_forward_hook(keep)
        self._hooked.add(layer)


def _check_int4(model: PreTrainedModel, device: str, source: str) -> None:
    if torch.device(device).type != "cpu":
        raise DeepSpecError("int4 weights run on a CPU only; load the target with device='cpu'")
    if model.dtype != torch.bfloat16:
        raise DeepSpecError(
            f"int4 weights go with bfloat16 activations; {source} is in {dtype_name(model.dtype)}"
        )
    layers = decoder_layers(model, model.config.get_text_config().num_hidden_layers)
    sizes = {m.in_features for m in layers.modules() if isinstance(m, nn.Linear)}
    if uneven := sorted(size for size in sizes if size % Int4Linear.BLOCK):
        raise DeepSpecError(
            f"{source}: int4 weights need input sizes divisible by {Int4Linear.BLOCK}, found {uneven[0]}"
        )
