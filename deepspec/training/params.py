"""The section `train` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from deepspec.drafters.loss_params import LossParams
from deepspec.features.params import FeaturesParams
from deepspec.section import Section


class TrainParams(Section):
    """One training run; the same for every drafter, but for the loss where its own section has one."""

    steps: int = Field(ge=1)
    batch_size: int = Field(8, ge=1, description="Sequences per optimiser step, over all processes.")
    lr: float = Field(gt=0)
    warmup: float = Field(0.04, ge=0, lt=1, description="Share of the steps.")
    weight_decay: float = Field(0.0, ge=0)
    grad_clip: float = Field(1.0, gt=0)
    anchors: int = Field(32, ge=1, description="Random block starts per sequence.")
    max_length: int = Field(512, ge=8)
    supervise: Literal["answer", "all"] = Field(
        "answer",
        description="`all` also learns from the prompt's tokens, where the target's law is as valid.",
    )
    heldout: int = Field(32, ge=1, description="Conversations kept out for choosing the best checkpoint.")
    eval_every: int = Field(200, ge=1)
    save_every: int = Field(100, ge=1)
    mixed_precision: Annotated[
        Literal["no", "bf16"], BeforeValidator(lambda value: "no" if value is False else value)
    ] = Field(
        "bf16", description="YAML reads a bare `no` as false, and `dvc exp run -S` takes its quotes away."
    )
    features: FeaturesParams = FeaturesParams()
    pass_tokens: int = Field(
        1 << 16,
        ge=8,
        description="Most tokens of one pass, padding included; long rows get passes of their own.",
    )
    accumulate: int = Field(1, ge=1, description="Parts of a step's batch, each with a pass of its own.")
    workers: int = Field(1, ge=1, description="Threads that make batches ahead of time.")
    replay: float = Field(
        0.0, ge=0, lt=1, description="Share of the steps, the last ones, whose blocks start after rejections."
    )
    gradient_checkpointing: bool = Field(False, description="Less memory, more time.")
    compile: bool = Field(False, description="torch.compile the network (GPU).")
    real_decode: bool = Field(
        True,
        description="At the end decode held-out prompts with the whole target: temperatures of the confidence, "
        "and a check of the expected τ. false: once features are cached, none of the target's layers is loaded.",
    )
    written_out: bool = Field(
        False, description="Write embeddings and the whole head into the draft; else they are the target's."
    )
    loss: LossParams = LossParams()

    @model_validator(mode="after")
    def _parts(self) -> TrainParams:
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"train.accumulate is {self.accumulate}, more than batch_size ({self.batch_size})"
            )
        return self
