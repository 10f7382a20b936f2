"""What a GGUF file says beside its logits: tokens, their splitting, template, confidence head, the target's file."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from deepspec.drafters.algorithms.mtp import own_module
from deepspec.drafters.network import Network
from deepspec.export import llamacpp
from deepspec.export.checks import Check
from deepspec.export.draft import Draft
from deepspec.export.readers import causal_lm
from deepspec.export.readers.directory import Directory
from deepspec.export.readers.gguf import keys
from deepspec.export.readers.sample import Sample
from deepspec.export.suitable import split_name
from deepspec.target.next_token import Module, Parts, read_module

# Of the target's largest logit, by which its own file may be off: 5 % but where its weights are coarse.
ROUNDING = {"q8_0": 0.1, "q4_0": 0.6, "q4_1": 0.6}


def tokenizer(draft: Draft, file: Path, splits: bool = True) -> list[Check]:
    """Check that tokens, their splitting and the template are the target's.

    Args:
        splits: whether the splitting was named here, and not by llama.cpp's converter.
    """
    found, known = keys(file), draft.target.tokenizer
    tokens = found["tokenizer.ggml.tokens"]
    wrong = [token for token, i in known.get_vocab().items() if i >= len(tokens) or tokens[i] != token]
    said = f"the GGUF's tokens are not the target's, from {min(wrong, default='')!r} on"
    same = found.get("tokenizer.chat_template") == known.chat_template
    return [
        _check("gguf_tokens", not wrong, said),
        *([_split(draft, found.get("tokenizer.ggml.pre"))] if splits else []),
        _check("gguf_template", same, "the GGUF has another chat template"),
    ]


def _split(draft: Draft, said: str | None) -> Check:
    split = split_name(json.loads((Path(draft.target.source) / "tokenizer.json").read_text()))
    return _check(
        "gguf_pre",
        said == split,
        f"tokenizer.ggml.pre is {said!r}, the target's text is split as {split!r}: llama.cpp would read other tokens",
    )


def confidence(draft: Draft, source: Directory) -> list[Check]:
    """Check that the confidence head is the trained one, its temperature folded in, where llama.cpp can read it."""
    name = f"{llamacpp.CONFIDENCE}.weight"
    if draft.kind != "dspark" or name not in draft.weights:
        return []
    wanted = draft.weights[name].float()
    if wanted.shape[-1] != source.want("hidden_size") + source.want("markov_rank"):
        return []
    wanted = wanted / (llamacpp.temperature(draft) or 1.0)
    found = source.weights.get(name)
    if found is None:
        said = (
            "the confidence head is missing: with --spec-draft-p-min llama.cpp would draft nothing, silently"
        )
        return [Check("confidence", False, said)]
    same = found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-5, atol=1e-7)
    return [_check("confidence", same, "the confidence head is not the trained one")]


def module(draft: Draft, network: Network, source: Directory) -> list[Check]:
    """Check that the next-token module is the trained one, weight by weight, and not the target's own.

    Args:
        network: the module as the file rounds it.
    """
    if draft.kind != "mtp":
        return []
    wanted = network.stored()
    wrong = [
        name
        for name, x in sorted(wanted.items())
        if name not in source.weights or not torch.allclose(source.weights[name], x, rtol=1e-5, atol=1e-6)
    ]
    said = f"{len(wrong)} of {len(wanted)} weights of the next-token module are not the trained ones, {wrong[:1]} first"
    own = own_module(draft.target)
    if wrong and own and _is(read_module(own.directory, own.module), draft.network.config.module, source):
        said = "the target's own next-token module lies in the place of the trained one"
    return [_check("module", not wrong, said)]


def _is(own: Parts, module: Module, source: Directory) -> bool:
    """Return whether the matrix that joins token and state is, but for rounding, that of other parts."""
    found, joins = (
        source.weights.get(f"{module.prefix}{module.naming.joins}.weight"),
        own.parts["joins"].float(),
    )
    return found is not None and float((found - joins).norm()) <= 0.02 * float(joins.norm())


def target(path: Path, sample: Sample) -> list[Check]:
    """Check the target's own file, where there is one: its logits are the target's, as far as its precision goes."""
    files = sorted(path.glob("target-*.gguf"))
    if not files:
        return []
    reading = causal_lm.gguf(files[0], sample)
    places = sample.anchors[:, None] + torch.arange(sample.gamma)
    wanted = sample.last[places] @ sample.head.T
    off = float((reading.logits - wanted).abs().max() / wanted.abs().max())
    same = float((reading.logits.argmax(-1) == wanted.argmax(-1)).float().mean())
    passed = off <= ROUNDING.get(files[0].stem.removeprefix("target-"), 0.05)
    said = f"off by {off:.1%} of the target's largest logit; the same token in {same:.0%} of {places.numel()} places"
    return [Check("target", passed, f"{files[0].name}: {said}")]


def _check(name: str, passed: bool, said: str) -> Check:
    right = "as trained" if name in ("confidence", "module") else "the target's own"
    return Check(name, passed, right if passed else said)
