"""Write a draft for serving engines and check each directory: data/drafts/NAME → data/exports/NAME."""

from __future__ import annotations

import argparse
from pathlib import Path

from deepspec.config import Params
from deepspec.errors import DeepSpecError
from deepspec.files import write_json
from deepspec.stages.common import stage


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--drafter", required=True, help="a name below data/drafts")
    parser.add_argument(
        "--to",
        action="append",
        metavar="ENGINE",
        help="hf, vllm, speculators, sglang, tgi, llamacpp or all; repeat it for several (default: all)",
    )
    parser.add_argument(
        "--precision",
        default="f16",
        help="of llama.cpp's files: f32, f16, bf16, q8_0, q4_0 or q4_1 (default: %(default)s)",
    )
    parser.add_argument(
        "--with-target", action="store_true", help="write the target's own GGUF beside the draft's"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("data/exports"),
        help="folder of the exports (default: %(default)s)",
    )


def main(params: Params, flags: argparse.Namespace) -> None:
    """Export drafts; the record is written in any case, then a failed check ends the stage with an error."""
    from deepspec.drafters.checkpoint import draft_directory
    from deepspec.export.draft import load_draft
    from deepspec.export.engines import chosen, export, with_others
    from deepspec.export.llamacpp import Options
    from deepspec.target.model import load_where_it_runs

    name = flags.drafter
    engines = chosen(flags.to)
    target = load_where_it_runs("data/target")
    evaluation = Path("reports/eval") / f"{name}.json"
    draft = load_draft(name, draft_directory(name), target, evaluation)
    record = export(draft, engines, flags.output / name, Options(flags.precision, flags.with_target))
    path = Path("reports/export") / f"{name}.json"
    write_json(path, with_others(record, path))
    failed = []
    for engine, entry in record["engines"].items():
        if "refused" in entry:
            print(f"{engine}: refused: {entry['refused']}")
            continue
        parity = entry["parity"]
        print(f"{engine}: {entry['path']} ({entry['format']}), " + _verdict(parity))
        failed += [f"{engine}: {c['message']}" for c in parity["checks"] if not c["passed"]]
    if failed:
        raise DeepSpecError(f"{name} was not exported as it was trained: {'; '.join(failed)}; see {path}")
    if flags.to and all("refused" in entry for entry in record["engines"].values()):
        raise DeepSpecError(f"{name}: nothing was written; the lines above say why")


def _verdict(parity: dict) -> str:
    error = parity["max_abs_error"]
    checks = f"{sum(c['passed'] for c in parity['checks'])} of {len(parity['checks'])} checks passed"
    return checks if error is None else f"{checks}, logits within {error:.1e}"


if __name__ == "__main__":
    stage(main, add_flags)
