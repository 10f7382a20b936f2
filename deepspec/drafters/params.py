"""The sections `drafters` and `evaluate.decode` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from deepspec.decoding.params import AnyController, CostController
from deepspec.decoding.shapes import AUTO, AnyShape
from deepspec.drafters.loss_params import LossParams
from deepspec.section import Section

START = (
    "Layers begin as the `target`'s last ones, at `random`, or (`auto`) as the target's where it can lend them; "
    "or a draft directory to go on from."
)

WINDOW = "The draft's layers see so many tokens back, each itself among them; null: the whole context."
HEAD_RANK = (
    "A trained head of this rank over the whole vocabulary (`draft_vocab_size: 0`); null: the target's rows."
)
ROPE = "Scaled as the target's rotary embedding where that is linear, llama3 or yarn; or `plain`."


class TrainedParams(Section):
    """What every drafter that is trained may have in its section."""

    loss: LossParams | None = Field(None, description="In place of `train.loss`.")


class BlockParams(TrainedParams):
    """What block drafters share: layers that make a whole block in one pass."""

    layers: int = Field(2, ge=1)
    block_size: int = Field(7, ge=1, description="γ: tokens drafted per block.")
    target_layer_ids: list[int] | None = Field(None, description="None spreads five over the depth.")
    draft_vocab_size: int = Field(8192, ge=0, description="Most frequent tokens kept; 0 keeps them all.")
    head_rank: int | None = Field(None, ge=1, description=HEAD_RANK)
    context_skip: bool = Field(
        False, description="Feed the newest target feature into the block's input (our engine only)."
    )
    start: str = Field("auto", description=START)
    sample_from_anchor: bool = Field(
        True, description="The anchor's place predicts the first token; false: γ masks behind it predict."
    )
    causal: bool = Field(
        False, description="Each place of a block sees only those before it (JetSpec's); false: all see all."
    )
    sliding_window: int | None = Field(None, ge=1, description=WINDOW)
    rope: Literal["target", "plain"] = Field("target", description=ROPE)


class DSparkParams(BlockParams):
    """DSpark: a parallel block drafter with a sequential head and a confidence head."""

    type: Literal["dspark"]
    markov_head: Literal["vanilla", "gated", "rnn"] = "vanilla"
    markov_rank: int = Field(128, ge=0, description="Of the sequential head; 0 leaves it out (DFlash).")
    confidence_head: bool = True


class DFlashParams(BlockParams):
    """DFlash: a parallel block drafter; every position is predicted on its own."""

    type: Literal["dflash"]
    sample_from_anchor: bool = Field(
        False, description="The anchor's place predicts the first token, as in DSpark; no engine serves that."
    )


class DFlash2Params(BlockParams):
    """DFlash 2: DFlash with convolutions along the block and a selector of paths through its candidates."""

    type: Literal["dflash2"]
    sample_from_anchor: bool = Field(
        False, description="The anchor's place predicts the first token, as in DSpark; no engine serves that."
    )
    conv_group_size: int = Field(16, ge=1, description="Channels that share a correction of the kernel.")
    selector_rank: int = Field(256, ge=1, description="Of the scores of pairs of tokens.")
    selector_top_k: int = Field(16, ge=1, description="K: candidates of a place, among which paths go.")


class EagleParams(TrainedParams):
    """What EAGLE's drafters share: a layer that reads a token's embedding beside a state."""

    block_size: int = Field(5, ge=1, description="γ: steps unrolled in training, tokens drafted at most.")
    target_layer_ids: list[int] | None = Field(None, description="None takes a low, a middle and a high one.")
    draft_vocab_size: int = Field(8192, ge=0, description="Most frequent tokens kept; 0 keeps them all.")
    start: str = Field("auto", description=START)
    qk_norm: bool = Field(False, description="Qwen3-style layer, DeepSeek's format; else Llama's.")
    sliding_window: int | None = Field(None, ge=1, description=WINDOW)
    rope: Literal["target", "plain"] = Field("target", description=ROPE)


class Eagle3Params(EagleParams):
    """EAGLE-3: one layer that drafts token by token from the target's features and its own outputs."""

    type: Literal["eagle3"]
    version: Literal["3", "3.1"] = Field(
        "3", description="3.1 norms each of the target's states and what is fed back."
    )


