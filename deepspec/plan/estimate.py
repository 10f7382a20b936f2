"""Tokens, hours, bytes on disk and peak memory of each stage: arithmetic on parameters, sizes and rates.

Every stage does one of three things. It *decodes*: a step reads the weights, and the cache of all requests in flight,
and multiplies. It *extracts*: passes over whole conversations, which multiply. Or it *trains* a draft: three times the
products of a pass of the draft, beside the two laws over the draft vocabulary. How much of a machine's rates these
reach was measured on the demo (`docs/training.md`); a token count that only the target can tell, the length of its
answers, is taken from there too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from deepspec.plan.rates import Rates
from deepspec.plan.sizes import DraftSize, TargetSize

if TYPE_CHECKING:
    from deepspec.config import Params
    from deepspec.evaluation.params import EvaluateParams

READING, DECODING, EXTRACTING, TRAINING = 0.8, 0.9, 0.75, 0.7  # of the rates, reached in the demo
OUR_TRAINING = 0.9  # with our kernels for losses, norms and attention
TILED = 0.2  # of either, where AMX multiplies: products are so fast then that a step waits for all else
ANSWERED = 0.7  # of max_new_tokens, in the mean
PROMPT = 60  # tokens of a prompt, its template included
TEXT = 12  # bytes that a token takes in the data set: ids, mask and text, compressed
PLAIN, DRAFTED, LOOKED_UP, CONTROLLED = (
    1.2,
    1.2,
    1.4,
    1.1,
)  # times the plain decoding of the evaluation's tokens
SWEPT, COUNTED, BATCHED = 0.9, 0.2, 1.6  # likewise: sweeps decoded or computed, full batches
BESIDES = 1.5  # likewise: float32, whole blocks, transformers, training's promise, traces, costs
RUNTIME = 1.2e9  # bytes of Python, PyTorch and transformers
PASS_TOKENS = 2048  # of a pass that extracts (`features.local.BATCH_TOKENS`)
CODES = {
    "bf16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "int4": 0.5 + 2 / 32,
}  # bytes a value; a scale for a row is left out


@dataclass(frozen=True)
class Estimate:
    """What one stage takes.

    Attributes:
        tokens: that it makes or reads.
        memory: peak, of one process, in bytes.
        disk: bytes that it leaves.
        how: the derivation, in a line.
    """

    stage: str
    tokens: float
    seconds: float
    memory: float
    disk: float
    how: str


@dataclass(frozen=True)
class Plan:
    """The whole pipeline's."""

    target: TargetSize
    rates: Rates
    estimates: tuple[Estimate, ...]

    @property
    def seconds(self) -> float:
        return sum(estimate.seconds for estimate in self.estimates)

    @property
    def disk(self) -> float:
        return sum(estimate.disk for estimate in self.estimates)

    def of(self, stage: str) -> Estimate:
        """Return the estimate of a stage."""
        return next(estimate for estimate in self.estimates if estimate.stage == stage)


def make_plan(params: Params, target: TargetSize, drafts: dict[str, DraftSize | None], rates: Rates) -> Plan:
    """Estimate every stage.

    Args:
        drafts: of each drafter of the pipeline its size; None: it is not trained.
    """
    trained = {name: size for name, size in drafts.items() if size is not None}
    decoding = (
        _target(target, rates),
        _prompts(params, target, rates),
        _answers(params, target, rates),
        *_features(params, target, trained, rates),
    )
    training = (_training(params, target, name, size, rates) for name, size in trained.items())
    evaluation = _evaluation(params, target, len(drafts), rates)
    if params.target.engine == "vllm":
        decoding = tuple(_in_vllm(estimate, target) for estimate in decoding)
        evaluation = _in_vllm(evaluation, target)
    return Plan(target, rates, (*decoding, *training, evaluation))


def _in_vllm(estimate: Estimate, target: TargetSize) -> Estimate:
    """Return the estimate of a stage whose passes vLLM runs: the stage itself holds the ends of the target."""
    if estimate.stage == "target":
        links = "links to the target's files, of which the ends are read"
        return replace(
            estimate, seconds=0.0, memory=RUNTIME + target.ends * target.bytes, disk=0.0, how=links
        )
    held = min(estimate.memory, RUNTIME + target.ends * target.bytes)
    return replace(estimate, memory=held, how=f"{estimate.how}; in vLLM, whose memory is its own")


def conversation_tokens(params: Params) -> float:
    """Return the tokens of a conversation in the data set, in the mean."""
    length = PROMPT + ANSWERED * params.generate.max_new_tokens
    return min(length, params.generate.max_length)


