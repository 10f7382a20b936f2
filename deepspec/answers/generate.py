"""The target answers every prompt: the distillation data.

Each process takes its share of the prompts and appends what it finishes to a shard of its own; the main
process puts the shards together. An answer depends on its prompt's id and the run's seed, not on the order or
the company in which it was generated.
"""

from __future__ import annotations

import json
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from deepspec.answers import given, openai
from deepspec.answers.conversation import Conversation, UnusableError
from deepspec.answers.history import Histories
from deepspec.answers.params import GenerateParams
from deepspec.answers.shards import Shard, Sink, Work, assemble, read_work
from deepspec.decoding.engine import stream
from deepspec.decoding.request import Generation, Request, Sampling
from deepspec.errors import DeepSpecError
from deepspec.files import digest, file_digest
from deepspec.lineage import code_digest
from deepspec.messages.prompt import Prompt
from deepspec.messages.prompts import Prompts, read_prompts
from deepspec.progress import Progress

if TYPE_CHECKING:
    from deepspec.config import Params
    from deepspec.decoding.served import Stream
    from deepspec.features.kept import Keeper

WORK_ROOT = Path(".deepspec/generate")


def generate_data(
    target: Any,
    params: Params,
    prompts: str | Path,
    out: str | Path,
    work_root: Path = WORK_ROOT,
    decode: Stream | None = None,
    keeper: Keeper | None = None,
) -> dict | None:
    """Answer `prompts` and write the data set to `out`; an earlier run that was cut off is continued.

    To be called by every process of `accelerate launch` (or torchrun), or by one alone.

    Args:
        decode: decodes the requests of engine `local`; None: the target does it here.
        keeper: keeps the states of the tokens, where the target answers here.

    Returns:
        The manifest; None in all processes but the main one.

    Raises:
        DeepSpecError: bad prompts, no answer from a server, or not one conversation that succeeded.
    """
    state = process_state()
    rows = read_prompts(prompts)
    _check_kinds(rows, params.generate)
    settings = generation_settings(params, served=decode is not None)
    key = {
        "settings": settings,
        "target": target.digest,
        "prompts": file_digest(prompts),
        "code": code_digest(__name__),
    }
    directory = Path(work_root) / digest(json.dumps(key, sort_keys=True))
    if keeper:
        keeper.begin(directory.name)
    share = longest_first(rows)[state.process_index :: state.num_processes]
    _answer_share(target, params, share, directory, state, decode, keeper)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    histories = Histories(target)
    for row in rows:
        if row.chat.tools or len(row.chat.slots()) > 1:
            histories.of(row.chat)
    made = assemble(read_work(directory), rows.ids, Path(out), settings, target.digest, histories.describe())
    if keeper:
        keeper.finish(made["digest"])
    return made


def _check_kinds(prompts: Prompts, params: GenerateParams) -> None:
    """Refuse prompts that the engine cannot do anything with, before time is spent."""
    if params.engine != "given" and (tokens := sum(bool(prompt.chat.input_ids) for prompt in prompts)):
        raise DeepSpecError(
            f"{tokens} of {len(prompts)} prompts are token ids with their answers, which engine {params.engine!r} "
            "cannot answer; set generate.engine to given"
        )


def process_state() -> PartialState:
    """Return this process's place among those launched together. It takes a GPU, so call it before loading a target.

    Without a GPU, the processes of torchrun work together too. The time-out is that of the barrier at the
    end, where the quickest waits for the slowest.
    """
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))


def generation_settings(params: Params, served: bool = False) -> dict[str, Any]:
    """Return all parameters that an answer depends on; batch size, addresses and time-outs do not count.

    Args:
        served: the target answers in vLLM.
    """
    generate = params.generate
    keys = ("engine", "max_new_tokens", "max_length", "temperature", "top_p", "top_k")
    settings = {"seed": params.seed, **{key: getattr(generate, key) for key in keys}}
    if served and generate.engine == "local":
        settings["engine"] = "vllm"
    if generate.engine == "given":
        settings = {"seed": params.seed, "engine": "given", "max_length": generate.max_length} | {
            "temperature": generate.temperature,
            "top_p": generate.top_p,
            "answered_by": generate.given.answered_by,
        }
    return settings | ({"model": generate.openai.model} if generate.engine == "openai" else {})


