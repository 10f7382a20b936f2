"""Medusa as vLLM and TGI load it: the FasterDecoding layout, residual heads on the target's last state."""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec.export.readers.directory import Directory, Facts, Reading, Unreadable
from deepspec.export.readers.ops import Head
from deepspec.export.readers.sample import Sample


def vllm(source: Directory, sample: Sample) -> Reading:
    """Read vLLM's directory: biases only with `medusa_fc_bias`; `token_map` cuts the head to the draft's vocabulary."""
    config = source.config
    if config.get("model_type") != "medusa":
        raise Unreadable("model_type is not medusa, by which vLLM knows it")
    if not config.get("medusa_fc_bias") and any(name.endswith(".bias") for name in source.weights):
        raise Unreadable("biases: vLLM drops them silently unless medusa_fc_bias is true")
    vocab = source.want("vocab_size")
    ids = None
    if (cut := config.get("truncated_vocab_size", vocab)) < vocab:
        ids = source.take("token_map", cut)
    return _read(source, sample, ids)


def tgi(source: Directory, sample: Sample) -> Reading:
    """Read TGI's: whole heads, biases as in the file; a directory with `architectures` is taken for a model."""
    if "architectures" in source.config:
        raise Unreadable("config.json has architectures: TGI would take the directory for a model")
    source.want("base_model_name_or_path")
    source.optional("token_map")  # vLLM's
    return _read(source, sample, None)


def native(source: Directory, sample: Sample) -> Reading:
    """Read DeepSpec's own: one head for all, the target's rows of the draft's vocabulary."""
    head = Head(source, source.want("vocab_size"), sample.head)
    states = _states(source, sample)
    return Reading(torch.stack([head.logits(x) for x in states], 1), Facts(draft_ids=head.ids))


def _read(source: Directory, sample: Sample, ids: Tensor | None) -> Reading:
    vocab, d = source.want("vocab_size"), source.want("hidden_size")
    layers = source.want("medusa_num_layers")
    logits = []
    for k, x in enumerate(_states(source, sample)):
        columns = x @ source.take(f"{k}.{layers}.weight", vocab, d).T
        if ids is not None:
            kept = torch.full_like(columns, -torch.inf)
            columns = kept.index_copy(-1, ids, columns[:, ids])
        logits.append(columns)
    return Reading(torch.stack(logits, 1), Facts(draft_ids=ids))


def _states(source: Directory, sample: Sample) -> list[Tensor]:
    """Return for each head f_k of the state before each anchor, [anchors, d]."""
    d = source.want("hidden_size")
    states = []
    for k in range(source.want("medusa_num_heads")):
        x = sample.last[sample.anchors - 1]
        for layer in range(source.want("medusa_num_layers")):
            weight = source.take(f"{k}.{layer}.linear.weight", d, d)
            bias = source.optional(f"{k}.{layer}.linear.bias", d)
            inner = x @ weight.T + (0 if bias is None else bias)
            x = x + inner * inner.sigmoid()
        states.append(x)
    return states