def trained_tokens(params: Params) -> float:
    """Return the tokens of a conversation as it is trained on, in the mean."""
    return min(conversation_tokens(params), params.train.max_length)


def step_seconds(target: TargetSize, rates: Rates, batch: int, context: float) -> float:
    """Return the seconds of a decoding step of so many requests, each with so many tokens in its cache."""
    cache = batch * context * target.kv * target.bytes
    read = (target.read(batch) + cache) / rates.bandwidth
    return read / READING + 2 * target.active * batch / rates.narrow_flops / DECODING


def extract_seconds(target: TargetSize, rates: Rates, tokens: float) -> float:
    """Return the seconds that the target's passes over so many tokens take, on all devices."""
    return 2 * target.active * tokens / (rates.flops * EXTRACTING * rates.devices)


def _target(target: TargetSize, rates: Rates) -> Estimate:
    return Estimate(
        "target",
        0,
        2 * target.weights / rates.disk,
        RUNTIME + 2 * target.weights,
        target.weights,
        f"{target.parameters / 1e9:.3g} B parameters of {target.bytes:g} bytes, loaded twice for the self-test",
    )


def _decoding_memory(target: TargetSize, batch: int, length: float) -> float:
    logits = batch * target.vocab * 4.0 * 2
    return RUNTIME + target.weights + batch * length * target.kv * target.bytes + logits


def _prompts(params: Params, target: TargetSize, rates: Rates) -> Estimate:
    magpie = params.prompts.mix.get("magpie", 0.0) / sum(params.prompts.mix.values())
    tokens = magpie * params.prompts.count * params.prompts.magpie.max_new_tokens * ANSWERED
    batch = params.generate.batch_size
    seconds = tokens / batch * step_seconds(target, rates, batch, PROMPT)
    return Estimate(
        "prompts",
        tokens,
        seconds / rates.devices,
        _decoding_memory(target, batch, PROMPT) if magpie else RUNTIME,
        params.prompts.count * PROMPT * 5.0,
        f"{magpie:.0%} of {params.prompts.count} prompts written by the target",
    )


def _answers(params: Params, target: TargetSize, rates: Rates) -> Estimate:
    generate, count = params.generate, params.prompts.count
    answers = count * ANSWERED * generate.max_new_tokens
    tokens = count * conversation_tokens(params)
    disk = tokens * TEXT * 2  # the shards, and the data set made of them
    if generate.engine != "local":
        how = f"{tokens:.3g} tokens by {generate.engine}: its own time"
        return Estimate("generate", tokens, 0.0, RUNTIME, disk, how)
    batch = generate.batch_size
    step = step_seconds(target, rates, batch, conversation_tokens(params))
    return Estimate(
        "generate",
        tokens,
        answers / batch * step / rates.devices + extract_seconds(target, rates, count * PROMPT),
        _decoding_memory(target, batch, generate.max_length),
        disk,
        f"{count} × {ANSWERED:.0%} of {generate.max_new_tokens} tokens, {batch} at a time, {batch / step:.0f} tokens/s "
        "a device",
    )


def bytes_a_token(params: Params, target: TargetSize, layers: int) -> float:
    """Return what the features of a token take on disk."""
    return (layers + 1) * target.hidden * CODES[params.train.features.form] + 4


def extraction_memory(target: TargetSize, layers: int) -> float:
    """Return the peak memory of a process that extracts."""
    states = PASS_TOKENS * (layers + 1) * target.hidden * (target.bytes + 2)
    return (
        RUNTIME
        + target.weights
        + states
        + 4 * PASS_TOKENS * target.hidden * target.bytes
        + 256 * target.vocab * 6
    )


def _features(
    params: Params, target: TargetSize, drafts: dict[str, DraftSize], rates: Rates
) -> Iterable[Estimate]:
    if params.train.features.mode == "online" or not drafts:
        return
    layers = max(draft.features for draft in drafts.values())
    tokens = params.prompts.count * trained_tokens(params)
    disk = tokens * bytes_a_token(params, target, layers)
    written = disk / rates.disk
    if params.train.features.states is not None:
        how = f"{tokens:.3g} tokens read from an engine's files, whose time is its own"
        yield Estimate("features", tokens, written, RUNTIME + target.ends * target.bytes, disk, how)
        return
    local = params.target.engine == params.generate.engine == "local"
    if rates.kernels and local and params.train.features.directory is None:
        # Written by the answers, read, and written in shards.
        how = (
            f"{tokens:.3g} tokens, kept while the target answers and put in order, if its layers are Llama's"
        )
        yield Estimate("features", tokens, 3 * written, extraction_memory(target, layers), disk, how)
        return
    seconds = extract_seconds(target, rates, tokens) + written
    yield Estimate(
        "features",
        tokens,
        seconds,
        extraction_memory(target, layers),
        disk,
        f"{tokens:.3g} tokens of {bytes_a_token(params, target, layers):.0f} bytes: {layers} layers and the last state "
        f"of {target.hidden} in {params.train.features.form}, {tokens / seconds:.0f} tokens/s",
    )


