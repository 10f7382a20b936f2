"""Which engines can serve which drafts: decided by sizes and configuration alone, so before anything is trained.

The stage `target` and `deepspec doctor --target X` ask here of networks that have no weights yet, the exporters of
trained drafts.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from deepspec.drafters.algorithms.eagle3 import VARIANTS
from deepspec.drafters.algorithms.mtp import own_module
from deepspec.drafters.network import Network
from deepspec.drafters.registry import reader
from deepspec.target.ends import Ends

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {  # pre-tokenizer of tokenizer.json, with its pattern → llama.cpp's name for it
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    ("Split", "ByteLevel", _LLAMA3): "llama-bpe",
    ("Split", "ByteLevel", _LLAMA3.replace("{1,3}", "")): "qwen2",
}
GGUF_ARCHITECTURES = ("llama", "qwen3")  # which of llama.cpp's carry the same name
GGUF_MODULES = ("qwen3_5_text", "qwen3_next", "glm4_moe")  # whose next-token modules llama.cpp runs
CONVERT = "convert it with llama.cpp's convert_hf_to_gguf.py"
UNTRAINED = ("lookup", "suffix")
NO_METHOD = {
    "hf": "transformers has no use for a draft of type {kind}",
    "vllm": "vLLM has no method for a draft of type {kind}",
    "speculators": "the speculators format has no {kind}; export --to vllm",
    "sglang": "SGLang has no method for a draft of type {kind}",
    "tgi": "TGI knows Medusa and n-gram drafts, not {kind}",
    "llamacpp": "llama.cpp has no method for a draft of type {kind}",
}


NOT_RELEASED = (
    "DFlash 2 is not in a release of {engine} whose reading of it could be checked ({where}); train dflash, or export "
    "--to llamacpp"
)
NOT_YET = {
    ("vllm", "dflash2"): NOT_RELEASED.format(engine="vLLM", where="vllm#52816 proposes it"),
    ("speculators", "dflash2"): NOT_RELEASED.format(
        engine="vLLM", where="the speculators format has it since speculators#1006, vllm#52816 would read it"
    ),
    ("sglang", "dflash2"): NOT_RELEASED.format(engine="SGLang", where="sglang#35371 proposes it"),
    (
        "speculators",
        "mtp",
    ): "a next-token module is served from the target's own checkpoint; export --to vllm",
}


class Refused(Exception):
    """An engine cannot serve this draft; the message says why and what to train instead."""


class Described(Protocol):
    """What is known of a draft before it has weights."""

    @property
    def kind(self) -> str: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def network(self) -> Any: ...
    @property
    def target(self) -> Ends: ...


@dataclass(frozen=True)
class Intended:
    """A draft to be: its network without weights; none for a drafter that is not trained."""

    kind: str
    config: dict[str, Any]
    network: Network | None
    target: Ends


def kind_of(config: dict[str, Any]) -> str | None:
    """Return the kind of a draft by its config.json; None for an unknown architecture."""
    algorithm = reader(config)
    if algorithm is None:
        return None
    return "dflash" if algorithm.type == "dspark" and not config.get("markov_rank") else algorithm.type


def check(engine: str, draft: Described) -> None:
    """Raise Refused, one line, if an engine cannot serve a draft."""
    checks = CHECKS[engine].get(draft.kind)
    if checks is None:
        *others, last = (kind for kind in CHECKS[engine] if kind not in UNTRAINED)
        kinds = f"{', '.join(others)} or {last}" if others else last
        raise Refused(
            NOT_YET.get((engine, draft.kind)) or f"{NO_METHOD[engine].format(kind=draft.kind)}; train {kinds}"
        )
    for each in checks:
        each(draft)


def refusals(target: Ends, networks: Mapping[str, Network | str]) -> dict[str, dict[str, str | None]]:
    """Return, of each drafter, engine → None or why it cannot serve what will be trained.

    Args:
        networks: by name, as `deepspec.drafters.suitable.intended` gives them.
    """
    found: dict[str, dict[str, str | None]] = {}
    for name, network in networks.items():
        if isinstance(network, str):
            draft = Intended(network, {}, None, target)
        else:
            config = network.description()
            draft = Intended(kind_of(config) or "", config, network, target)
        found[name] = {engine: _refusal(engine, draft) for engine in CHECKS}
    return found


def _refusal(engine: str, draft: Described) -> str | None:
    try:
        check(engine, draft)
    except Refused as refusal:
        return str(refusal)
    return None


def in_words(engines: Mapping[str, str | None]) -> str:
    """Say which engines can serve a drafter and why others cannot, in one line."""
    able = ", ".join(engine for engine, reason in engines.items() if reason is None) or "none"
    return "; ".join([able, *(f"not {engine}: {reason}" for engine, reason in engines.items() if reason)])


def plain_layer(draft: Described) -> None:
    """Refuse EAGLE-3 with norms of queries and keys."""
    if draft.network.config.qk_norm:
        raise Refused("engines run EAGLE-3 in Llama's layer, without q/k norms; train with qk_norm: false")


def three_layers(draft: Described) -> None:
    """Refuse EAGLE-3 of another number of features than the three of SGLang and llama.cpp."""
    layers = draft.network.config.target_layer_ids
    if len(layers) != 3:
        raise Refused(
            f"SGLang and llama.cpp size EAGLE-3 for three target layers, not {len(layers)}; train with three"
        )


def masks_alone(draft: Described) -> None:
    """Refuse DFlash that predicts at the anchor."""
    if draft.network.config.sample_from_anchor:
        raise Refused(
            "engines take DFlash drafts from the masks alone (1 + γ places), and this draft's anchor predicts the "
            "first token; train with sample_from_anchor: false"
        )


def from_anchor(draft: Described) -> None:
    """Refuse DSpark that does not predict at the anchor, where SGLang's does."""
    if not draft.network.config.sample_from_anchor:
        raise Refused("SGLang's DSpark drafts from the anchor on; train with sample_from_anchor: true")


