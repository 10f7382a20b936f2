"""The pipeline as DVC reports it: its stages, what each waits for, and how it is named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

LIGHT = {"target", "validate", "report"}  # may run beside a stage that computes; unknown ones may not


@dataclass(frozen=True)
class Stage:
    """One of DVC's stages; `train@dspark` is one of a matrix."""

    name: str
    after: tuple[str, ...]  # the stages whose outputs it reads
    outs: tuple[str, ...] = ()  # relative to the repository

    @property
    def heavy(self) -> bool:
        """Whether it wants the accelerator (or all the cores) for itself."""
        return self.name.split("@")[0] not in LIGHT

    def outputs(self, suffix: str) -> list[str]:
        return [out for out in self.outs if out.endswith(suffix)]


def read_graph(root: Path) -> list[Stage]:
    """The stages of `dvc.yaml` at `root` and whatever they depend on, in an order in which they can run."""
    from dvc.repo import Repo
    from dvc.repo.reproduce import get_active_graph, plan_repro

    with Repo(str(root)) as repo:
        graph = get_active_graph(repo.index.graph)
        own = [stage for stage in graph if stage.path_in_repo == "dvc.yaml"]
        order = [stage for stage in plan_repro(graph, own) if not stage.is_data_source]
        return [
            Stage(
                _address(stage),
                tuple(sorted(_address(before) for before in graph.successors(stage) if before in order)),
                tuple(str(out.def_path) for out in stage.outs),
            )
            for stage in order
        ]


def _address(stage) -> str:
    return stage.name if stage.path_in_repo == "dvc.yaml" else f"{stage.path_in_repo}:{stage.name}"


def describe(root: Path, name: str, commit: str) -> str:
    """`smollm2-135m-instruct dspark 3bd7e8f`: target (or else `name`), drafters and commit, by DVC's parameters."""
    import dvc.api

    params = dvc.api.params_show("params.yaml", repo=str(root))
    target = params.get("target") or {}
    source = str(target.get("source", name) if isinstance(target, dict) else target)
    source = source.rstrip("/").split("/")[-1].removeprefix("embedded:")
    drafters = params.get("pipeline") or []
    return " ".join(filter(None, (source, "+".join(map(str, drafters)), commit[:7])))
