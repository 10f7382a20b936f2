"""Is an export the draft that was trained? It is read back by an engine's conventions and compared, check by check.

The proof is in the logits: those that the reader computes from the directory and the target's states equal those of
the network in training, at every place of every block. The other checks say what is wrong where they do not, and catch
what no logit of a short text shows: a context length, a tokenizer, a template, a weight that no engine reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspec.drafters.network import Network
from deepspec.export import gguf_checks, gguf_model, reference
from deepspec.export.checks import Check
from deepspec.export.draft import Draft
from deepspec.export.layout import TOKENIZER_FILES, Layout
from deepspec.export.readers import block, causal_lm, eagle3, gguf, gguf_next_token, medusa, next_token
from deepspec.export.readers.directory import Directory, Facts, Reading, Unreadable
from deepspec.export.readers.sample import Sample

TOLERANCE = 1e-3
ROUNDED = 0.02  # distance of two laws in the mean, of the same head rounded in two ways
Read = Callable[[Directory, Sample], Reading]
READERS: dict[str, Read] = {
    "vllm-eagle3": eagle3.vllm,
    "sglang-eagle3": eagle3.sglang,
    "speculators-eagle3": eagle3.speculators,
    "native-eagle3": eagle3.native,
    "native-peagle": eagle3.native,
    "vllm-dflash": block.dflash,
    "dflash": block.dflash,
    "dspark": block.dspark,
    "speculators-block": block.speculators,
    "native-dspark": block.native,
    "native-dflash": block.native,
    "native-dflash2": block.native,
    "vllm-medusa": medusa.vllm,
    "tgi-medusa": medusa.tgi,
    "native-medusa": medusa.native,
    "next-token": next_token.stitched,
    "gguf-dflash": gguf.dflash,
    "gguf-eagle3": gguf.draft_eagle3,
    "gguf-next-token": gguf_next_token.read,
}
# Where the engine's files are not a config.json and safetensors: what opens the directory.
OPENERS: dict[str, Callable[[Path], Directory]] = {
    "gguf-dflash": gguf.open_dflash,
    "gguf-eagle3": gguf.open_eagle3,
    "gguf-next-token": gguf_next_token.open_module,
}
# Read by transformers, which accounts for weights.
MODELS: dict[str, Callable[[Path, Sample], Reading]] = {
    "causal-lm": causal_lm.directory,
    "gguf": lambda path, sample: causal_lm.gguf(gguf.draft_file(path), sample),
}


@dataclass(frozen=True)
class Parity:
    """Result of comparing a written directory with its draft.

    Args:
        max_abs_error: of the logits; None where there was none to compare.
    """

    max_abs_error: float | None
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> list[str]:
        return [check.message for check in self.checks if not check.passed]

    def to_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "max_abs_error": self.max_abs_error,
            "checks": [asdict(check) for check in self.checks],
        }


def check(draft: Draft, layout: Layout, path: Path, samples: list[Sample]) -> Parity:
    """Compare the written directory with the draft that it was made of.

    Args:
        samples: none for a draft without weights.
    """
    checks = _tokenizer(draft, path) if draft.trained else [_settings(draft, path)]
    if not draft.trained:
        return Parity(None, tuple(checks))
    try:
        error, found = _compare(draft, layout, path, samples)
    except Unreadable as unreadable:
        return Parity(None, (*checks, Check("readable", False, str(unreadable))))
    return Parity(error, (*checks, *found))


def _compare(draft: Draft, layout: Layout, path: Path, samples: list[Sample]) -> tuple[float, list[Check]]:
    network = layout.network() if layout.network else draft.network
    wanted = [reference.logits(network, sample) for sample in samples]
    checks = _gguf(draft, path, samples[0]) if layout.reader.startswith("gguf") else []
    if layout.reader in MODELS:
        readings = [MODELS[layout.reader](path, sample) for sample in samples]
        checks.append(Check("weights", True, "transformers found every weight, and no other"))
        explain = None
    else:
        source = OPENERS.get(layout.reader, lambda path: Directory.open(path, layout.weights_file))(path)
        read = READERS[layout.reader]
        readings = [read(source, sample) for sample in samples]
        checks += [_weights(source), *_facts(draft, readings[0].facts)]
        if layout.reader in OPENERS:
            checks += gguf_checks.confidence(draft, source) + gguf_checks.module(draft, network, source)
        explain = lambda: _explain(draft, network, source, read, samples[0], wanted[0])  # noqa: E731
    checks.append(_length(draft, readings[0].facts))
    if layout.network and draft.config.get("head_rank"):
        checks.append(_product(draft, samples))
    errors = [_error(draft, r, w) for r, w in zip(readings, wanted, strict=True)]
    error = max(errors)
    places = sum(len(sample.anchors) * sample.gamma for sample in samples)
    if error <= TOLERANCE:
        said = f"{places} places of {sum(len(s.anchors) for s in samples)} blocks: off by {error:.1e} at most"
        return error, [*checks, Check("logits", True, said)]
    named = explain() if explain else ""
    said = f"logits differ by up to {error:.3g} from the trained draft's ({TOLERANCE:g} allowed)"
    return error, [*checks, Check("logits", False, named or f"{said}; no known fault explains it")]


def _gguf(draft: Draft, path: Path, sample: Sample) -> list[Check]:
    checks = gguf_checks.tokenizer(draft, gguf.draft_file(path), splits=draft.kind != "mtp")
    if gguf_model.is_converted(draft.target):  # by llama.cpp's converter, to what no reader here knows
        return checks
    return checks + gguf_checks.target(path, sample)


def _error(draft: Draft, reading: Reading, wanted: Tensor) -> float:
    """Return the largest difference of logits at the draft's own tokens."""
    found = reading.logits[..., draft.network.draft_ids]
    if found.shape != wanted.shape:
        raise Unreadable(
            f"the engine drafts {list(found.shape)} logits, the trained draft {list(wanted.shape)}"
        )
    return float((found - wanted).detach().abs().nan_to_num(torch.inf, torch.inf).max())