def vanilla_markov(draft: Described) -> None:
    """Refuse DSpark with another Markov head than the simplest."""
    head = draft.network.config.markov_head_type
    if head != "vanilla":
        raise Refused(
            f"engines run DSpark's vanilla Markov head, not {head!r}; train with markov_head: vanilla"
        )


def no_skip(draft: Described) -> None:
    """Refuse a block drafter with our own skip."""
    if draft.network.config.context_skip:
        raise Refused("context_skip is known to our engine alone; train with context_skip: false")


def layers_in_order(draft: Described) -> None:
    """Refuse features that engines do not hand out."""
    layers = list(draft.network.config.target_layer_ids)
    if layers != sorted(set(layers)):
        raise Refused(
            f"engines hand out target layers in their order; train with target_layer_ids ascending, not {layers}"
        )
    if layers[0] < 0:
        raise Refused("engines hand out no embedding output; train without target layer -1")


def above_layer_0(draft: Described) -> None:
    """Refuse EAGLE-3 that reads the output of layer 0, for which SGLang has no id: 1 means the output of layer 1."""
    if draft.network.config.target_layer_ids[0] == 0:
        raise Refused("SGLang has no id for the output of layer 0; train with target_layer_ids from 1 on")


def gguf_package(draft: Described) -> None:
    """Refuse where the package gguf is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise Refused("GGUF needs the package gguf; pip install 'deepspec[pipeline]'")


def gguf_tokenizer(draft: Described) -> None:
    """Refuse a tokenizer that llama.cpp has no name for."""
    split_name(json.loads((Path(draft.target.source) / "tokenizer.json").read_text()))


def gguf_draft(draft: Described) -> None:
    """Refuse a draft LM that cannot be written as GGUF."""
    gguf_model(draft.config, "this draft")


def gguf_model(config: dict[str, Any], what: str) -> None:
    """Refuse a model that cannot be written as GGUF: of another architecture, with biases, or a scaled rotation.

    Args:
        what: it is called in the message.
    """
    kind = config.get("model_type")
    if kind not in GGUF_ARCHITECTURES:
        known = " and ".join(GGUF_ARCHITECTURES)
        raise Refused(f"GGUF is written for {known}, and {what} is a {kind!r}; {CONVERT}")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise Refused(f"{what} has biases, which are not written here; {CONVERT}")
    scaled = (config.get("rope_parameters") or {}).get("rope_type", "default") != "default"
    if scaled or config.get("rope_scaling"):
        raise Refused(f"{what} scales its rotary embedding, which is not written here; {CONVERT}")


def split_name(tokenizer: dict) -> str:
    """Return llama.cpp's name of a tokenizer.json's pre-tokenization.

    Raises:
        Refused: it is not known here.
    """
    kind = tokenizer["model"]["type"]
    if kind != "BPE":
        raise Refused(
            f"GGUF is written with byte-level BPE, and this tokenizer is {kind}; convert with llama.cpp's "
            "convert_hf_to_gguf.py"
        )
    pre = tokenizer.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers", [pre] if pre else [])
    types = tuple(part["type"] for part in parts)
    patterns = tuple(part["pattern"].get("Regex", "") for part in parts if part["type"] == "Split")
    if (*types, *patterns) not in SPLITS:
        readable = ", ".join(dict.fromkeys(" + ".join(names[:2]) for names in SPLITS))
        raise Refused(
            f"llama.cpp's name for the pre-tokenizer {' + '.join(types) or 'none'} is not known here ({readable}); "
            "convert with llama.cpp's convert_hf_to_gguf.py"
        )
    return SPLITS[(*types, *patterns)]


def plain_norms(draft: Described) -> None:
    """Refuse EAGLE-3 with norms that only some drafts have, EAGLE-3.1's among them."""
    if on := [key for key in VARIANTS if getattr(draft.network.config, key)]:
        raise Refused(
            f'{on[0]} is set, which this format does not carry; train with version: "3", or export to vllm'
        )


