"""SGLang (2026-08): EAGLE-3, DFlash and DSpark directories, draft models and n-grams.

Layer ids are ours, i is the output of layer i, but for EAGLE-3: since 0.5.13 (pull request 25454, May 2026) ids whose
first is 1 are outputs, and others are inputs of layers, one higher. DFlash takes embeddings and head from the target,
so a reduced vocabulary is widened to the target's whole one; DSpark is given whole too, in DeepSeek's format.
"""

from __future__ import annotations

from torch import Tensor

from deepspec.export.draft import Draft
from deepspec.export.formats import (
    dflash_config,
    dspark_config,
    eagle3_config,
    lm_layout,
    shared,
)
from deepspec.export.layout import Layout
from deepspec.export.next_token import stitched
from deepspec.export.suitable import Refused

WIDENED = (
    "The draft was trained on {columns} tokens; here it has the target's whole vocabulary, as this engine asks. Its "
    "law among its own tokens is unchanged."
)

INPUTS = (
    "Its first target layer is not 1, so its layer ids are inputs of layers, as SGLang reads them since 0.5.13; an "
    "earlier version takes every state one layer late. A draft whose first layer is 1 is read the same by all."
)


def serve(draft: Draft, algorithm: str, where: str | None, *flags: str) -> str:
    path = ["--speculative-draft-model-path", where] if where else []
    words = ["python -m sglang.launch_server --model-path", draft.target_path]
    return " ".join([*words, "--speculative-algorithm", algorithm, *path, *flags])


def eagle3(draft: Draft, where: str, tokens: int) -> Layout:
    layers = list(draft.network.config.target_layer_ids)
    inputs = layers[0] != 1
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **eagle3_config(draft),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [i + inputs for i in layers],
            "use_aux_hidden_state": True,
        },
    }
    chain = ("--speculative-num-steps", str(tokens), "--speculative-eagle-topk 1")
    command = serve(draft, "EAGLE3", where, *chain, "--speculative-num-draft-tokens", str(tokens + 1))
    return Layout(
        "LlamaForCausalLMEagle3",
        "sglang-eagle3",
        command,
        config,
        shared(draft),
        copies=draft.tokenizer_files,
        notes=(INPUTS,) if inputs else (),
    )


def mtp(draft: Draft, where: str, tokens: int) -> Layout:
    chain = f"--speculative-num-steps {tokens} --speculative-eagle-topk 1"
    command = f"python -m sglang.launch_server --model-path {where} --speculative-algorithm NEXTN {chain}"
    return stitched(draft, f"{command} --speculative-num-draft-tokens {tokens + 1}")


def dflash(draft: Draft, where: str, tokens: int) -> Layout:
    config = dflash_config(draft)
    mask = draft.target.tokenizer.convert_ids_to_tokens(config["dflash_config"]["mask_token_id"])
    if mask is not None:  # an id of the vocabulary's padding has no text
        config["dflash_config"]["mask_token"] = mask
    left_out = ("embed_tokens.weight", "lm_head.weight", "d2t", "t2d")
    weights = {name: weight for name, weight in draft.weights.items() if name not in left_out}
    if draft.own_embeddings:
        raise Refused("SGLang takes DFlash's embeddings from the target, and this draft brings its own")
    flags = ("--speculative-num-draft-tokens", str(config["block_size"]))
    command = serve(draft, "DFLASH", where, *flags)
    return Layout(
        "DFlashDraftModel",
        "dflash",
        command,
        config,
        weights,
        copies=draft.tokenizer_files,
        notes=widened(draft),
    )


def dspark(draft: Draft, where: str, tokens: int) -> Layout:
    config = dspark_config(draft) | {"draft_vocab_size": draft.target.vocab_size}
    weights = {name: weight for name, weight in draft.weights.items() if name not in ("d2t", "t2d")}
    if draft.reduced:
        weights["lm_head.weight"] = draft.target.head_weight.cpu().to(draft.dtype)
        weights["markov_head.markov_w2.weight"] = _spread(draft, weights["markov_head.markov_w2.weight"])
    command = serve(draft, "DSPARK", where)
    return Layout(
        "Qwen3DSparkModel",
        "dspark",
        command,
        config,
        weights,
        copies=draft.tokenizer_files,
        notes=widened(draft),
    )


def lm(draft: Draft, where: str, tokens: int) -> Layout:
    flags: tuple[str, ...] = ("--speculative-num-steps", str(tokens), "--speculative-eagle-topk 1")
    flags += ("--speculative-num-draft-tokens", str(tokens + 1))
    return lm_layout(draft, serve(draft, "STANDALONE", where, *flags))


def ngram(draft: Draft, where: str, tokens: int) -> Layout:
    settings = {
        "speculative_algorithm": "NGRAM",
        "speculative_num_draft_tokens": draft.block_size + 1,
    }
    flags = ("--speculative-num-draft-tokens", str(draft.block_size + 1))
    return Layout("ngram settings", "settings", serve(draft, "NGRAM", None, *flags), settings=settings)


def widened(draft: Draft) -> tuple[str, ...]:
    return (WIDENED.format(columns=draft.network.config.draft_vocab_size),) if draft.reduced else ()


def _spread(draft: Draft, rows: Tensor) -> Tensor:
    """Spread the rows of the draft's columns to their target ids; zero elsewhere, which corrects nothing."""
    whole = rows.new_zeros(draft.target.vocab_size, rows.shape[1])
    return whole.index_copy(0, draft.network.draft_ids, rows)


PLANS = {
    "eagle3": eagle3,
    "mtp": mtp,
    "dflash": dflash,
    "dspark": dspark,
    "lm": lm,
    "lookup": ngram,
    "suffix": ngram,
}
