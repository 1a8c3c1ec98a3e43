"""What XLA makes of products with quantized weights on TPUs and GPUs: is a 16-bit copy of a weight ever made?

    python scripts/aot_quantized.py --chips v6e h100      # default: all; needs what `make aot` installs

Prints for each chip, number of rows and kind of weight the bytes that the program is given and its temporaries, and on
TPUs the compiler's estimate of its cycles once operands are in scratch memory. Nothing runs. For the kernel that takes
XLA's place on TPUs see `make aot`.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

import aot  # sets the environment that the compilers need, before jax is imported
import jax
import jax.numpy as jnp

from jaxinfer.ops.grouped_matmul import grouped_matmul
from jaxinfer.ops.matmul import matmul
from jaxinfer.ops.quantized_matmul import BACKENDS, Quantized

WIDTH, OUT, GROUP = 4096, 14336, 128  # the feed-forward of Llama 3.1 8B
EXPERTS = 32
ROWS = (1, 8, 256, 2048)
(XLA,) = (backend for backend in BACKENDS if backend.name == "xla")

array = jax.ShapeDtypeStruct


def weights(shape: tuple[int, ...], axis: int) -> dict[str, Any]:
    """A weight in bfloat16, and as it is quantized along `axis`."""

    def scales(count: int) -> Any:
        return array(tuple(count if i == axis else size for i, size in enumerate(shape)), jnp.bfloat16)

    return {
        "bfloat16": array(shape, jnp.bfloat16),
        "int8": Quantized(array(shape, jnp.int8), scales(1)),
        "int4": Quantized(array(shape, jnp.int4), scales(shape[axis] // GROUP)),
    }


def product(x: Any, weight: Any) -> Any:
    return XLA.run(x, weight) if isinstance(weight, Quantized) else matmul(x, weight)


def report(label: str, compiled: Any) -> None:
    memory = compiled.memory_analysis()
    cycles = [int(found) for found in re.findall(r'"estimated_cycles":"(\d{1,12})"', compiled.as_text())]
    given, made = memory.argument_size_in_bytes / 1e6, memory.temp_size_in_bytes / 1e6
    estimate = f", {sum(cycles) / 1e3:6.0f} thousand cycles" if cycles else ""
    print(f"  {label:<22} arguments {given:7.1f} MB, temporaries {made:7.1f} MB{estimate}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--chips", nargs="+", choices=[*aot.TPUS, *aot.GPUS], default=[*aot.TPUS, *aot.GPUS])
    for chip in parser.parse_args().chips:
        mesh = aot.target(chip)
        print(f"{chip}: rows of {WIDTH} times [{OUT}, {WIDTH}]")
        for rows in ROWS:
            for kind, weight in weights((OUT, WIDTH), 1).items():
                x = array((rows, WIDTH), jnp.bfloat16)
                report(f"{rows} rows, {kind}", aot.compiled(mesh, product, (x, weight)))
        print(f"{chip}: 64 rows of 2048 times {EXPERTS} experts' [2048, {WIDTH}]")
        for kind, weight in weights((EXPERTS, 2048, WIDTH), 1).items():
            given = (array((64, 2048), jnp.bfloat16), weight, array((EXPERTS,), jnp.int32))
            report(f"experts, {kind}", aot.compiled(mesh, grouped_matmul, given))


if __name__ == "__main__":
    main()
