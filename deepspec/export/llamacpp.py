"""llama.cpp (read from b11549): one GGUF file beside the target's, with the target's tokenizer.

DSpark, DFlash and DFlash 2 are its architecture `dflash`, DSpark with a Markov head, DFlash 2 with a selector; EAGLE-3
is `eagle3`; a draft LM is a model of its own. Layer ids are inputs of layers, one more than ours; `d2t` holds target
ids. `dflash` rotates halves as transformers does; `eagle3` and `llama` rotate neighbouring pairs, so the rows of their
query and key projections go in another order. Embeddings, and a head over the whole vocabulary, are the target's.
A next-token module has the target's architecture, and llama.cpp's own converter writes it.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from deepspec.decoding.calibration import CALIBRATION
from deepspec.drafters.algorithms.mtp import MTPModel
from deepspec.drafters.block_network import BlockConfig
from deepspec.drafters.checkpoint import stored_weights
from deepspec.drafters.network import Network
from deepspec.export import converter, gguf_model, reference
from deepspec.export.draft import Draft
from deepspec.export.formats import lm_of_target_size
from deepspec.export.gguf import Gguf, Key, check_precision, interleaved, rounded
from deepspec.export.gguf_model import LAYER
from deepspec.export.layout import WEIGHTS, Layout, fill
from deepspec.export.next_token import stitched
from deepspec.export.readers.dflash2 import SIZES as SELECTOR
from deepspec.target.next_token import read_module

ENGINE = "llama.cpp b11549"
TOP = {
    "fc": "fc",
    "norm": "output_norm",
    "hidden_norm": "enc.output_norm",
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "markov_head.markov_w1": "markov_w1",
    "markov_head.markov_w2": "markov_w2",
    "candidate_selector.hidden_projection": "selector_hidden",
    "candidate_selector.predecessor_codebook": "selector_predecessor.weight",
    "candidate_selector.successor_codebook": "selector_successor.weight",
}
CONVOLUTIONS = {  # in a layer; bases have no `.weight` in either
    "attention_conv.base_kernel": "attn_conv_base",
    "attention_conv.kernel_projection": "attn_conv_proj",
    "mlp_conv.base_kernel": "ffn_conv_base",
    "mlp_conv.kernel_projection": "ffn_conv_proj",
}
SERVED = Path("reports/serve")
CONFIDENCE = "confidence_head.proj"
PLACES = "its calibrated temperatures differ from place to place, which llama.cpp does not know, so they are left out"
Plan = Callable[[Draft, str, int], Layout]


@dataclass(frozen=True)
class Options:
    """`precision` of the files, a key of `gguf.FILE_TYPES`; `with_target`: write the target beside the draft."""

    precision: str = "f16"
    with_target: bool = False


def plans(options: Options) -> Mapping[str, Plan]:
    """Return how each kind of draft is laid out for llama.cpp."""
    return {
        "dspark": lambda draft, where, tokens: _dflash(draft, where, tokens, options),
        "dflash": lambda draft, where, tokens: _dflash(draft, where, tokens, options),
        "dflash2": lambda draft, where, tokens: _dflash(draft, where, tokens, options),
        "eagle3": lambda draft, where, tokens: _eagle3(draft, where, tokens, options),
        "mtp": lambda draft, where, tokens: _mtp(draft, where, tokens, options),
        "lm": lambda draft, where, tokens: _lm(draft, where, tokens, options),
    }


def _dflash(draft: Draft, where: str, tokens: int, options: Options) -> Layout:
    """Lay out DSpark, DFlash or DFlash 2."""
    check_precision(options.precision)
    config, arch = draft.network.config, "dflash"
    keys = _sizes(draft, arch, config.num_hidden_layers) | {
        f"{arch}.target_layers": [i + 1 for i in config.target_layer_ids],
        f"{arch}.block_size": config.query_size,
        **_seen(config, arch),
    }
    if draft.kind == "dflash2":
        keys |= {f"{arch}.{name}": getattr(config, name) for name in SELECTOR}
    names = {
        f"layers.{i}.{ours}": f"blk.{i}.{theirs}"
        for i in range(config.num_hidden_layers)
        for ours, theirs in (LAYER | CONVOLUTIONS).items()
    }
    weights = _own_weights(draft)
    notes: tuple[str, ...] = ()
    vectors: dict[str, Tensor] = {}
    if draft.kind == "dspark":
        vectors, notes = _confidence(draft, weights)
        keys |= {
            f"{arch}.sample_from_anchor": config.sample_from_anchor,
            f"{arch}.has_confidence_head": bool(vectors),
        }
    for name in ("weight", "bias"):
        weights.pop(f"{CONFIDENCE}.{name}", None)
    return _layout(draft, where, tokens, options, arch, keys, names | TOP, weights, vectors, notes)


def _seen(config: BlockConfig, arch: str) -> dict[str, Key]:
    """Return what the layers, all alike, see: nothing where that is the whole context and block."""
    keys: dict[str, Key] = {f"{arch}.attention.causal": True} if config.one_way(0) else {}
    if (window := config.window(0)) is not None:
        keys[f"{arch}.attention.sliding_window"] = window
        keys[f"{arch}.attention.sliding_window_pattern"] = [True] * config.num_hidden_layers
    return keys


def _eagle3(draft: Draft, where: str, tokens: int, options: Options) -> Layout:
    check_precision(options.precision)
    config, arch = draft.network.config, "eagle3"
    keys = _sizes(draft, arch, 1) | {
        f"{arch}.target_layers": [i + 1 for i in config.target_layer_ids],
        f"{arch}.target_hidden_size": draft.target.hidden_size,
        f"{arch}.norm_before_residual": False,
        f"{arch}.norm_before_fc": False,
    }
    names = {f"midlayer.{ours}": f"blk.0.{theirs}" for ours, theirs in LAYER.items()}
    names["midlayer.hidden_norm"] = "blk.0.attn_norm_2"
    weights = _own_weights(draft)
    for name, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        place = f"midlayer.self_attn.{name}_proj.weight"
        weights[place] = interleaved(weights[place], heads)
    return _layout(draft, where, tokens, options, arch, keys, TOP | names, weights)


def _lm(draft: Draft, where: str, tokens: int, options: Options) -> Layout:
    check_precision(options.precision)
    config, weights = lm_of_target_size(draft)
    matrices = {name for name, weight in weights.items() if weight.dim() == 2}
    name = f"draft-{options.precision}.gguf"
    keys = _tokenizer(draft, config["vocab_size"])
    made = gguf_model.model(config, weights, keys, f"{draft.name} draft", options.precision)
    command = _command(draft, where, name, "draft-simple", tokens, options)
    layout = Layout(
        f"GGUF {made.architecture}",
        "gguf",
        command,
        make=lambda path: made.write(path / name),
        copies=draft.tokenizer_files,
    )
    return _beside(draft, replace(layout, network=_rounded(draft, matrices, options.precision)), options)


def _mtp(draft: Draft, where: str, tokens: int, options: Options) -> Layout:
    """Lay out a next-token module: the converter takes it out of a target that has it in the place of its own."""
    found = converter.find(options.precision)
    whole, file = stitched(draft, ""), f"draft-{options.precision}.gguf"
    given = f"{draft.name} draft", converter.MODULE

    def make(path: Path) -> None:
        model = path / "model"
        model.mkdir()
        fill(whole, model, lambda source, place: place.symlink_to(source.resolve()))
        found.run(model, path / file, options.precision, *given)
        shutil.rmtree(model)

    run = shlex.join([found.script.name, "TARGET", *found.arguments(file, options.precision, *given)])
    layout = Layout(
        "GGUF next-token module",
        "gguf-next-token",
        _command(draft, where, file, "draft-mtp", tokens, options),
        config=whole.config,
        make=make,
        copies=draft.tokenizer_files,
        notes=(f"Written by llama.cpp's converter ({found.identity}): `{run}`.",),
        network=lambda: _rounded_module(draft, options.precision),
    )
    return _beside(draft, layout, options)


def _rounded_module(draft: Draft, precision: str) -> Network:
    """Return the module with its matrices rounded, but those that choose experts, which the converter leaves exact."""
    network = cast(MTPModel, deepcopy(draft.network))
    exact = ("mlp.gate.weight", "mlp.shared_expert_gate.weight")
    weights = {
        name: rounded(x, precision) if x.dim() == 2 and not name.endswith(exact) else x.float()
        for name, x in stored_weights(network).items()
    }
    with TemporaryDirectory() as directory:
        save_file(weights, Path(directory) / WEIGHTS)
        network.take(read_module(Path(directory), network.config.module), draft.name)
    return network


def _layout(
    draft: Draft,
    where: str,
    tokens: int,
    options: Options,
    arch: str,
    keys: dict[str, Key],
    names: Mapping[str, str],
    weights: dict[str, Tensor],
    vectors: dict[str, Tensor] | None = None,
    notes: tuple[str, ...] = (),
) -> Layout:
    """Lay out a draft that reads the target's states. `names`: ours → llama.cpp's, without `.weight`."""
    vectors = dict(vectors or {})
    matrices: dict[str, Tensor] = {}
    for name, weight in weights.items():
        theirs = names.get(name) or f"{names[name.removesuffix('.weight')]}.weight"
        (matrices if weight.dim() == 2 else vectors)[theirs] = weight
    if draft.reduced:
        vectors["d2t"] = draft.network.draft_ids.cpu()
    keys = keys | _tokenizer(draft, draft.target.vocab_size)
    made = Gguf(arch, f"{draft.name} draft", options.precision, keys, matrices, vectors)
    file = f"draft-{options.precision}.gguf"
    ours = {name for name, weight in weights.items() if weight.dim() == 2}
    command = _command(draft, where, file, f"draft-{draft.kind.removesuffix('2')}", tokens, options)
    layout = Layout(
        f"GGUF {arch}",
        f"gguf-{arch}",
        command,
        make=lambda path: made.write(path / file),
        copies=draft.tokenizer_files,
        notes=notes,
        network=_rounded(draft, ours, options.precision),
    )
    return _beside(draft, layout, options)


def _rounded(draft: Draft, names: set[str], precision: str) -> Callable[[], Network]:
    return lambda: reference.rounded(draft.network, names, lambda x: rounded(x, precision))


def _beside(draft: Draft, layout: Layout, options: Options) -> Layout:
    """Add the target's own GGUF where it is asked for."""
    layout = replace(layout, notes=layout.notes + _measured(draft))
    if not options.with_target:
        return layout
    gguf_model.check_target(draft.target, options.precision)
    make = layout.make

    def both(path: Path) -> None:
        if make:
            make(path)
        gguf_model.write_target(draft.target, options.precision, path / f"target-{options.precision}.gguf")

    return replace(layout, make=both)


