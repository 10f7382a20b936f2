"""Every kind of pass that decoding makes, over two sequences that part, beside one forward of the model's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deepspec.target.attention import ForwardPass, Unsuited, tree_mask
from deepspec.target.layerwise import widened
from deepspec.target.reaches import reaches
from deepspec.target.source import decoder_layers, length_limit, text_decoder

if TYPE_CHECKING:
    from deepspec.target.model import Target

SHORTEST, LONGEST = 160, 1280  # prompt tokens
ROUGH = (torch.bfloat16, torch.float16)
MARGIN = 40  # tokens beyond the largest window


@dataclass(frozen=True)
class Difference:
    """The first place where a pass differs from transformers' own."""

    where: str
    position: int
    error: float
    kind: str

    def __str__(self) -> str:
        return f"{self.where} differs from position {self.position} on, by {self.error:.1g} of its size, in {self.kind}"


@dataclass(frozen=True)
class Reference:
    """What the model's own forward gives for one sequence of n tokens."""

    layers: list[Tensor | None]  # [n, d], or None where a layer hands out another shape
    last: Tensor  # [n, d]
    logits: Tensor  # [n, vocab]

    @property
    def states(self) -> dict[str, Tensor]:
        """All of it by where it is, as differences name it."""
        found = {f"layer {i}": x for i, x in enumerate(self.layers[:-1]) if x is not None}
        return found | {
            f"the state behind layer {len(self.layers) - 1}": self.last,
            "the head's output": self.logits,
        }


