"""`deepspec serve-check`: the evaluation's prompts in a serving engine, without and with each draft, and in ours.

At T = 0, one request at a time, with the same token ids. Two engines cannot share a machine's cores and be timed, so
they come one after the other: ours, the engine plain, with each draft, and plain again; where the two plain runs
disagree, the machine was not quiet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepspec.config import Params, load_params
from deepspec.decoding.drafter import Drafter
from deepspec.drafters.checkpoint import draft_digest, draft_directory
from deepspec.drafters.load import is_trained, load_drafter
from deepspec.errors import DeepSpecError, nearest
from deepspec.serving import ours
from deepspec.serving.clients import CLIENTS
from deepspec.serving.engines import Draft, Work, local, remote
from deepspec.serving.environment import Environment, find_or_set_up
from deepspec.serving.launch import speculative_config
from deepspec.serving.llamacpp import check as llamacpp
from deepspec.serving.prepare import (
    TARGET,
    Settings,
    conditions,
    decoded_here,
    each,
    exported,
    tokens_drafted,
    work_of,
)
from deepspec.serving.record import About, Measured, ServingRecord, check_target, compare
from deepspec.serving.table import show
from deepspec.target.model import Target, load_target

GPU_ONLY = ("dspark",)
BLOCKS = ("dflash", "dspark", "medusa")
STARTED = ("vllm", "llamacpp")  # what is set up and started here


def run(settings: Settings) -> list[str]:
    """Measure, write the records and print the table. Returns why drafts failed, one line each.

    Raises:
        DeepSpecError: no such draft, export or engine; an engine that does not start, answer, or serve this target.
    """
    _check_settings(settings)
    params = load_params(settings.params)
    if params.target.engine != "local":
        raise DeepSpecError(
            f"target.engine: {params.target.engine}: serve-check decodes in this project's engine as well, which would "
            "load the whole target; deepspec evaluate measures drafts in vLLM alone"
        )
    if settings.engine == "llamacpp" and not settings.base_url:
        return llamacpp.run(settings, params)
    loads = each(settings.drafters or params.pipeline, settings, lambda name: _directory(name, settings))
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
    drafts = each(loads, settings, lambda name: _draft(name, loads[name], settings, target, environment))
    work = work_of(target, params, settings)
    own = {draft: decoded_here(target, drafter, draft, work) for draft, drafter in drafts.values()}
    return own, work, conditions(target, settings, work, CLIENTS[settings.engine].timing)


def _check_settings(settings: Settings) -> None:
    if settings.engine not in CLIENTS:
        known = ", ".join(CLIENTS)
        raise DeepSpecError(
            f"unknown engine {settings.engine!r}{nearest(settings.engine, CLIENTS)}; known: {known}"
        )
    if settings.base_url is None and settings.engine not in STARTED:
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
    return settings.exported or exported(name, directory, "vllm", "vLLM")


def _draft(
    name: str, loads: Path, settings: Settings, target: Target, environment: Environment | None
) -> tuple[Draft, Drafter]:
    """Return a draft with what the engine loads of it (nothing, where somebody else serves it), and ours."""
    directory = draft_directory(name)
    drafter = load_drafter(directory, target)
    tokens = tokens_drafted(directory, drafter, settings)
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
