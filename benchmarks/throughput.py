"""Tokens a second at batch sizes 1, 4, 16: plain decoding, verification of fixed length, and the prefix scheduler,
whose curve stays as it was measured or is corrected by the rounds.

    python -m benchmarks.throughput --target data/target --drafter data/drafts/dspark --prompts gsm8k.jsonl

How it measures: `deepspec/evaluation/throughput.py`; a group has twice as many prompts as fit in flight. The last
column counts drafted tokens verified per request and round: the scheduler's falls as the batch grows (Figure 8 of
DSpark), since a verified token is no longer free.

Ratios are of tokens a second, with 95 % intervals of a paired bootstrap over groups. Finished groups are kept in a
work file: a killed benchmark goes on.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.common import (
    REPORTS,
    TASKS,
    WORK_DIR,
    Prompt,
    command_line,
    load_prompts,
    work_key,
    write_report,
)
from deepspec.commands.profile import parse_batches
from deepspec.decoding.profiles import load_or_measure
from deepspec.decoding.shapes import AUTO
from deepspec.drafters.load import load_drafter
from deepspec.errors import DeepSpecError
from deepspec.evaluation.contest import DecodingConfig
from deepspec.evaluation.throughput import (
    CORRECTED,
    SCHEDULER,
    BatchRun,
    Server,
    Setting,
    configs,
    groups_of,
    rows,
)
from deepspec.evaluation.timing import rotated
from deepspec.journal import WorkLog
from deepspec.markdown import markdown_table
from deepspec.progress import Progress
from deepspec.target.model import load_target


def measure(
    server: Server, settings: list[Setting], prompts: list[Prompt], groups: int, log: WorkLog
) -> dict[Setting, dict[str, list[BatchRun]]]:
    """Return all runs, those in the log taken from there."""
    pieces = [
        (setting, g, config)
        for setting in settings
        for g in range(groups)
        for config in rotated(server.configs, g)
    ]
    missing = [piece for piece in pieces if log.get(_key(*piece)) is None]
    ids = [prompt.ids for prompt in prompts]
    decoded = {s: groups_of(ids, 2 * s.batch, groups, server.seed) for s in settings}
    warm: Setting | None = None
    with Progress("throughput", len(pieces), len(pieces) - len(missing)) as progress:
        for setting, g, config in missing:
            if setting != warm:
                server.warm_up(setting, decoded[setting][0])
                warm = setting
            run = server.run(config, setting, decoded[setting][g])
            log.add(_key(setting, g, config), asdict(run))
            progress.tokens(run.tokens)
            progress.advance()
    return {
        setting: {
            config.name: [BatchRun(**log.get(_key(setting, g, config))) for g in range(groups)]
            for config in server.configs
        }
        for setting in settings
    }


def report(results: dict[Setting, dict[str, list[BatchRun]]]) -> tuple[str, dict]:
    """The Markdown table, and the same figures as data."""
    data = [row.model_dump(mode="json") for row in rows(results)]
    cells = [
        [
            f"T={entry['temperature']:g}, batch {entry['batch']}, {entry['name']}",
            f"{entry['tokens_per_second']:.1f}",
            _cell(entry["speedup"]),
            _cell(entry["against_best_fixed"]) if entry["name"] in (SCHEDULER, CORRECTED) else "",
            f"{entry['tau']:.2f}",
            "" if entry["verified_per_request"] is None else f"{entry['verified_per_request']:.2f}",
        ]
        for entry in data
    ]
    header = ["", "tokens/s (median)", "× plain", "× best fixed", "τ", "verified a request"]
    return markdown_table(header, cells, "tn"), {"results": data}


def _cell(interval: dict[str, float] | None) -> str:
    if not interval:
        return ""
    bounds = "" if interval["low"] is None else f" [{interval['low']:.2f}, {interval['high']:.2f}]"
    return f"{interval['value']:.2f}{bounds}"


def _key(setting: Setting, group: int, config: DecodingConfig) -> str:
    return f"T={setting.temperature:g} batch={setting.batch} group={group} {config.name}"


def arguments() -> argparse.ArgumentParser:
    parser = command_line("throughput", __doc__)
    add = parser.add_argument
    add("--target", default="data/target", help="target directory")
    add("--drafter", required=True, help="directory of a trained draft for it")
    add(
        "--prompts",
        nargs="+",
        default=TASKS,
        help='evaluation tasks, or JSONL files with {"turns": [...]} a line',
    )
    add("--count", type=int, default=32, help="prompts of each source")
    add("--groups", type=int, default=6, help="groups of prompts at each batch size")
    add("--batches", default="1,4,16", help="requests in flight")
    add("--lengths", default="2,4", help="fixed verification lengths beside the whole block")
    add("--temperatures", default="0,1", help="of the sampler; 0 is greedy")
    add("--max-new-tokens", type=int, default=128, help="of an answer")
    add("--seed", type=int, default=0, help="of the sampling and of the choice of prompts")
    add("--reports", type=Path, default=REPORTS, help="folder of the table")
    return parser


def _numbers(text: str, flag: str, kind: type) -> list:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise DeepSpecError(f"{flag} takes numbers like 0,1, found {text!r}") from None


def run(flags: argparse.Namespace) -> None:
    batches = parse_batches(flags.batches)
    lengths = _numbers(flags.lengths, "--lengths", int)
    settings = [Setting(t, b) for t in _numbers(flags.temperatures, "--temperatures", float) for b in batches]
    target = load_target(flags.target)
    drafter = load_drafter(flags.drafter, target)
    prompts = load_prompts(target, flags.prompts, flags.count, flags.seed)
    curve = load_or_measure(target, drafter, batches=batches, shape=AUTO)
    compared = configs(drafter, curve, lengths, corrected=True, tree=AUTO)
    server = Server(target, compared, flags.max_new_tokens, flags.seed)
    key = work_key(
        target,
        [flags.drafter],
        curve.to_json(),
        flags.max_new_tokens,
        flags.seed,
        [prompt.ids for prompt in prompts],
    )
    log = WorkLog(WORK_DIR / f"throughput-{key}.jsonl")
    results = measure(server, settings, prompts, flags.groups, log)
    table, data = report(results)
    data |= {"curve": curve.to_json(), "groups": flags.groups, "max_new_tokens": flags.max_new_tokens}
    write_report(flags.reports, "throughput", "Throughput by batch size", table, data, target)
    log.remove()


def main(argv: list[str] | None = None) -> int:
    flags = arguments().parse_args(argv)
    try:
        run(flags)
    except DeepSpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
