"""Products with quantized weights beside those in float32, on this machine: milliseconds, the best of several runs."""

from __future__ import annotations

import time
from typing import Any

import jax

from jaxinfer.ops.matmul import matmul
from jaxinfer.ops.quantized_matmul import Quantized, quantize, quantized_matmul

OUT, WIDTH, GROUP = 8192, 2048, 128
RUNS = 15


def report() -> int:
    """Print a table; turns are taken, so that a busy moment is nobody's alone."""
    weight = jax.random.normal(jax.random.key(0), (OUT, WIDTH))
    kinds: dict[str, Any] = {
        "float32": weight,
        "int8": quantize(weight, bits=8, scales_shape=(OUT, 1)),
        "int4": quantize(weight, bits=4, scales_shape=(OUT, WIDTH // GROUP)),
    }

    @jax.jit
    def product(x: jax.Array, weight: Any) -> jax.Array:
        return quantized_matmul(x, weight) if isinstance(weight, Quantized) else matmul(x, weight)

    print(f"rows times [{OUT}, {WIDTH}]    " + "    ".join(f"{kind:>10}" for kind in kinds))
    for rows in (1, 8, 64, 512):
        x = jax.random.normal(jax.random.key(rows), (rows, WIDTH))
        best = dict.fromkeys(kinds, float("inf"))
        for run in range(RUNS):
            for kind, own in kinds.items():
                started = time.perf_counter()
                jax.block_until_ready(product(x, own))
                if run:  # the first compiles
                    best[kind] = min(best[kind], time.perf_counter() - started)
        print(f"{rows:>23}    " + "    ".join(f"{1e3 * seconds:>7.2f} ms" for seconds in best.values()))
    return 0
