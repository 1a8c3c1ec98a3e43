"""Compile the kernels for TPUs and GPUs that are not there, and show what the compilers made of them.

    make aot                                    # all chips, all cases, in an environment of its own
    python scripts/aot.py --chips v5e h100 --cases Llama
    python scripts/aot.py --quick               # a few cases on one chip of each kind

XLA's compilers are in the libtpu package and in JAX's CUDA plugin, and need no device. For every case of real models
and every chip this prints the scratch memory (TPU: VMEM) or shared memory, registers and spills (GPU), and
checks for paged attention that the pool is updated in place: the bytes aliased are the pool's, and the program copies
nothing of its shape. Exits with 1 if anything fails.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before jax is imported: stay on the CPU, keep libtpu from asking which TPU it is on, let Mosaic GPU tell of its work.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v6e-8")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
os.environ["MOSAIC_GPU_DUMP_RESOURCES"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.flash_attention import cases as flash_cases
from pallas_kernels.flash_attention import gpu as flash_gpu
from pallas_kernels.flash_attention import tpu as flash_tpu
from pallas_kernels.paged_attention import gpu, gpu_layout, tpu
from pallas_kernels.paged_attention.cases import CASES, ModelCase
from pallas_kernels.paged_attention.quantized import QuantizedPool
from pallas_kernels.quantized_matmul import tpu as product_tpu
from pallas_kernels.quantized_matmul.cases import CASES as PRODUCTS
from pallas_kernels.quantized_matmul.cases import ProductCase

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x4", "tpu7x": "tpu7x:2x2x1"}
# Bytes a second and bytes of memory; the rest of a Hopper chip is the same.
GPUS = {"h100": (3_352_320_000_000, 84_929_347_584), "h200": (4_800_000_000_000, 150_754_820_096)}
HOPPER = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {} device_memory_size: {} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 7 }} runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{}"
"""
# Tokens, rows, pages in a table: a step of decodes and chunks together, and one decode alone.
STEPS = ((256, 64, 128), (1, 8, 512))
NUM_PAGES = 8192
FLASH_TOKENS = (2048, 20)
PRODUCT_ROWS = (1, product_tpu.MAX_ROWS)
QUICK_CHIPS = ("v6e", "h100")
QUICK_CASES = (
    "Llama 3.1 8B",
    "Gemma 2 9B, window",
    "gpt-oss 20B, window",
    "Llama 3.1 8B, int8 cache",
    "Llama 3.1 8B, down",
)


@dataclass(frozen=True)
class Program:
    """What is compiled: a label, how, and the pool, one array or a tree of them, that it must update in place."""

    label: str
    compile: Callable[[Mesh], Any]
    pool: Any = None


def target(chip: str) -> Mesh:
    """One device of a chip."""
    if chip in TPUS:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[chip]).devices
    else:
        config = HOPPER.format(*GPUS[chip], f"NVIDIA {chip.upper()}")
        devices = topologies.get_topology_desc(
            platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=config
        ).devices
    return Mesh(np.array(devices[:1]), ("x",))


def compiled(mesh: Mesh, function: Callable[..., Any], arguments: tuple[Any, ...], **options: Any) -> Any:
    """arguments: trees of ShapeDtypeStructs."""
    whole = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), arguments)
    # Without set_mesh, Pallas asks the process's own device which chip it lowers for.
    with jax.set_mesh(mesh):
        return jax.jit(function, **options).lower(*arguments).compile()


