"""Typed `params.yaml`; the only reader of it.

Every section is a pydantic model that refuses unknown keys. An error names the key by its dotted path and the
nearest valid one, so that a typo is found before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from deepspec.data.codec import CODECS
from deepspec.drafters.lookup import LookupParams
from deepspec.drafters.registry import algorithms
from deepspec.drafters.suffix import SuffixParams
from deepspec.errors import DeepSpecError, nearest
from deepspec.section import Section
from deepspec.training.loss_params import LossParams


class TargetParams(Section):
    """The verifier."""

    source: str = Field(description="`embedded:<name>`, a local directory, or a hub id.")
    revision: str | None = Field(None, description="Pinned hub revision; ignored for a directory.")
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"


class MagpieParams(Section):
    """The target writes its own user turns (Magpie, arXiv 2406.08464)."""

    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(0.95, gt=0, le=1)
    max_new_tokens: int = Field(96, ge=4)


class PromptsParams(Section):
    """Where training prompts come from. `mix` maps a source to its weight."""

    count: int = Field(ge=1)
    mix: dict[str, float] = Field(
        description="`magpie`, `seed`, `jsonl:<path>` or `hub:<dataset>[:split]` → weight."
    )
    magpie: MagpieParams = MagpieParams()
    min_chars: int = Field(12, ge=1)
    max_chars: int = Field(1500, ge=1)
    overlap_ngram: int = Field(8, ge=2, description="Words in the n-gram that marks an evaluation prompt.")

    @model_validator(mode="after")
    def _weights(self) -> PromptsParams:
        for source, weight in self.mix.items():
            if source not in ("magpie", "seed") and not source.startswith(("jsonl:", "hub:")):
                raise ValueError(
                    f"unknown prompt source {source!r}: use magpie, seed, jsonl:<path> or hub:<dataset>[:split]"
                )
            if weight < 0:
                raise ValueError(f"the weight of prompt source {source!r} is negative ({weight})")
        if sum(self.mix.values()) <= 0:
            raise ValueError("no prompt source has a positive weight")
        return self


class OpenAIParams(Section):
    """Any server that speaks the OpenAI chat API. The key is read from `$DEEPSPEC_OPENAI_KEY`."""

    base_urls: list[str] = Field([], description="Each is sent `concurrency` requests at once.")
    model: str = ""
    concurrency: int = Field(32, ge=1, description="Requests in flight per base URL.")
    retries: int = Field(5, ge=0)
    timeout_s: float = Field(120.0, gt=0)


class GenerateParams(Section):
    """How the target answers the prompts: the distillation data."""

    engine: Literal["local", "openai"] = "local"
    batch_size: int = Field(48, ge=1, description="Conversations decoded at once (local engine).")
    max_new_tokens: int = Field(192, ge=1, description="Per answer.")
    max_length: int = Field(512, ge=16, description="Of a whole conversation, in tokens.")
    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    openai: OpenAIParams = OpenAIParams()


class ValidateParams(Section):
    """Bounds of the Great Expectations suite that guards the distillation data."""

    min_rows: int = Field(1, ge=1)
    min_answer_tokens: int = Field(1, ge=1)
    max_truncated_share: float = Field(0.9, ge=0, le=1)
    max_failed_share: float = Field(0.05, ge=0, le=1)
    repetition_ngram: int = Field(8, ge=2)
    max_repetition: float = Field(
        0.7, ge=0, le=1, description="Share of an answer's n-grams that are repeats."
    )
    max_degenerate_share: float = Field(0.2, ge=0, le=1, description="Rows allowed above max_repetition.")


class FeaturesParams(Section):
    """Where the target's hidden states come from in training."""

    mode: Literal["cached", "online"] = Field(
        "cached", description="`online` runs the target in every step and stores nothing."
    )
    form: Literal[tuple(CODECS)] = Field("bf16", description="Of the cache: how each hidden state is stored.")
    directory: str | None = Field(
        None, description="Of the cache, to share it; null: one of its own under .deepspec/features."
    )