def longest_first(prompts: Prompts) -> Prompts:
    """Sort prompts by length, longest first: a batch pads little, and what needs most memory comes first."""

    def length(prompt: Prompt) -> int:
        slots = prompt.chat.slots()
        return sum(len(message["content"]) for message in slots[0].before) if slots else 0

    lengths, ids = array("Q", map(length, prompts)), prompts.ids
    return prompts.arranged(sorted(range(len(prompts)), key=lambda i: (-lengths[i], ids[i])))


def _answer_share(
    target: Any,
    params: Params,
    share: Prompts,
    directory: Path,
    state: PartialState,
    decode: Stream | None,
    keeper: Keeper | None,
) -> None:
    work: Work = read_work(directory)
    todo = share.arranged(i for i, id in enumerate(share.ids) if id not in work.rows)
    several = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
    progress = Progress(
        f"generate{several}",
        total=len(share),
        done=len(share) - len(todo),
        shown=state.is_main_process,
    )
    kinds: dict[str, Callable[..., None]] = {
        "local": partial(answer_ids, decode=decode, keeper=keeper),
        "openai": openai.answer,
        "given": given.answer,
    }
    answer = kinds[params.generate.engine]
    with Shard(directory, state.process_index, state.num_processes) as shard, progress:
        answer(target, todo, params.generate, Sink(shard, progress, params.seed))


def answer_ids(
    target: Any,
    prompts: Sequence[Prompt],
    params: GenerateParams,
    sink: Sink,
    decode: Stream | None = None,
    keeper: Keeper | None = None,
) -> None:
    """Answer prompts by their token ids, in a batch whose free places are filled at once.

    The next turn of a conversation goes before a new conversation, so that what a kill can lose stays small.

    Args:
        decode: decodes the requests; None: our own engine.
        keeper: of our own engine's states.
    """
    waiting = deque(range(len(prompts)))  # numbers: a prompt is read when its turn comes
    histories = Histories(target)
    asked: dict[str, Conversation] = {}
    follow_ups: deque[Conversation] = deque()
    sampling = Sampling(params.temperature, params.top_k, params.top_p)
    recorder = keeper.recorder if keeper else None
    decode = decode or partial(stream, target, None, batch_size=params.batch_size, recorder=recorder)

    def next_request() -> Request | None:
        conversation = (
            follow_ups.popleft()
            if follow_ups
            else _open_next(target, prompts, waiting, params, sink, histories)
        )
        if conversation is None:
            return None
        asked[conversation.prompt.id] = conversation
        return Request(
            prompt_ids=conversation.prompt_ids or [],
            max_new_tokens=conversation.room,
            sampling=sampling,
            seed=sink.seed(conversation),
            id=conversation.prompt.id,
            on_tokens=lambda tokens, accepted: sink.progress.tokens(len(tokens)),
        )

    while waiting or follow_ups:
        for generation in decode(next_request):
            conversation = asked.pop(generation.id)
            if _take(conversation, generation, sink, keeper):
                follow_ups.append(conversation)


def _open_next(
    target: Any,
    prompts: Sequence[Prompt],
    waiting: deque[int],
    params: GenerateParams,
    sink: Sink,
    histories: Histories,
) -> Conversation | None:
    """Open the next prompt that fits; those that do not are recorded as failures."""
    while waiting:
        prompt = prompts[waiting.popleft()]
        try:
            return Conversation(target, prompt, params.max_new_tokens, params.max_length, histories)
        except UnusableError as error:
            sink.failed(prompt.id, str(error))
    return None


def _take(
    conversation: Conversation, generation: Generation, sink: Sink, keeper: Keeper | None = None
) -> bool:
    """Add the answer to its conversation; return whether there is another turn to answer."""
    recorded = keeper.recorder.take(generation.id) if keeper else None
    try:
        if generation.finish_reason == "error":
            raise UnusableError(generation.error or "the engine reported an error")
        conversation.add_answer(generation.tokens, generation.finish_reason)
    except UnusableError as error:
        sink.failed(conversation.prompt.id, str(error))
        return False
    if conversation.prompt_ids is None:
        if keeper and recorded:
            keeper.keep(conversation.input_ids, recorded)
        sink.finished(conversation)
        return False
    return True
