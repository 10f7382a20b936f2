"""What a GGUF file says beside its logits: tokens, their splitting, template, confidence head, the target's file."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from deepspec.export import llamacpp
from deepspec.export.checks import Check
from deepspec.export.draft import Draft
from deepspec.export.readers import causal_lm
from deepspec.export.readers.directory import Directory
from deepspec.export.readers.gguf import keys
from deepspec.export.readers.sample import Sample
from deepspec.export.suitable import split_name

# Of the target's largest logit, by which its own file may be off: 5 % but where its weights are coarse.
ROUNDING = {"q8_0": 0.1, "q4_0": 0.6, "q4_1": 0.6}


def tokenizer(draft: Draft, file: Path) -> list[Check]:
    """Check that tokens, their splitting and the template are the target's."""
    found, known = keys(file), draft.target.tokenizer
    tokens = found["tokenizer.ggml.tokens"]
    wrong = [token for token, i in known.get_vocab().items() if i >= len(tokens) or tokens[i] != token]
    split = split_name(json.loads((Path(draft.target.source) / "tokenizer.json").read_text()))
    said = found.get("tokenizer.ggml.pre")
    return [
        _check(
            "gguf_tokens",
            not wrong,
            f"the GGUF's tokens are not the target's, from {min(wrong, default='')!r} on",
        ),
        _check(
            "gguf_pre",
            said == split,
            f"tokenizer.ggml.pre is {said!r}, the target's text is split as {split!r}: llama.cpp would read other "
            "tokens",
        ),
        _check(
            "gguf_template",
            found.get("tokenizer.chat_template") == known.chat_template,
            "the GGUF has another chat template",
        ),
    ]


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
    right = "as trained" if name == "confidence" else "the target's own"
    return Check(name, passed, right if passed else said)