def _product(draft: Draft, samples: list[Sample]) -> Check:
    """Check that a head of low rank says the same when it is multiplied out and rounded."""
    dense = reference.with_dense_head(draft.network, draft.dtype)
    laws = [
        torch.cat([reference.logits(model, sample).flatten(0, 1) for sample in samples]).softmax(-1)
        for model in (draft.network, dense)
    ]
    apart = float((laws[0] - laws[1]).abs().sum(-1).mean() / 2)
    said = f"multiplied out in {draft.dtype_name} the head takes {apart:.1e} from an accepted token's chance"
    return Check("head", apart <= ROUNDED, said if apart <= ROUNDED else f"{said} ({ROUNDED:g} allowed)")


def _weights(source: Directory) -> Check:
    unread = source.unread()
    if unread:
        return Check("weights", False, f"weights that the engine reads nowhere: {', '.join(unread[:3])}")
    return Check("weights", True, f"all {len(source.weights)} weights are read")


def _facts(draft: Draft, facts: Facts) -> list[Check]:
    """Compare what the engine takes from the configuration with what the draft was trained with."""
    trained = draft.network.config
    ids = draft.network.draft_ids if draft.reduced else None
    checks = []
    if facts.layer_ids is not None:
        wanted = tuple(trained.target_layer_ids)
        by = {a - b for a, b in zip(facts.layer_ids, wanted, strict=False)}
        off = f"; they are off by {by.pop():+d}" if len(by) == 1 and by != {0} else ""
        said = "layer ids: the engine would read target layers {}, the draft was trained on {}" + off
        checks.append(_same("layer_ids", facts.layer_ids, wanted, said))
    if facts.rope_theta is not None:
        said = "RoPE base: the engine would take {}, the draft was trained with {}"
        checks.append(_same("rope", facts.rope_theta, float(trained.rope_theta), said))
    if facts.rms_norm_eps is not None:
        said = "rms_norm_eps: the engine would take {}, the draft was trained with {}"
        checks.append(_same("norms", facts.rms_norm_eps, float(trained.rms_norm_eps), said))
    if facts.mask_token_id is not None:
        said = "mask token: the engine would feed {}, the draft was trained with {}"
        checks.append(_same("mask_token", facts.mask_token_id, trained.mask_token_id, said))
    if facts.sample_from_anchor is not None:
        said = "anchor layout: the engine would take sample_from_anchor as {}, the draft was trained with {}"
        checks.append(_same("anchor", facts.sample_from_anchor, trained.sample_from_anchor, said))
    if facts.norms is not None:
        wanted_norms = tuple(sorted(name for name in eagle3.VARIANTS if getattr(trained, name)))
        said = "norms: the engine would take {}, the draft was trained with {}"
        checks.append(_same("eagle_norms", facts.norms, wanted_norms, said))
    if facts.causal is not None:
        wanted = (trained.one_way(0), trained.window(0), getattr(trained, "selector_top_k", None))
        said = (
            "block: the engine would take (causal, window, candidates) as {}, the draft was trained with {}"
        )
        checks.append(_same("block", (facts.causal, facts.window, facts.candidates), wanted, said))
    if facts.draft_ids is not None:
        known = ids is not None and torch.equal(facts.draft_ids, ids)
        said = "d2t: the engine would take the draft's columns for other tokens" + _as_ids(
            facts.draft_ids, ids
        )
        checks.append(
            Check(
                "d2t", known, "the draft's columns are the tokens that it was trained on" if known else said
            )
        )
    return checks


def _as_ids(found: Tensor, ids: Tensor | None) -> str:
    if ids is not None and len(found) == len(ids) and torch.equal(found - torch.arange(len(found)), ids):
        return "; it holds target ids in the place of offsets (target id − column)"
    return ""


