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

from deepspec.entry import guarded, quiet_environment
from deepspec.stages.common import stage

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
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def environment() -> None:
    """Make a language model faster with a draft, without changing a token. `dvc repro` runs all stages."""
    quiet_environment()


def _add_stage(name: str, summary: str) -> None:
    @app.command(name, help=summary, context_settings=PASS_THROUGH, rich_help_panel="Stages")
    def run_stage(context: typer.Context) -> None:
        module = importlib.import_module(f"deepspec.stages.{name}")
        sys.argv[:] = [f"deepspec {name}", *context.args]  # what its own --help and its records call it
        stage(module.main, getattr(module, "add_flags", None), context.args)


for _name, _summary in STAGES.items():
    _add_stage(_name, _summary)


@app.command(rich_help_panel="Tools")
def demo() -> None:
    """Run `dvc repro` with its stages in view, the time each will take, and a first figure after the prompts."""
    from deepspec.commands.demo import run

    _exit(run)


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
    adapt: Annotated[
        bool, typer.Option("--adapt", help="The draft goes on learning along an answer (an experiment).")
    ] = False,
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
    from deepspec.commands.chat import Settings, run

    settings = Settings(target, drafter, no_draft, adapt, temperature, max_new_tokens, system, seed, params)
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
    from deepspec.commands.profile import Settings, run

    _exit(lambda: run(Settings(target, drafter, batches, weights, force)))


@app.command(rich_help_panel="Tools")
def plan(
    params: Annotated[Path, typer.Option(help="The parameters of the pipeline.")] = Path("params.yaml"),
    config: Annotated[
        Path | None,
        typer.Option(
            help="File or directory with the target's config.json.", show_default="the target's own"
        ),
    ] = None,
    rates: Annotated[
        Path | None, typer.Option(help="YAML file of rates.", show_default="this machine's, measured")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say before anything runs what each stage takes: tokens, time, memory, disk; exits with 1 if something won't fit.

    Needs the target's configuration alone, none of its weights."""
    from deepspec.commands.plan import Settings, run

    failures: list[str] = []

    def planned() -> None:
        if not run(Settings(params, config, rates, as_json)):
            failures.append("")

    raise typer.Exit(guarded(planned) or len(failures))


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
    from deepspec.report import compare as comparing

    failures: list[str] = []

    def run() -> None:
        measured = comparing.load(first), comparing.load(second)
        found = comparing.compare(*measured, margin, proof)
        comparing.show(found, *measured)
        failures.extend(found.failures)

    raise typer.Exit(guarded(run) or int(bool(failures)))


@app.command(rich_help_panel="Tools")
def plots(
    revisions: Annotated[
        list[str] | None,
        typer.Argument(help="To compare, as `dvc plots diff` takes them.", show_default="none"),
    ] = None,
) -> None:
    """Draw the plots of dvc.yaml into dvc_plots/index.html, a page that loads nothing from a network."""
    from deepspec.commands.plots import run

    _exit(lambda: print(run(tuple(revisions or ()))))


@app.command(rich_help_panel="Tools")
def inspect(
    draft: Annotated[
        str, typer.Argument(metavar="DIR", help="A draft directory, or a name under data/drafts.")
    ],
    target: Annotated[
        str | None,
        typer.Option(
            help="Load it for this target: a directory, a hub id, or embedded:<name>.", show_default="none"
        ),
    ] = None,
) -> None:
    """Say what a draft directory is, for which target, and what it lacks; exits with 1 if it does not load.

    Knows the styles of SafeAILab, SpecForge, speculators, NVIDIA, z-lab, AngelSlim, DeepSeek and FasterDecoding."""
    from deepspec.commands.inspect import run

    loads = True

    def look() -> None:
        nonlocal loads
        loads = run(draft, target)

    raise typer.Exit(guarded(look) or int(not loads))


Drafters = Annotated[
    list[str] | None, typer.Option("--drafter", help="Repeatable.", show_default="all of the pipeline")
]
ParamsFile = Annotated[Path, typer.Option(help="Names the pipeline, the target and the gate's bounds.")]


@app.command(rich_help_panel="Registry")
def track(drafter: Drafters = None, params: ParamsFile = Path("params.yaml")) -> None:
    """Log what `dvc repro` made into MLflow, a run a drafter; what is logged already is left alone.

    Goes to $MLFLOW_TRACKING_URI, or else to mlruns/mlflow.db."""
    from deepspec.tracking.commands import run_track

    _exit(lambda: run_track(drafter or [], params))


@app.command(rich_help_panel="Registry")
def register(
    drafter: Drafters = None,
    params: ParamsFile = Path("params.yaml"),
    target_by_reference: Annotated[
        bool,
        typer.Option("--target-by-reference", help="Name the target in the version instead of copying it."),
    ] = False,
    with_exports: Annotated[
        bool,
        typer.Option("--with-exports", help="Copy the directories for serving engines into the version."),
    ] = False,
) -> None:
    """Make a version of the target with its draft, and load it and let it write: the challenger."""
    from deepspec.tracking.commands import run_register
    from deepspec.tracking.register import Parts

    _exit(lambda: run_register(drafter or [], params, Parts(not target_by_reference, with_exports)))


@app.command(rich_help_panel="Registry")
def promote(
    drafter: Drafters = None,
    params: ParamsFile = Path("params.yaml"),
    margin: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="What may be lost, as a share.", show_default="promote.margin"),
    ] = None,
    rollback: Annotated[bool, typer.Option("--rollback", help="Back to the previous champion.")] = False,
    afresh: Annotated[
        bool,
        typer.Option(
            "--afresh", help="Pass over a champion that cannot be compared with, as on a new machine."
        ),
    ] = False,
) -> None:
    """Make the challenger the champion, if it passes every rule of the gate; exits with 1 if one is refused."""
    from deepspec.tracking.commands import run_promote, run_rollback

    passed = True

    def run() -> None:
        nonlocal passed
        if rollback:
            run_rollback(drafter or [], params)
        else:
            passed = run_promote(drafter or [], params, margin, afresh)

    raise typer.Exit(guarded(run) or int(not passed))