class PEagleParams(EagleParams):
    """P-EAGLE: EAGLE-3's network, run once for all places of a draft."""

    type: Literal["peagle"]
    block_size: int = Field(7, ge=1, description="γ: tokens drafted in one pass.")
    layers: int = Field(2, ge=1, description="The first reads the embeddings too.")


class MTPParams(TrainedParams):
    """MTP: the target's own next-token module, several steps of it."""

    type: Literal["mtp"]
    block_size: int = Field(3, ge=1, description="γ: steps unrolled in training, tokens drafted at most.")
    start: str = Field(
        "auto",
        description="The target's own module, else (`auto`) or at any rate (`target`) its last layer; `random`; or a "
        "draft directory to go on from.",
    )
    finetune: bool = Field(True, description="false: the module is used as it is.")


class MedusaParams(TrainedParams):
    """Medusa: residual heads on the target's last hidden state; the cheapest draft to train and to run."""

    type: Literal["medusa"]
    heads: int = Field(4, ge=1, description="K: tokens drafted.")
    layers: int = Field(1, ge=1, description="Residual layers of a head.")
    draft_vocab_size: int = Field(8192, ge=0, description="Most frequent tokens kept; 0 keeps them all.")
    start: str | None = Field(
        None, description="A draft directory to go on from; null: heads that change nothing."
    )


class LMParams(TrainedParams):
    """An independent draft language model of the target's tokenizer."""

    type: Literal["lm"]
    block_size: int = Field(5, ge=1, description="γ: tokens drafted at most.")
    source: str | None = Field(None, description="A model of the same tokenizer: a directory or a hub id.")
    from_layers: list[int] | None = Field(None, description="Or: the target's own layers to start from.")
    hidden_size: int | None = Field(None, ge=8, description="Or: from scratch, of this width.")
    layers: int = Field(2, ge=1, description="From scratch: decoder layers.")
    finetune: bool = Field(True, description="false: used as it is.")

    @model_validator(mode="after")
    def _one_origin(self) -> LMParams:
        given = [name for name in ("source", "from_layers", "hidden_size") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(
                f"a draft of type lm wants one of source, from_layers, hidden_size; found {found}"
            )
        return self


class LookupParams(Section):
    """Training-free: the continuation of the longest earlier match of the context's end."""

    type: Literal["lookup"]
    block_size: int = Field(7, ge=1)
    min_match: int = Field(2, ge=1, description="Shortest suffix, in tokens, that counts as a match.")


class SuffixParams(Section):
    """Training-free: the longest earlier match of any length, found by a suffix automaton."""

    type: Literal["suffix"]
    block_size: int = Field(16, ge=1)
    min_match: int = Field(2, ge=1)


AnyDrafter = Annotated[
    DSparkParams
    | DFlashParams
    | DFlash2Params
    | Eagle3Params
    | PEagleParams
    | MTPParams
    | MedusaParams
    | LMParams
    | LookupParams
    | SuffixParams,
    Field(discriminator="type"),
]
LookupChoice = Annotated[LookupParams | SuffixParams, Field(discriminator="type")]


DEFAULT_LOOKUP = SuffixParams(type="suffix", min_match=3)


class DecodeParams(Section):
    """How a trained draft is used at decode time."""

    lookup: LookupChoice | None = Field(
        DEFAULT_LOOKUP,
        description="Asked before the trained draft, which answers where nothing matches; null: not asked.",
    )
    tree: AnyShape = AUTO
    verify: Literal["standard", "block", "recursive", "traversal"] | None = Field(
        None, description="Rule for sampled drafts; None: the best that fits."
    )
    controller: AnyController = CostController()
