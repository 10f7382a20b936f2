"""The training loop, on accelerate: the same command on one CPU and on many GPUs.

Every step's data and randomness follow from (seed, step), so a run that was killed and resumed ends with the
weights of an unbroken one. Losses are divided by the global sum of position weights, so the result does not depend
on how many processes share a batch.
"""

from __future__ import annotations

import json
import math
import signal
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from deepspec.errors import DeepSpecError
from deepspec.files import replacing, write_text
from deepspec.training.batches import Batch, Batches

if TYPE_CHECKING:
    from deepspec.config import TrainParams

CHECKPOINT = "checkpoint.pt"
BEST = "best.pt"


class Trainer:
    """Trains an objective to `params.steps`, keeping the best weights by expected τ on held-out sequences.

    Args:
        objective: module whose forward(batch) gives (weighted loss sum, sums to report); `weight` among the sums is
            what the loss is to be divided by.
        heldout: indices of the sequences kept out of `batches`.
        work: directory of checkpoints, outside DVC outputs.
    """

    def __init__(
        self,
        objective: nn.Module,
        batches: Batches,
        heldout: list[int],
        params: TrainParams,
        accelerator: Accelerator,
        work: Path,
    ):
        self.params, self.batches, self.heldout = params, batches, heldout
        self.accelerator, self.work = accelerator, work
        if params.batch_size < accelerator.num_processes:
            raise DeepSpecError(
                f"train.batch_size is {params.batch_size}, fewer than the {accelerator.num_processes} processes"
            )
        trainable = [p for p in objective.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trainable, lr=params.lr, weight_decay=params.weight_decay, betas=(0.9, 0.95), fused=True
        )
        self.raw = objective
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        self.step, self.best_tau, self.history = 0, 0.0, []
        self.stopping = False

    def run(self) -> None:
        """Train from the last checkpoint to the end.

        Raises:
            DeepSpecError: the loss is not finite.
            SystemExit: after SIGTERM, with a checkpoint written.
        """
        self._resume()
        signal.signal(signal.SIGTERM, self._on_sigterm)
        began, first = time.monotonic(), self.step
        window: dict[str, float] = {}
        while self.step < self.params.steps:
            tick = time.monotonic()
            sums = self._train_step()
            sums["seconds"] = time.monotonic() - tick
            window = {name: window.get(name, 0.0) + value for name, value in sums.items()}
            self.step += 1
            last = self.step == self.params.steps
            if self.step % self.params.eval_every == 0 or last:
                elapsed = time.monotonic() - began
                self._report(window, elapsed, (self.step - first) / elapsed)
                window = {}
            stopping = sums["asked"] > 0
            if self.step % self.params.save_every == 0 or last or stopping:
                self._save()
            if stopping:
                raise SystemExit(143)

    def best_weights(self) -> dict[str, Tensor]:
        return torch.load(self.work / BEST, weights_only=True)

    def _train_step(self) -> dict[str, float]:
        params, accelerator = self.params, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = params.lr * schedule(self.step, params.steps, params.warmup)
        batch = self._batch(
            self.batches.make(self.step, accelerator.process_index, accelerator.num_processes)
        )
        self.objective.train()
        with accelerator.autocast():
            loss, sums = self.objective(batch)
        weight = sums.pop("weight")
        # All processes stop at the same step, whichever was asked to.
        asked = weight.new_tensor(float(self.stopping))
        total = accelerator.reduce(torch.stack([loss.detach(), weight, asked, *sums.values()]), "sum")
        self.stopping = bool(total[2] > 0)
        if not bool(torch.isfinite(total).all()):
            raise DeepSpecError(
                f"step {self.step}: the loss is not finite; lower train.lr (now {params.lr}) or check the data"
            )
        # A data-parallel wrapper averages gradients over processes; the sum over the global weight is wanted.
        accelerator.backward(loss * accelerator.num_processes / total[1].clamp(min=1e-6))
        accelerator.clip_grad_norm_(self.objective.parameters(), params.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return dict(zip(("loss", "weight", "asked", *sums), total.tolist(), strict=True))

    @torch.no_grad()
    def evaluate(self) -> float:
        """Expected τ on fixed blocks in the held-out sequences' answers: per block, then averaged."""
        self.objective.eval()
        accelerator = self.accelerator
        mine = self.heldout[accelerator.process_index :: accelerator.num_processes]
        total = torch.zeros(2, device=accelerator.device)
        for start in range(0, len(mine), self.params.batch_size):
            part = mine[start : start + self.params.batch_size]
            batch = self._batch(self.batches.blocks(part, step=0, answers_only=True))
            with accelerator.autocast():
                _, sums = self.raw(batch)
            total += torch.stack((sums["tau"], sums["blocks"]))
        tau, blocks = accelerator.reduce(total, "sum").tolist()
        return tau / max(blocks, 1)

    def _report(self, window: dict[str, float], elapsed: float, rate: float) -> None:
        heldout_tau = self.evaluate()
        per_weight = {
            name: window[name] / window["weight"] for name in ("loss", "ce", "kl", "tv", "confidence")
        }
        line = {
            "step": self.step,
            **{name: round(value, 5) for name, value in per_weight.items()},
            "train_tau": round(window["tau"] / window["blocks"], 4),
            "heldout_tau": round(heldout_tau, 4),
            "lr": self.params.lr * schedule(self.step, self.params.steps, self.params.warmup),
            "positions_per_second": round(window["positions"] / window["seconds"], 1),
        }
        self.history.append(line)
        self._best(heldout_tau)
        left = (self.params.steps - self.step) / rate
        self.accelerator.print(
            f"step {self.step}/{self.params.steps}  loss {line['loss']:.3f}  train τ {line['train_tau']:.3f}  "
            f"held-out τ {heldout_tau:.3f}  {rate:.2f} steps/s  {_clock(elapsed)} elapsed, {_clock(left)} left",
            flush=True,
        )

    def _best(self, tau: float) -> None:
        if tau > self.best_tau and self.accelerator.is_main_process:
            with replacing(self.work / BEST) as scratch:
                torch.save(self._weights(), scratch)
        self.best_tau = max(tau, self.best_tau)

    def _weights(self) -> dict[str, Tensor]:
        model = self.accelerator.unwrap_model(self.objective)
        return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}

    def _save(self) -> None:
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        state = {
            "step": self.step,
            "best_tau": self.best_tau,
            "history": json.dumps(self.history),
            "weights": self._weights(),
            "optimizer": self.optimizer.state_dict(),
        }
        with replacing(self.work / CHECKPOINT) as scratch:
            torch.save(state, scratch)

    def _resume(self) -> None:
        path = self.work / CHECKPOINT
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise DeepSpecError(
                f"{path}: corrupt checkpoint ({error}); delete it to train from the start"
            ) from error
        model = self.accelerator.unwrap_model(self.objective)
        model.load_state_dict(state["weights"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best_tau = state["step"], state["best_tau"]
        self.history = json.loads(state["history"])
        self.accelerator.print(f"resumed at step {self.step}", flush=True)

    def _batch(self, batch: Batch) -> Batch:
        device = self.accelerator.device
        return Batch(**{field.name: getattr(batch, field.name).to(device) for field in fields(Batch)})

    def _on_sigterm(self, *_) -> None:
        self.stopping = True


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to zero."""
    ramp = max(round(steps * warmup), 1)
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(steps - ramp, 1)))


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def write_history(path: Path, history: list[dict]) -> None:
    """Metrics as JSON lines."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in history))
