"""DFlash and DSpark as vLLM and SGLang run them: one pass over a block that sees the context's states and itself.

DFlash puts the anchor before γ masks and takes what the masks say (`block_size` counts the anchor); DSpark takes what
the anchor's own place says as well, and corrects each place by the token before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec.export.readers.dflash2 import ConvolvedLayer, Selector
from deepspec.export.readers.directory import Directory, Facts, Reading, Unreadable
from deepspec.export.readers.ops import Head, Layer, attention, rms, rope_theta, seen_by
from deepspec.export.readers.sample import Sample


def dflash(source: Directory, sample: Sample) -> Reading:
    """Read a `DFlashDraftModel`: keys in `dflash_config`; masks alone predict."""
    own = source.want("dflash_config")
    if own.get("sample_from_anchor"):
        raise Unreadable("sample_from_anchor: engines take DFlash drafts from the masks alone")
    for key in ("target_layer_ids", "mask_token_id"):
        if key not in own:
            raise Unreadable(f"dflash_config lacks {key}")
    gamma = source.want("block_size") - 1
    causal = bool(own.get("causal"))
    return read(source, sample, own["target_layer_ids"], own["mask_token_id"], gamma, False, causal)


def dspark(source: Directory, sample: Sample) -> Reading:
    """Read a `Qwen3DSparkModel` as engines do: the vanilla head alone."""
    kind = source.config.get("markov_head_type", "vanilla")
    if kind != "vanilla" or not source.want("markov_rank"):
        raise Unreadable(f"engines run the vanilla Markov head, not {kind!r}")
    return native(source, sample)


def native(source: Directory, sample: Sample) -> Reading:
    """Read DeepSeek's format and ours."""
    return read(
        source,
        sample,
        source.want("target_layer_ids"),
        source.want("mask_token_id"),
        source.want("block_size"),
        source.config.get("sample_from_anchor", True),
        any(source.config.get("causal") or ()),
    )


def speculators(source: Directory, sample: Sample) -> Reading:
    """Read the speculators format.

    Sizes are in `transformer_layer_config`, layer ids are one higher, and the anchor is left out unless
    `sample_from_anchor`."""
    own = {key: x for key, x in source.config.items() if not key.startswith(("speculators", "transformer"))}
    flat = Directory(source.want("transformer_layer_config") | own, source.weights, used=source.used)
    layers = [i - 1 for i in source.want("aux_hidden_state_layer_ids")]
    from_anchor = source.config.get("sample_from_anchor", False)
    gamma = source.want("block_size") - (not from_anchor)
    return read(flat, sample, layers, source.want("mask_token_id"), gamma, from_anchor)