def _length(draft: Draft, facts: Facts) -> Check:
    """Check that the draft has as many positions as the target."""
    wanted, found = draft.target.max_length, facts.max_position_embeddings
    if found is None:
        return Check("max_position_embeddings", True, "this format has no positions")
    if found < wanted:
        said = f"max_position_embeddings is {found}, the target's {wanted}: beyond {found} the draft fails"
        return Check("max_position_embeddings", False, said)
    return Check("max_position_embeddings", True, f"{found}, as many as the target has ({wanted})")


def _tokenizer(draft: Draft, path: Path) -> list[Check]:
    """Compare the target's own files byte for byte; a template may lie in tokenizer_config.json or beside it."""
    theirs, ours = (
        draft.tokenizer_files,
        {name: path / name for name in TOKENIZER_FILES if (path / name).exists()},
    )
    template = {name for name in (*theirs, *ours) if "template" in name}
    differing = [name for name in {*theirs, *ours} if not _identical(theirs.get(name), ours.get(name))]
    templates_differ = _template(theirs) != _template(ours)
    others = sorted(set(differing) - template - ({"tokenizer_config.json"} if templates_differ else set()))
    return [
        Check(
            "tokenizer",
            not others,
            f"another tokenizer than the target's: {', '.join(others)} differs"
            if others
            else "the target's own",
        ),
        Check(
            "chat_template",
            not templates_differ,
            "another chat template than the target's" if templates_differ else "the target's own",
        ),
    ]


def _identical(one: Path | None, other: Path | None) -> bool:
    return one is not None and other is not None and one.read_bytes() == other.read_bytes()


def _template(files: dict[str, Path]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].read_text()
    if "tokenizer_config.json" in files:
        return json.loads(files["tokenizer_config.json"].read_text()).get("chat_template")
    return None


def _settings(draft: Draft, path: Path) -> Check:
    """Check the settings of a draft without weights: they may ask for no more tokens than it proposes."""
    settings = json.loads((path / "settings.json").read_text())
    drafted = [x for key, x in settings.items() if key in DRAFTED]
    known = bool(drafted) and all(x in (draft.block_size, draft.block_size + 1) for x in drafted)
    said = f"{drafted[0] if drafted else 'no'} tokens a draft; the draft proposes {draft.block_size}"
    return Check("settings", known, said)


DRAFTED = ("num_speculative_tokens", "speculate", "speculative_num_draft_tokens", "prompt_lookup_num_tokens")


def _same(name: str, found: Any, wanted: Any, said: str) -> Check:
    found, wanted = (list(x) if isinstance(x, tuple) else x for x in (found, wanted))
    return Check(name, found == wanted, f"{wanted}" if found == wanted else said.format(found, wanted))


def _explain(
    draft: Draft, network: Network, source: Directory, read: Read, sample: Sample, wanted: Tensor
) -> str:
    """Name the known fault that, mended, makes the logits right; empty where none does."""
    for said, directory, seen in _hypotheses(draft, network, source, sample):
        try:
            if _error(draft, read(directory, seen), wanted) <= TOLERANCE:
                return said
        except (Unreadable, KeyError):
            continue
    return ""


def _hypotheses(
    draft: Draft, network: Network, source: Directory, sample: Sample
) -> list[tuple[str, Directory, Sample]]:
    trained = draft.network.config
    weights = draft.weights if network is draft.network else network.stored(written_out=True)
    found: list[tuple[str, Directory, Sample]] = []

    def suppose(said: str, seen: Sample = sample, **changes: dict) -> None:
        found.append(
            (f"{said}: with this mended the logits are the trained draft's", source.changed(**changes), seen)
        )

    for by in (-1, 1):
        suppose(f"layer ids are off by {-by:+d}", sample.shifted(by))
    if theta := getattr(trained, "rope_theta", None):
        rope = {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
        inner = source.config.get("transformer_layer_config")
        suppose("wrong RoPE base", config={"transformer_layer_config": inner | rope} if inner else rope)
    if (mask := getattr(trained, "mask_token_id", None)) is not None:
        inner = source.config.get("dflash_config")
        own = {"mask_token_id": mask}
        suppose("wrong mask token", config={"dflash_config": inner | own} if inner else own)
    for order, said in gguf.ORDERS.items() if "arch" in source.config else ():
        rows = {
            n: order(x, source.config["head_dim"])
            for n, x in source.weights.items()
            if n.endswith(gguf.ROTATED)
        }
        suppose(said, weights=rows)
    for name in ("norm.weight", "hidden_norm.weight"):
        if name in weights and source.has(name):
            what = "final norm" if name == "norm.weight" else "norm of the target's states"
            suppose(f"the {what} ({name}) is missing or not the trained one", weights={name: weights[name]})
    for name, weight in sorted(source.weights.items()):
        if weight.dim() == 2 and weight.shape[0] == weight.shape[1]:
            what = "the Markov matrix" if "markov" in name else "a matrix"
            suppose(f"{what} {name} is transposed", weights={name: weight.T})
    for name, weight in sorted(weights.items()):
        if source.has(name) and source.weights[name].shape == weight.shape:
            suppose(f"{name} is not the trained weight", weights={name: weight})
    return found
