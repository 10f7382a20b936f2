"""What the benchmarks share: prompts, interleaved paired runs, intervals, and reports that say where they come from."""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from deepspec.device import describe_device
from deepspec.evaluation.stats import Interval, Pair, speedup
from deepspec.evaluation.timing import (
    WARM_UP_TOKENS,
    Answering,
    FirstToken,
    Runtime,
    rotated,
    timed,
    warm_up,
)
from deepspec.files import digest, file_digest, write_json, write_text
from deepspec.git import git_or_none
from deepspec.journal import WorkLog
from deepspec.lineage import code_digest
from deepspec.messages.sources import read_jsonl
from deepspec.progress import Progress
from deepspec.provenance import without_folders
from deepspec.target.model import Target
from deepspec.tasks.dialogue import prompt_ids
from deepspec.tasks.task import load_task

WORK_DIR = Path(".deepspec/benchmarks")
REPORTS = Path("reports/benchmarks")
TASKS = ["humaneval", "word_problems", "conversations"]  # the project's three


@dataclass(frozen=True)
class Prompt:
    source: str  # the task's name, or the file's
    ids: list[int]


def command_line(name: str, doc: str) -> argparse.ArgumentParser:
    """The parser of `python -m benchmarks.<name>`, whose help is the module's docstring."""
    summary, _, rest = doc.partition("\n\n")
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def load_prompts(target: Target, sources: Iterable[str], count: int, seed: int = 0) -> list[Prompt]:
    """The first turns of `count` prompts of each source, in the target's chat template.

    Args:
        sources: names of evaluation tasks, paths of their YAML, or of a JSONL with a prompt a line.

    Raises:
        DeepSpecError: an unknown task, or a file that cannot be read.
    """
    prompts = []
    for source in sources:
        if source.endswith((".jsonl", ".jsonl.gz")):
            name, chats = Path(source).name.partition(".")[0], [row.chat for row in read_jsonl(source)]
            chosen = sorted(random.Random(seed).sample(range(len(chats)), min(count, len(chats))))
            chats = [chats[i] for i in chosen]
        else:
            task = load_task(source, count, seed)
            name, chats = task.name, task.prompts
        prompts += [Prompt(name, prompt_ids(target, chat)) for chat in chats]
    return prompts


@dataclass(frozen=True)
class Answer:
    """What was decoded of a prompt. `passes` are the target's that gave tokens, the first token's among them."""

    tokens: list[int]
    passes: int
    draft_s: float | None = None
    verify_s: float | None = None
    host_s: float | None = None


@dataclass(frozen=True)
class DecodingConfig:
    """What is compared: a runtime with all that decides how it decodes.

    Args:
        runtime: what its prefill is shared with: configurations of one runtime start a prompt alike.
        reference: name of the plain configuration that it is compared with.
        decode: (prompt, most new tokens) → the answer, greedily.
        step_bytes: weights that one target pass reads; None where unknown.
    """

    name: str
    runtime: str
    reference: str
    decode: Callable[[list[int], int], Answer]
    step_bytes: int | None = None


@dataclass(frozen=True)
class Run:
    """One configuration on one prompt. `seconds` are without the prefill, to which the first token belongs."""

    tokens: int
    seconds: float
    passes: int
    draft_s: float | None
    verify_s: float | None
    host_s: float | None
    output: str  # digest of all its tokens


