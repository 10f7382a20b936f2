"""EAGLE-3 as vLLM and SGLang run it: one layer over [norm(embedding); norm(state)], token by token.

They count target layers differently. vLLM's `eagle_aux_hidden_state_layer_ids` are inputs of layers, one higher than
the layer whose output is meant. SGLang's were outputs; since 0.5.13 they are only where the first is 1, else inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec.export.readers.directory import Directory, Facts, Reading, Unreadable
from deepspec.export.readers.ops import Head, Layer, attention, rms, rope_theta
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
    fc = source.take("fc.weight", d, len(layer_ids) * d)
    prefix = "midlayer." if source.has("midlayer.hidden_norm.weight") else "layers.0."
    layer = Layer(source, prefix, 2 * d, normed=source.has(f"{prefix}self_attn.q_norm.weight"))
    state_norm = source.take(f"{prefix}hidden_norm.weight", d)
    final_norm = source.take("norm.weight", d)
    embed = source.optional("embed_tokens.weight", vocab, d)
    embed = sample.embeddings if embed is None else embed
    head = Head(source, vocab, sample.head)
    parts = sample.features(layer_ids).split(d, -1)
    if "fc_norm" in on:
        norms = [source.take(f"fc_norm.{i}.weight", d) for i in range(len(parts))]
        parts = tuple(rms(part, norm, layer.eps) for part, norm in zip(parts, norms, strict=True))
    features = torch.cat(parts, -1)
    if "norm_before_fc" in on:
        features = rms(features, source.take("input_norm.weight", features.shape[-1]), layer.eps)
    states = features @ fc.T  # [n, d]

    def joined(tokens: Tensor, below: Tensor) -> Tensor:
        normed = rms(embed[tokens], layer.input_norm, layer.eps)
        return torch.cat((normed, rms(below, state_norm, layer.eps)), -1)

    def chain(anchor: int, steps: int) -> Tensor:
        """Return the logits of the drafted places: place i has token i + 1 and the state before it."""
        below = states[:anchor]
        out = []
        for k in range(steps):
            places = torch.arange(len(below))
            x = joined(sample.tokens[1 : anchor + 1 + k], below)
            query = layer.queries(x[-1:], places[-1:])
            attended = attention(query, layer.keys(x, places), layer.values(x))
            state = rms(below[-1:], state_norm, layer.eps) if "norm_before_residual" in on else below[-1:]
            hidden = layer.finish(attended, state)
            out.append(rms(hidden, final_norm, layer.eps))
            below = torch.cat((below, out[-1] if "norm_output" in on else hidden))
        return head.logits(torch.cat(out))

    gamma = sample.gamma
    logits = torch.stack([chain(anchor, gamma) for anchor in sample.anchors.tolist()])
    facts = Facts(
        layer_ids=tuple(layer_ids),
        rope_theta=rope_theta(config),
        rms_norm_eps=layer.eps,
        norms=tuple(sorted(on)),
        max_position_embeddings=config.get("max_position_embeddings"),
        draft_ids=head.ids,
    )
    return Reading(logits, facts)