class TrainParams(Section):
    """One training run; the same for every drafter, but for the loss where its own section has one."""

    steps: int = Field(ge=1)
    batch_size: int = Field(8, ge=1, description="Sequences per optimiser step, over all processes.")
    lr: float = Field(gt=0)
    warmup: float = Field(0.04, ge=0, lt=1, description="Share of the steps.")
    weight_decay: float = Field(0.0, ge=0)
    grad_clip: float = Field(1.0, gt=0)
    anchors: int = Field(32, ge=1, description="Random block starts per sequence.")
    max_length: int = Field(512, ge=8)
    supervise: Literal["answer", "all"] = Field(
        "answer",
        description="`all` also learns from the prompt's tokens, where the target's law is as valid.",
    )
    heldout: int = Field(32, ge=1, description="Conversations kept out for choosing the best checkpoint.")
    eval_every: int = Field(200, ge=1)
    save_every: int = Field(100, ge=1)
    mixed_precision: Annotated[
        Literal["no", "bf16"], BeforeValidator(lambda value: "no" if value is False else value)
    ] = Field(
        "bf16", description="YAML reads a bare `no` as false, and `dvc exp run -S` takes its quotes away."
    )
    features: FeaturesParams = FeaturesParams()
    accumulate: int = Field(1, ge=1, description="Parts of a step's batch, each with a pass of its own.")
    replay: float = Field(
        0.0, ge=0, lt=1, description="Share of the steps, the last ones, whose blocks start after rejections."
    )
    gradient_checkpointing: bool = Field(False, description="Less memory, more time.")
    compile: bool = Field(False, description="torch.compile the network (GPU).")
    written_out: bool = Field(
        False, description="Write embeddings and the whole head into the draft; else they are the target's."
    )
    loss: LossParams = LossParams()

    @model_validator(mode="after")
    def _parts(self) -> TrainParams:
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"train.accumulate is {self.accumulate}, more than batch_size ({self.batch_size})"
            )
        return self


LookupChoice = Annotated[LookupParams | SuffixParams, Field(discriminator="type")]
DrafterParams = Annotated[
    Union[tuple(algorithm.params for algorithm in algorithms().values())], Field(discriminator="type")  # noqa: UP007
]


class ChainTree(Section):
    """One path."""

    type: Literal["chain"]
    depth: int | None = Field(None, ge=1, description="None: the drafter's block size.")


class StaticTree(Section):
    type: Literal["static"]
    paths: list[list[int]] = Field(description="Paths of child ranks: [1, 0] is the second child's first.")


class BeamTree(Section):
    """EAGLE-2: the `width` best nodes of a level are expanded, the `nodes` best of all are kept."""

    type: Literal["beam"]
    width: int = Field(8, ge=1)
    depth: int | None = Field(None, ge=1)
    nodes: int = Field(24, ge=1)


class BestFirstTree(Section):
    """The `nodes` likeliest paths, at most `width` children a node."""

    type: Literal["best_first"]
    width: int = Field(8, ge=1)
    depth: int | None = Field(None, ge=1)
    nodes: int = Field(24, ge=1)


class SampledTree(Section):
    type: Literal["sampled"]
    branching: list[int] = Field([8, 4, 2, 1], description="Most children a node, by depth.")
    budget: int | None = Field(24, ge=1, description="Nodes kept, those likeliest to survive; None: all.")


TreeParams = Annotated[
    ChainTree | StaticTree | BeamTree | BestFirstTree | SampledTree, Field(discriminator="type")
]


class FixedController(Section):
    type: Literal["fixed"]
    length: int | None = Field(None, ge=1, description="Levels verified; None: all.")


class ThresholdController(Section):
    type: Literal["threshold"]
    least: float = Field(ge=0, le=1, description="Confidence below which a path is cut.")


class CostController(Section):
    """Verifies what pays on the measured cost curve, one request at a time; pauses where drafting does not."""

    type: Literal["cost"]


class SchedulerController(Section):
    """DSpark's prefix scheduler: one verification budget for all requests in flight."""

    type: Literal["scheduler"]


ControllerParams = Annotated[
    FixedController | ThresholdController | CostController | SchedulerController, Field(discriminator="type")
]
TAGGED: dict[str, type[Section]] = {
    get_args(section.model_fields["type"].annotation)[0]: section
    for union in (
        DrafterParams,
        TreeParams,
        ControllerParams,
        LossParams.model_fields["positions"].annotation,
    )
    for section in get_args(get_args(union)[0])
}


class DecodeParams(Section):
    """How a trained draft is used at decode time."""

    lookup: LookupChoice | None = Field(
        SuffixParams(type="suffix", min_match=3),
        description="Asked before the trained draft, which answers where nothing matches; null: not asked.",
    )
    tree: TreeParams = ChainTree(type="chain")
    verify: Literal["standard", "block", "recursive", "traversal"] | None = Field(
        None, description="Rule for sampled drafts; None: the best that fits."
    )
    controller: ControllerParams = CostController(type="cost")


