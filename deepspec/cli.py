"""`deepspec ...`: the stages of the pipeline one by one, a chat that shows the draft at work, and a doctor.

Nothing heavy is imported before a command runs, so that `deepspec --help` answers at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from deepspec.stages.common import guarded, quiet_environment, stage

STAGES = {
    "target": "Fetch or convert the target into data/target.",
    "prompts": "Collect the training prompts.",
    "generate": "Let the target answer the prompts: the distillation data.",
    "validate": "Check the distillation data against its suite of expectations.",
    "train": "Train one drafter (--drafter NAME) in this process; dvc.yaml shows how to start several.",
    "evaluate": "Measure drafters (--drafter NAME, repeatable): τ, speed-up, losslessness.",
    "export": "Write a draft for serving engines (--drafter NAME, --to ENGINE) and check each directory.",
    "report": "Sum everything up in reports/ and print the table.",
}
# A stage parses its own flags, `--help` among them.
PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}

app = typer.Typer(
    help="Make a language model faster with a draft, without changing a token. `dvc repro` runs all stages.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _add_stage(name: str, summary: str) -> None:
    @app.command(name, help=summary, context_settings=PASS_THROUGH, rich_help_panel="Stages")
    def run_stage(context: typer.Context) -> None:
        module = importlib.import_module(f"deepspec.stages.{name}")
        sys.argv[:] = [f"deepspec {name}", *context.args]  # what its own --help and its records call it
        stage(module.main, getattr(module, "add_flags", None), context.args)


for _name, _summary in STAGES.items():
    _add_stage(_name, _summary)


@app.command(rich_help_panel="Tools")
def chat(
    target: Annotated[
        str, typer.Option(help="A target directory, a hub id, or embedded:<name>.")
    ] = "data/target",
    drafter: Annotated[
        str | None,
        typer.Option(
            help="A name under data/drafts or a directory.", show_default="the last of the pipeline"
        ),
    ] = None,
    no_draft: Annotated[bool, typer.Option("--no-draft", help="Plain decoding, for comparison.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Per answer.")] = 512,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampler.")] = 0,
    params: Annotated[Path, typer.Option(help="Says how a draft is used (evaluate.decode).")] = Path(
        "params.yaml"
    ),
) -> None:
    """Talk to the target and watch the draft: accepted draft tokens are coloured.

    Each line of standard input is a turn. `/reset` forgets the conversation, `/quit` or Ctrl-D ends it,
    Ctrl-C stops an answer."""
    from deepspec.chat import Settings, run

    settings = Settings(target, drafter, no_draft, temperature, max_new_tokens, system, seed, params)
    _exit(lambda: run(settings))


@app.command(rich_help_panel="Tools")
def profile(
    target: Annotated[
        str, typer.Option(help="A target directory, a hub id, or embedded:<name>.")
    ] = "data/target",
    drafter: Annotated[
        str | None, typer.Option(help="A name under data/drafts or a directory.", show_default="none")
    ] = None,
    batches: Annotated[str, typer.Option(help="Requests in flight, comma-separated.")] = "1,4,16",
    weights: Annotated[str, typer.Option(help="dense, or int4 (a CPU only).")] = "dense",
    force: Annotated[bool, typer.Option("--force", help="Measure anew what is stored.")] = False,
) -> None:
    """Measure what a target pass and a draft cost on this device: the curve that controllers decide with."""
    from deepspec.profile import Settings, run

    _exit(lambda: run(Settings(target, drafter, batches, weights, force)))


@app.command(rich_help_panel="Tools")
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A drafter's name, or the file of its record.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The one that may not be worse.")],
    margin: Annotated[float, typer.Option(min=0.0, max=1.0, help="What B may lose, as a share.")] = 0.03,
    proof: Annotated[
        bool, typer.Option("--proof", help="The whole 95 % interval must lie above 1 - margin.")
    ] = False,
) -> None:
    """Set two evaluation records side by side, paired by prompt; exits with 1 if B is worse than A.

    Worse: the mean over tasks of B / A, of speed-up or τ, at any temperature, is below 1 - margin, or B changed a
    token. Records that cannot be compared end with 2."""
    from deepspec.evaluation import compare as comparing

    failures: list[str] = []

    def run() -> None:
        measured = comparing.load(first), comparing.load(second)
        found = comparing.compare(*measured, margin, proof)
        comparing.show(found, *measured)
        failures.extend(found.failures)

    quiet_environment()
    raise typer.Exit(guarded(run) or int(bool(failures)))


@app.command("serve-check", rich_help_panel="Tools")
def serve_check(
    engine: Annotated[str, typer.Option(help="vllm, sglang or tgi.")] = "vllm",
    drafter: Annotated[
        list[str] | None, typer.Option(help="Repeatable.", show_default="those of the pipeline")
    ] = None,
    prompts: Annotated[int | None, typer.Option(help="Of each task, in place of params.yaml's.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Per answer, likewise.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Comma-separated, likewise.")] = None,
    speculative_tokens: Annotated[
        int | None, typer.Option(help="K, tokens drafted at once.", show_default="the draft's block size")
    ] = None,
    exported: Annotated[
        Path | None, typer.Option(help="Directory that vLLM loads.", show_default="that of `deepspec export`")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="A server of the draft that is running.", show_default="start vLLM")
    ] = None,
    plain_url: Annotated[str | None, typer.Option(help="One without the draft, for the speed-up.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 compares token for token.", show_default="the target's")
    ] = None,
    params: Annotated[Path, typer.Option(help="Says which tasks and prompts.")] = Path("params.yaml"),
    output: Annotated[Path, typer.Option(help="Folder of the records.")] = Path("reports/serve"),
) -> None:
    """Serve drafts in another engine and see that it accepts as many tokens as ours; exits with 1 if it does not.

    vLLM is started here, from $DEEPSPEC_VLLM_PYTHON or an environment that is set up once; SGLang and TGI are asked at
    --base-url. The server at --base-url must serve nobody else meanwhile."""
    from deepspec.export.serving import check

    settings = check.Settings(
        engine, tuple(drafter or ()), prompts, max_new_tokens, tuple(tasks.split(",")) if tasks else (),
        speculative_tokens, exported, base_url, plain_url, dtype, params, output,
    )  # fmt: skip
    failures: list[str] = []
    quiet_environment()
    status = guarded(lambda: failures.extend(check.run(settings)))
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    raise typer.Exit(status or int(bool(failures)))


@app.command(rich_help_panel="Tools")
def doctor(
    root: Annotated[Path, typer.Option(help="The repository.")] = Path("."),
) -> None:
    """Check this machine and checkout, and say what to mend; exits with 1 if something must be mended."""
    from deepspec.doctor import run

    raise typer.Exit(0 if run(root) else 1)


def _exit(action: Callable[[], None]) -> None:
    quiet_environment()
    raise typer.Exit(guarded(action))


if __name__ == "__main__":
    app()