def interleave(
    configs: Sequence[DecodingConfig],
    first_token: dict[str, Callable[[list[int]], Any]],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    log: WorkLog,
    bandwidth: Callable[[], float],
) -> tuple[dict[str, list[Run]], list[float]]:
    """Return configuration → its run of each prompt; and `bandwidth()`, asked once a prompt.

    Runs are ordered and timed as `deepspec/evaluation/timing.py` says. The prefill that is taken off is the time in
    which the configuration's runtime makes the first token alone (`first_token`, without a draft): alike on all sides,
    and what a draft makes of the prompt stays in. The bandwidth of a shared machine changes from minute to minute,
    and with the pages that a process happens to get: it is asked in the same conditions.
    """
    pieces = [(config, i) for i in range(len(prompts)) for config in rotated(configs, i)]
    missing = [piece for piece in pieces if log.get(_key(*piece)) is None]
    prefill = {runtime: FirstToken(decode) for runtime, decode in first_token.items()}
    if missing:
        longest = max(prompts, key=lambda prompt: len(prompt.ids))
        tokens = min(max_new_tokens, WARM_UP_TOKENS)
        warm_up([Answering(each.decode, tokens, prefill[each.runtime]) for each in configs], longest.ids)
    with Progress("decoding", len(pieces), len(pieces) - len(missing)) as progress:
        for config, i in missing:
            if log.get(f"bandwidth {i}") is None:
                log.add(f"bandwidth {i}", bandwidth())
            prefill[config.runtime].seconds(
                prompts[i].ids
            )  # before the run: it makes the kernels for this length
            runtime = Answering(config.decode, max_new_tokens, prefill[config.runtime])
            run = one_run(runtime, prompts[i].ids)
            log.add(_key(config, i), asdict(run))
            progress.tokens(run.tokens)
            progress.advance()
    runs = {config.name: [Run(**log.get(_key(config, i))) for i in range(len(prompts))] for config in configs}
    return runs, [log.get(f"bandwidth {i}") for i in range(len(prompts))]


def one_run(runtime: Runtime[list[int], Answer], ids: list[int]) -> Run:
    """Return one timed run of a prompt."""
    answer, seconds = timed(runtime, ids)
    output = digest(json.dumps(answer.tokens))
    parts = answer.draft_s, answer.verify_s, answer.host_s
    return Run(len(answer.tokens), seconds, answer.passes, *parts, output)


def rate(runs: Sequence[Run]) -> float:
    """Tokens a second after the first one of each prompt."""
    return sum(run.tokens - 1 for run in runs) / sum(run.seconds for run in runs)


def tau(runs: Sequence[Run]) -> float:
    """Tokens committed per target pass, the target's own included."""
    return sum(run.tokens for run in runs) / sum(run.passes for run in runs)


def pass_seconds(runs: Sequence[Run]) -> float | None:
    """Seconds a target pass with all that belongs to it, or None where no answer needed a second one."""
    passes = sum(run.passes - 1 for run in runs)
    return sum(run.seconds for run in runs) / passes if passes else None


def compared(runs: Sequence[Run], reference: Sequence[Run]) -> Interval | None:
    """Ratio of tokens a second, with the paired bootstrap over prompts of `evaluation/stats.py`."""
    pairs = zip(reference, runs, strict=True)
    return speedup([Pair(a.seconds, a.tokens - 1, b.seconds, b.tokens - 1) for a, b in pairs])


def provenance(target: Target | None) -> dict[str, str]:
    """Commit, command (of absolute paths the last part), target (of what needs one), machine and versions."""
    words = without_folders(sys.argv[1:])
    return {
        "commit": git_or_none(Path(__file__).parent, "describe", "--always", "--dirty") or "unknown",
        "command": " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *words]),
        **({"target": f"{target.digest}, {target.precision}"} if target else {}),
        "device": describe_device(target.device if target else torch.device("cpu")),
        "versions": f"Python {platform.python_version()}, transformers {transformers.__version__}",
    }


def write_report(
    folder: Path, name: str, title: str, body: str, data: dict, target: Target | None = None
) -> None:
    """Print the Markdown, and write `<name>.md` and `<name>.json` with where the numbers come from."""
    made = provenance(target)
    lines = [f"# {title}", "", body, "", *(f"- {key}: `{value}`" for key, value in made.items())]
    text = "\n".join(lines) + "\n"
    print(text)
    write_text(folder / f"{name}.md", text)
    write_json(folder / f"{name}.json", {"provenance": made, **data})


def work_key(target: Target, files: Iterable[str | Path], *settings: Any) -> str:
    """Digest of all that a kept result depends on: the code, the target, files (or folders of them), settings."""
    parts = [
        (file.name, file_digest(file))
        for path in map(Path, files)
        for file in (sorted(path.iterdir()) if path.is_dir() else [path])
        if file.is_file()
    ]
    code = code_digest("deepspec.decoding.engine", "deepspec.drafters.checkpoint")
    return digest(json.dumps([target.digest, code, parts, settings], default=str))


def _key(config: DecodingConfig, prompt: int) -> str:
    return f"{config.name} {prompt}"