class SweepParams(Section):
    """The trained draft alone over chain lengths, tree depths and node budgets, at T = 0."""

    prompts: int = Field(1, ge=1, description="Per task.")
    max_new_tokens: int = Field(48, ge=1)
    depth_nodes: int = Field(16, ge=1, description="Nodes of the trees whose depth is swept.")
    nodes: list[Annotated[int, Field(ge=1)]] = Field([4, 8, 16, 32], min_length=1)


class ThroughputParams(Section):
    """Tokens a second with several requests in flight: plain, fixed lengths, the prefix scheduler."""

    batches: list[Annotated[int, Field(ge=1)]] = Field([1, 4, 16], min_length=1)
    lengths: list[Annotated[int, Field(ge=1)]] = Field(
        [2], description="Fixed ones; the whole block is added."
    )
    temperatures: list[Annotated[float, Field(ge=0)]] = Field([0.0], min_length=1)
    groups: int = Field(2, ge=1, description="Of prompts, decoded by all one after the other.")
    max_new_tokens: int = Field(24, ge=1)


class EvaluateParams(Section):
    tasks: list[str] = Field(
        min_length=1, description="Names of `deepspec/evaluation/tasks/*.yaml` or paths to such files."
    )
    tasks_dir: str | None = Field(
        None, description="Its `<task>.jsonl` is read instead; `$DEEPSPEC_TASKS_DIR` takes its place."
    )
    temperatures: list[Annotated[float, Field(ge=0)]] = Field(
        [0.0, 1.0], min_length=1, description="0 is greedy."
    )
    prompts_per_task: int = Field(8, ge=1)
    max_new_tokens: int = Field(128, ge=1)
    lossless_prompts: int = Field(4, ge=1, description="Per task, checked in float32 at T = 0.")
    lossless_new_tokens: int = Field(64, ge=1)
    decode: DecodeParams = DecodeParams()
    controllers: list[ControllerParams] = Field(
        [FixedController(type="fixed")],
        description="Others, measured beside that of `decode` on the same prompts.",
    )
    traces: int = Field(
        1, ge=0, description="Prompts per task and temperature that the report shows token by token."
    )
    sweeps: SweepParams | None = Field(SweepParams(), description="null: not measured.")
    throughput: ThroughputParams | None = Field(ThroughputParams(), description="null: not measured.")


class StudyParams(Section):
    """Drafters compared under equal settings, each trained with several seeds: the paper's table (paper/)."""

    seeds: list[int] = Field([0], min_length=1, description="Of training; prompts and sampling have `seed`.")
    eagle3: str = Field(description="The drafter of the pipeline that stands for EAGLE-3 in Table 1.")
    dflash: str = Field(description="The one that stands for DFlash.")
    dspark: str = Field(description="The one that stands for DSpark.")
    ablations: list[str] = Field(
        [],
        description="Drafters of Figures 3 and 4 and of the table of ablations, trained with the first seed.",
    )
    texts: int = Field(40, ge=1, description="Prompts per task on whose answers rounds are expected.")
    samples: int = Field(3, ge=1, description="Answers to each of them.")
    prompts: int = Field(8, ge=1, description="Per task, where the confidence is measured.")
    timed_prompts: int = Field(8, ge=1, description="Per task, where other ways to verify are timed.")
    nodes: int = Field(16, ge=2, description="Of the trees.")

    @property
    def roles(self) -> dict[str, str]:
        """Name in the paper → drafter."""
        return {"EAGLE-3": self.eagle3, "DFlash": self.dflash, "DSpark": self.dspark}


# Of all drafters of a study; those of its table: block_size too.
_EQUAL = ("target_layer_ids", "draft_vocab_size")


class PromoteParams(Section):
    """The gate between challenger and champion; docs/registry.md has its rules."""

    margin: float = Field(0.03, ge=0, lt=1, description="Share of τ or speed-up that a challenger may lack.")
    proof: bool = Field(False, description="The whole 95 % interval must lie above 1 - margin.")
    min_speedup: float = Field(1.0, ge=0, description="Over plain decoding, of any champion.")
    require_export: bool = Field(True, description="Some engine's export must have passed parity.")