def read(
    source: Directory,
    sample: Sample,
    layer_ids: list[int],
    mask: int,
    gamma: int,
    from_anchor: bool,
    causal: bool = False,
) -> Reading:
    """
    Compute the logits of a block drafter's directory.

    Args:
        layer_ids: i means the output of decoder layer i.
        mask: the token that stands for those to be drafted.
        gamma: tokens drafted.
        from_anchor: whether the anchor's place predicts the first.
        causal: whether a block's places see only those before them.
    """
    config = source.config
    if gamma != sample.gamma:
        raise Unreadable(
            f"block size: the engine drafts {gamma} tokens, the draft was trained for {sample.gamma}"
        )
    d, vocab = source.want("hidden_size"), source.want("vocab_size")
    eps = float(source.want("rms_norm_eps"))
    fc = source.take("fc.weight", d, len(layer_ids) * d)
    state_norm, final_norm = source.take("hidden_norm.weight", d), source.take("norm.weight", d)
    count = source.want("num_hidden_layers")
    window = _window(source, count)
    layers = [Layer(source, f"layers.{i}.", d, normed=True) for i in range(count)]
    embed = source.optional("embed_tokens.weight", vocab, d)
    embed = sample.embeddings if embed is None else embed
    head = Head(source, vocab, sample.head)
    markov = Markov(source, d, len(head.weight)) if config.get("markov_rank") else None
    _confidence(source, d)
    selector = Selector(source, d, len(head.weight)) if config.get("selector_rank") else None
    convolved = (
        [ConvolvedLayer(source, f"layers.{i}.", layer, d) for i, layer in enumerate(layers)]
        if selector
        else []
    )
    skip = source.take("context_skip.weight", d, fc.shape[1]) if config.get("context_skip") else None
    features = sample.features(layer_ids)
    context = rms(features @ fc.T, state_norm, eps)

    def block(anchor: int) -> Tensor:
        masks = [mask] * (gamma - from_anchor)
        x = embed[torch.tensor([int(sample.tokens[anchor]), *masks])]
        if skip is not None:
            newest = rms(features[anchor - 1].unflatten(0, (-1, d)), None, eps).flatten()
            x = x + newest @ skip.T
        places = torch.arange(anchor + len(x))
        seen = seen_by(places[anchor:], places, causal, window)
        for with_convolutions in convolved:
            x = with_convolutions(x, context[:anchor], places, seen)
        for layer in () if convolved else layers:
            normed = rms(x, layer.input_norm, eps)
            known = torch.cat((context[:anchor], normed))
            queries = layer.queries(normed, places[anchor:])
            x = layer.finish(attention(queries, layer.keys(known, places), layer.values(known), seen), x)
        hidden = rms(x, final_norm, eps)[len(x) - gamma :]
        previous = sample.tokens[anchor : anchor + gamma]
        corrects = markov or selector
        return head.logits(hidden, corrects.correction(hidden, previous) if corrects else 0.0)

    facts = Facts(
        layer_ids=tuple(layer_ids),
        rope_theta=rope_theta(config),
        rms_norm_eps=eps,
        mask_token_id=mask,
        sample_from_anchor=bool(from_anchor),
        causal=causal,
        window=window,
        candidates=config.get("selector_top_k"),
        max_position_embeddings=config.get("max_position_embeddings"),
        draft_ids=head.ids,
    )
    return Reading(torch.stack([block(anchor) for anchor in sample.anchors.tolist()]), facts)


def _window(source: Directory, count: int) -> int | None:
    """Return how many places back the layers see, all of them alike; None: all."""
    kinds = set(source.config.get("layer_types") or ["full_attention"])
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        raise Unreadable("layer_types names several kinds of attention, or one that is not known")
    windows = source.config.get("windows") or [source.want("sliding_window")] * count
    if len(set(windows)) > 1:
        raise Unreadable(f"windows differ from layer to layer: {windows}")
    return int(windows[0])


class Markov:
    """What the token before adds to the logits: W₂ z, z of the three kinds."""

    def __init__(self, source: Directory, d: int, columns: int):
        rank = source.config["markov_rank"]
        self.kind = source.config.get("markov_head_type", "vanilla")
        self.w1 = source.take("markov_head.markov_w1.weight", source.want("vocab_size"), rank)
        self.w2 = source.take("markov_head.markov_w2.weight", columns, rank)
        name = {"gated": "gate_proj", "rnn": "joint_proj"}.get(self.kind)
        shape = {"gated": (rank, d + rank), "rnn": (3 * rank, 2 * rank + d)}.get(self.kind)
        if name and shape:
            self.weight = source.take(f"markov_head.{name}.weight", *shape)
            self.bias = source.take(f"markov_head.{name}.bias", shape[0])

    def correction(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """Return the Markov head's correction [γ, columns] for hidden [γ, d] and previous tokens int64 [γ]."""
        embedded = self.w1[previous]
        if self.kind == "gated":
            gate = (torch.cat((hidden, embedded), -1) @ self.weight.T + self.bias).sigmoid()
            return (gate * embedded) @ self.w2.T
        if self.kind == "rnn":
            state, latents = torch.zeros_like(embedded[0]), []
            for h, e in zip(hidden, embedded, strict=True):
                g, c, o = (self.weight @ torch.cat((state, e, h)) + self.bias).chunk(3)
                state = g.sigmoid() * state + (1 - g.sigmoid()) * c.tanh()
                latents.append(o.tanh())
            embedded = torch.stack(latents)
        return embedded @ self.w2.T


def _confidence(source: Directory, d: int) -> None:
    """Check that the confidence head is whole where it is announced; it shapes no logit."""
    if source.config.get("enable_confidence_head"):
        markov = bool(source.config.get("confidence_head_with_markov")) * (
            source.config.get("markov_rank") or 0
        )
        source.take("confidence_head.proj.weight", 1, d + markov)
        source.take("confidence_head.proj.bias", 1)
