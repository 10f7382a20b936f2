"""The target in vLLM for a stage: running servers, or one that is started for it and ended after it."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepspec.errors import DeepSpecError

if TYPE_CHECKING:
    from deepspec.config import Params
    from deepspec.decoding.served import Servers, Stream
    from deepspec.serving.environment import Environment
    from deepspec.target.ends import Ends
    from deepspec.target.params import TargetParams

logger = logging.getLogger(__name__)

TARGET = Path("data/target")
MEMORY = Path("/dev/shm")  # hidden states never reach a disk there


@contextmanager
def answering(params: Params, target: Ends, max_length: int) -> Iterator[Stream]:
    """Yield what decodes requests of at most so many tokens in vLLM."""
    with served_target(params.target, None, min(max_length, target.max_length)) as servers:
        yield partial(servers.stream, target.stop_ids)


@contextmanager
def served_target(
    target: TargetParams, layers: Sequence[int] | None, max_length: int, form: str = "bf16"
) -> Iterator[Servers]:
    """Yield servers of `data/target`, for all processes that were launched together.

    Args:
        layers: vLLM's ids of layers whose states the servers are to write; None: no states.
        max_length: of a conversation, in tokens.
        form: of the states that a server that is started here writes.

    Raises:
        DeepSpecError: vLLM cannot be set up or does not start, or no server is at an address.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from deepspec.decoding.served import Servers

    own, state = target.vllm, PartialState()
    if (
        not own.base_urls
        and int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes)) < state.num_processes
    ):
        raise DeepSpecError(
            "a server that is started here answers this machine alone; for processes on several, name running ones "
            "in target.vllm.base_urls, or store the features on one machine first (train --features-only)"
        )
    with ExitStack() as stack:
        found: list[Any] = [own.base_urls, own.states_folder, None]
        if not own.base_urls and state.is_main_process:
            try:
                found[:2] = stack.enter_context(_started(target, layers, max_length, form))
            except DeepSpecError as error:
                found[2] = str(error)
        broadcast_object_list(found)
        addresses, folder, failure = found
        if failure:
            raise DeepSpecError(failure)
        if layers is not None and folder is None:
            raise DeepSpecError(
                "hidden states of running servers need target.vllm.states_folder, where they write them"
            )
        yield Servers(
            addresses,
            own.concurrency,
            own.retries,
            own.timeout_s,
            Path(folder) if layers is not None else None,
        )
        state.wait_for_everyone()  # before the main process ends the server


@contextmanager
def _started(
    target: TargetParams, layers: Sequence[int] | None, max_length: int, form: str
) -> Iterator[tuple[list[str], str | None]]:
    """Start a server; yield its address, and the folder that it writes states to."""
    from deepspec.serving.environment import find_or_set_up
    from deepspec.serving.launch import states_config

    environment = find_or_set_up()
    logger.info("starting vLLM %s", environment.version)
    what = environment, target
    room = target.vllm.concurrency
    if layers is None:
        with server(*what, None, max_length, "target", room) as address:
            yield [address], None
    else:
        with _states_folder() as folder:
            speculative, transfer = states_config(layers, folder, form)
            with server(*what, speculative, max_length, "states", room, transfer) as address:
                yield [address], str(folder)


def server(
    environment: Environment,
    target: TargetParams,
    speculative: dict[str, Any] | None,
    max_length: int,
    name: str,
    sequences: int,
    more: Sequence[str] = (),
) -> AbstractContextManager[str]:
    """Return the context of a server of `data/target`, started as params.yaml says."""
    from deepspec.serving.launch import serving

    own = target.vllm
    given = ["--tensor-parallel-size", str(own.tensor_parallel)]
    given += ["--pipeline-parallel-size", str(own.pipeline_parallel)]
    given += ["--enable-expert-parallel"] if own.expert_parallel else []
    given += ["--quantization", own.quantization] if own.quantization else []
    arguments = [*given, *more, *own.arguments]
    return serving(environment, TARGET, target.dtype, max_length, speculative, name, sequences, arguments)


@contextmanager
def _states_folder() -> Iterator[Path]:
    """Make a folder for this directory's states, in memory where there is such a place, and empty it on leaving."""
    root = MEMORY if os.access(MEMORY, os.W_OK) else Path(".deepspec").resolve()
    here = hashlib.sha256(str(Path.cwd()).encode()).hexdigest()[:12]
    folder = root / f"deepspec-states-{os.getuid()}-{here}"
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run has left
    folder.mkdir(parents=True, mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
