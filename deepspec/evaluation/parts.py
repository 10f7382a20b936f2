"""The parts of an evaluation record (`record.py`): figures and settings, each field with its definition."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    model_serializer,
)

Bounds = tuple[float, float]
Mode = Literal["greedy", "sampled"]
Setting = str | int | float | bool | None


class Part(BaseModel):
    """A part of a record: it cannot be changed, and has the keys that are named here and no others."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class _Gain(Part):
    tau: float | None = Field(
        description="tokens committed per pass of the target, its own token included: all tokens over all rounds"
    )
    tau_ci95: Bounds | None = Field(
        description="95 % interval of tau by a paired bootstrap: prompts, with all their runs, are drawn again 2,000 "
        "times within each task, and the tails are moved outwards for few prompts (deepspec/evaluation/stats.py); null "
        "where a task has one prompt alone"
    )
    speedup: float | None = Field(
        description="seconds a token of plain decoding over seconds a token with the draft, in the same engine and "
        "minute, prefill left out, each a ratio of sums over a task's prompts; a mean is that over tasks; null "
        "without losslessness"
    )
    speedup_ci95: Bounds | None = Field(description="95 % interval of the speed-up, as that of tau")


class _Ratio(Part):
    ratio: float | None = Field(
        description="how many times as fast the draft is as this other way of decoding, paired by prompt; null "
        "without losslessness of both"
    )
    ratio_ci95: Bounds | None = Field(description="95 % interval of the ratio, as that of tau")


class Positions(Part):
    """Acceptance by position of a draft."""

    accept_rate_by_position: list[float] = Field(
        description="of the rounds that proposed a position and accepted all before it, the share that accepted it too"
    )
    reached_by_position: list[int] = Field(
        description="how many rounds proposed a position and accepted all before it"
    )


def _as_in(part: type[Part], name: str) -> Any:
    """Return a field of another part, with its description, to be declared again in its place."""
    return part.model_fields[name]


class Figures(Part):
    """What is said of every way of decoding on a task."""

    rounds: int = Field(description="passes of the target that verified a draft or drew a token of their own")
    tau: float | None = _as_in(_Gain, "tau")
    tau_ci95: Bounds | None = _as_in(_Gain, "tau_ci95")
    accept_rate_by_position: list[float] = _as_in(Positions, "accept_rate_by_position")
    reached_by_position: list[int] = _as_in(Positions, "reached_by_position")
    tokens_per_second: float | None = Field(description="tokens over seconds, prefill left out")
    speedup: float | None = _as_in(_Gain, "speedup")
    speedup_ci95: Bounds | None = _as_in(_Gain, "speedup_ci95")
    draft_ms: float | None = Field(description="time of a round in the draft: the median over prompts")
    verify_ms: float | None = Field(
        description="time of a round in the target's pass with the verdict: the median over prompts"
    )
    host_ms: float | None = Field(
        description="time of a round in Python around both: the median over prompts"
    )
    lossless: bool = Field(
        description="in float32 at T = 0 the output is token for token the plain one, but for proven ties; without it "
        "no speed-up is reported"
    )


class BesideFigures(_Ratio, Figures):
    """Of another way of decoding on the same prompts."""

    computed: bool = Field(
        False,
        description="not decoded: its rounds are counted along what the draft wrote, which is exact of a lookup, and "
        "its passes take the plain run's seconds times the cost curve",
    )


class OutputBin(Part):
    """Rounds that begin within a stretch of the answer."""

    start: int = Field(description="tokens of the answer that are there when such a round begins, at least")
    end: int = Field(description="tokens of the answer that are there when such a round begins, less than")
    rounds: int = Field(description="rounds that begin there")
    tau: float = Field(description="tokens committed per round that begins there")


class ContextBin(Part):
    """Rounds that begin behind so many tokens of prompt and answer."""

    start: int = Field(description="tokens before such a round, at least")
    end: int = Field(description="tokens before such a round, less than")
    rounds: int = Field(description="rounds that begin there")
    tau: float = Field(description="tokens committed per round that begins there")


class StateCosts(Part):
    """What the rounds of the draft cost a target that keeps a state, and so runs accepted tokens again."""

    passes: int = Field(description="runs of the target, the separate ones over accepted tokens among them")
    fed_tokens: int = Field(description="committed tokens that were run again, in all rounds")
    fed_per_round: float = Field(description="the same, a round")
    tokens_per_pass: float = Field(
        description="tokens committed per run of the target: tau with every run counted"
    )


