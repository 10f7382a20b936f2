"""DeepSeek's DSpark and DFlash releases, and those that are written here: our configuration is theirs."""

from __future__ import annotations

from deepspec.drafters.published import block
from deepspec.drafters.published.plan import Found, Plan
from deepspec.drafters.published.sizes import sizes
from deepspec.errors import DeepSpecError

DSPARK, OURS = "Qwen3DSparkModel", "DeepSpecDSparkModel"
_GEMMA = (
    "layers of Gemma 4's shape (norms behind attention and MLP, GELU, scaled embeddings) are not run here; "
    "the Qwen3 class is"
)


def recognise(found: Found) -> Plan | None:
    """Recognise these by their architecture."""
    config, name = dict(found.config), found.architecture
    if config.get("speculators_model_type"):
        return None
    if name.startswith("Gemma4") and ("DSpark" in name or "Eagle3" in name):
        what = "DSpark" if "DSpark" in name else "EAGLE-3"
        return Plan(
            "DeepSeek",
            f"{what} for Gemma 4",
            made_for=config.get("target_model_name_or_path"),
            refusal=_GEMMA,
        )
    if name not in (DSPARK, OURS):
        return None
    depth = config.get("num_hidden_layers") or 1
    what = f"{'DSpark' if config.get('markov_rank') else 'DFlash'}, {depth} layers"
    target = config.get("target_model_name_or_path")
    try:
        first = {
            n.removeprefix("layers.0."): w for n, w in found.weights.items() if n.startswith("layers.0.")
        }
        size = sizes(config, first)
        seen = block.attention(config, depth, {}) if name == DSPARK else {}  # ours says it layer by layer
        own = config | size.config | seen
    except DeepSpecError as error:
        return Plan("DeepSeek", what, made_for=target, refusal=str(error))
    if found.target_layers:
        own.setdefault("num_target_layers", found.target_layers)
    return Plan("DeepSeek, DeepSpec", what, "dspark", own, made_for=target, assumed=size.assumed)
