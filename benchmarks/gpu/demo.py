"""Step 6: the demo's training with 20 times the data and steps, and what its draft gains.

Needs `--target` and `--data` (the demo's generate stage with 20 times the prompts). Training is cut short when the
step's time is over, with a checkpoint from which the next run goes on. The dry run makes its own target and data.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

import torch

from benchmarks.gpu import models
from benchmarks.gpu.clock import median_seconds
from benchmarks.gpu.findings import Findings, OutOfTime, Setting
from deepspec.config import Params, load_params
from deepspec.decoding.engine import generate
from deepspec.drafters.load import load_drafter
from deepspec.features.read import read_sequences
from deepspec.target.model import load_target
from deepspec.tasks.dialogue import prompt_ids
from deepspec.tasks.task import load_task
from deepspec.training.paths import TrainingPaths
from deepspec.training.run import train

ROOT = Path(__file__).parents[2]
DRAFTER = "dspark"
TIMES = 20
_TO_SAVE = 30  # seconds
TASKS = ("humaneval", "word_problems", "conversations")
_PROMPTS, _TOKENS = 4, 128  # prompts of each task


def run(setting: Setting, findings: Findings) -> None:
    work = (setting.work / "demo").resolve()
    work.mkdir(parents=True, exist_ok=True)
    if setting.dry:
        target = models.make_target(setting.work / "float32", models.TINY, "float32", setting.device)
        data = write_data(work / "random-data", models.TINY.vocab)
    elif setting.target and setting.data:
        target, data = setting.target, setting.data
    else:
        findings.piece("data", _missing)
        return
    findings.record["pieces"].pop("data", None)
    target, data = target.resolve(), data.resolve()
    params = settings(setting)
    paths = TrainingPaths(work / "draft", work / "history.jsonl", work / "features.json")
    findings.piece("training", lambda: training(findings, params, target, data, paths, work))
    for graphs in setting.graphs:
        way = "graphs" if graphs else "eager"
        findings.piece(f"decoding, {way}", lambda g=graphs: gain(setting, target, paths.draft, g))


def settings(setting: Setting) -> Params:
    """The demo's, with the steps that 20 times the data deserve; features are computed as they are needed."""
    params = load_params(ROOT / "params.yaml")
    steps = setting.pick(2, TIMES * params.train.steps)
    change: dict[str, Any] = {
        "steps": steps,
        "features": {"mode": "online"},
        "save_every": max(steps // 40, 1),
    }
    change |= {"eval_every": max(steps // 16, 1)}
    sizes: dict[str, Any] = {}
    if setting.dry:
        change |= {"batch_size": 2, "anchors": 3, "heldout": 2, "max_length": 48}
        sizes = {"layers": 1, "block_size": 3, "markov_rank": 8, "start": "random"}
    whole = params.model_dump(by_alias=True)
    whole["train"] |= change
    whole["drafters"][DRAFTER] |= sizes
    return Params.model_validate(whole)


def training(
    findings: Findings, params: Params, target: Path, data: Path, paths: TrainingPaths, work: Path
) -> dict[str, Any]:
    """Conversations, and the last line of the history.

    Raises:
        OutOfTime: it was cut short.
    """
    sequences, _ = read_sequences(data, params.train.max_length, params.train.supervise)
    (work / "data").mkdir(exist_ok=True)
    link = work / "data" / "distill"
    link.unlink(missing_ok=True)
    link.symlink_to(data)
    with chdir(work), _ended_after(findings.left - _TO_SAVE):
        try:
            train(params, DRAFTER, target, paths)
        except SystemExit:
            raise OutOfTime from None
    last = json.loads(paths.history.read_text().splitlines()[-1])
    return {"conversations": len(sequences), "steps": params.train.steps, "history": last}


def gain(setting: Setting, target_path: Path, draft: Path, graphs: bool) -> dict[str, Any]:
    """Plain and drafted decoding of the evaluation tasks' prompts, one request at a time, greedily."""
    target = load_target(target_path, device=str(setting.device), graphs=graphs)
    drafter = load_drafter(draft, target)
    count, tokens = setting.pick(1, _PROMPTS), setting.pick(8, _TOKENS)
    prompts = [prompt_ids(target, chat) for name in TASKS for chat in load_task(name, count, 0).prompts]
    rates, taus = {}, {}
    for name, drafting in (("plain", None), (DRAFTER, drafter)):

        def call(drafting=drafting):
            return [generate(target, drafting, prompt, tokens)[0] for prompt in prompts]

        seconds = median_seconds(call, target.device, setting.pick(1, 3), untimed=2)
        answers = call()
        made = sum(len(answer.tokens) for answer in answers)
        rates[name] = made / seconds
        taus[name] = made / max(sum(answer.stats.rounds for answer in answers), 1)
    ratio = rates[DRAFTER] / rates["plain"]
    return {"plain": rates["plain"], "drafted": rates[DRAFTER], "tau": taus[DRAFTER], "ratio": ratio}


def write_data(directory: Path, vocab: int) -> Path:
    """A small distillation data set of random tokens."""
    import pyarrow
    import pyarrow.parquet

    directory.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, vocab, (n,), generator=rng).tolist() for n in range(20, 32)]
    masks = [[0] * 6 + [1] * (len(row) - 6) for row in rows]
    table = pyarrow.table({"input_ids": rows, "loss_mask": masks})
    pyarrow.parquet.write_table(table, directory / "train.parquet")
    (directory / "manifest.json").write_text(json.dumps({"digest": "random"}))
    return directory


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """Ask for an end with a checkpoint, as a cluster does."""
    before = signal.getsignal(signal.SIGTERM)
    timer = Timer(max(seconds, 1), os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)


def _missing() -> dict[str, Any]:
    raise FileNotFoundError("not run: --target and --data were not given")
