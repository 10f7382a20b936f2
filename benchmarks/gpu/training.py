"""Step 4: training steps at Qwen3-4B's sizes, on random features: the whole step of `Trainer`, with data that
are made ahead of time as in a run.

FLOP are counted by torch on one step, in matrix products and attention, masked parts included; MFU is their rate over
that of a large bfloat16 product on this device. The share of waiting is what a step takes longer than one whose batch
is on the device already. The attention of a block drafter is timed apart, forward and backward: under a dense mask as
it is trained, and by other kernels on the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.clock import forget_peak, matrix_rate, median_seconds, peak_bytes
from benchmarks.gpu.findings import Findings, Setting
from deepspec.drafters.algorithms.dspark import DSparkConfig, DSparkModel
from deepspec.drafters.algorithms.eagle3 import Eagle3Config, Eagle3Model
from deepspec.drafters.block_network import block_mask
from deepspec.drafters.network import Network
from deepspec.features.local import Features
from deepspec.features.sequences import Sequence, Sequences
from deepspec.target.attention import attend
from deepspec.target.ends import H_LAST
from deepspec.training.batches import Batch, Batches
from deepspec.training.objective import BlockObjective
from deepspec.training.params import TrainParams
from deepspec.training.trainer import Trainer

QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "draft_vocab_size": 151_936,
    "num_target_layers": 36,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "draft_vocab_size": 256,
    "num_target_layers": 36,
}
COMMON = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "block_size": 7}
LAYERS = (1, 9, 17, 25, 33)  # of the 36
ALGORITHMS = ("dspark", "dflash", "eagle3")
SEQUENCES = 4


def run(setting: Setting, findings: Findings) -> None:
    rate = findings.piece(
        "ceiling",
        lambda: {"bfloat16_flops": matrix_rate(setting.device, setting.pick(256, 8192), torch.bfloat16)},
    )["bfloat16_flops"]
    for algorithm in ALGORITHMS:
        findings.piece(f"step, {algorithm}", lambda a=algorithm: training_step(setting, a, rate))
    blocks = Blocks.random(setting)
    expected = blocks.dense().detach()
    for name, kernel in blocks.kernels(setting).items():
        backward = not (setting.dry and name.startswith("flex"))  # which has none on a CPU
        findings.piece(
            f"attention, {name}",
            lambda k=kernel, b=backward: attention(setting, blocks, k, expected, b),
        )


class RandomFeatures(Features):
    """Features of sequences that no target has read, kept in memory."""

    def __init__(self, network: Network, length: int, device: torch.device):
        config, rng = network.config, torch.Generator().manual_seed(0)
        rows = torch.randint(2, config.vocab_size, (SEQUENCES, length), generator=rng).tolist()
        self.sequences = Sequences.of(Sequence(ids, [1] * length, [1] * length) for ids in rows)
        self.layers = config.target_layer_ids
        draw = (length, config.hidden_size)
        self.kept = []
        head = network.lm_head.weight.detach().to(device, torch.bfloat16)
        for _ in rows:
            found: dict[int | str, Tensor] = {
                layer: torch.randn(draw, generator=rng).bfloat16() for layer in (*self.layers, H_LAST)
            }
            parts = found[H_LAST].to(device).split(256)
            found["log_norm"] = torch.cat([(part @ head.T).float().logsumexp(-1) for part in parts]).cpu()
            self.kept.append(found)

    def rows(self, indices: list[int]) -> list[dict[int | str, Tensor]]:
        return [self.kept[i] for i in indices]

    def describe(self) -> dict[str, Any]:
        return {"mode": "random"}


class OnDevice(Batches):
    """The batch of step 0, on the device, at every step."""

    device: torch.device

    def make(self, step: int, rank: int = 0, world: int = 1, parts: int = 1) -> list[Batch]:
        if not hasattr(self, "kept"):
            self.kept = [part.to(self.device) for part in super().make(0, rank, world, parts)]
        return self.kept


def network(setting: Setting, algorithm: str) -> Network:
    """A random draft over the whole vocabulary, whose laws are not flat."""
    torch.manual_seed(0)
    sizes = setting.pick(TINY, QWEN3_4B) | COMMON
    with setting.device:
        if algorithm == "eagle3":
            model = Eagle3Model(Eagle3Config(**sizes, target_layer_ids=(1, 17, 32)))
        else:
            dspark = algorithm == "dspark"
            config = DSparkConfig(
                **sizes,
                num_hidden_layers=setting.pick(1, 5),
                target_layer_ids=LAYERS,
                mask_token_id=sizes["vocab_size"] - 1,
                markov_rank=setting.pick(8, 256) if dspark else 0,
                enable_confidence_head=dspark,
                sample_from_anchor=dspark,
            )
            model = DSparkModel(config)
        model.lm_head.weight.data.normal_(std=2 * sizes["hidden_size"] ** -0.5)
    return model


def training_step(setting: Setting, algorithm: str, rate: float) -> dict[str, Any]:
    """Tokens of sequences a second, peak memory, share of waiting for data, and MFU of one drafter's step."""
    device, length, anchors = setting.device, setting.pick(48, 4096), setting.pick(6, 512)
    model = network(setting, algorithm)
    store = RandomFeatures(model, length, device)
    params = TrainParams(steps=1000, lr=1e-4, batch_size=1, anchors=anchors, mixed_precision="bf16")
    accelerator = Accelerator(mixed_precision="bf16", cpu=device.type == "cpu")
    objective = BlockObjective(model, params.loss).to(accelerator.device)
    what = (store, list(range(SEQUENCES)), 1, anchors, model.config.block_size, 0)
    trainer = Trainer(objective, Batches(*what), [0], params, accelerator, setting.work / "training")
    repeats = setting.pick(1, 20)

    def step() -> None:
        trainer.train_step()
        trainer.step += 1

    forget_peak(device)
    with trainer.prefetcher:
        whole = median_seconds(step, device, repeats, untimed=setting.pick(1, 3))
    peak = peak_bytes(device)
    with FlopCounterMode(display=False) as counter:
        step()
    trainer.prefetcher.batches = OnDevice(*what)
    trainer.prefetcher.batches.device = accelerator.device
    fed = median_seconds(step, device, repeats, untimed=1)
    flops = counter.get_total_flops()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "parameters": trained,
        "tokens_per_second": length / whole,
        "step_ms": 1000 * whole,
        "peak_bytes": peak,
        "waiting_share": max(1 - fed / whole, 0.0),
        "flops": flops,
        "mfu": flops / whole / rate,
    }


