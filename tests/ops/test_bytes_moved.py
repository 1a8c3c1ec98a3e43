"""What the kernels copy for a step of decodes, counted copy by copy as the simulation begins them, against the keys and
values that must be read."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.ops.paged_attention import AttentionCase
from pallas_kernels.paged_attention import gpu_layout, tpu, tpu_layout
from pallas_kernels.paged_attention.quantized import QuantizedPool
from tests.ops.ragged import Ragged, make_case
from tests.ops.simulation import simulated

bfloat16_case = functools.partial(make_case, dtype="bfloat16", head_dim=128, page_size=16)
GQA, MQA = {"num_heads": 16, "num_kv_heads": 2}, {"num_heads": 12, "num_kv_heads": 1}
RAGGED = bfloat16_case(**GQA), (1500, 333, 701)
SINGLE = bfloat16_case(**MQA), (1500, 700, 16)
WINDOW = bfloat16_case(**GQA, window=1024), (2000, 1100, 1023)
LATENTS = make_case(dtype="bfloat16", page_size=16, num_heads=16, num_kv_heads=1, head_dim=576, latent_dim=512)
# Case, cached keys, programs, and how much may move in all: five programs share the keys of a decode where there are
# few decodes, each reads the queries, and leaves its part in float32 to be merged.
ON_GPUS = {
    "grouped heads": (*RAGGED, 1, 1.1),
    "split decodes": (*RAGGED, 264, 1.15),
    "one kv head": (*SINGLE, 1, 1.1),
    "window": (*WINDOW, 1, 1.1),
    "int8": (bfloat16_case(**GQA, kv_dtype="int8"), RAGGED[1], 1, 1.1),
    "latents": (LATENTS, RAGGED[1], 1, 1.1),
}


@dataclass
class Copies:
    """Bytes of the copies between memory and scratch memory, by what is in memory: the pool's shape, or another's."""

    bytes: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, what: str, ref: Any) -> None:
        """Count, whenever this place of the kernel is passed, a copy of this part of an array."""
        size = int(np.prod(ref.shape)) * jnp.dtype(ref.dtype).itemsize

        def count() -> None:
            with self._lock:
                self.bytes[what] += size

        jax.debug.callback(count)


def _whole(ref: Any) -> Any:
    return getattr(ref, "ref", ref)


def needed_bytes(case: AttentionCase, cached: tuple[int, ...]) -> int:
    """Of the keys and values in the cache that the newest tokens of these sequences see."""
    seen = sum(cached) if case.window is None else sum(min(length, case.window - 1) for length in cached)
    kinds = 2 if case.latent_dim is None else 1
    return seen * case.num_kv_heads * kinds * (2 * case.head_dim if case.kv_dtype is None else case.head_dim + 4)


def passing_bytes(case: AttentionCase, num_rows: int) -> int:
    """Of queries, outputs, new keys and values: what goes in and out anyway."""
    return num_rows * 2 * (case.num_heads + case.num_kv_heads) * case.head_dim * 2


def check(copies: Copies, case: AttentionCase, cached: tuple[int, ...], most: float = 1.1, lanes: int = 0) -> None:
    """most: what may move in all, of what has to. lanes: those that hold a latent on this device, if not as many."""
    needed = needed_bytes(replace(case, head_dim=lanes or case.head_dim), cached)
    assert needed <= copies.bytes["pool read"] <= 1.1 * needed, copies.bytes
    assert copies.bytes.total() <= most * (needed + passing_bytes(case, len(cached))), copies.bytes


def ragged_of(case: AttentionCase, cached: tuple[int, ...]) -> Ragged:
    width = -(-(max(cached) + 1) // case.page_size)
    if case.window is not None:
        width = case.window // case.page_size + 2
    return Ragged(case, [(length, 1) for length in cached], len(cached), len(cached) + 1, width)


@pytest.mark.parametrize(
    ("case", "cached"),
    [
        RAGGED,
        pytest.param(bfloat16_case(**GQA, page_size=64), (1500, 333, 701), marks=pytest.mark.slow),
        pytest.param(*SINGLE, marks=pytest.mark.slow),
        pytest.param(*WINDOW, marks=pytest.mark.slow),
        pytest.param(LATENTS, RAGGED[1], marks=pytest.mark.slow),
    ],
)
def test_tpu(monkeypatch: pytest.MonkeyPatch, case: AttentionCase, cached: tuple[int, ...]) -> None:
    copies, original = Copies(), pltpu.make_async_copy
    pool_shape = tpu.pool_shape(case, len(cached))[1:]

    class Counted:
        def __init__(self, source: Any, target: Any, sem: Any) -> None:
            self._copy = original(source, target, sem)
            self.wait = self._copy.wait
            reads, writes = (_whole(ref).shape[1:] == pool_shape for ref in (source, target))
            self._what, self._ref = "pool read" if reads else "pool write" if writes else "other", source

        def start(self) -> None:
            copies.begin(self._what, self._ref)
            self._copy.start()

    monkeypatch.setattr(pltpu, "make_async_copy", Counted)
    ragged = ragged_of(case, cached)
    rows = tpu.prepare(ragged.batch.page_tables[0], ragged.batch.query_start, ragged.batch.kv_len)

    def run(q: Any, k: Any, v: Any, pool: Any) -> Any:
        return tpu.paged_attention(
            case, q, k, v, pool, rows, ragged.batch.num_tokens, interpret=pltpu.InterpretParams()
        )

    pool = jnp.zeros(tpu.pool_shape(case, len(ragged.pool)), jnp.bfloat16)
    jax.block_until_ready(compiled(run)(*ragged.inputs(), pool))
    jax.effects_barrier()
    lanes = -(-case.head_dim // tpu_layout.LANES) * tpu_layout.LANES  # 11 % more of DeepSeek's latents than of numbers
    check(copies, case, cached, lanes=lanes)


@simulated
@pytest.mark.slow
@pytest.mark.parametrize("name", list(ON_GPUS))
def test_gpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case, cached, programs, most = ON_GPUS[name]
    check(copies_of_gpu(monkeypatch, ragged_of(case, cached), programs), case, cached, most)


@simulated
@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 128])
def test_chunk_on_a_gpu(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """Three tiles, each of which reads the pages before the chunk once for a kv head, in blocks of 128 keys from its
    oldest page on; the chunk's own keys and values are not read from pages."""
    case = bfloat16_case(**GQA, window=window)
    ragged = Ragged(case, [(1500, 40)], 40, 2, 97 if window is None else 12)
    copies = copies_of_gpu(monkeypatch, ragged, 1)
    oldest = [0 if window is None else 1500 + first - window + 1 for first in range(0, 40, 16)]
    blocks = sum(-(-(1500 - key // 16 * 16) // 128) for key in oldest)
    assert copies.bytes["pool read"] == blocks * 128 * 2 * 2 * 128 * 2
    assert copies.bytes["pool write"] == 40 * 2 * 2 * 128 * 2


def copies_of_gpu(monkeypatch: pytest.MonkeyPatch, ragged: Ragged, programs: int) -> Copies:
    """Simulate a step, with so many programs for decodes."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.paged_attention import gpu

    case, copies = ragged.case, Copies()
    pool_shapes = gpu.pool_shape(case, 1)[1:], gpu.scales_shape(case, 1)[1:]

    def counted(original: Callable[..., None], verb: str) -> Callable[..., None]:
        def copy(source: Any, target: Any, *rest: Any, **options: Any) -> None:
            memory = source if verb == "read" else target
            copies.begin(f"pool {verb}" if _whole(memory).shape[1:] in pool_shapes else "other", memory)
            original(source, target, *rest, **options)

        return copy

    monkeypatch.setattr(plgpu, "copy_gmem_to_smem", counted(plgpu.copy_gmem_to_smem, "read"))
    monkeypatch.setattr(plgpu, "copy_smem_to_gmem", counted(plgpu.copy_smem_to_gmem, "write"))
    batch = ragged.batch
    prepared = gpu.prepare(case, ragged.num_tokens, batch.page_tables[0], batch.query_start, batch.kv_len)

    def run(q: Any, k: Any, v: Any, pool: Any) -> Any:
        blocks = gpu_layout.Blocks(keys=64, slots=2, programs=programs)
        interpret = plgpu.InterpretGPUParams()
        return gpu.paged_attention(case, q, k, v, pool, prepared, blocks=blocks, interpret=interpret)

    pool: Any = jnp.zeros(gpu.pool_shape(case, len(ragged.pool)), jnp.dtype(case.kv_dtype or case.dtype))
    if case.kv_dtype is not None:
        pool = QuantizedPool(pool, jnp.zeros(gpu.scales_shape(case, len(ragged.pool))))
    jax.block_until_ready(compiled(run)(*ragged.inputs(), pool))
    jax.effects_barrier()
    return copies


def compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(run, donate_argnums=3, compiler_options={"xla_backend_optimization_level": 0})
