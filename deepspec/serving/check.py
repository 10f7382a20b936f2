"""`deepspec serve-check`: the evaluation's prompts in a serving engine, without and with each draft, and in ours.

At T = 0, one request at a time, with the same token ids. Two engines cannot share a machine's cores and be timed, so
they come one after the other: ours, the engine plain, with each draft, and plain again; where the two plain runs
disagree, the machine was not quiet.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from deepspec.config import Params, load_params
from deepspec.decoding.drafter import Drafter
from deepspec.device import describe_device
from deepspec.drafters.checkpoint import draft_digest, draft_directory
from deepspec.drafters.load import is_trained, load_drafter
from deepspec.errors import DeepSpecError, nearest
from deepspec.provenance import provenance
from deepspec.serving import ours
from deepspec.serving.engines import Draft, Work, local, remote, watched
from deepspec.serving.environment import Environment, find_or_set_up
from deepspec.serving.launch import speculative_config
from deepspec.serving.protocols import CLIENTS, Prompt
from deepspec.serving.record import (
    SERVE_VERSION,
    About,
    Measured,
    Provenance,
    ServingRecord,
    check_target,
    compare,
)
from deepspec.serving.table import show
from deepspec.target.model import Target, load_target
from deepspec.tasks.task import load_task

logger = logging.getLogger(__name__)

TARGET = Path("data/target")
REPORTS = Path("reports/serve")
EXPORTS = Path("reports/export")
GPU_ONLY = ("dspark",)
BLOCKS = ("dflash", "dspark", "medusa")
T = TypeVar("T")
SLACK = 64  # tokens of the context behind an answer's end, for drafts


@dataclass(frozen=True)
class Settings:
    """None takes what params.yaml says, or the draft's own."""

    engine: str = "vllm"
    drafters: tuple[str, ...] = ()  # none: those of the pipeline
    prompts: int | None = None  # of each task
    max_new_tokens: int | None = None
    tasks: tuple[str, ...] = ()
    speculative_tokens: int | None = None
    exported: Path | None = None  # directory that the engine loads
    base_url: str | None = None
    plain_url: str | None = None
    dtype: str | None = None
    params: Path = Path("params.yaml")
    output: Path = REPORTS


def run(settings: Settings) -> list[str]:
    """Measure, write the records and print the table. Returns why drafts failed, one line each.

    Raises:
        DeepSpecError: no such draft, export or engine; an engine that does not start, answer, or serve this target.
    """
    _check_settings(settings)
    params = load_params(settings.params)
    loads = _each(settings.drafters or params.pipeline, settings, lambda name: _directory(name, settings))
    environment = None if settings.base_url else find_or_set_up()
    # The models are gone when this returns: the engine gets their memory.
    own, work, about = _measure_ours(loads, params, settings, environment)
    failed: dict[str, str] = {}
    if environment:
        version, answers, failed = local(environment, TARGET, list(own), work)
    elif settings.base_url:
        (draft,) = own
        client = CLIENTS[settings.engine]
        version, answers = remote(client, settings.base_url, settings.plain_url, draft, work)
    records: list[ServingRecord] = []
    for draft, decoded in own.items():
        if draft.name in failed:
            continue
        drafted, plain = answers[draft.name]
        try:
            check_target(drafted, decoded, settings.base_url or settings.engine)
        except DeepSpecError as error:
            failed[draft.name] = str(error)
            continue
        measured = Measured(list(work.prompts), drafted, plain, decoded)
        found = dict(compare(measured, settings.engine, draft.gated))
        record = ServingRecord(**dict(about), engine_version=version, **draft.identity, **found)
        record.write(settings.output / f"{draft.name}-{settings.engine}.json")
        records.append(record)
    if not records:
        raise DeepSpecError("; ".join(failed.values()))
    show(records)
    short = [f"{record.drafter}: {failure}" for record in records for failure in record.failures]
    return short + [f"{name}: {reason}" for name, reason in failed.items()]


def _measure_ours(
    loads: dict[str, Path], params: Params, settings: Settings, environment: Environment | None
) -> tuple[dict[Draft, list[ours.Ours]], Work, About]:
    """Measure every prompt in our engine by draft; return also the engine's work and the conditions of both."""
    target = load_target(TARGET, dtype=settings.dtype)
    drafts = _each(loads, settings, lambda name: _draft(name, loads[name], settings, target, environment))
    work = _work(target, params, settings)
    own = {draft: _ours(target, drafter, draft, work) for draft, drafter in drafts.values()}
    return own, work, _about(target, settings, work)


def _each(names: Iterable[str], settings: Settings, make: Callable[[str], T]) -> dict[str, T]:
    """Return what is made of each drafter, without those that cannot be served and were not asked for by name."""
    found = {}
    for name in names:
        try:
            found[name] = make(name)
        except DeepSpecError as error:
            if settings.drafters:
                raise
            logger.warning("left out: %s", error)
    if not found:
        raise DeepSpecError(
            "no drafter of the pipeline has an export that vLLM serves here; train one that has "
            "(docs/deploy-serving.md) or name one with --drafter"
        )
    return found


