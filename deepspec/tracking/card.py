"""What the registry's pages say in words: a sentence about a record, and the card of a version."""

from __future__ import annotations

from deepspec.evaluation.record import Record
from deepspec.markdown import markdown_table


def describe(record: Record) -> str:
    """Describe a result in a sentence."""
    summary = record.summary
    speed = f"{summary.speedup:.2f}×" if summary.speedup else "not lossless, so no speed-up"
    return (
        f"{record.drafter} for {record.target}: τ {summary.tau:.2f}, {speed} against plain decoding at "
        f"T = {summary.temperature:g}, measured on {record.device}."
    )


def describe_model(record: Record) -> str:
    """Describe a registered model: all its versions are of one target and one drafter."""
    return (
        f"The target {record.target} with its draft {record.drafter}: the target's own text in fewer "
        "passes. `@champion` passed the gate of `deepspec promote`, `@challenger` is to be judged, `@previous` "
        "is what `--rollback` goes back to."
    )


def card(record: Record, name: str) -> str:
    """Return the Markdown card of a version: figures, how it is loaded, what it is not for."""
    rows = [
        [task, f"{entry.temperature:g}", _number(entry.tau), _gain(entry.speedup), _yes(entry.lossless)]
        for task, entry in ((key.rsplit("@", 1)[0], entry) for key, entry in record.tasks.items())
    ]
    figures = markdown_table(["task", "T", "τ", "speed-up", "lossless"], rows, "tnnnt")
    made = [
        ["target", f"`{record.target}` (`{record.target_digest}`)"],
        ["draft", f"`{record.drafter}` (`{record.draft_digest}`)"],
        ["measured on", f"{record.device}, {record.dtype}"],
        ["commit", f"`{record.provenance.git_commit or 'none'}`"],
    ]
    return "\n\n".join(
        [
            describe(record),
            figures,
            markdown_table(["", ""], made),
            f'```python\nmodel = mlflow.pyfunc.load_model("models:/{name}@champion")\n'
            'model.predict(pandas.DataFrame({"prompt": ["Why is the sky blue?"]}))\n```',
            "For checks and small services; what serves many requests is the export. What the target should not be "
            "used for, this version should not be used for either: its answers are the target's.",
        ]
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _gain(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


def _yes(value: bool) -> str:
    return "yes" if value else "**no**"
