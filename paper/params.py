"""The params.yaml of this folder: that of the pipeline with a section `study`."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field, model_validator

from deepspec.config import Params
from deepspec.errors import nearest
from deepspec.section import Section


class StudyParams(Section):
    """Drafters compared under equal settings, each trained with several seeds: the paper's table (paper/)."""

    seeds: list[int] = Field([0], min_length=1, description="Of training; prompts and sampling have `seed`.")
    eagle3: str = Field(description="The drafter of the pipeline that stands for EAGLE-3 in Table 1.")
    dflash: str = Field(description="The one that stands for DFlash.")
    dspark: str = Field(description="The one that stands for DSpark.")
    ablations: list[str] = Field(
        [],
        description="Drafters of Figures 3 and 4 and of the table of ablations, trained with the first seed.",
    )
    texts: int = Field(40, ge=1, description="Prompts per task on whose answers rounds are expected.")
    samples: int = Field(3, ge=1, description="Answers to each of them.")
    prompts: int = Field(8, ge=1, description="Per task, where the confidence is measured.")
    timed_prompts: int = Field(8, ge=1, description="Per task, where other ways to verify are timed.")
    nodes: int = Field(16, ge=2, description="Of the trees.")

    @property
    def roles(self) -> dict[str, str]:
        """Name in the paper → drafter."""
        return {"EAGLE-3": self.eagle3, "DFlash": self.dflash, "DSpark": self.dspark}


# Keys that must be equal for all drafters of a study; drafters of its table must also share block_size.
_EQUAL = ("target_layer_ids", "draft_vocab_size")


class PaperParams(Params):
    """The parameters of the paper's pipeline."""

    study: StudyParams

    @model_validator(mode="after")
    def _equal(self) -> PaperParams:
        """Drafters of a study differ in what is compared, and in nothing else."""
        if self.target.engine != "local":
            raise ValueError(
                "target.engine: the study runs its target in this project's own engine; set it to local"
            )
        if 1.0 not in self.evaluate.temperatures:
            raise ValueError("study: evaluate.temperatures lacks 1.0, which the table is of")
        table, ablations = list(self.study.roles.values()), self.study.ablations
        for names, where, known in (
            (table, "pipeline", self.pipeline),
            (ablations, "drafters", self.drafters),
        ):
            for name in names:
                if name not in known:
                    raise ValueError(f"study names {name!r}, which `{where}` lacks{nearest(name, known)}")
        if twice := set(ablations) & set(self.pipeline):
            raise ValueError(f"study.ablations names {min(twice)!r}, which `pipeline` has")
        every = [*self.pipeline, *ablations]
        for key, names in {**{key: every for key in _EQUAL}, "block_size": table}.items():
            found = {name: getattr(self.drafters[name], key, None) for name in names}
            if any(value is None or value != found[names[0]] for value in found.values()):
                of = ", ".join(f"{name} {value}" for name, value in found.items())
                raise ValueError(f"study: the drafters compared need the same {key}, found {of}")
        changed = {own for own, *_ in self.changes()}
        for name in ablations:
            if name not in changed:
                raise ValueError(
                    f"study.ablations: {name} differs from no drafter before it in one key alone"
                )
        return self

    def changes(self) -> Iterator[tuple[str, str, str]]:
        """Ablation of the study, a drafter named before it that is like it but for one key, and that key."""
        before = {name: self.drafters[name].model_dump() for name in self.pipeline}
        for name in self.study.ablations:
            own = self.drafters[name].model_dump()
            for partner, other in before.items():
                keys = [key for key in own if key not in other or other[key] != own[key]]
                if len(keys) == 1 and len(other) == len(own):
                    yield name, partner, keys[0]
            before[name] = own
