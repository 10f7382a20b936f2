"""The training loop, on accelerate: the same command on one CPU and on many GPUs.

Every step's data and randomness follow from (seed, step), so a run that was killed and resumed ends with the
weights of an unbroken one. Losses are divided by the global sum of position weights, so the result does not depend
on how many processes share a batch.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor

from deepspec.errors import DeepSpecError
from deepspec.files import replacing, write_text
from deepspec.progress import Progress
from deepspec.training.batches import Batches
from deepspec.training.distribute import DistributedObjective
from deepspec.training.prefetch import Prefetcher
from deepspec.training.replay import rejected_starts

if TYPE_CHECKING:
    from deepspec.training.objective import BlockObjective
    from deepspec.training.params import TrainParams

logger = logging.getLogger(__name__)

BEST = "best.pt"


class Trainer:
    """Trains an objective to `params.steps`, keeping the best weights by expected τ on held-out sequences.

    Args:
        objective: what is trained.
        heldout: indices of the sequences kept out of `batches`.
        work: directory of checkpoints, outside DVC outputs.
    """

    def __init__(
        self,
        objective: BlockObjective,
        batches: Batches,
        heldout: list[int],
        params: TrainParams,
        accelerator: Accelerator,
        work: Path,
    ):
        self.params, self.batches, self.heldout = params, batches, heldout
        self.accelerator, self.work = accelerator, work
        mine = accelerator.process_index, accelerator.num_processes, params.accumulate
        self.prefetcher = Prefetcher(batches, accelerator.device, params.steps, *mine, params.workers)
        processes, size = accelerator.num_processes, min(params.batch_size, len(batches.members))
        if processes > 1 and size % (processes * params.accumulate):
            raise DeepSpecError(
                f"a batch of {size} conversations cannot be shared evenly by {processes} processes with "
                f"train.accumulate {params.accumulate}; change train.batch_size"
            )
        self.raw = objective
        self.distributed = DistributedObjective(objective, params, accelerator)
        self.step, self.best_tau = 0, 0.0
        self.history: list[dict] = []
        self.stopping = False
        self.waited, self.seconds = 0.0, 0.0  # for data, and altogether, in this process's steps
        self.before = 0.0  # seconds of the steps of earlier sittings
        # The first step of the second stage; no step where there is none.
        self.replay_from = params.steps - round(params.steps * params.replay) if params.replay else -1

    def run(self) -> None:
        """Train from the last checkpoint to the end.

        Raises:
            DeepSpecError: the loss is not finite.
            SystemExit: after SIGTERM, with a checkpoint written.
        """
        self._resume()
        signal.signal(signal.SIGTERM, self._on_sigterm)
        shown = self.accelerator.is_main_process
        with Progress("train", self.params.steps, self.step, shown) as progress, self.prefetcher:
            self._fit(progress)
        if shown and self.seconds:
            logger.info("steps waited for data %.1f %% of their time", 100 * self.waited / self.seconds)

    def _fit(self, progress: Progress) -> None:
        window: dict[str, float] = {}
        while self.step < self.params.steps:
            if self.step == self.replay_from and not self.batches.replayed:
                self.batches.replayed = rejected_starts(
                    self.raw, self.batches, self.accelerator, self.batches.seed
                )
            tick = time.monotonic()
            sums = self.train_step()
            sums["seconds"] = time.monotonic() - tick
            self.waited += sums["waited"]
            self.seconds += sums["seconds"]
            window = {name: window.get(name, 0.0) + value for name, value in sums.items()}
            self.step += 1
            progress.advance()
            last = self.step == self.params.steps
            if self.step % self.params.eval_every == 0 or last:
                progress.note(self._report(window))
                window = {}
            if self.step % self.params.save_every == 0 or last or self.stopping:
                self._save()
            if self.stopping:
                raise SystemExit(143)

    def best_weights(self) -> dict[str, Tensor]:
        return torch.load(self.work / BEST, weights_only=True)

    def train_step(self) -> dict[str, float]:
        params, accelerator = self.params, self.accelerator
        for group in self.distributed.optimizer.param_groups:
            group["lr"] = params.lr * schedule(self.step, params.steps, params.warmup)
        tick = time.monotonic()
        parts = self.prefetcher.take(self.step)
        waited = time.monotonic() - tick
        weight = reduce(add, (self.raw.weight(part) for part in parts))
        # All processes stop at the same step, whichever was asked to.
        asked = weight.new_tensor(float(self.stopping))
        total_weight, asked = accelerator.reduce(torch.stack((weight, asked)), "sum")
        self.stopping = bool(asked > 0)
        self.distributed.objective.train()
        sums: dict[str, Tensor] = {}
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            with self.distributed.gradient_sync(last):
                with accelerator.autocast():
                    loss, found = self.distributed.objective(part)
                self.distributed.backward(loss / total_weight.clamp(min=1e-6))
            for name, value in {"loss": loss.detach(), **found}.items():
                sums[name] = sums.get(name, 0.0) + value
        total = accelerator.reduce(torch.stack(list(sums.values())), "sum")
        if not bool(torch.isfinite(total).all()):
            raise DeepSpecError(
                f"step {self.step}: the loss is not finite; lower train.lr (now {params.lr}) or check the data"
            )
        norm = self.distributed.clip_gradients()
        if norm == 0:
            raise DeepSpecError(f"step {self.step}: no weight has a gradient; the data or the loss is dead")
        self.distributed.optimizer_step()
        figures = {"weight": float(total_weight), "norm": norm, "steps": 1.0, "waited": waited}
        return dict(zip(sums, total.tolist(), strict=True)) | figures

    @torch.no_grad()
    def evaluate(self) -> float:
        """Compute expected τ on fixed blocks in the held-out sequences' answers: per block, then averaged."""
        self.distributed.objective.eval()
        accelerator = self.accelerator
        share = max(self.params.batch_size // accelerator.num_processes, 1)
        total = torch.zeros(2, device=accelerator.device)
        for start in range(0, len(self.heldout), share * accelerator.num_processes):
            rows = self.heldout[start : start + share * accelerator.num_processes]
            for part in self.batches.shares(rows, accelerator.process_index, accelerator.num_processes):
                # Every process runs every pass, if only on the first sequence: a sharded network needs them all.
                batch = self.batches.blocks(part or self.heldout[:1], step=0, answers_only=True)
                with accelerator.autocast():
                    _, sums = self.raw(batch.to(accelerator.device))
                if part:
                    total += torch.stack((sums["tau"], sums["blocks"]))
        tau, blocks = accelerator.reduce(total, "sum").tolist()
        return tau / max(blocks, 1)

    def _report(self, window: dict[str, float]) -> str:
        """Evaluate, keep the figures of the steps since the last report, and return them in words."""
        heldout_tau = self.evaluate()
        names = [name for name in ("loss", "ce", "kl", "tv", "confidence") if name in window]
        train_tau = {"train_tau": round(window["tau"] / window["blocks"], 4)} if "tau" in window else {}
        line = {
            "step": self.step,
            **{name: round(window[name] / window["weight"], 5) for name in names},
            **train_tau,
            "heldout_tau": round(heldout_tau, 4),
            "gradient_norm": round(window["norm"] / window["steps"], 5),
            "lr": self.params.lr * schedule(self.step, self.params.steps, self.params.warmup),
            "positions_per_second": round(window["positions"] / window["seconds"], 1),
            "waiting_share": round(window["waited"] / window["seconds"], 5),
            "hours": round((self.before + self.seconds) / 3600, 6),
        }
        self.history.append(line)
        self.accelerator.log({name: value for name, value in line.items() if name != "step"}, self.step)
        self._best(heldout_tau)
        told = "".join(f"train τ {tau:.3f}, " for tau in train_tau.values())
        return (
            f"loss {line['loss']:.3f}, {told}held-out τ {heldout_tau:.3f}, "
            f"{window['steps'] / window['seconds']:.2f} steps/s"
        )

    def _best(self, tau: float) -> None:
        if tau > self.best_tau:
            self.best_tau = tau
            weights = self.distributed.weights()
            if self.accelerator.is_main_process:
                with replacing(self.work / BEST) as scratch:
                    torch.save(weights, scratch)

    def _save(self) -> None:
        progress = {
            "step": self.step,
            "best_tau": self.best_tau,
            "seconds": self.before + self.seconds,
            "history": json.dumps(self.history),
            "replayed": self.batches.replayed,
        }
        self.distributed.save_checkpoint(self.work, progress)

    def _resume(self) -> None:
        progress = self.distributed.load_checkpoint(self.work)
        if progress is None:
            return
        self.step, self.best_tau = progress["step"], progress["best_tau"]
        self.before = progress["seconds"]
        self.history = json.loads(progress["history"])
        self.batches.replayed = progress["replayed"]
        if self.accelerator.is_main_process:
            logger.info("resumed at step %d", self.step)

    def _on_sigterm(self, *_) -> None:
        self.stopping = True


def schedule(step: int, steps: int, warmup: float) -> float:
    """Return the share of the peak learning rate: linear warm-up, then a cosine to zero."""
    ramp = max(round(steps * warmup), 1)
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(steps - ramp, 1)))


def write_history(path: Path, history: list[dict]) -> None:
    """Write metrics as JSON lines."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in history))