def _measured(draft: Draft) -> tuple[str, ...]:
    """Return what `deepspec serve-check` found that drafting gains in llama.cpp, where it measured this very draft."""
    notes = []
    for path in sorted(SERVED.glob(f"{draft.name}-llamacpp-*.json")):
        try:
            found = json.loads(path.read_text())
            if found["draft_digest"] == draft.digest and found["plain_seconds"]:
                where = (
                    f"{found['engine_version']}, target in {found['precision']}, {found['threads']} threads"
                )
                notes.append(f"Measured in {where}: {found['advice']}; {found['fastest']}.")
        except (OSError, ValueError, KeyError):
            continue
    return tuple(notes)


def _own_weights(draft: Draft) -> dict[str, Tensor]:
    """Return the weights that the target has not: no shared embeddings, no shared head, no maps of tokens."""
    weights = {name: weight for name, weight in draft.weights.items() if name not in ("d2t", "t2d")}
    if not draft.own_embeddings:
        weights.pop("embed_tokens.weight")
    shared = draft.target.head_weight.cpu().to(draft.dtype)
    if not draft.reduced and torch.equal(weights["lm_head.weight"], shared):
        weights.pop("lm_head.weight")
    return weights


def _confidence(draft: Draft, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the confidence head as llama.cpp reads it, one temperature folded in, and what its reader should know."""
    config = draft.network.config
    weight, bias = (weights.get(f"{CONFIDENCE}.{name}") for name in ("weight", "bias"))
    if weight is None or bias is None:
        return {}, (
            "It has no confidence head: leave `--spec-draft-p-min` out, with which it would not draft at all.",
        )
    if weight.shape[-1] != config.hidden_size + config.markov_rank:
        return {}, (
            "Its confidence head does not see the Markov part, as llama.cpp's must: leave `--spec-draft-p-min` out.",
        )
    folded = temperature(draft)
    note = "`--spec-draft-p-min P` ends a draft before its first token of a confidence below P; "
    note += PLACES if folded is None else f"its calibrated temperature ({folded:g}) is in the head"
    by = folded or 1.0
    return {"conf_proj.weight": weight.float() / by, "conf_proj.bias": bias.float() / by}, (note + ".",)


def temperature(draft: Draft) -> float | None:
    """Return the temperature of greedy drafting's confidence, 1 where uncalibrated; None where places differ."""
    path = draft.directory / CALIBRATION
    found = json.loads(path.read_text()).get("greedy") if path.exists() else None
    temperatures = set(found or [1.0])
    return temperatures.pop() if len(temperatures) == 1 else None


def _sizes(draft: Draft, arch: str, layers: int) -> dict[str, Key]:
    config = draft.network.config
    return {
        f"{arch}.block_count": layers,
        f"{arch}.context_length": draft.target.max_length,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.dimension_count": config.head_dim,
        f"{arch}.rope.freq_base": float(config.rope_theta),
        f"{arch}.vocab_size": draft.target.vocab_size,
    }


def _tokenizer(draft: Draft, size: int) -> dict[str, Key]:
    mask = getattr(draft.network.config, "mask_token_id", None)
    return gguf_model.target_tokenizer(draft.target, size, mask)


def _command(draft: Draft, where: str, file: str, kind: str, tokens: int, options: Options) -> str:
    target = f"{where}/target-{options.precision}.gguf" if options.with_target else "TARGET.gguf"
    said = f"llama-server -m {target} -md {where}/{file} --spec-type {kind} --spec-draft-n-max {tokens}"
    beside = f"{draft.target_path} in GGUF; deepspec export --with-target writes it"
    return said if options.with_target else f"{said} (TARGET.gguf: {beside})"


PLANS = plans(Options())
