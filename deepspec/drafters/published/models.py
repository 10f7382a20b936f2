"""Whole language models as drafts, and next-token modules (MTP) of a target's own checkpoint."""

from __future__ import annotations

from fnmatch import fnmatchcase

from deepspec.drafters.published.plan import Found, Plan
from deepspec.target.next_token import modules_of, stack_of

_MODULES = ("mtp.", "model.mtp.", "mtp_layers.", "model.mtp_layers.")
_PARTS = (".eh_proj.", ".enorm.", ".hnorm.", ".shared_head.", "nextn")


def recognise(found: Found) -> Plan | None:
    """Recognise a model by its architecture, a next-token module by the names of its weights."""
    module = [
        name for name in found.weights if name.startswith(_MODULES) or any(part in name for part in _PARTS)
    ]
    whole = any(
        name.endswith(".layers.0.input_layernorm.weight") for name in set(found.weights) - set(module)
    )
    if module and not whole:
        return _modules_alone(found)
    early = found.weights.get("fc.weight")
    if early is not None and not found.has("hidden_norm"):
        return Plan(
            "SafeAILab",
            "EAGLE-1 or 2",
            refusal="EAGLE-1 and 2 read the last state alone; only EAGLE-3 is run here",
        )
    if not fnmatchcase(found.architecture, "*ForCausalLM"):
        return None
    said = (
        f"its next-token modules (MTP, {len(module)} weights) are passed over: it drafts as a whole model, and only "
        "for itself as the target by these"
    )
    return Plan(
        "Hugging Face",
        f"a language model ({found.architecture})",
        "lm",
        dict(found.config),
        assumed=(said,) if module else (),
        left_out=tuple(module),
    )


def _modules_alone(found: Found) -> Plan:
    """Recognise the modules of a target without its other layers."""
    modules = modules_of(found.weights)
    if not modules:
        why = "next-token modules of a target (MTP) under names that are not known here (DeepSeek's, Qwen's, MiMo's)"
        return Plan("the target's own", "MTP", refusal=why)
    more = [module.prefix.rstrip(".") for module in modules[len(stack_of(modules)) :]]
    return Plan(
        "the target's own",
        "MTP",
        "mtp",
        {"architectures": ["DeepSpecMTPModel"]},
        assumed=(f"the first module drafts every token, not {', '.join(more)}",) if more else (),
        needs_target=("the shape of its layer, which is the target's",),
    )