def one_layer(draft: Described) -> None:
    """Refuse EAGLE-3 with more layers than the formats written here carry."""
    config = draft.network.config
    if config.num_hidden_layers > 1:
        raise Refused(f"it has {config.num_hidden_layers} layers, and the formats written here carry one")


def no_window(draft: Described) -> None:
    """Refuse EAGLE-3 within a window."""
    if draft.network.config.sliding_window is not None:
        raise Refused(
            "its attention has a window, which no format written here carries; train with sliding_window: null"
        )


def whole_rope(draft: Described) -> None:
    """Refuse a rotary embedding of a part of a head."""
    if "partial_rotary_factor" in (draft.network.config.rope_scaling or {}):
        raise Refused("its rotary embedding is of a part of a head, which no format written here carries")


def plain_rope(draft: Described) -> None:
    """Refuse a rotary embedding that is scaled."""
    if draft.network.config.rope_scaling is not None:
        raise Refused(
            "its rotary embedding is scaled, which is not written for llama.cpp here; train with rope: plain"
        )


def whole_context(draft: Described) -> None:
    """Refuse a block drafter whose layers have windows or are causal."""
    if draft.network.config.windows or draft.network.config.causal:
        raise Refused(
            "its layers have windows or are causal, which this format does not carry; train with causal: false and no "
            "sliding_window, or a dflash"
        )


def targets_head(draft: Described) -> None:
    """Refuse a block drafter with a head of its own, where SGLang's have the target's."""
    if draft.network.config.head_rank:
        raise Refused(
            "SGLang drafts blocks with the target's head, and this draft's is its own, of low rank; train with "
            "head_rank: null, or export to vllm or llamacpp"
        )


def layers_alike(draft: Described) -> None:
    """Refuse a block drafter whose layers see different parts of the context."""
    config = draft.network.config
    if len(set(config.windows)) > 1 or len(set(config.causal)) > 1:
        raise Refused("its layers have several windows, or only some are causal, which is not written here")


