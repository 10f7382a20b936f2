"""What the benchmarks of verification and identity share: prompts in, reports with their provenance out."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers

from deepspec.data.prompt_sources import read_jsonl
from deepspec.evaluation.device import describe_device
from deepspec.evaluation.task import load_task
from deepspec.files import digest, file_digest, source_digest, write_json, write_text
from deepspec.target import Target

WORK_DIR = Path(".deepspec/benchmarks")


def read_prompts(target: Target, sources: Iterable[str], count: int) -> list[list[int]]:
    """Token ids of the first `count` first turns of each source: a task's name or YAML, or a JSONL of {"turns": [...]}.

    Raises:
        DeepSpecError: an unknown task, or a file that cannot be read.
    """
    turns = []
    for source in sources:
        lines = read_jsonl(source) if source.endswith((".jsonl", ".jsonl.gz")) else load_task(source).prompts
        turns += [prompt[0] for prompt in lines[:count]]
    return [target.chat_ids([{"role": "user", "content": text}]) for text in turns]


def work_key(target: Target, drafters: Iterable[str | Path], *settings: Any) -> str:
    """Digest of all that a kept result depends on, the code included."""
    code = source_digest("decoding", "drafters", "attention.py", "fused.py", "target.py")
    files = [
        (file.name, file_digest(file))
        for drafter in drafters
        for file in sorted(Path(drafter).iterdir())
        if file.is_file()
    ]
    return digest(json.dumps([target.digest, code, files, settings], default=str))


def provenance(target: Target) -> dict[str, str]:
    return {
        "commit": _git("describe", "--always", "--dirty"),
        "command": " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "target": f"{target.digest}, {str(target.dtype).removeprefix('torch.')}",
        "device": describe_device(target.device),
        "versions": f"Python {platform.python_version()}, transformers {transformers.__version__}",
    }


def write_report(folder: Path, name: str, title: str, body: str, data: dict, target: Target) -> None:
    """Print the Markdown, and write `<name>.md` and `<name>.json` with where the numbers come from."""
    made = provenance(target)
    lines = [f"# {title}", "", body, "", *(f"- {key}: `{value}`" for key, value in made.items())]
    text = "\n".join(lines) + "\n"
    print(text)
    write_text(folder / f"{name}.md", text)
    write_json(folder / f"{name}.json", {"provenance": made, **data})


def _git(*words: str) -> str:
    result = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent)
    return result.stdout.strip() or "unknown"