def _check_settings(settings: Settings) -> None:
    if settings.engine not in CLIENTS:
        known = ", ".join(CLIENTS)
        raise DeepSpecError(
            f"unknown engine {settings.engine!r}{nearest(settings.engine, CLIENTS)}; known: {known}"
        )
    if settings.base_url is None and settings.engine != "vllm":
        raise DeepSpecError(
            f"{settings.engine} is not started from here; serve the draft with it and name its address with --base-url"
        )
    if settings.exported and len(settings.drafters) != 1:
        raise DeepSpecError("--exported is the directory of one draft: name it with --drafter")
    if settings.base_url and len(settings.drafters) != 1:
        raise DeepSpecError("a server at --base-url serves one draft: name it with --drafter")
    for flag in ("prompts", "max_new_tokens", "speculative_tokens"):
        value = getattr(settings, flag)
        if value is not None and value < 1:
            raise DeepSpecError(f"--{flag.replace('_', '-')} must be >= 1, found {value}")


def _directory(name: str, settings: Settings) -> Path:
    """Return the directory that vLLM loads: a draft's export, or a lookup's own settings."""
    directory = draft_directory(name)
    if settings.base_url or not is_trained(directory):
        return directory
    return settings.exported or _exported(name, directory)


def _draft(
    name: str, loads: Path, settings: Settings, target: Target, environment: Environment | None
) -> tuple[Draft, Drafter]:
    """Return a draft with what the engine loads of it (nothing, where somebody else serves it), and ours."""
    directory = draft_directory(name)
    drafter = load_drafter(directory, target)
    tokens = settings.speculative_tokens or drafter.block_size
    if tokens > drafter.block_size:
        raise DeepSpecError(
            f"{directory}: drafts at most {drafter.block_size} tokens, {tokens} are asked for (--speculative-tokens)"
        )
    config: dict[str, Any] = {}
    if environment:
        config = speculative_config(loads, tokens)
        if config["method"] in GPU_ONLY and not environment.gpu:
            raise DeepSpecError(f"{name}: vLLM serves {config['method']} on a GPU only")
        if config["method"] in BLOCKS and tokens != drafter.block_size:
            raise DeepSpecError(
                f"{name}: a block is drafted whole, {drafter.block_size} tokens; leave --speculative-tokens out"
            )
    return Draft(name, draft_digest(directory), tokens, config, is_trained(directory)), drafter


def _exported(name: str, directory: Path) -> Path:
    """Return the directory that `deepspec export` wrote for vLLM from this very draft."""
    path = EXPORTS / f"{name}.json"
    todo = f"deepspec export --drafter {name} --to vllm"
    try:
        record = json.loads(path.read_text())
        entry, digest = record["engines"]["vllm"], record["draft_digest"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DeepSpecError(f"{path}: no export of {name} for vLLM; export it first ({todo})") from None
    if "refused" in entry:
        raise DeepSpecError(f"{name} cannot be served by vLLM: {entry['refused']}")
    if digest != draft_digest(directory):
        raise DeepSpecError(f"{path}: of an earlier draft; export it again ({todo})")
    return Path(entry["path"])


def _work(target: Target, params: Params, settings: Settings) -> Work:
    """Return the first turn of each prompt as work."""
    limit = settings.max_new_tokens or params.evaluate.max_new_tokens
    count = settings.prompts or params.evaluate.prompts_per_task
    prompts = []
    for name in settings.tasks or params.evaluate.tasks:
        for turns in load_task(name, count, params.seed, params.evaluate.tasks_dir).prompts:
            messages = [{"role": "user", "content": turns[0]}]
            text = target.chat_text(messages)
            prompts.append(Prompt(str(name), str(text), target.chat_ids(messages)))
    longest = max(len(prompt.ids) for prompt in prompts) + limit + SLACK
    if longest > target.max_length:
        prompts = [prompt for prompt in prompts if len(prompt.ids) + limit + SLACK <= target.max_length]
        longest = target.max_length
    if not prompts:
        raise DeepSpecError(f"no prompt leaves room for {limit} tokens; ask for fewer (--max-new-tokens)")
    return Work(tuple(prompts), limit, tuple(sorted(target.stop_ids)), target.precision, longest)


def _ours(target: Target, drafter: Drafter, draft: Draft, work: Work) -> list[ours.Ours]:
    def decode(prompt: Prompt) -> ours.Ours:
        return ours.decode(target, drafter, prompt.ids, work.limit, draft.tokens)

    decode(work.prompts[0])  # kernels
    return [decode(prompt) for prompt in watched(work.prompts, f"{draft.name}, our engine")]


def _about(target: Target, settings: Settings, work: Work) -> About:
    source = (
        json.loads((TARGET / "deepspec.json").read_text())["source"]
        if (TARGET / "deepspec.json").exists()
        else ""
    )
    return About(
        serve_version=SERVE_VERSION,
        engine=settings.engine,
        timing=CLIENTS[settings.engine].timing,
        target=source,
        target_digest=target.digest,
        dtype=work.dtype,
        device=describe_device(target.device),
        temperature=0.0,
        max_new_tokens=work.limit,
        provenance=Provenance(**provenance()),
    )
