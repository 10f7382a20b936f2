"""What `deepspec serve-check` is asked, and what every engine is measured on: prompts, our own counts, conditions."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from deepspec.config import Params
from deepspec.decoding.drafter import Drafter
from deepspec.device import describe_device
from deepspec.drafters.checkpoint import draft_digest
from deepspec.errors import DeepSpecError
from deepspec.progress import watched
from deepspec.provenance import provenance
from deepspec.serving import ours
from deepspec.serving.engines import Draft, Work
from deepspec.serving.protocols import SLACK, Prompt
from deepspec.serving.record import SERVE_VERSION, About, Provenance
from deepspec.target.model import Target
from deepspec.tasks.dialogue import first_turn, prompt_ids
from deepspec.tasks.task import load_task

logger = logging.getLogger(__name__)

TARGET = Path("data/target")
REPORTS = Path("reports/serve")
EXPORTS = Path("reports/export")
T = TypeVar("T")


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
    draws: int | None = None  # sampled answers a question, where the law at T = 1 is tested
    lengths_only: bool = False  # accepted lengths alone, which other work on the machine does not change


def each(names: Iterable[str], settings: Settings, make: Callable[[str], T]) -> dict[str, T]:
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
        engine = {"vllm": "vLLM", "llamacpp": "llama.cpp"}.get(settings.engine, settings.engine)
        raise DeepSpecError(
            f"no drafter of the pipeline has an export that {engine} serves here; train one that has "
            "(docs/deploy-serving.md) or name one with --drafter"
        )
    return found


def exported(name: str, directory: Path, engine: str, called: str) -> Path:
    """Return the directory that `deepspec export` wrote for an engine from this very draft.

    Args:
        engine: its name in the record; `called` in messages.

    Raises:
        DeepSpecError: none, refused, or of an earlier draft.
    """
    path = EXPORTS / f"{name}.json"
    todo = f"deepspec export --drafter {name} --to {engine}"
    try:
        record = json.loads(path.read_text())
        entry, digest = record["engines"][engine], record["draft_digest"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DeepSpecError(f"{path}: no export of {name} for {called}; export it first ({todo})") from None
    if "refused" in entry:
        raise DeepSpecError(f"{name} cannot be served by {called}: {entry['refused']}")
    if digest != draft_digest(directory):
        raise DeepSpecError(f"{path}: of an earlier draft; export it again ({todo})")
    if not entry.get("parity", {}).get("passed", True):
        wrong = "; ".join(check["message"] for check in entry["parity"]["checks"] if not check["passed"])
        raise DeepSpecError(f"{path}: the export is not the draft that was trained: {wrong}")
    return Path(entry["path"])


def tokens_drafted(directory: Path, drafter: Drafter, settings: Settings) -> int:
    """Return K, at most the draft's block size.

    Raises:
        DeepSpecError: more are asked for.
    """
    tokens = settings.speculative_tokens or drafter.block_size
    if tokens > drafter.block_size:
        raise DeepSpecError(
            f"{directory}: drafts at most {drafter.block_size} tokens, {tokens} are asked for (--speculative-tokens)"
        )
    return tokens


def work_of(target: Target, params: Params, settings: Settings) -> Work:
    """Return the first turn of each prompt as work."""
    limit = settings.max_new_tokens or params.evaluate.max_new_tokens
    count = settings.prompts or params.evaluate.prompts_per_task
    prompts = []
    for name in settings.tasks or params.evaluate.tasks:
        for chat in load_task(name, count, params.seed, params.evaluate.tasks_dir).prompts:
            asked = first_turn(chat)
            text = target.chat_text(asked.messages, True, asked.tools, asked.chat_template_kwargs)
            prompts.append(Prompt(str(name), text, prompt_ids(target, asked)))
    longest = max(len(prompt.ids) for prompt in prompts) + limit + SLACK
    if longest > target.max_length:
        prompts = [prompt for prompt in prompts if len(prompt.ids) + limit + SLACK <= target.max_length]
        longest = target.max_length
    if not prompts:
        raise DeepSpecError(f"no prompt leaves room for {limit} tokens; ask for fewer (--max-new-tokens)")
    return Work(tuple(prompts), limit, tuple(sorted(target.stop_ids)), target.precision, longest)


def decoded_here(target: Target, drafter: Drafter, draft: Draft, work: Work) -> list[ours.Ours]:
    """Return every prompt decoded by our engine."""

    def decode(prompt: Prompt) -> ours.Ours:
        return ours.decode(target, drafter, prompt.ids, work.limit, draft.tokens)

    decode(work.prompts[0])  # kernels
    return [decode(prompt) for prompt in watched(work.prompts, f"{draft.name}, our engine")]


def conditions(target: Target, settings: Settings, work: Work, timing: str) -> About:
    """Return what both engines are measured on. `timing`: between which tokens the engine is timed."""
    record = TARGET / "deepspec.json"
    return About(
        serve_version=SERVE_VERSION,
        engine=settings.engine,
        timing=timing,
        target=json.loads(record.read_text())["source"] if record.exists() else "",
        target_digest=target.digest,
        dtype=work.dtype,
        device=describe_device(target.device),
        temperature=0.0,
        max_new_tokens=work.limit,
        provenance=Provenance(**provenance()),
    )