def paged(kernel: Any, case: ModelCase, step: tuple[int, int, int], writes: bool = True) -> Program:
    """One layer's attention by a kernel's module, the pool donated."""
    num_tokens, num_rows, width = step

    def attention(
        q: Any, kv: Any, pool: Any, table: Any, starts: Any, lengths: Any, count: Any, sinks: Any, place: Any
    ) -> Any:
        k, v = kv or (None, None)
        if kernel is gpu:
            batch = gpu.prepare(case, num_tokens, table, starts, lengths, place)
            return gpu.paged_attention(case, q, k, v, pool, batch, sinks)
        rows = tpu.prepare(table, starts, lengths, context=case.context, place=place)
        return tpu.paged_attention(case, q, k, v, pool, rows, count, sinks)

    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(case.dtype))
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    new = array((num_tokens, case.num_kv_heads, case.head_dim))
    held = array if case.kv_dtype is None else functools.partial(array, dtype=jnp.dtype(case.kv_dtype))
    pool = held(kernel.pool_shape(case, NUM_PAGES))
    if case.kv_dtype is not None:
        pool = QuantizedPool(pool, jax.ShapeDtypeStruct(kernel.scales_shape(case, NUM_PAGES), jnp.float32))
    arguments = (
        array((num_tokens, case.num_heads, case.head_dim)),
        (new, new if case.latent_dim is None else None) if writes else None,
        pool,
        integers((num_rows, width)),
        integers((num_rows + 1,)),
        integers((num_rows,)),
        integers(()),
        jax.ShapeDtypeStruct((case.num_heads,), jnp.float32) if case.has_sinks else None,
        integers(()) if case.context > 1 else None,
    )
    label = f"paged, {case.name}, {num_tokens} tokens in {num_rows} rows{'' if writes else ', reads only'}"
    return Program(
        label,
        lambda mesh: compiled(mesh, attention, arguments, donate_argnums=2),
        pool,
    )


def flash(kernel: Any, name: str, case: flash_cases.FlashCase, num_tokens: int) -> Program:
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(case.dtype))
    arguments = (
        array((1, num_tokens, case.num_heads, case.head_dim)),
        array((1, num_tokens, case.num_kv_heads, case.head_dim)),
        array((1, num_tokens, case.num_kv_heads, case.value_dim)),
        (jax.ShapeDtypeStruct((1, num_tokens), jnp.int32),) * 2 if case.has_segments else None,
    )

    def attention(q: Any, k: Any, v: Any, segments: Any) -> Any:
        return kernel.flash_attention(case, q, k, v, segments=segments)

    return Program(f"flash, {name}, {num_tokens} tokens", lambda mesh: compiled(mesh, attention, arguments))


def product(name: str, case: ProductCase, num_rows: int) -> Program:
    arguments = (
        jax.ShapeDtypeStruct((num_rows, case.num_in), jnp.dtype(case.dtype)),
        jax.ShapeDtypeStruct((case.num_out, case.num_in), jnp.int4),
        jax.ShapeDtypeStruct((case.num_out, case.num_groups), jnp.dtype(case.dtype)),
    )
    label = f"int4 product, {name}, {num_rows} rows"
    return Program(label, lambda mesh: compiled(mesh, product_tpu.quantized_matmul, arguments))


def programs(chip: str, wanted: Callable[[str], bool]) -> list[Program]:
    cases = [case for case in CASES if wanted(case.name)]
    named = [(name, case) for name, case in flash_cases.CASES.items() if wanted(name)]
    if chip in GPUS:
        # What the kernels refuse in words is the XLA path's.
        found = [paged(gpu, case, step) for case in cases for step in STEPS if gpu_layout.supports(case) is None]
        served = [(name, case) for name, case in named if flash_gpu.supports(case) is None]
        return found + [flash(flash_gpu, name, case, FLASH_TOKENS[0]) for name, case in served]
    found = [paged(tpu, case, STEPS[0]) for case in cases]
    if cases:
        found += [paged(tpu, cases[0], STEPS[1]), paged(tpu, cases[0], STEPS[0], writes=False)]
    found += [flash(flash_tpu, name, case, tokens) for name, case in named for tokens in FLASH_TOKENS]
    products = [(name, case) for name, case in PRODUCTS.items() if wanted(name)]
    return found + [product(name, case, rows) for name, case in products for rows in PRODUCT_ROWS]


@contextlib.contextmanager
def printed() -> Iterator[Any]:
    """What the process prints meanwhile, compilers included: a list of one text, at the end."""
    sys.stdout.flush()
    kept, text = os.dup(1), []
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield text
        finally:
            sys.stdout.flush()
            os.dup2(kept, 1)
            os.close(kept)
            file.seek(0)
            text.append(file.read().decode(errors="replace"))