class PassCosts(Part):
    """What a pass of the draft's rounds cost beside a plain one, verdicts among them."""

    by_curve: float = Field(
        description="by the cost curve, with which controllers decide: the mean over rounds"
    )
    measured: float = Field(description="seconds a round over seconds a plain round, of the same prompts")


class LosslessChecked(Part):
    """On how much losslessness was checked."""

    prompts: int = Field(description="prompts of the check in float32")
    tokens: int = Field(description="tokens of the check in float32")


class _TaskFacts(Part):
    category: str = Field(description="kind of the task: math, code, chat or other")
    task_version: str = Field(description="version of the task's definition")
    source: str = Field(description="where its prompts come from")
    prompts_digest: str = Field(description="digest of its prompts: records compare where it is the same")
    temperature: float = Field(description="temperature of sampling; 0 is greedy")
    prompts: int = Field(description="prompts that were decoded")
    new_tokens: int = Field(description="tokens that the draft's runs wrote")


class TaskEntry(Figures, _TaskFacts):
    """One task at one temperature, of the draft as `evaluate.decode` uses it."""

    tau_by_output_position: list[OutputBin] = Field(
        description="tau of the rounds that begin when so many tokens of the answer are there, by 16"
    )
    baseline_tokens_per_second: float | None = Field(
        description="tokens/s of plain decoding of the same prompts"
    )
    ties: int = Field(
        description="differences of the check that are none: the target's two best logits, recomputed in float64, are "
        "less than 1e-4 apart"
    )
    lossless_checked: LosslessChecked = Field(description="on how much losslessness was checked")
    output_hashes: list[str] = Field(description="digest of the tokens of each prompt")
    beside: dict[str, BesideFigures] = Field(
        description="the same figures of the lookup alone and of other controllers of the same draft, on the same "
        "prompts"
    )


class BesideMean(_Ratio, _Gain):
    """Mean over tasks of another way of decoding."""


class Mean(_Gain):
    """Means over tasks at one temperature."""

    beside: dict[str, BesideMean] = Field(description="the same means of the other ways of decoding")


class _Headline(Part):
    temperature: float = Field(description="temperature of the headline: greedy, or the lowest measured")


class Summary(_Gain, _Headline):
    """The headline: means over tasks."""

    speedup_vs_hf: float | None = Field(
        description="tokens/s at T = 0 over those of transformers.generate on each task's first prompt"
    )
    lossless: bool = Field(description="every task is lossless")
    by_temperature: dict[str, Mean] = Field(description="means over tasks at each temperature")


class _BlockCounts(Part):
    blocks: int = Field(description="blocks drafted")
    tau: float | None = Field(description="tokens committed per block, the target's own included")


class Blocks(Positions, _BlockCounts):
    """The trained draft alone on a task: whole blocks, no lookup, no controller."""


class BeforeAfter(Part):
    """A number before and after calibration."""

    before: float | None = Field(description="as the head was trained")
    after: float | None = Field(description="after sequential temperature scaling")


class ReliabilityBin(Part):
    """Positions whose predicted chance of acceptance lies within a bin."""

    low: float = Field(description="lower end of the bin")
    high: float = Field(description="upper end of the bin")
    count: int = Field(description="positions in the bin")
    predicted: float = Field(description="mean predicted chance")
    observed: float = Field(description="share that was accepted")


class Reliability(Part):
    """Reliability curves before and after calibration."""

    before: list[ReliabilityBin] = Field(description="as the head was trained")
    after: list[ReliabilityBin] = Field(description="after sequential temperature scaling")


class Threshold(Part):
    """What is verified where blocks are cut at a confidence."""

    threshold: float = Field(description="each block is cut at the first position whose own chance is below")
    accepted: int = Field(description="drafted tokens that are verified and accepted")
    rejected: int = Field(description="drafted tokens that are verified and rejected")
    acceptance_rate: float | None = Field(
        description="accepted over verified; null where nothing is verified"
    )


class Confidence(Part):
    """What the confidence head is worth, on prompts it was not calibrated on."""

    blocks: int = Field(description="blocks drafted")
    ece: BeforeAfter = Field(
        description="the gap between predicted and observed chance that all tokens up to a position are accepted, in "
        "15 bins weighted by their counts, mean over positions; before and after calibration"
    )
    auc: float | None = Field(
        description="chance that a path that was accepted had been given a higher chance than one that was not"
    )
    reliability: Reliability = Field(description="predicted against observed chance, by bins")
    thresholds: list[Threshold] = Field(
        description="drafted tokens that are accepted or rejected where each block is cut at the first position whose "
        "own chance is below a threshold"
    )