def whole_vocabulary(draft: Described) -> None:
    """Refuse DFlash 2 with a reduced vocabulary, and more candidates than llama.cpp has room for."""
    config = draft.network.config
    if config.draft_vocab_size < config.vocab_size:
        raise Refused("engines run DFlash 2 over the whole vocabulary; train with draft_vocab_size: 0")
    most = config.selector_top_k
    if config.hidden_size < most * (most + 1):
        raise Refused(
            f"llama.cpp wants a width of {most * (most + 1)} for selector_top_k {most}, and the draft is "
            f"{config.hidden_size} wide; train with a smaller selector_top_k"
        )


def of_a_known_family(draft: Described) -> None:
    """Refuse a next-token module of a target that came without one: engines run those of families that have them."""
    if own_module(draft.target) is None:
        kind = draft.target.config.model_type
        raise Refused(
            f"engines run next-token modules of families whose checkpoints bring them, not a {kind}'s; train eagle3"
        )


def module_in_gguf(draft: Described) -> None:
    """Refuse a next-token module of a family whose modules llama.cpp does not run, or that is not read back here."""
    kind = draft.target.config.model_type
    if kind not in GGUF_MODULES:
        why = " (its converter leaves them out)" if kind == "deepseek_v3" else ""
        raise Refused(
            f"llama.cpp's next-token modules are written for {', '.join(GGUF_MODULES)}, not for a {kind}{why}; train "
            "eagle3, or export --to vllm"
        )


Check = Callable[[Described], None]
PEAGLE: tuple[Check, ...] = (plain_layer, no_window, whole_rope, layers_in_order)
EAGLE3: tuple[Check, ...] = (*PEAGLE, one_layer)
BLOCK: tuple[Check, ...] = (no_skip, whole_rope, layers_in_order)
DFLASH: tuple[Check, ...] = (*BLOCK, masks_alone)
DSPARK: tuple[Check, ...] = (*BLOCK, vanilla_markov)
GGUF: tuple[Check, ...] = (gguf_package, gguf_tokenizer)
CHECKS: dict[str, dict[str, tuple[Check, ...]]] = {
    "hf": dict.fromkeys(
        ("lm", "eagle3", "peagle", "mtp", "dspark", "dflash", "dflash2", "medusa", "lookup", "suffix"), ()
    ),
    "vllm": {
        "eagle3": EAGLE3,
        "peagle": PEAGLE,
        "mtp": (of_a_known_family,),
        "dflash": (*DFLASH, layers_alike),
        "dspark": (*DSPARK, whole_context),
        **dict.fromkeys(("medusa", "lm", "lookup", "suffix"), ()),
    },
    "speculators": {
        "eagle3": EAGLE3,
        "dflash": (*DFLASH, whole_context),
        "dspark": (*DSPARK, whole_context),
    },
    "sglang": {
        "eagle3": (*EAGLE3, plain_norms, three_layers, above_layer_0),
        "mtp": (of_a_known_family,),
        "dflash": (*DFLASH, whole_context, targets_head),
        "dspark": (*DSPARK, whole_context, from_anchor, targets_head),
        **dict.fromkeys(("lm", "lookup", "suffix"), ()),
    },
    "tgi": dict.fromkeys(("medusa", "lookup", "suffix"), ()),
    "llamacpp": {
        "eagle3": (*EAGLE3, plain_norms, three_layers, plain_rope, *GGUF),
        "dflash": (*DFLASH, layers_alike, plain_rope, *GGUF),
        "dflash2": (*DFLASH, layers_alike, whole_vocabulary, plain_rope, *GGUF),
        "dspark": (*DSPARK, layers_alike, plain_rope, *GGUF),
        "mtp": (of_a_known_family, module_in_gguf, gguf_package),
        "lm": (gguf_draft, *GGUF),
    },
}
