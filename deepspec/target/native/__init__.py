"""Kernels of our own for CPUs with AVX512-BF16, compiled once on the machine that runs them; else torch's are used.

`deepspec/kernels.py` compiles and loads `kernels.cpp`, which has what Python calls. What it does is in the headers:
`numbers.h` (sixteen at a time), `products.h` (and AMX: `tiles.h`), `attention.h`, `layers.h`, `laws.h`,
`drafts.h` (what grows from laws), `losses.h`.
`matrix.py` lays weights out for it, `layer.py` runs a Llama-shaped decoder layer as one call. A token's results do not
depend on what shares its pass, to the bit.
"""