def _training(params: Params, target: TargetSize, name: str, draft: DraftSize, rates: Rates) -> Estimate:
    train = params.train
    length = trained_tokens(params)
    rows = train.batch_size
    tokens = rows * length  # of a step
    positions = rows * train.anchors * draft.block * 0.9  # some blocks end with their conversation
    backbone = 6.0 * draft.multiplied * (tokens + positions)
    # Forward and backward of the draft's law, forward of the target's.
    a_column = 8.0 * target.hidden if draft.head_rank is None else 2.0 * target.hidden + 6.0 * draft.head_rank
    laws = a_column * draft.columns * positions
    reached = (OUR_TRAINING if rates.kernels else TRAINING) * (TILED if rates.tiles else 1)
    seconds = (backbone + laws) / (rates.flops * reached * rates.devices)
    online = train.features.mode == "online"
    local = online and params.target.engine == "local"
    if online:
        seconds += extract_seconds(target, rates, tokens)
    share = rows / rates.devices
    states = share * train.max_length * (draft.features + 1) * target.hidden
    shared = (target.vocab + draft.columns) * target.hidden * 4.0
    ends = target.weights if local else target.ends * target.bytes
    activations = share * train.anchors * draft.block * target.hidden * 4.0 * 40
    batches = 1 + max(2, train.workers + 1)  # in use, and made ahead
    budget = (train.loss.budget_mib or 0) * 2.0**20
    memory = RUNTIME + ends + shared + draft.trained * 20.0 + batches * states * 2 + activations + budget
    if train.real_decode:
        memory = max(memory, _decoding_memory(target, 8, length) + shared + draft.trained * 4.0)
    evaluations = train.steps // train.eval_every * train.heldout / max(rows, 1) / 3
    return Estimate(
        f"train {name}",
        train.steps * tokens,
        (train.steps + evaluations) * seconds,
        memory,
        draft.trained * 2.0 + 16.0 * draft.trained,
        f"{train.steps} steps of {positions:.0f} positions, {draft.trained / 1e6:.3g} M parameters, "
        f"{seconds:.2g} s a step, {'the whole target' if local else 'the ends of the target'} in memory"
        f"{', the whole for the real decode at the end' if train.real_decode and not local else ''}",
    )


def _evaluation(params: Params, target: TargetSize, drafters: int, rates: Rates) -> Estimate:
    evaluate = params.evaluate
    tokens = len(evaluate.tasks) * evaluate.prompts_per_task * evaluate.max_new_tokens
    tokens *= len(evaluate.temperatures) * drafters
    step = step_seconds(target, rates, 1, PROMPT + evaluate.max_new_tokens)
    times = evaluated_times(evaluate)
    exact = 4.0 * target.parameters if evaluate.lossless_prompts else 0.0
    return Estimate(
        "evaluate",
        tokens * times,
        tokens * times * step,
        RUNTIME + max(target.weights + exact, _decoding_memory(target, 16, 512)),
        0.0,
        f"{tokens} tokens of {drafters} drafters in the time of decoding them plainly {times:.1f} times, "
        f"{1 / step:.3g} tokens/s; float32 for the proof of losslessness",
    )


def evaluated_times(evaluate: EvaluateParams) -> float:
    """Return how often the evaluation's tokens would be decoded plainly in the time that it takes with a draft."""
    plain = min(evaluate.plain_new_tokens or evaluate.max_new_tokens, evaluate.max_new_tokens)
    times = BESIDES + DRAFTED + PLAIN * plain / evaluate.max_new_tokens
    others = [chosen for chosen in evaluate.controllers if chosen != evaluate.decode.controller]
    times += CONTROLLED * len(others)
    if not evaluate.computed:
        times += LOOKED_UP
    if evaluate.sweeps:
        times += COUNTED if evaluate.computed else SWEPT
    return times + (BATCHED if evaluate.throughput else 0.0)