def resources(chip: str, text: str, output: str) -> str:
    """Memory and registers of the kernels in a compiled program: its text, and what was printed while it was made."""
    if chip in TPUS:
        pattern = r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"'
        lines = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
        found = [int(size) for line in lines for size in re.findall(pattern, line)[:1]]
        if len(lines) != 1 or not found:
            raise ValueError(f"{len(lines)} kernels, where one is expected, that says its scratch memory")
        return f"{found[0] / 2**20:.0f} MiB VMEM"
    if not re.search(r'custom_call_target="mosaic_gpu', text):
        raise ValueError("the program has no Mosaic GPU kernel")
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", output)]
    if not registers:
        return "the kernel is one of those above"
    spills = sum(map(int, re.findall(r"stack frame, (\d+) bytes spill stores", output)))
    shared = max(map(int, re.findall(r"smem_scratch_bytes=(\d+)", output)), default=0)
    return f"{shared / 1024:.0f} KiB shared, {max(registers)} registers, {spills} B spilled"


def pool_problems(program: Any, pool: Any) -> list[str]:
    """Why a compiled program does not update the pool in place."""
    arrays = jax.tree.leaves(pool)
    size = sum(array.size * array.dtype.itemsize for array in arrays)
    memory, problems = program.memory_analysis(), []
    if memory.alias_size_in_bytes != size:
        problems.append(f"{memory.alias_size_in_bytes} bytes are aliased, the pool has {size}")
    if memory.temp_size_in_bytes >= size:
        problems.append(f"{memory.temp_size_in_bytes} bytes of temporaries have room for a copy of the pool")
    for array in arrays:
        dimensions = ",".join(map(str, array.shape))
        if re.search(rf"\[{dimensions}\][^=]* (copy|copy-start|fusion|transpose|reshape)\(", program.as_text()):
            problems.append(f"the pool's {array.dtype.name} are copied")
    return problems


def report(chip: str, mesh: Mesh, program: Program) -> bool:
    """Compile, print a line, and say whether all is well."""
    started, used, problems, output = time.perf_counter(), "", [], ""
    try:
        with printed() as text:
            result = program.compile(mesh)
        output = text[0]
        used = resources(chip, result.as_text(), output)
        problems = [] if program.pool is None else pool_problems(result, program.pool)
    except Exception as error:  # whatever the compiler says of one case, the others are still compiled
        problems = [f"{type(error).__name__}: {str(error)[:500]}"]
    verdict = (
        "FAILED " + "; ".join(problems) if problems else "compiled" if program.pool is None else "in place, no copy"
    )
    print(f"  {program.label:<66} {used:<48} {verdict}  ({time.perf_counter() - started:.1f} s)", flush=True)
    return not problems


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the kernels without a TPU or a GPU.")
    parser.add_argument("--chips", nargs="+", choices=[*TPUS, *GPUS], help="default: all")
    parser.add_argument("--cases", default="", help="only those whose name contains this")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK_CASES)} on {' and '.join(QUICK_CHIPS)}")
    arguments = parser.parse_args()

    def wanted(name: str) -> bool:
        return arguments.cases in name and (not arguments.quick or name in QUICK_CASES)

    names = [case.name for case in CASES] + list(flash_cases.CASES) + list(PRODUCTS)
    if not any(map(wanted, names)):
        parser.error(f"no case is called {arguments.cases!r}; there are: {', '.join(dict.fromkeys(names))}")
    chips = arguments.chips or (QUICK_CHIPS if arguments.quick else [*TPUS, *GPUS])
    results = []
    for chip in chips:
        found = programs(chip, wanted)
        if not found:
            print(f"{chip}: nothing to compile; the kernel refuses: {gpu_layout.supports(CASES[0])}")
            continue
        try:
            mesh = target(chip)
        except Exception as error:  # the compiler is not installed, or says no
            print(f"{chip}: FAILED {type(error).__name__}: {str(error)[:300]}")
            results += [False] * len(found)
            continue
        print(f"{chip}: {len(found)} programs; pools of {NUM_PAGES} pages")
        results += [report(chip, mesh, program) for program in found]
    print(f"{len(results)} programs, {results.count(False)} failed")
    return 1 if False in results else 0


if __name__ == "__main__":
    sys.exit(main())
