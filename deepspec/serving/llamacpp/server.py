"""Serve with xllamacpp: a script for the Python of llama.cpp's environment, which has nothing of ours.

    python server.py '{"model": "target.gguf", "port": 8080, ...}'

The keys are `launch.Server`'s.
"""

import json
import sys
import time

import xllamacpp


def parameters(asked):
    """Return llama.cpp's parameters."""
    found = xllamacpp.CommonParams()
    found.model.path = asked["model"]
    found.port, found.n_ctx, found.n_parallel = asked["port"], asked["context"], 1
    found.verbosity, found.ui, found.fit_params, found.cache_ram_mib = 1, False, False, 0
    for name in ("cpuparams", "cpuparams_batch"):
        getattr(found, name).n_threads = asked["threads"]
    cache = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{asked['cache'].upper()}")
    found.cache_type_k = found.cache_type_v = cache
    draft = found.speculative.draft
    draft.n_max, draft.p_min = asked["tokens"], asked["least"]
    draft.cache_type_k = draft.cache_type_v = cache
    for name in ("cpuparams", "cpuparams_batch"):
        getattr(draft, name).n_threads = asked["threads"]
    if asked["draft"]:
        draft.mparams.path = asked["draft"]
    if asked["kind"]:
        names = asked["kind"].upper().replace("-", "_").split(",")
        kinds = [
            getattr(xllamacpp.common_speculative_type, f"COMMON_SPECULATIVE_TYPE_{name}") for name in names
        ]
        found.speculative.types = kinds
    simple = found.speculative.ngram_simple
    if asked["match"]:
        simple.size_n, simple.size_m, simple.min_hits = asked["match"], asked["tokens"], 1
    return found


if __name__ == "__main__":
    server = xllamacpp.Server(parameters(json.loads(sys.argv[1])))
    while True:
        time.sleep(3600)
