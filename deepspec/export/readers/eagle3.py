"""EAGLE-3 as vLLM and SGLang run it: one layer over [norm(embedding); norm(state)], token by token.

They count target layers differently. vLLM's `eagle_aux_hidden_state_layer_ids` are inputs of layers, one higher than
the layer whose output is meant. SGLang's were outputs; since 0.5.13 they are only where the first is 1, else inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec.export.readers.directory import Directory, Facts, Reading, Unreadable
from deepspec.export.readers.ops import Head, Layer, attention, rms, rope_theta, seen_by
from deepspec.export.readers.sample import Sample

VARIANTS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


def vllm(source: Directory, sample: Sample) -> Reading:
    """Read vLLM's native directory: `eagle_aux_hidden_state_layer_ids` at the top, or else in `eagle_config`."""
    eagle = source.config.get("eagle_config") or {}
    key = "eagle_aux_hidden_state_layer_ids"
    ids = source.config.get(key) or eagle.get(key)
    if not ids:
        raise Unreadable(f"layer ids: config.json lacks {key}; vLLM would take layers of its own")
    if len(eagle.get(key) or [0, 0, 0]) != len(ids):
        raise Unreadable(f"layer ids: vLLM sizes fc by eagle_config.{key} and reads {len(ids)} states")
    return read(source, sample, [i - 1 for i in ids])


def speculators(source: Directory, sample: Sample) -> Reading:
    """Read the speculators format: sizes in `transformer_layer_config`, vLLM's layer ids, weights `layers.0.*`."""
    config = source.config
    own = {key: config[key] for key in (*VARIANTS, "draft_vocab_size") if key in config}
    flat = Directory(source.want("transformer_layer_config") | own, source.weights, used=source.used)
    ids = source.want("eagle_aux_hidden_state_layer_ids")
    if len(ids) != flat.config.get("num_aux_hidden_states", 3):
        raise Unreadable("layer ids: vLLM sizes fc for 3 states unless num_aux_hidden_states says otherwise")
    return read(flat, sample, [i - 1 for i in ids])


def sglang(source: Directory, sample: Sample) -> Reading:
    """Read SGLang's directory as 0.5.13 and later do: ids are outputs where the first is 1, else inputs of layers."""
    ids = _sglang_ids(source)
    return read(source, sample, ids if ids[0] == 1 else [i - 1 for i in ids])


def sglang_before(source: Directory, sample: Sample) -> Reading:
    """Read SGLang's directory as versions before 0.5.13 do: ids are layers whose outputs are meant."""
    return read(source, sample, _sglang_ids(source))


def _sglang_ids(source: Directory) -> list[int]:
    ids = source.want("eagle_config").get("eagle_aux_hidden_state_layer_ids")
    if not ids:
        raise Unreadable("layer ids: eagle_config lacks eagle_aux_hidden_state_layer_ids")
    return ids


def native(source: Directory, sample: Sample) -> Reading:
    """Read DeepSpec's own: `target_layer_ids`, each the layer whose output is meant."""
    return read(source, sample, source.want("target_layer_ids"))


