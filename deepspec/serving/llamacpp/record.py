"""`reports/serve/<drafter>-llamacpp-<precision>.json`: a serving record, with all ways of decoding and their costs."""

from __future__ import annotations

from pydantic import Field

from deepspec.evaluation.parts import Bounds, Part
from deepspec.serving.record import Agreement, ServingRecord


class Cost(Part):
    """What a pass over so many tokens takes, or a round that drafts so many."""

    tokens: int = Field(description="tokens of the pass, or drafted ones of the round")
    plain_passes: float = Field(description="in passes over one token just before and after it, median")
    plain_passes_ci95: Bounds = Field(description="95 % interval of that ratio, by turns")
    seconds: float = Field(description="that ratio times the median seconds of a plain pass")


class Expected(Part):
    """What drafting so many tokens should gain, by the costs measured here and our engine's acceptance."""

    drafted: int = Field(description="tokens drafted a round")
    tau: float = Field(description="tokens a round, the target's own included")
    speedup: float = Field(description="seconds a token plain over those with the draft")
    speedup_ci95: Bounds = Field(description="95 % interval of the speed-up, by turns of the measured costs")


class Way(Part):
    """One way of decoding, interleaved with the others prompt by prompt."""

    name: str = Field(description="llama.cpp's kind of draft with what is not its default, or this engine's")
    tokens_per_second: float | None = Field(description="tokens/s, from an answer's first token to its last")
    speedup: float | None = Field(description="seconds a token of llama.cpp plain over those of this way")
    speedup_ci95: Bounds | None = Field(description="95 % interval of the speed-up, by prompts")
    tokens_per_turn: float | None = Field(
        description="tokens a pass of the target, those without a draft included"
    )
    drafted_per_turn: float | None = Field(description="tokens drafted a pass of the target")
    same_as_plain: Agreement = Field(description="its greedy answers and the plain ones")


class Law(Part):
    """Two samples of answers at T = 1, with the draft and without."""

    prompts: int = Field(description="questions asked")
    draws: int = Field(description="answers to each, of either sample")
    max_new_tokens: int = Field(description="tokens of such an answer at most")
    change: float = Field(description="share of second tokens, moved onto one, that is to be seen")
    power: float = Field(description="how surely that is seen by so many draws, by simulation")
    p_second_token: float = Field(description="p of the second tokens' counts, which a draft decides first")
    p_length: float = Field(description="p of the answers' lengths")


class LlamaCppRecord(ServingRecord):
    """All that was measured of one draft in llama.cpp."""

    precision: str = Field(description="precision of the target's file")
    draft_file: str = Field(description="the draft's file")
    threads: int = Field(description="threads of the server")
    passes: list[Cost] = Field(description="what a pass over so many tokens takes")
    rounds: list[Cost] = Field(description="what a round that drafts so many takes")
    plain_seconds: float | None = Field(
        description="median seconds of a plain pass while the costs were measured; null where they were not"
    )
    expected: list[Expected] = Field(description="what each length should gain")
    advice: str = Field(description="whether to draft, and how many, said before the answers were timed")
    fastest: str = Field(description="the fastest of llama.cpp's ways as measured, or that none gains")
    ways: list[Way] = Field(description="every way of decoding, interleaved")
    law: Law | None = Field(description="the law at T = 1; null where it was not tested")