@app.command("serve-check", rich_help_panel="Tools")
def serve_check(
    engine: Annotated[str, typer.Option(help="vllm, llamacpp, sglang or tgi.")] = "vllm",
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
        Path | None,
        typer.Option(help="Directory that the engine loads.", show_default="that of `deepspec export`"),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="A server of the draft that is running.", show_default="start one")
    ] = None,
    plain_url: Annotated[str | None, typer.Option(help="One without the draft, for the speed-up.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32 compares token for token; llama.cpp also takes f16, q8_0, q4_0, q4_1.",
            show_default="the target's; f16 for llama.cpp",
        ),
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(
            help="Sampled answers a question for llama.cpp's law at T = 1; 0: none.",
            show_default="as many as see 0.15 of a law moved",
        ),
    ] = None,
    lengths_only: Annotated[
        bool, typer.Option("--lengths-only", help="llama.cpp: count accepted tokens alone; time nothing.")
    ] = False,
    params: Annotated[Path, typer.Option(help="Says which tasks and prompts.")] = Path("params.yaml"),
    output: Annotated[Path, typer.Option(help="Folder of the records.")] = Path("reports/serve"),
) -> None:
    """Serve drafts in another engine and see that it accepts as many tokens as ours; exits with 1 if it does not.

    vLLM is started here, from $DEEPSPEC_VLLM_PYTHON or an environment that is set up once, and so is llama.cpp, from
    $DEEPSPEC_LLAMA_SERVER or a wheel; SGLang and TGI are asked at --base-url, where nobody else must be served."""
    from deepspec.serving import check

    settings = check.Settings(
        engine, tuple(drafter or ()), prompts, max_new_tokens, tuple(tasks.split(",")) if tasks else (),
        speculative_tokens, exported, base_url, plain_url, dtype, params, output, draws, lengths_only,
    )  # fmt: skip
    failures: list[str] = []
    status = guarded(lambda: failures.extend(check.run(settings)))
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    raise typer.Exit(status or int(bool(failures)))


@app.command(rich_help_panel="Tools")
def doctor(
    root: Annotated[Path, typer.Option(help="The repository.")] = Path("."),
    target: Annotated[
        str | None, typer.Option(help="Instead: what this directory or hub id can be used for as a target.")
    ] = None,
) -> None:
    """Check this machine and checkout, and say what to mend; exits with 1 if something must be mended."""
    from deepspec.commands.doctor import run, run_target

    sound: list[bool] = []
    status = guarded(lambda: sound.append(run_target(target, root) if target else run(root)))
    raise typer.Exit(status or int(sound != [True]))


@app.command(rich_help_panel="Tools")
def reproduce(
    tag: Annotated[
        str | None,
        typer.Argument(help="A tag of the repository, a milestone, or anything that names a commit."),
    ] = None,
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute/--pull", help="Make data and drafts again, or pull them from the DVC remote."
        ),
    ] = False,
    repo: Annotated[str, typer.Option(help="A path or URL to clone from.")] = ".",
    into: Annotated[
        Path | None, typer.Option(help="An empty directory.", show_default="deepspec-TAG")
    ] = None,
    stages: Annotated[
        str | None, typer.Option(help="Comma-separated, in place of all that are to run.", show_default="all")
    ] = None,
    drafter: Annotated[
        str | None, typer.Option(help="Train this one draft again and compare its weights.")
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(help="Whose metrics are compared.", show_default="the milestone's, or dvc.yaml"),
    ] = None,
    remote: Annotated[
        str | None, typer.Option(help="Where to pull from.", show_default="the repository's remote")
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="Show the milestones: results by name, and how each comes back.")
    ] = False,
    setup: Annotated[
        bool, typer.Option("--setup", help="Run in an environment that `make setup` makes in the clone.")
    ] = False,
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=SHARE", help="Of the metrics that match, in place of the table's; repeatable."
        ),
    ] = None,
) -> None:
    """Bring a tagged result back in an empty directory and compare each metric with the committed one.

    What DVC keeps is pulled (or made again), what git keeps is measured again. Exits with 1 if a metric differs by
    more than its tolerance (docs/reproduce.md). An interrupted run goes on when it is run again."""
    from deepspec.reproduce.milestones import listed, milestones_of

    if list_:
        _exit(lambda: print("\n".join(listed(milestones_of(repo)))))
    if tag is None:
        raise typer.BadParameter("name a tag, a milestone or a commit; --list shows the milestones")
    from deepspec.reproduce.run import Settings, run

    chosen = tuple(stages.split(",")) if stages else ()
    settings = Settings(
        tag, repo, into, recompute, chosen, drafter, pipeline, remote, setup, tuple(tolerance or ())
    )
    matched: list[bool] = []
    status = guarded(lambda: matched.append(run(settings)))
    raise typer.Exit(status or int(matched != [True]))


def _exit(action: Callable[[], None]) -> None:
    raise typer.Exit(guarded(action))


if __name__ == "__main__":
    app()