class Blocks:
    """Queries, keys and values of a block drafter's layer: blocks see what is before their anchor, and themselves.

    queries [1, heads, m, d], keys and values [1, kv_heads, n + m, d] with m = blocks · γ.
    """

    def __init__(self, queries: Tensor, keys: Tensor, values: Tensor, anchors: Tensor, size: int):
        self.inputs = queries, keys, values
        self.anchors, self.size = anchors, size
        self.context = keys.shape[2] - queries.shape[2]
        self.groups = queries.shape[1] // keys.shape[1]

    @classmethod
    def random(cls, setting: Setting) -> Blocks:
        sizes, size = setting.pick(TINY, QWEN3_4B), COMMON["block_size"]
        n, blocks = setting.pick(40, 4096), setting.pick(5, 512)
        heads, kv_heads, dim = (
            sizes[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
        )
        torch.manual_seed(3)
        dtype = setting.pick(torch.float32, torch.bfloat16)
        shapes = ((heads, blocks * size), (kv_heads, n + blocks * size), (kv_heads, n + blocks * size))
        drawn = [torch.randn(1, *shape, dim, device=setting.device).to(dtype) for shape in shapes]
        anchors = torch.randperm(n - 1, device=setting.device)[:blocks].sort().values[None] + 1
        return cls(*(x.requires_grad_() for x in drawn), anchors, size)

    def kernels(self, setting: Setting) -> dict[str, Callable[[], Tensor]]:
        """Ways to the same [1, m, heads, d]."""
        found = {
            "dense mask, heads along the queries (as trained)": self.dense,
            "dense mask, math kernel": lambda: self._under(SDPBackend.MATH, self.dense),
            "dense mask, keys repeated": self.repeated,
        }
        if setting.dry:
            return found | {"flex attention, not compiled": lambda: self.flex(flex_attention)}
        efficient = SDPBackend.EFFICIENT_ATTENTION
        compiled = torch.compile(flex_attention)
        return found | {
            "dense mask, efficient kernel": lambda: self._under(efficient, self.dense),
            "flex attention, compiled, its mask made anew": lambda: self.flex(compiled),
        }

    def dense(self) -> Tensor:
        queries, keys, values = self.inputs
        mask = block_mask(self.anchors, self.context, self.size).repeat(1, 1, self.groups, 1)
        return attend(queries, keys, values, mask.to(queries.dtype), None)

    def repeated(self) -> Tensor:
        queries, *others = self.inputs
        mask = block_mask(self.anchors, self.context, self.size).to(queries.dtype)
        keys, values = (x.repeat_interleave(self.groups, 1) for x in others)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).transpose(1, 2)

    def flex(self, kernel: Callable[..., Tensor]) -> Tensor:
        queries, keys, values = (x if torch.is_grad_enabled() else x.detach() for x in self.inputs)
        anchors, size, context = self.anchors[0], self.size, self.context

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            block = query // size
            own = (key >= context) & ((key - context) // size == block)
            return (key < anchors[block]) | own  # an anchor lies before the context's end

        mask = create_block_mask(visible, None, None, queries.shape[2], keys.shape[2], device=keys.device)
        return kernel(queries, keys, values, block_mask=mask, enable_gqa=True).transpose(1, 2)

    def _under(self, backend: SDPBackend, call: Callable[[], Tensor]) -> Tensor:
        with sdpa_kernel(backend):
            return call()


def attention(
    setting: Setting, blocks: Blocks, kernel: Callable[[], Tensor], expected: Tensor, backward: bool
) -> dict[str, Any]:
    """Milliseconds of forward and backward, peak memory, and the relative distance to the trained one's output.

    Raises:
        RuntimeError: another function was computed.
    """

    def call() -> None:
        with torch.set_grad_enabled(backward):
            out = kernel()
        if backward:
            torch.autograd.grad(out.float().square().sum(), blocks.inputs)

    with torch.no_grad():
        out = kernel()
    away = float((out - expected).float().norm() / expected.float().norm())
    if not away < 2e-2:
        raise RuntimeError(f"its output is {away:.2g} away from the dense mask's")
    forget_peak(setting.device)
    took = median_seconds(call, setting.device, setting.pick(1, 20), untimed=setting.pick(1, 3))
    return {"ms": 1000 * took, "peak_bytes": peak_bytes(setting.device), "away": away, "backward": backward}
