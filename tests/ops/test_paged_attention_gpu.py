"""The GPU kernel, simulated on the CPU with copies, barriers and WGMMA, against the oracle."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.ops import paged_attention_gpu
from jaxinfer.ops.paged_attention import AttentionCase, choose_backend
from pallas_kernels.paged_attention import gpu_layout
from pallas_kernels.paged_attention.cases import CASES
from pallas_kernels.paged_attention.gpu_layout import Blocks, pool_shape
from tests.ops.ragged import Ragged, make_case

NEW_ENOUGH = jax.__version_info__[:2] >= gpu_layout.MIN_JAX
simulated = pytest.mark.skipif(not NEW_ENOUGH, reason="this JAX cannot simulate Mosaic GPU")
gpu_case = functools.partial(
    make_case, platform="gpu", page_size=16, head_dim=64, dtype="bfloat16", num_heads=4, num_kv_heads=2, scale=0.125
)
BLOCKS = Blocks(keys=64, slots=2, programs=1)


@functools.cache
def attend(case: AttentionCase, blocks: Blocks | None, shares: bool) -> Callable[..., tuple[jax.Array, jax.Array]]:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.paged_attention import gpu

    def run(q: Any, k: Any, v: Any, pool: Any, batch: Any, sinks: Any) -> tuple[jax.Array, jax.Array]:
        prepared = gpu.prepare(case, q.shape[0], batch.page_tables[0], batch.query_start, batch.kv_len)
        new = (None, None) if shares else (k, v)
        interpret = plgpu.InterpretGPUParams()
        return gpu.paged_attention(case, q, *new, pool, prepared, sinks, blocks=blocks, interpret=interpret)

    return jax.jit(run, donate_argnums=3, compiler_options={"xla_backend_optimization_level": 0})


def check(ragged: Ragged, blocks: Blocks | None = BLOCKS) -> tuple[np.ndarray, jax.Array]:
    """Hold outputs, padding and every page to the oracle: new slots hold the new tokens, the others what they did."""
    case = ragged.case
    sinks = None if ragged.sinks is None else jnp.asarray(ragged.sinks)
    before = np.zeros(pool_shape(case, ragged.pool.shape[0]), np.float32)
    before[..., : case.head_dim] = ragged.pool
    out, pool = attend(case, blocks, False)(*ragged.inputs(), jnp.asarray(before, case.dtype), ragged.batch, sinks)
    expected, result = ragged.expected(), np.asarray(out, np.float64)
    np.testing.assert_allclose(result[: len(expected)], expected, atol=4e-2, rtol=4e-2)
    assert not result[len(expected) :].any()
    held = np.array(jnp.asarray(ragged.pool, case.dtype), np.float32)
    table = np.asarray(ragged.batch.page_tables[0])
    for row, (cached, new) in enumerate(ragged.lengths):
        for position in range(cached, cached + new):
            page = table[row, position // case.page_size % table.shape[1]]
            wrote = np.stack([ragged.keys[row][position], ragged.values[row][position]])
            held[page, :, :, position % case.page_size] = jnp.asarray(wrote, case.dtype)
    np.testing.assert_array_equal(np.asarray(pool, np.float32)[..., : case.head_dim], held)
    return result, pool


# Case, T, S, table width, longest cached part.
KINDS = (
    (gpu_case(), 24, 5, 16, 200),
    (gpu_case(num_heads=3, num_kv_heads=1, window=70, has_sinks=True), 16, 4, 8, 300),
    (gpu_case(num_kv_heads=4, soft_cap=2.0, head_dim=40), 80, 3, 10, 70),
)


@st.composite
def ragged_batches(draw: st.DrawFn) -> Ragged:
    """Any mixture of decodes and chunks that fits, rows without tokens among them."""
    case, num_tokens, num_sequences, width, longest = draw(st.sampled_from(KINDS))
    lengths, room = [], num_tokens
    for _ in range(draw(st.integers(0, num_sequences))):
        new = min(draw(st.sampled_from((1, 1, 1, 0, 2, 9, 12, 70))), room)
        room -= new
        most = longest if case.window is not None else min(longest, width * case.page_size - new)
        lengths.append((draw(st.integers(0, most)) if new else 0, new))
    return Ragged(case, lengths, num_tokens, num_sequences, width, seed=draw(st.integers(0, 2**16)))


@simulated
@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(ragged=ragged_batches())
def test_matches_oracle_and_leaks_no_nan(ragged: Ragged) -> None:
    check(ragged)


@simulated
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_decodes_and_chunks_together(slots: int) -> None:
    check(Ragged(gpu_case(), [(200, 1), (0, 1), (18, 11)], 16, 4, 16), Blocks(keys=64, slots=slots, programs=1))


@simulated
@pytest.mark.slow
def test_a_tile_holds_one_token_of_many_heads() -> None:
    check(Ragged(gpu_case(num_heads=33, num_kv_heads=1), [(70, 1), (18, 11)], 16, 3, 8))


@simulated
def test_the_keys_of_one_decode_are_split() -> None:
    """Over 4 programs, of which the last have no keys at first; the newest key is in none of the pages."""
    case = gpu_case(num_heads=2, num_kv_heads=1)
    for cached in (0, 300, 1000):
        check(Ragged(case, [(cached, 1)], 1, 2, 64), Blocks(keys=64, slots=2, programs=4))


@simulated
def test_reads_another_layers_pool() -> None:
    """Without k and v, attention reads what the owner of the pool wrote, and changes nothing."""
    ragged = Ragged(gpu_case(), [(70, 1), (18, 11)], 16, 4, 8)
    out, pool = check(ragged)
    before = np.asarray(pool, np.float32)
    shared, pool = attend(ragged.case, BLOCKS, True)(*ragged.inputs(), pool, ragged.batch, None)
    np.testing.assert_allclose(np.asarray(shared, np.float64), out, atol=2e-2)
    np.testing.assert_array_equal(np.asarray(pool, np.float32), before)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "dtype float32 is not one of bfloat16, float16"),
        ({"head_dim": 320}, "head_dim 320 is not in 1..256"),
        ({"page_size": 24}, "page_size 24 is not one of 8, 16, 32, 64, 128"),
        ({"num_heads": 5}, "5 query heads are no multiple of 2 kv heads"),
        ({"num_heads": 130}, "65 query heads of a kv head are more than 64, a tile's rows"),
        ({"window": 0}, "window 0 is less than 1"),
        ({"kv_dtype": "int8"}, "it reads no keys and values of int8"),
    ],
)
def test_refusals(changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_layout, "MIN_JAX", (0, 0))
    assert gpu_layout.supports(gpu_case(**changes)) == reason


def test_other_gpus_get_xla_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention_gpu, "_capability", lambda: "8.0")
    backend, refusals = choose_backend(gpu_case())
    assert (backend.name, refusals["pallas_gpu"]) == ("xla", "the GPU's compute capability is 8.0, not 9.0 (Hopper)")
    monkeypatch.setattr(paged_attention_gpu, "_capability", lambda: "9.0")
    monkeypatch.setattr(gpu_layout, "MIN_JAX", (0, 0))
    backend, refusals = choose_backend(gpu_case())
    assert backend.name == "xla"
    assert "has never run on a GPU" in refusals["pallas_gpu"]
    assert choose_backend(gpu_case(), forced="pallas_gpu")[0].name == "pallas_gpu"
    monkeypatch.setattr(gpu_layout, "MIN_JAX", (99, 0))
    assert "is older than 99.0" in choose_backend(gpu_case())[1]["pallas_gpu"]


@simulated
def test_wrong_arguments_are_refused() -> None:
    from pallas_kernels.paged_attention import gpu

    ragged = Ragged(gpu_case(), [(9, 1)], 1, 2, 4)
    q, k, v = (jnp.asarray(array) for array in ragged.inputs())
    pool = jnp.zeros(pool_shape(ragged.case, 9), jnp.bfloat16)
    prepared = gpu.prepare(ragged.case, 1, ragged.batch.page_tables[0], ragged.batch.query_start, ragged.batch.kv_len)
    with pytest.raises(ValueError, match=r"k has shape \(1, 1, 64\); this case needs \(1, 2, 64\)"):
        gpu.paged_attention(ragged.case, q, k[:, :1], v, pool, prepared)
    with pytest.raises(ValueError, match="one of k and v is None"):
        gpu.paged_attention(ragged.case, q, k, None, pool, prepared)
    with pytest.raises(ValueError, match="the pool is of float32; this case needs bfloat16"):
        gpu.paged_attention(ragged.case, q, k, v, pool.astype(jnp.float32), prepared)
    with pytest.raises(ValueError, match=r"query_start .* do not fit page_table"):
        gpu.prepare(ragged.case, 1, ragged.batch.page_tables[0], ragged.batch.kv_len, ragged.batch.kv_len)


def test_real_models_fit_shared_memory() -> None:
    largest = replace(CASES[0], name="the largest pages and heads", head_dim=256, page_size=128)
    for case in (*CASES, largest):
        if case.dtype not in gpu_layout.DTYPES or case.latent_dim is not None:
            continue
        blocks, shape = gpu_layout.choose_blocks(case), pool_shape(case, 1)
        assert blocks.slots >= (1 if case is largest else 2)
        assert 2 * shape[-1] * (64 + 2 * blocks.keys * blocks.slots) + 128 * blocks.keys <= 229376, case.name
