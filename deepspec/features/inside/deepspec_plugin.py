"""vLLM's plugin that puts models which hand out all their states in the place of those that do not.

vLLM finds it by the entry point beside it and calls it in every process before a model is made.
"""

from __future__ import annotations

from vllm import ModelRegistry

LATENT = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")


def register() -> None:
    """Name the models; they are imported where they are served."""
    for name in LATENT:
        ModelRegistry.register_model(name, f"deepspec_latent:{name}")
