"""τ by length of the context, of drafts trained on short rows: full attention beside windows.

The target is a tiny random model that writes its own texts, at temperature 1. Drafts learn rows of `--row` tokens, and
their τ at T = 1 is expected, block by block, behind contexts of each length: Σ over a block of the chance that so many
tokens survive, from the laws of both. A window no shorter than the rows changes nothing in training, so one draft is
measured with each. Intervals are over texts.

    python -m benchmarks.contexts
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import REPORTS, command_line, write_report
from benchmarks.tiny_families import tiny_config, tiny_model
from deepspec.decoding.engine import generate
from deepspec.drafters.loss_params import LossParams
from deepspec.drafters.network import Network
from deepspec.drafters.registry import algorithms
from deepspec.features.local import OnlineFeatures
from deepspec.features.sequences import Sequence
from deepspec.markdown import markdown_table
from deepspec.progress import Progress
from deepspec.target.model import Target, load_target
from deepspec.training.batches import Batches
from deepspec.training.losses import expected_tau
from deepspec.training.objective import BlockObjective
from tests.tiny import make_tokenizer

DRAFTERS: dict[str, dict[str, Any]] = {
    "eagle3": {"type": "eagle3", "block_size": 5},
    "dspark": {"type": "dspark", "block_size": 5, "layers": 2, "markov_rank": 16, "confidence_head": False},
}
_BATCH, _ANCHORS, _BLOCKS = 4, 32, 128  # rows of a step and blocks of each; blocks behind a context


def make_target(directory: Path, longest: int) -> Target:
    """Write and load a target whose heads are sharp enough that what it writes can be learnt."""
    config = tiny_config("llama", max_position_embeddings=2 * longest)
    model = tiny_model("llama", config=config)
    with torch.no_grad():
        model.get_output_embeddings().get_parameter("weight").mul_(3.0)
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return load_target(directory)


def texts(target: Target, count: int, length: int, seed: int) -> list[Sequence]:
    """Let the target write texts of so many tokens."""
    prompts = [[2 + (seed + i) % 400] for i in range(count)]
    target.generation_config.eos_token_id, target.tokenizer.eos_token = None, None
    found = generate(target, None, prompts, max_new_tokens=length - 1, temperature=1.0, seed=seed)
    rows = [[*prompt, *out.tokens] for prompt, out in zip(prompts, found, strict=True)]
    return [Sequence(row, [1] * len(row), [1] * len(row)) for row in rows]


def train(section: dict[str, Any], target: Target, rows: list[Sequence], steps: int) -> Network:
    """Train a draft of the whole vocabulary."""
    algorithm = algorithms()[section["type"]]
    torch.manual_seed(0)
    params = algorithm.params.model_validate({"draft_vocab_size": 0, "start": "random", **section})
    model = algorithm.network(params, target)  # type: ignore[misc]  # both are trained
    model.share(target, torch.arange(target.vocab_size))
    features = OnlineFeatures(target, rows, model.config.target_layer_ids)
    batches = Batches(features, list(range(len(rows))), _BATCH, _ANCHORS, model.config.block_size, 0)
    objective = BlockObjective(model, LossParams())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    with Progress(f"training {section['type']}", steps) as progress:
        for step in range(steps):
            optimizer.zero_grad()
            for batch in batches.make(step):
                loss, _ = objective(batch)
                (loss / objective.weight(batch)).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            progress.advance()
    return model.eval()


def windowed(model: Network, window: int | None) -> Network:
    """Return the draft with all its layers in a window."""
    config = model.config
    named = {"windows": (window,) * config.num_hidden_layers if window else ()}
    changed = replace(config, **({"sliding_window": window} if hasattr(config, "sliding_window") else named))
    same = type(model)(changed)
    same.load_state_dict(model.state_dict())
    same.target_transform = model.target_transform
    return same.eval()


@torch.no_grad()
def taus(model: Network, target: Target, rows: list[Sequence], length: int) -> np.ndarray:
    """Expected τ behind the first `length` tokens, of each text."""
    end = length + _BLOCKS
    cut = [Sequence(row.ids[:end], row.answer[:end], row.learnt[:end]) for row in rows]
    gamma = model.config.block_size
    features = OnlineFeatures(target, cut, model.config.target_layer_ids)
    batches = Batches(features, list(range(len(cut))), 1, _BLOCKS, gamma, 0)
    objective, found = BlockObjective(model, LossParams()), []
    anchors = torch.arange(length, length + _BLOCKS - gamma)[None]
    for i in range(len(cut)):
        batch = batches.at([i], anchors)
        found.append(float(expected_tau(objective.acceptance(batch), batch.valid).mean()))
    return np.array(found)


def main(argv: list[str] | None = None) -> int:
    parser = command_line("contexts", __doc__)
    add = parser.add_argument
    add("--row", type=int, default=512, help="tokens of a row that drafts learn (default 512)")
    add("--rows", type=int, default=64, help="rows (default 64)")
    add("--steps", type=int, default=600, help="of training (default 600)")
    add(
        "--lengths",
        type=int,
        nargs="+",
        default=[512, 2048, 8192],
        help="of contexts (default 512 2048 8192)",
    )
    add("--windows", type=int, nargs="+", default=[0, 2048, 512], help="0: none (default 0 2048 512)")
    add("--texts", type=int, default=8, help="behind which τ is measured (default 8)")
    add("--output", type=Path, default=REPORTS, help="folder of the report")
    flags = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        target = make_target(Path(scratch), max(flags.lengths))
        learnt = texts(target, flags.rows, flags.row, seed=1)
        long = texts(target, flags.texts, max(flags.lengths) + _BLOCKS, seed=300)
        lines, data = [], {}
        for name, section in DRAFTERS.items():
            model = train(section, target, learnt, flags.steps)
            for window in flags.windows:
                each = windowed(model, window or None)
                found = {length: taus(each, target, long, length) for length in flags.lengths}
                said = [_interval(tau) for tau in found.values()]
                lines.append((name, str(window) if window else "none", *said))
                data[f"{name} {window}"] = {str(length): tau.tolist() for length, tau in found.items()}
        heads = ["drafter", "window", *(f"context {length}" for length in flags.lengths)]
        title = f"Expected τ by context, drafts of rows of {flags.row} tokens"
        write_report(flags.output, "contexts", title, markdown_table(heads, lines, "tn"), data)
    return 0


def _interval(values: np.ndarray) -> str:
    half = 1.96 * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{values.mean():.3f} ± {half:.3f}"


if __name__ == "__main__":
    sys.exit(main())