class Ratio(Part):
    """A ratio with its 95 % interval."""

    value: float = Field(description="the ratio")
    low: float | None = Field(description="lower end of its 95 % interval")
    high: float | None = Field(description="upper end of its 95 % interval")


class Throughput(Part):
    """One way of decoding with a full batch."""

    temperature: float = Field(description="temperature of sampling")
    batch: int = Field(description="requests at once")
    name: str = Field(description="plain, a fixed length, or the prefix scheduler")
    tokens_per_second: float = Field(
        description="tokens/s of the full batch, prefill left out; the median over groups"
    )
    speedup: Ratio | None = Field(description="tokens/s over those of plain decoding at this batch size")
    against_best_fixed: Ratio | None = Field(description="tokens/s over those of the best fixed length here")
    best_fixed: str = Field(description="the fixed length with the highest rate here, chosen afterwards")
    tau: float = Field(description="tokens per round and request")
    verified_per_request: float | None = Field(description="drafted tokens verified per request and round")


class SweepPoint(Part):
    """One length of chains, or one depth or size of trees."""

    sweep: str = Field(description="block_length, depth or nodes")
    value: int = Field(description="its length, depth or nodes")
    tau: float | None = Field(description="tau there")
    speedup: float | None = Field(description="speed-up there")
    speedup_ci95: Bounds | None = Field(description="95 % interval of the speed-up")
    round_ms: float = Field(description="milliseconds of a round, the mean over prompts")


class Sweeps(Part):
    """The trained draft alone, everything verified."""

    temperature: float = Field(description="temperature of sampling")
    prompts: int = Field(description="prompts that were decoded at each point")
    points: list[SweepPoint] = Field(description="a row for each length, depth and number of nodes")
    computed: bool = Field(
        False,
        description="not decoded: rounds are counted along plain answers, which is exact at T = 0, and passes take the "
        "plain run's seconds times the cost curve",
    )


class TrainParity(Part):
    """Greedy blocks in training and in decoding, on the same held-out contexts."""

    promised: float = Field(description="acceptance at position 1 in training")
    measured: float = Field(description="acceptance at position 1 in decoding")
    agreement: list[float] = Field(
        description="by position, share of blocks with the same token, of those that were the same up to there"
    )
    blocks: int = Field(description="contexts")
    below: bool = Field(description="acceptance is lower than chance would have it")
    unlike: bool = Field(description="more tokens differ than rounding and chance would have it")


class RecordWarning(Part):
    """What a reader must not overlook; it changes no number."""

    name: str = Field(description="its name in docs/evaluation.md")
    message: str = Field(description="what was found")


class Decode(Part):
    """`evaluate.decode` as it was."""

    lookup: dict[str, Setting] | None = Field(description="asked before the trained draft; null: not asked")
    tree: dict[str, JsonValue] = Field(description="shape of the drafts")
    verify: str | None = Field(description="rule for sampled drafts; null: the best that fits")
    controller: dict[str, Setting] = Field(description="what decides how much is drafted")


class RoundCosts(Part):
    """What a round costs on this machine, by which controllers decide."""

    identity: dict[str, Setting] = Field(description="of which machine, target and drafter the costs are")
    passes: dict[str, list[tuple[int | float, int | float]]] = Field(
        description="requests at once → (tokens of a pass, its seconds)"
    )
    drafts: dict[str, float] = Field(description="requests at once → seconds of a draft")
    chain_drafts: dict[str, float] | None = Field(
        None, description="the same of a chain, where `drafts` is of trees; empty where it is not"
    )
    context: int | None = Field(None, description="tokens of context where passes were measured")
    slopes: list[tuple[int | float, int | float]] | None = Field(
        None, description="(new tokens of a request, seconds that each further token of its context adds)"
    )
    verdict: float | None = Field(
        None, description="seconds that each token adds which was drawn from the draft's law"
    )

    @model_serializer(mode="wrap")
    def _as_known(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what records of this version may lack."""
        return {key: value for key, value in plain(self).items() if value is not None}


class Provenance(Part):
    """By what code, command and packages the record was made."""

    git_commit: str | None = Field(description="commit of the code; null outside a repository")
    git_dirty: bool = Field(description="the code differed from that commit")
    command: str = Field(description="command that measured")
    packages: dict[str, str | None] = Field(
        description="versions of Python and of the packages that decide results"
    )
    cpu: str = Field(description="processor and the instructions that decide how sums are rounded")


class DraftProvenance(Provenance):
    """The same, and by what the draft was made."""

    data_digest: str | None = Field(description="digest of the data that the draft was trained on")
    trained_at_commit: str | None = Field(description="commit that the draft was trained at")