class Params(Section):
    seed: int = 0
    target: TargetParams
    prompts: PromptsParams
    generate: GenerateParams = GenerateParams()
    validate_: ValidateParams = Field(ValidateParams(), alias="validate")
    pipeline: list[str] = Field(description="Drafters that the pipeline trains and evaluates.")
    drafters: dict[str, DrafterParams] = Field(description="Drafter name → its algorithm and sizes.")
    train: TrainParams
    evaluate: EvaluateParams
    study: StudyParams | None = None
    promote: PromoteParams = PromoteParams()

    @model_validator(mode="after")
    def _named(self) -> Params:
        for name in self.pipeline:
            if name not in self.drafters:
                raise ValueError(
                    f"pipeline names {name!r}, which `drafters` lacks{nearest(name, self.drafters)}"
                )
        return self

    @model_validator(mode="after")
    def _equal(self) -> Params:
        """Drafters of a study differ in what is compared, and in nothing else."""
        if self.study is None:
            return self
        if 1.0 not in self.evaluate.temperatures:
            raise ValueError("study: evaluate.temperatures lacks 1.0, which the table is of")
        table, ablations = list(self.study.roles.values()), self.study.ablations
        for names, where, known in (
            (table, "pipeline", self.pipeline),
            (ablations, "drafters", self.drafters),
        ):
            for name in names:
                if name not in known:
                    raise ValueError(f"study names {name!r}, which `{where}` lacks{nearest(name, known)}")
        if twice := set(ablations) & set(self.pipeline):
            raise ValueError(f"study.ablations names {min(twice)!r}, which `pipeline` has")
        every = [*self.pipeline, *ablations]
        for key, names in {**{key: every for key in _EQUAL}, "block_size": table}.items():
            found = {name: getattr(self.drafters[name], key, None) for name in names}
            if any(value is None or value != found[names[0]] for value in found.values()):
                of = ", ".join(f"{name} {value}" for name, value in found.items())
                raise ValueError(f"study: the drafters compared need the same {key}, found {of}")
        changed = {own for own, *_ in self.changes()}
        for name in ablations:
            if name not in changed:
                raise ValueError(
                    f"study.ablations: {name} differs from no drafter before it in one key alone"
                )
        return self

    def changes(self) -> Iterator[tuple[str, str, str]]:
        """Ablation of the study, a drafter named before it that is like it but for one key, and that key."""
        before = {name: self.drafters[name].model_dump() for name in self.pipeline}
        for name in self.study.ablations:
            own = self.drafters[name].model_dump()
            for partner, other in before.items():
                keys = [key for key in own if key not in other or other[key] != own[key]]
                if len(keys) == 1 and len(other) == len(own):
                    yield name, partner, keys[0]
            before[name] = own


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check a params file.

    Raises:
        DeepSpecError: the file is missing, is not YAML, or has an unknown or mistyped key.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise DeepSpecError(
            f"{path}: no such file; run from the repository's root or pass --params"
        ) from None
    except yaml.YAMLError as error:
        raise DeepSpecError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise DeepSpecError(f"{path}: expected a mapping of sections, found {type(raw).__name__}")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise DeepSpecError(f"{path}: {_explain(error, raw)}") from None


def _explain(error: ValidationError, raw: dict) -> str:
    """The first problem of a validation error, in one line with the dotted key."""
    first = error.errors()[0]
    key, model = _locate(first["loc"], raw)
    if first["type"] == "extra_forbidden":
        word = str(first["loc"][-1])
        return f"unknown key {key!r}{nearest(word, _names(model))}"
    if first["type"] == "missing":
        return f"missing key {key!r}"
    if first["type"] == "union_tag_invalid":
        found = first["ctx"]["tag"]
        known = [tag.strip("' ") for tag in first["ctx"]["expected_tags"].split(",")]
        return f"{key}.type: unknown type {found!r}{nearest(found, known)}; known: {', '.join(known)}"
    message = first["msg"].removeprefix("Value error, ")
    return (
        f"{key}: {message} (found {first['input']!r})" if key and first["type"] != "value_error" else message
    )


def _locate(loc: tuple, raw: dict) -> tuple[str, type[Section] | None]:
    """Dotted key as written in the file, and the model of the section in which it stands.

    Pydantic puts the tag of a discriminated union into the location; the file has no such level.
    """
    model: type[Section] | None = Params
    node: Any = raw
    parts: list[str] = []
    for i, step in enumerate(loc):
        last = i == len(loc) - 1
        if model is None and isinstance(node, dict) and node.get("type") == step and step not in node:
            model = TAGGED[step]
            continue
        parts.append(str(step))
        node = node.get(step) if isinstance(node, dict) else None
        if not last:
            model = _child(model, step)
    return ".".join(parts), model


def _child(model: type[Section] | None, name: Any) -> type[Section] | None:
    if model is None:
        return None
    for key, field in model.model_fields.items():
        if name == (field.alias or key) and isinstance(field.annotation, type):
            return field.annotation if issubclass(field.annotation, Section) else None
    return None


def _names(model: type[Section] | None) -> list[str]:
    return [field.alias or key for key, field in model.model_fields.items()] if model else []
