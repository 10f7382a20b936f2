"""`deepspec plan`: what the pipeline of a params file will take, before anything of it runs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from deepspec.config import Params, load_params
from deepspec.errors import DeepSpecError
from deepspec.markdown import markdown_table
from deepspec.plan.advice import gigabytes, remarks
from deepspec.plan.estimate import Plan, make_plan
from deepspec.plan.rates import Rates, measure
from deepspec.plan.sizes import DraftSize, measure_draft, measure_target
from deepspec.target.embedded import PREFIX
from deepspec.target.source import dtype_named, from_pretrained, is_hub_id


@dataclass(frozen=True)
class Settings:
    """Flags of the command.

    Args:
        config: a file or directory with the target's config.json; None: that of `target.source`.
        rates: a file of rates; None: this machine's, measured.
    """

    params: Path
    config: Path | None
    rates: Path | None
    as_json: bool


def run(settings: Settings) -> bool:
    """Print the plan; True if everything fits.

    Raises:
        DeepSpecError: no configuration of the target, a mistake in a file, or a drafter that the target cannot have.
    """
    params = load_params(settings.params)
    name, config = target_config(params, settings.config)
    dtype = dtype_named(params.target.dtype)
    plan = plan_of(
        params, name, config, Rates.read(settings.rates) if settings.rates else measure(dtype, Path())
    )
    found = remarks(plan, params)
    if settings.as_json:
        stages = [asdict(estimate) for estimate in plan.estimates]
        said = [asdict(remark) for remark in found]
        print(
            json.dumps(
                {
                    "target": asdict(plan.target),
                    "rates": plan.rates.model_dump(),
                    "stages": stages,
                    "remarks": said,
                },
                indent=2,
            )
        )
    else:
        print(page(plan))
        for remark in found:
            print(
                f"{'note' if remark.fits else 'does not fit'}: {remark.stage} {remark.found}; {remark.change}"
            )
        if not found:
            print("everything fits")
    return all(remark.fits for remark in found)


def plan_of(params: Params, name: str, config: Any, rates: Rates) -> Plan:
    """Return the plan of a params file for a target of this configuration."""
    target = measure_target(name, config, dtype_named(params.target.dtype))
    drafts: dict[str, DraftSize | None] = {
        drafter: measure_draft(params.drafters[drafter], config, target) for drafter in params.pipeline
    }
    return make_plan(params, target, drafts, rates)


def target_config(params: Params, given: Path | None) -> tuple[str, Any]:
    """Return a name and the configuration of the target: of a file, of data/target, or of the source itself.

    Raises:
        DeepSpecError: there is none without fetching the target.
    """
    source, here = params.target.source, Path("data/target")
    if given is not None:
        return str(given), from_pretrained(AutoConfig, str(given))
    if (here / "deepspec.json").exists() and json.loads((here / "deepspec.json").read_text()).get(
        "source"
    ) == source:
        return source, from_pretrained(AutoConfig, str(here))
    if source.startswith(PREFIX):
        kept = Path.home() / ".cache" / "deepspec" / source.replace(":", "-")
        if not (kept / "config.json").exists():
            raise DeepSpecError(
                f"{source}: its configuration is in its package; run `deepspec target` first, or give --config"
            )
        return source, from_pretrained(AutoConfig, str(kept))
    if not is_hub_id(source) and not Path(source).is_dir():
        raise DeepSpecError(f"{source}: no such target directory (and not a hub id like owner/name)")
    return source, from_pretrained(AutoConfig, source, revision=params.target.revision)


def page(plan: Plan) -> str:
    """Return the plan as text: a table, and how each figure comes about."""
    target, rates = plan.target, plan.rates
    active = f", {target.active / 1e9:.3g} B of them active" if target.chosen < target.experts else ""
    rows = [
        (
            estimate.stage,
            f"{estimate.tokens:,.0f}" if estimate.tokens else "",
            duration(estimate.seconds),
            gigabytes(estimate.memory),
            gigabytes(estimate.disk) if estimate.disk else "",
            estimate.how,
        )
        for estimate in plan.estimates
    ]
    rows.append(
        (
            "all",
            "",
            duration(plan.seconds),
            gigabytes(max(e.memory for e in plan.estimates)),
            gigabytes(plan.disk),
            "",
        )
    )
    heads = ("stage", "tokens", "time", "peak memory", "disk", "derived from")
    lines = [
        f"{target.name}: {target.parameters / 1e9:.3g} B parameters{active}, {gigabytes(target.weights)}; ends "
        f"{gigabytes(target.ends * target.bytes)}",
        f"{rates.devices} × {rates.flops / 1e12:.3g} TFLOP/s, {gigabytes(rates.bandwidth)}/s, "
        f"{gigabytes(rates.memory)}; "
        f"disk {gigabytes(rates.disk)}/s, {gigabytes(rates.free_disk)} free",
        "",
        markdown_table(heads, rows, "tnnnnt"),
        "",
    ]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Return seconds in words: `41 s`, `12 min`, `3.4 h`, `5.2 days`."""
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.1f} days"
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"
