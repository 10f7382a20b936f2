"""Is a target, run our way, the target that transformers runs?

Plain and drafted output come from one engine and agree even where both are wrong. So before a directory is used for
the first time, every kind of pass is compared with one uncached forward of the model's own code: prefill in two parts,
single steps, several tokens, a tree of which a side branch is kept, a chain rolled back, two requests of different
lengths. The states behind every layer must agree at every position, and the logits. Where a window is longer than the
longest prompt, the same weights are tested once more with a short one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import PreTrainedModel

from deepspec.errors import DeepSpecError
from deepspec.files import digest as digest_of
from deepspec.files import write_json
from deepspec.lineage import code_digest
from deepspec.target.attention import NAME, Unsuited
from deepspec.target.layerwise import Layerwise
from deepspec.target.nearness import HEAD, first_worse, head_error
from deepspec.target.passes import ROUGH, Difference, Plan, Reference, Tolerance, compare, reference
from deepspec.target.reach import first_difference
from deepspec.target.reaches import reduced
from deepspec.target.source import dtype_name
from deepspec.target.states import keeps_states

if TYPE_CHECKING:
    from deepspec.target.model import Target

ATTENTION, STATES, STEPS = (
    "our attention",
    "transformers' own cache",
    "transformers' own cache, a token at a time",
)
BODIES = (ATTENTION, STATES, STEPS)  # what each can do, the one before it can too
FAILS = "its own forward fails"
SMALL = 400_000_000  # parameters up to which the test runs in float32, whatever the target's dtype
# Of a state's difference over its size, the largest at any position; in 16 bits the median over a pass, or more
# where rounding makes more (`Tolerance`): each layer is then compared by `reach` and `nearness`.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}


@dataclass(frozen=True)
class Verdict:
    """What a self-test found. A target with a `refusal` is never decoded."""

    body: str = ATTENTION
    reason: str = ""  # why not our attention
    features: bool = True  # whether layers hand out one state a token
    tokens: int = 0
    dtype: str = "float32"
    tolerance: float = 0.0
    error: float = 0.0  # the largest found
    shortened: tuple[str, ...] = ()  # windows and the like that a copy with shorter ones was tested for
    unreached: tuple[str, ...] = ()
    refusal: str | None = None

    @property
    def trees(self) -> bool:
        return self.body == ATTENTION

    @property
    def summary(self) -> str:
        """What was found, in words."""
        why = f" ({self.reason})" if self.reason else ""
        far = f"; not reached: {', '.join(self.unreached)}" if self.unreached else ""
        small = f"; {', '.join(self.shortened)} by a copy of the same weights" if self.shortened else ""
        size = f"{self.tokens} tokens in {self.dtype} within {self.tolerance:g}{small}{far}"
        if self.refusal:
            return f"refused: {self.refusal} (tested over {size})"
        return f"as transformers runs it, through {self.body}{why}, tested over {size}"


# (attention, dtype, sizes that are not the model's own) → the model
Load = Callable[[str | None, torch.dtype | None, Mapping[str, int]], PreTrainedModel]
Wrap = Callable[[PreTrainedModel, "Verdict"], "Target"]  # (model, verdict so far) → a target that runs it so


def examine(digest: str, load: Load, wrap: Wrap, fresh: bool = False) -> Verdict:
    """Return the verdict on a target, found now or, unless it is to be `fresh`, kept in the user's cache."""
    if not fresh and (found := kept_verdict(digest)) is not None:
        return found
    verdict, kept = _examine(load, wrap), _record(digest)
    with suppress(OSError):  # a home that is not to be written to
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, asdict(verdict))
    return verdict


def kept_verdict(digest: str) -> Verdict | None:
    """Return the verdict that the user's cache has on a target; None where it was not tested with this code."""
    with suppress(OSError, ValueError, KeyError, TypeError):  # none, or one that cannot be read
        found = json.loads(_record(digest).read_text())
        return Verdict(**found | {name: tuple(found[name]) for name in ("shortened", "unreached")})
    return None


def _record(digest: str) -> Path:
    code = code_digest("deepspec.target.model")
    key = digest_of(f"{digest} {transformers.__version__} {torch.__version__} {code}")
    return Path.home() / ".cache" / "deepspec" / "selftests" / f"{key[:24]}.json"


def _examine(load: Load, wrap: Wrap) -> Verdict:
    verdict, config = _tested(load, wrap, {})
    _, far = Plan.of(config)
    if verdict.refusal or not far:
        return verdict
    small = reduced(config, far)
    shortened = tuple(f"{name} {n} as {small[name]}" for name, n in far.items())
    try:
        copy, _ = _tested(load, wrap, small)
    except Exception as error:  # whatever a model's own code makes of such sizes
        copy = replace(verdict, refusal=f"{FAILS}: {_words(error)}")
    if copy.refusal and copy.refusal.startswith(FAILS):
        return replace(verdict, unreached=(*verdict.unreached, f"{', '.join(shortened)}: {copy.refusal}"))
    if copy.refusal:
        return replace(copy, shortened=shortened, refusal=f"with {', '.join(shortened)}, {copy.refusal}")
    weaker = max(verdict, copy, key=lambda found: BODIES.index(found.body))
    return replace(
        weaker,
        tokens=verdict.tokens,
        features=verdict.features and copy.features,
        error=max(verdict.error, copy.error),
        shortened=shortened,
        unreached=tuple(dict.fromkeys((*verdict.unreached, *copy.unreached))),
    )