def read(source: Directory, sample: Sample, layer_ids: list[int]) -> Reading:
    """
    Compute the logits of an EAGLE-3 directory.

    Args:
        layer_ids: i means the output of decoder layer i.
    """
    config = source.config
    on = {key for key in VARIANTS if config.get(key)}
    d = source.want("hidden_size")
    vocab = source.want("vocab_size")
    eps = float(source.want("rms_norm_eps"))
    fc = source.take("fc.weight", d, len(layer_ids) * d)
    final_norm = source.take("norm.weight", d)
    embed = source.optional("embed_tokens.weight", vocab, d)
    embed = sample.embeddings if embed is None else embed
    head = Head(source, vocab, sample.head)
    first = "midlayer." if source.has("midlayer.hidden_norm.weight") else "layers.0."
    prefixes = [first, *_further(source)]
    normed = source.has(f"{first}self_attn.q_norm.weight")
    layers = [Layer(source, prefix, d if i else 2 * d, normed) for i, prefix in enumerate(prefixes)]
    state_norm = source.take(f"{first}hidden_norm.weight", d)
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    norms = (
        [source.take(f"fc_norm.{i}.weight", d) for i in range(len(layer_ids))] if "fc_norm" in on else None
    )
    whole_norm = source.take("input_norm.weight", len(layer_ids) * d) if "norm_before_fc" in on else None

    def fused(features: Tensor) -> Tensor:
        """Join states [n, layers·d]."""
        if norms is not None:
            parts = zip(features.split(d, -1), norms, strict=True)
            features = torch.cat([rms(part, norm, eps) for part, norm in parts], -1)
        if whole_norm is not None:
            features = rms(features, whole_norm, eps)
        return features @ fc.T

    def through(tokens: Tensor, below: Tensor) -> Tensor:
        """Return the outputs [n, d] of all places: place i has the token i + 1 and the state before it."""
        places, hidden = torch.arange(len(below)), below
        seen = seen_by(places, places, True, window)
        for i, layer in enumerate(layers):
            state = rms(hidden, layer.input_norm if i else state_norm, eps)
            x = state if i else torch.cat((rms(embed[tokens], layer.input_norm, eps), state), -1)
            attended = attention(layer.queries(x, places), layer.keys(x, places), layer.values(x), seen)
            hidden = layer.finish(attended, state if not i and "norm_before_residual" in on else hidden)
        return hidden

    states = fused(sample.features(layer_ids))  # [n, d]

    def chain(anchor: int, steps: int) -> Tensor:
        """Return the logits of the drafted places, each output fed back."""
        below, out = states[:anchor], []
        for k in range(steps):
            hidden = through(sample.tokens[1 : anchor + 1 + k], below)[-1:]
            out.append(rms(hidden, final_norm, eps))
            below = torch.cat((below, out[-1] if "norm_output" in on else hidden))
        return head.logits(torch.cat(out))

    parallel = source.has("mask_hidden")
    later = fused(source.take("mask_hidden").reshape(1, -1)) if parallel else states[:0]
    mask = _mask(source) if parallel else 0

    def block(anchor: int, steps: int) -> Tensor:
        """Return the logits of P-EAGLE: one pass, mask tokens and one vector behind the anchor."""
        tokens = torch.cat((sample.tokens[1 : anchor + 1], torch.full((steps - 1,), mask)))
        hidden = through(tokens, torch.cat((states[:anchor], later.expand(steps - 1, -1))))[-steps:]
        return head.logits(rms(hidden, final_norm, eps))

    draft = block if parallel else chain
    gamma = sample.gamma
    logits = torch.stack([draft(anchor, gamma) for anchor in sample.anchors.tolist()])
    facts = Facts(
        layer_ids=tuple(layer_ids),
        rope_theta=rope_theta(config),
        rms_norm_eps=eps,
        norms=tuple(sorted(on)),
        mask_token_id=mask if parallel else None,
        max_position_embeddings=config.get("max_position_embeddings"),
        draft_ids=head.ids,
    )
    return Reading(logits, facts)


def _further(source: Directory) -> list[str]:
    """Return the prefixes of the layers behind the first, which read the state alone."""
    indices = {name.split(".")[1] for name in source.weights if name.startswith("layers.")} - {"0"}
    return [f"layers.{i}." for i in sorted(map(int, indices))]


def _mask(source: Directory) -> int:
    """Return the token of P-EAGLE's later places, under one of the names that vLLM and DeepSpec know."""
    for key in ("pard_token", "ptd_token_id", "mask_token_id"):
        if source.config.get(key) is not None:
            return int(source.config[key])
    raise Unreadable("mask token: config.json lacks pard_token; vLLM would not start")
