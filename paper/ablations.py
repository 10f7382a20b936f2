"""What one change to a drafter is worth: expected τ of its blocks at T = 1.
from paper.params import PaperParams

The drafts of `study.ablations` are of the first seed, so a ratio is to its partner's draft of that seed, on the same
texts. What seeds differ by is taken from the pipeline's drafters (`study.Spread`) and is in the interval.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from paper.params import PaperParams
from paper.study import MEAN, Study


def drafters(params: PaperParams) -> list[str]:
    return [*params.pipeline, *params.study.ablations]


def ratios(study: Study) -> list[dict[str, Any]]:
    """A row for each change: τ of whole blocks, its ratio to the partner's, and to those of the table's rows."""
    rows, tasks, taus = [], study.groups[MEAN], study.expected()
    first = {
        name: {task: table[:1] for task, table in study.tables(name).items()}
        for name in drafters(study.params)
    }
    for name, partner, key in study.params.changes():
        ours = first[name]
        rows.append(
            {
                "drafter": name,
                "partner": partner,
                "key": key,
                "values": [study.params.drafters[each].model_dump()[key] for each in (name, partner)],
                "tau": asdict(taus.tau(ours, tasks)),
                "ratio": asdict(taus.ratio(ours, first[partner], tasks)),
                "of": {
                    role: asdict(taus.ratio(ours, first[own], tasks))
                    for role, own in study.params.study.roles.items()
                },
            }
        )
    return rows