def _tested(load: Load, wrap: Wrap, sizes: Mapping[str, int]) -> tuple[Verdict, Any]:
    """Return the verdict on the model with these sizes, and its text configuration."""
    own, dtype = load(None, None, sizes), None
    if sum(p.numel() for p in own.parameters()) <= SMALL:
        own, dtype = own.float(), torch.float32
    config = own.config.get_text_config()
    plan, _ = Plan.of(config)
    tested = Verdict(dtype=dtype_name(own.dtype), tolerance=TOLERANCE[own.dtype], tokens=plan.tokens)
    try:
        references = [[reference(own, ids) for ids in (plan.one(seed), plan.other(seed))] for seed in (0, 1)]
        tolerance = Tolerance.of(own, tested.tolerance, plan.one(0), references[0][0])
    except Exception as error:
        return replace(tested, refusal=f"{FAILS}: {_words(error)}"), config
    tested = replace(tested, tolerance=tolerance.widest, features=None not in references[0][0].layers)
    reason = keeps_states(config)
    if not reason:
        try:
            target = wrap(load(NAME, dtype, sizes), tested)
            verdict = _judged(target, plan, references, tolerance)
            if verdict.refusal is None and verdict.features and own.dtype in ROUGH:
                verdict = _by_layer(verdict, target, own, plan, references[0][0])
            return verdict, config
        except Exception as error:  # whatever a model's own code makes of an attention that it does not know
            reason = _words(error)
    for body in (STATES, STEPS):
        tested = replace(tested, body=body, reason=reason)
        try:
            verdict = _judged(wrap(own, tested), plan, references, tolerance)
        except Exception as error:
            verdict = replace(tested, refusal=f"{reason}; and with {body}: {_words(error)}")
        if verdict.refusal is None:
            break
    return verdict, config


def _words(error: Exception) -> str:
    first = str(error).strip().splitlines()[:1]
    return (
        first[0]
        if isinstance(error, Unsuited) and first
        else f"{type(error).__name__}: {''.join(first)}"[:200]
    )


def _judged(target: Target, plan: Plan, references: list[list[Reference]], tolerance: Tolerance) -> Verdict:
    """Return its verdict with a refusal, if two prompts agree on it: one alone may have met a tie between experts."""
    verdict = target.verdict
    found: list[Difference] = []
    for seed, pair in enumerate(references):
        difference, largest = compare(target, plan, seed, pair, tolerance)
        if difference is None:
            return replace(verdict, error=largest)
        found.append(difference)
    first = found[0]
    how = "" if verdict.body == ATTENTION else f" ({STATES}, because {verdict.reason})"
    refusal = f"{first}{how}; its output would not be the model's own"
    return replace(verdict, error=first.error, refusal=refusal)


def _by_layer(
    verdict: Verdict, target: Target, own: PreTrainedModel, plan: Plan, theirs: Reference
) -> Verdict:
    """Return the verdict, refused where the head or a layer errs more, or sees other tokens, than transformers' own."""
    end = "; its output would not be the model's own"
    if (error := head_error(target, theirs)) > HEAD:
        return replace(
            verdict,
            refusal=f"the head is off by {error:.2g} of its output where rounding makes {HEAD:g}{end}",
        )
    try:
        both = Layerwise(target, own, plan.one(0)[: plan.tokens])
        found = first_difference(both)
    except Exception:  # layers that a state of one's own cannot be given to
        return replace(verdict, unreached=(*verdict.unreached, "what each layer sees"))
    if (layer := both.joined_unlike()) is not None:
        return replace(
            verdict, refusal=f"layer {layer} computes something else as one call with the others{end}"
        )
    if found is not None:
        layer, position, more = found
        seen = "more tokens" if more else "fewer tokens"
        refusal = f"layer {layer} sees {seen} than transformers' own at position {position}{end}"
        return replace(verdict, refusal=refusal)
    try:
        worse = first_worse(both)
    except Exception:  # layers of quantised weights, which have no other precision
        return replace(verdict, unreached=(*verdict.unreached, "what each layer computes"))
    return verdict if worse is None else replace(verdict, refusal=f"{worse}{end}")


def refuse(source: str, verdict: Verdict) -> None:
    """Raise DeepSpecError, one line, if the verdict is a refusal."""
    if verdict.refusal:
        raise DeepSpecError(f"{source}: this target is refused: {verdict.refusal}")