@dataclass(frozen=True)
class Plan:
    """Two sequences that part at `fork`, and how passes go over them."""

    tokens: int  # of the prompt
    vocab: int

    @classmethod
    def of(cls, config: Any) -> tuple[Plan, dict[str, int]]:
        """Long enough for all that the configuration says a token may not see beyond; with what was out of reach."""
        found = reaches(config)
        within = [n for n in found.values() if n + MARGIN <= LONGEST]
        limit = min(LONGEST, length_limit(config)) - MARGIN
        tokens = max(min(max([SHORTEST, *(n + MARGIN for n in within)]), limit), 48)
        return cls(tokens, config.vocab_size), {name: n for name, n in found.items() if n >= tokens}

    @property
    def fork(self) -> int:
        return self.tokens + 17

    def one(self, seed: int) -> Tensor:
        """int64 [fork + 8]"""
        generator = torch.Generator().manual_seed(seed)
        low = min(100, self.vocab // 4)  # special tokens often come first
        return torch.randint(low, self.vocab, (self.fork + 8,), generator=generator)

    def other(self, seed: int) -> Tensor:
        """int64 [fork + 16]: as `one` up to the fork, where another token stands."""
        generator = torch.Generator().manual_seed(seed + 100)
        low = min(100, self.vocab // 4)
        tail = torch.randint(low, self.vocab, (16,), generator=generator)
        one = self.one(seed)
        tail[0] = low if int(one[self.fork]) != low else low + 1
        return torch.cat((one[: self.fork], tail))


@torch.inference_mode()
def reference(model: PreTrainedModel, ids: Tensor) -> Reference:
    """Run the model's own forward once over ids [n], and keep what every layer hands out."""
    config = model.config.get_text_config()
    decoder = text_decoder(model)
    layers = decoder_layers(decoder, config.num_hidden_layers)
    outputs: dict[int | str, Tensor] = {}

    def keep(name: int | str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def keep_last(module: nn.Module, args: Any, output: Any) -> None:
        outputs["last"] = output.last_hidden_state

    def keep_input(module: nn.Module, args: Any) -> None:
        outputs.setdefault("last", args[0])

    handles = [layer.register_forward_hook(keep(i)) for i, layer in enumerate(layers)]
    handles.append(decoder.register_forward_hook(keep_last))
    handles.append(model.get_output_embeddings().register_forward_pre_hook(keep_input))
    try:
        logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    shape = outputs["last"].shape
    plain = [
        outputs[i][0] if isinstance(outputs.get(i), Tensor) and outputs[i].shape == shape else None
        for i in range(len(layers))
    ]
    return Reference(plain, outputs["last"][0], logits)


@dataclass(frozen=True)
class Tolerance:
    """How far a pass may be from transformers' own forward, over a state's size.

    In 16 bits that forward is itself some way from one in float32, the farther the more layers and experts there are:
    what is chosen otherwise by rounding differs by much. So there it is the median over a pass's positions, and may be
    `TIMES` what rounding makes of transformers' own.
    """

    least: float
    rough: bool = False
    rounding: Mapping[str, Tensor] = field(default_factory=dict)  # by where: the errors of transformers' own

    TIMES: ClassVar[float] = 2.0
    FEW: ClassVar[int] = 8  # positions whose median may be that of one that was rounded otherwise

    @classmethod
    def of(cls, model: PreTrainedModel, least: float, ids: Tensor, found: Reference) -> Tolerance:
        """Return that of a model, whose forward over ids [n] has been found."""
        if model.dtype not in ROUGH:
            return cls(least)
        layers = decoder_layers(text_decoder(model), model.config.get_text_config().num_hidden_layers)
        try:
            with widened(layers):
                exact = reference(model, ids).states
        except Exception:  # quantised weights have no other precision: then the least has to do
            return cls(least, True)
        return cls(
            least, True, {where: relative_errors(x, exact[where]) for where, x in found.states.items()}
        )

    def error(self, errors: Tensor) -> float:
        """Return the error of a pass, of the errors [n] at its positions."""
        return float(errors.median() if self.rough else errors.max())

    def limit(self, where: str, positions: int) -> float:
        rounding = self.rounding.get(where)
        if rounding is None:
            return self.least
        own = rounding.max() if positions < self.FEW else rounding.median()
        return max(self.least, self.TIMES * float(own))

    @property
    def widest(self) -> float:
        """The limit of a pass over many positions where it is widest."""
        return max([self.limit(where, self.FEW) for where in self.rounding], default=self.least)


def relative_errors(found: Tensor, expected: Tensor) -> Tensor:
    """Return [n]: how far states [n, d] are from those expected, over their size."""
    found, expected = found.double(), expected.double()
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    return torch.where(torch.isfinite(error), error, torch.full_like(error, torch.inf))


@torch.inference_mode()
def compare(
    target: Target, plan: Plan, seed: int, references: list[Reference], tolerance: Tolerance
) -> tuple[Difference | None, float]:
    """Run every kind of pass; return the first difference beyond the tolerance and the largest there was."""
    largest = 0.0
    for kind, mine, theirs, positions in _passes(target, plan, seed, references):
        for where, found in mine.items():
            errors, limit = relative_errors(found, theirs[where]), tolerance.limit(where, len(found))
            largest = max(largest, tolerance.error(errors))
            if tolerance.error(errors) > limit:
                first = int((errors > limit).nonzero()[0])
                return Difference(where, positions[first], float(errors[first]), kind), largest
    return None, largest


Compared = tuple[str, dict[str, Tensor], dict[str, Tensor], list[int]]


def _passes(target: Target, plan: Plan, seed: int, references: list[Reference]) -> Iterator[Compared]:
    """(kind of pass, our states by where they are, transformers' states, positions), lowest layer first."""
    one, other = plan.one(seed).tolist(), plan.other(seed).tolist()
    ours, theirs = references
    run = _Runner(target)
    half, fork = plan.tokens // 2 + 3, plan.fork
    yield run("a prefill", [(0, 0, one[:half])], [(ours, 0)])
    yield run("the second part of a prefill", [(0, half, one[half : plan.tokens])], [(ours, half)])
    at = plan.tokens
    for i in range(at, at + 3):
        yield run("a single step", [(0, i, one[i : i + 1])], [(ours, i)])
    at += 3
    yield run("a pass over several tokens", [(0, at, one[at : at + 7])], [(ours, at)])
    at += 7
    wrong = [one[at], *reversed(one[:5])]
    run("a chain that is rolled back", [(0, at, wrong)], [])
    yield run("a chain after one was rolled back", [(0, at, one[at : fork - 1])], [(ours, at)])
    at = fork - 1
    if target.verdict.trees:
        yield from run.tree(at, one[at : at + 4], other[fork : fork + 3], ours, theirs)
    else:
        yield run("a chain", [(0, at, one[at : at + 5])], [(ours, at)])
        yield run("a chain after a part of one stood", [(0, fork, other[fork : fork + 3])], [(theirs, fork)])
    at = fork + 3
    yield run("a single step after a rollback", [(0, at, other[at : at + 1])], [(theirs, at)])
    at += 1
    yield run("several tokens after a rollback", [(0, at, other[at : at + 5])], [(theirs, at)])
    at += 5
    run("a prefill", [(1, 0, one[:37])], [])
    yield run(
        "a pass over two requests",
        [(0, at, other[at : at + 3]), (1, 37, one[37:42])],
        [(theirs, at), (ours, 37)],
    )


class _Runner:
    """Runs passes of a target on one cache of two slots."""

    def __init__(self, target: Target):
        self.target = target
        self.cache = target.cache(2, self)
        self.layers = tuple(range(target.num_layers - 1)) if target.verdict.features else ()

    def __call__(
        self, kind: str, parts: list[tuple[int, int, list[int]]], references: list[tuple[Reference, int]]
    ) -> Compared:
        """parts: (cache row, start, ids) of each request; references: with the first position, likewise."""
        device = self.target.device
        self.cache.reserve(max(start + len(ids) for _, start, ids in parts) + 16)
        positions = [start + i for _, start, ids in parts for i in range(len(ids))]
        step = ForwardPass(
            torch.tensor([positions], device=device),
            cache=self.cache,
            rows=[row for row, _, _ in parts],
            starts=[start for _, start, _ in parts],
            counts=[len(ids) for _, _, ids in parts],
            wanted=self.layers,
        )
        ids = torch.tensor([[token for _, _, ids in parts for token in ids]], device=device)
        mine = self._states(step, self.target.forward(ids, step))
        if self.target.verdict.trees and len(step.stored) < self.target.num_layers:
            missing = sorted(set(range(self.target.num_layers)) - step.stored)
            raise Unsuited(f"layer {missing[0]} does not attend through it")
        spans = [
            (reference, slice(first, first + len(ids)))
            for (reference, first), (_, _, ids) in zip(references, parts, strict=False)
        ]
        return kind, mine, self._expected(spans), positions

    def tree(
        self, at: int, main: list[int], side: list[int], ours: Reference, theirs: Reference
    ) -> Iterator[Compared]:
        """Compare a main branch and a side branch below the token at `at`, node by node in turn; keep the side one."""
        device = self.target.device
        ids = [main[0], main[1], side[0], main[2], side[1], main[3], side[2]]
        depths = [0, 1, 1, 2, 2, 3, 3]
        visible = tree_mask([[-1, -1, 0, 1, 2, 3]], [at], len(ids))
        self.cache.reserve(at + 2 * len(ids))
        positions = torch.tensor([[at + depth for depth in depths]], device=device)
        step = ForwardPass(
            positions,
            visible.to(device),
            cache=self.cache,
            rows=[0],
            starts=[at],
            counts=[len(ids)],
            wanted=self.layers,
        )
        mine = self._states(step, self.target.forward(torch.tensor([ids], device=device), step))
        for branch, nodes in ((ours, [0, 1, 3, 5]), (theirs, [2, 4, 6])):
            first = at + depths[nodes[0]]
            expected = self._expected([(branch, slice(first, first + len(nodes)))])
            yield (
                "a tree",
                {name: x[nodes] for name, x in mine.items()},
                expected,
                [at + depths[n] for n in nodes],
            )
        self.cache.compact(0, at, [0, 2, 4, 6])

    def _states(self, step: ForwardPass, hidden: Tensor) -> dict[str, Tensor]:
        states = {f"layer {layer}": step.features[layer][0] for layer in self.layers}
        states[f"the state behind layer {self.target.num_layers - 1}"] = hidden[0]
        return states | {"the head's output": self.target.logits(hidden[0])}

    def _expected(self, spans: list[tuple[Reference, slice]]) -> dict[str, Tensor]:
        parts = [{where: x[span] for where, x in reference.states.items()} for reference, span in spans]
        return {where: torch.cat([part[where] for part in parts]) for where in parts[0]} if parts else {}
