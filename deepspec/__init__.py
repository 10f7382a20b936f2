"""DeepSpec: train, verify and measure speculative-decoding drafts of your own language model.

target = load_target("data/target")
drafter = load_drafter("data/drafts/dspark", target)
out = generate(target, drafter, prompt_ids, max_new_tokens=256, temperature=1.0, seed=0)
"""

from typing import Any

__all__ = ["generate", "load_drafter", "load_target"]

_HOME = {
    "generate": "deepspec.decoding.engine",
    "load_drafter": "deepspec.drafters.load",
    "load_target": "deepspec.target.model",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `deepspec --help` need not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'deepspec' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
