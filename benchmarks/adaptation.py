"""τ along long answers, of a draft as it is and of one that goes on learning from its verifications.

Both decode the same prompts, without a lookup, to `--tokens` tokens each, whatever would end an answer: at T = 0 the
same texts, at higher temperatures texts of the same law. τ is tokens committed per verification, by the place in the
answer at which a round begins; the ratio is paired by prompt, its interval over prompts. Seconds are those of draft and
target, learning included. Decoded prompts are kept, and a run that was stopped goes on.

    python -m benchmarks.adaptation --draft data/drafts/dspark --count 2
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.common import REPORTS, TASKS, WORK_DIR, command_line, load_prompts, work_key, write_report
from deepspec.decoding.drafter import Drafter
from deepspec.decoding.engine import Engine
from deepspec.decoding.request import Request, Sampling
from deepspec.drafters.load import load_drafter
from deepspec.errors import DeepSpecError
from deepspec.evaluation.stats import against, bootstrap, quotient
from deepspec.journal import WorkLog
from deepspec.lineage import code_digest
from deepspec.markdown import markdown_table
from deepspec.progress import Progress
from deepspec.target.model import Target, load_target
from deepspec.training.adapt import Adaptation, load_adapting

Runs = dict[tuple[str, float], list[dict[str, Any]]]  # (which draft, temperature) → its prompts
DRAFTS = ("as it is", "learning")


def decode(
    target: Target, drafter: Drafter, prompt: list[int], tokens: int, temperature: float, seed: int
) -> dict[str, Any]:
    """Return accepted tokens of each round of an answer, and its seconds."""
    request = Request(prompt, tokens, sampling=Sampling(temperature), seed=seed, stop_ids=frozenset())
    waiting = iter([request])
    (out,) = Engine(target, drafter).run(lambda: next(waiting, None))
    if out.error:
        raise DeepSpecError(out.error)
    return {"accepted": out.stats.accepted, "seconds": out.stats.decode_s, "tokens": len(out.tokens)}


def along(accepted: list[int], edges: list[int]) -> npt.NDArray[np.float64]:
    """Return tokens and rounds [parts, 2] of an answer, by where its rounds begin.

    Args:
        edges: where parts begin, and the end of the last.
    """
    committed = [count + 1 for count in accepted]
    starts = [0, *accumulate(committed)][:-1]
    parts = np.searchsorted(edges, starts, side="right") - 1
    table = np.zeros((len(edges) - 1, 2))
    np.add.at(table, parts.clip(max=len(table) - 1), np.stack((committed, np.ones(len(committed))), 1))
    return table


def report(runs: Runs, temperatures: list[float], edges: list[int]) -> tuple[str, dict[str, Any]]:
    """The table, and the same as data."""
    lines, data = [], {}
    for temperature in temperatures:
        mine = [runs[name, temperature] for name in DRAFTS]
        counted = [np.stack([along(run["accepted"], edges) for run in own]) for own in mine]
        timed = [np.array([(run["tokens"], run["seconds"]) for run in own]) for own in mine]
        rows = {
            f"{low}–{high}": [table[:, part] for table in counted]
            for part, (low, high) in enumerate(pairwise(edges))
        }
        rows |= {"all": [table.sum(1) for table in counted], "tokens/s": timed}
        for said, tables in rows.items():
            values = [float(quotient(table.sum(0))) for table in tables]
            ratio = bootstrap([np.hstack(tables)], against(quotient))
            lines.append((f"{temperature:g}", said, *(f"{value:.3f}" for value in values), str(ratio)))
            found = {"ratio": asdict(ratio) if ratio else None, **dict(zip(DRAFTS, values, strict=True))}
            data[f"T={temperature:g} {said}"] = found
    heads = ["T", "tokens of the answer", *(f"τ, {name}" for name in DRAFTS), "learning / as it is"]
    return markdown_table(heads, lines, "ttn"), data


def main(argv: list[str] | None = None) -> int:
    parser = command_line("adaptation", __doc__)
    add, known = parser.add_argument, Adaptation()
    add("--target", default="data/target", help="directory of the target (default: %(default)s)")
    add("--draft", type=Path, default=Path("data/drafts/dspark"), help="directory (default: %(default)s)")
    add("--prompts", nargs="+", default=TASKS, metavar="SOURCE", help="evaluation tasks or .jsonl files")
    add("--count", type=int, default=2, help="prompts of each source (default 2)")
    add("--tokens", type=int, default=2000, help="of an answer (default 2000)")
    add("--parts", type=int, default=4, help="of an answer, by which τ is told (default 4)")
    add("--temperatures", type=float, nargs="+", default=[0.0, 1.0], help="default: 0 1")
    add("--every", type=int, default=known.every, help="tokens between two steps (default %(default)s)")
    add("--blocks", type=int, default=known.blocks, help="of a step (default %(default)s)")
    add("--context", type=int, default=known.context, help="tokens that they see (default %(default)s)")
    add("--lr", type=float, default=known.lr, help="default %(default)s")
    add("--output", type=Path, default=REPORTS, help="folder of the report")
    flags = parser.parse_args(argv)
    how = Adaptation(flags.every, flags.blocks, flags.context, flags.lr)
    try:
        target = load_target(flags.target)
        drafters = dict(
            zip(
                DRAFTS,
                (load_drafter(flags.draft, target), load_adapting(flags.draft, target, how)),
                strict=True,
            )
        )
        prompts = load_prompts(target, flags.prompts, flags.count)
        digest = drafters["as it is"].digest
        ids = [prompt.ids for prompt in prompts]
        key = work_key(target, [], digest, ids, flags.tokens, how, code_digest("deepspec.training.adapt"))
        log = WorkLog(WORK_DIR / f"adaptation-{key}.jsonl")
        pieces = [
            (i, temperature, name)
            for i in range(len(prompts))
            for temperature in flags.temperatures
            for name in DRAFTS
        ]
        missing = [piece for piece in pieces if log.get(str(piece)) is None]
        with Progress("decoding", len(pieces), len(pieces) - len(missing)) as progress:
            for i, temperature, name in missing:
                found = decode(target, drafters[name], prompts[i].ids, flags.tokens, temperature, i)
                log.add(str((i, temperature, name)), found)
                progress.tokens(found["tokens"])
                progress.advance()
    except DeepSpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    runs: Runs = {}
    for i, temperature, name in pieces:
        runs.setdefault((name, temperature), []).append(log.get(str((i, temperature, name))) or {})
    edges = [round(part * flags.tokens / flags.parts) for part in range(flags.parts + 1)]
    table, data = report(runs, flags.temperatures, edges)
    title = f"τ along {flags.tokens} tokens of {len(prompts)} answers, {flags.draft.name}"
    settings = ", ".join(f"{name} {value:g}" for name, value in asdict(how).items())
    body = f"{table}\n\nA step of learning: {settings}."
    write_report(flags.output, "adaptation", title, body, {"settings": asdict(how), **data}, target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
