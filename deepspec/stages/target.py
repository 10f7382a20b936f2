"""Resolve the target of params.yaml (embedded, a directory or a hub id) into data/target.

One that this project's engine runs is tested against transformers' own forward; of one that vLLM runs only the
ends are read. The drafters of the pipeline are tried on its sizes: what cannot be decoded or distilled is refused here,
before anything is paid for.
"""

from __future__ import annotations

import argparse

from deepspec.config import Params
from deepspec.errors import DeepSpecError
from deepspec.stages.common import stage


def main(params: Params, flags: argparse.Namespace) -> None:
    from deepspec.drafters.suitable import intended
    from deepspec.export.suitable import in_words, refusals
    from deepspec.target.checks import not_applied
    from deepspec.target.model import load_target, resolve_target
    from deepspec.target.unloaded import resolve_unloaded

    target = params.target
    what = (
        target.source,
        target.revision,
        target.dtype,
        "data/target",
        target.template_date,
        target.chat_template_kwargs,
    )
    if target.engine == "vllm":
        loaded = resolve_unloaded(*what, target.vllm.quantization)
        found = f"vLLM runs it, {loaded.num_layers} layers that are not loaded here"
    else:
        found = resolve_target(*what).summary
        loaded = load_target("data/target", device="cpu")
    print(f"data/target: {target.source}, {target.dtype}; {found}")
    drafters = {name: params.drafters[name] for name in params.pipeline}
    networks, refused = intended(loaded, drafters)
    if changing := not_applied(loaded.generation_config):
        print(f"generation_config.json: not applied here: {', '.join(changing)}")
    for name, engines in refusals(loaded, networks).items():
        print(f"{name}: engines that can serve it: {in_words(engines)}")
    if refused:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise DeepSpecError(f"this target cannot have drafters of the pipeline: {reasons}")


if __name__ == "__main__":
    stage(main)
