"""Compile the TPU kernels for chips that are not there, and show what the compiler made of them.

    make aot                                    # all chips, all cases, in an environment of its own
    python scripts/aot.py --chips v5e --cases Llama

XLA's TPU compiler is in the libtpu package and needs no TPU. For every attention case of real models and every chip
this prints the scratch memory (VMEM) used, and checks that the page pool is updated in place: the bytes aliased are the
pool's, and the program copies nothing of its shape. Exits with 1 if anything fails.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

# Before jax is imported: stay on the CPU, and keep libtpu from asking which TPU it is on.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v6e-8")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.paged_attention import tpu
from pallas_kernels.paged_attention.cases import CASES, ModelCase

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x4", "tpu7x": "tpu7x:2x2x1"}
# Tokens, rows, pages in a table: a step of decodes and chunks together, and one decode alone.
STEPS = ((256, 64, 128), (1, 8, 512))
NUM_PAGES = 4096


def target(chip: str) -> Mesh:
    """One device of a chip."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices
    return Mesh(np.array(devices[:1]), ("x",))


def compile_attention(mesh: Mesh, case: ModelCase, step: tuple[int, int, int], writes: bool) -> Any:
    """One layer's attention, the pool donated."""
    num_tokens, num_rows, width = step
    whole = NamedSharding(mesh, PartitionSpec())

    def array(shape: tuple[int, ...], dtype: str = case.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=whole)

    def attention(q: Any, kv: Any, pool: Any, table: Any, starts: Any, lengths: Any, count: Any, sinks: Any) -> Any:
        k, v = kv or (None, None)
        return tpu.paged_attention(case, q, k, v, pool, tpu.prepare(table, starts, lengths), count, sinks)

    new = array((num_tokens, case.num_kv_heads, case.head_dim))
    # Without set_mesh, Pallas asks the process's own device which chip it lowers for.
    with jax.set_mesh(mesh):
        arguments = (
            array((num_tokens, case.num_heads, case.head_dim)),
            (new, new) if writes else None,
            array(tpu.pool_shape(case, NUM_PAGES)),
            array((num_rows, width), "int32"),
            array((num_rows + 1,), "int32"),
            array((num_rows,), "int32"),
            array((), "int32"),
            array((case.num_heads,), "float32") if case.has_sinks else None,
        )
        return jax.jit(attention, donate_argnums=2).lower(*arguments).compile()


def examine(compiled: Any, case: ModelCase) -> tuple[int, list[str]]:
    """Bytes of VMEM the kernel uses, and what is wrong."""
    shape = tpu.pool_shape(case, NUM_PAGES)
    size = int(np.prod(shape)) * jnp.dtype(case.dtype).itemsize
    text, memory = compiled.as_text(), compiled.memory_analysis()
    problems = []
    if memory.alias_size_in_bytes != size:
        problems.append(f"{memory.alias_size_in_bytes} bytes are aliased, the pool has {size}")
    if memory.temp_size_in_bytes >= size:
        problems.append(f"{memory.temp_size_in_bytes} bytes of temporaries have room for a copy of the pool")
    dimensions = ",".join(map(str, shape))
    if re.search(rf"\[{dimensions}\][^=]* (copy|copy-start|fusion|transpose|reshape)\(", text):
        problems.append("the pool is copied")
    kernels = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    used = re.findall(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"', kernels[0])
    if len(kernels) != 1 or not used:
        problems.append(f"{len(kernels)} kernels, where one is expected, that says its scratch memory")
    return int(used[0]) if used else 0, problems


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the TPU kernels without a TPU.")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--cases", default="", help="only those whose name contains this")
    arguments = parser.parse_args()
    cases = [case for case in CASES if arguments.cases in case.name]
    if not cases:
        parser.error(f"no case is called {arguments.cases!r}; there are: {', '.join(case.name for case in CASES)}")
    runs = [(case, STEPS[0], True) for case in cases] + [(cases[0], STEPS[1], True), (cases[0], STEPS[0], False)]
    failures = 0
    for chip in arguments.chips:
        mesh = target(chip)
        with jax.set_mesh(mesh):
            table = tpu.chip_name()
        print(f"{chip} (tuned table {table}): paged attention, {NUM_PAGES} pages; VMEM of the kernel, pool aliased")
        for case, step, writes in runs:
            started = time.perf_counter()
            label = f"{case.name}, {step[0]} tokens in {step[1]} rows{'' if writes else ', reads only'}"
            try:
                vmem, problems = examine(compile_attention(mesh, case, step, writes), case)
            except Exception as error:  # whatever the compiler says of one case, the others are still compiled
                vmem, problems = 0, [f"{type(error).__name__}: {str(error)[:500]}"]
            verdict = "FAILED " + "; ".join(problems) if problems else "in place, no copy"
            print(
                f"  {label:<58} {vmem / 2**20:6.1f} MiB  {verdict}  ({time.perf_counter() - started:.1f} s)", flush=True
            )
            failures += bool(problems)
    print(f"{len(runs) * len(arguments.chips)} programs, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
