"""The TPU kernel over keys and values of 8 bits, simulated, which raises on a race: against the oracle of what the pool
holds."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.ops.paged_attention import AttentionCase, choose_backend
from pallas_kernels.paged_attention import tpu, tpu_layout
from pallas_kernels.paged_attention.quantized import QuantizedPool
from pallas_kernels.paged_attention.tpu_layout import LANES, PIECE, Blocks, Layout
from tests.ops.ragged import Ragged, make_case
from tests.ops.test_paged_attention_tpu import attend, from_layout, to_layout

tpu_case = functools.partial(make_case, platform="tpu", page_size=32, kv_dtype="int8")


def packed(case: AttentionCase, scales: np.ndarray) -> np.ndarray:
    """[pages, kinds, K, B] -> the kernel's [pages, B / 32, R, 128]; lanes of no head hold NaN."""
    pages, kinds, heads, size = scales.shape
    by_tile = scales.reshape(pages, kinds, heads, size // PIECE, PIECE).transpose(0, 3, 2, 1, 4)
    result = np.full(tpu.scales_shape(case, pages), np.nan, np.float32)
    result.reshape(pages, size // PIECE, -1)[..., : kinds * heads * PIECE] = by_tile.reshape(pages, size // PIECE, -1)
    return result


def unpacked(case: AttentionCase, scales: jax.Array) -> np.ndarray:
    pages, tiles, rows, _ = scales.shape
    kinds, heads = Layout.of(case).kinds, case.num_kv_heads
    by_tile = np.asarray(scales).reshape(pages, tiles, rows * LANES)[..., : kinds * heads * PIECE]
    return by_tile.reshape(pages, tiles, heads, kinds, PIECE).transpose(0, 3, 2, 1, 4).reshape(pages, kinds, heads, -1)


def run(ragged: Ragged, blocks: Blocks | None, *inputs: np.ndarray | None) -> tuple[np.ndarray, QuantizedPool]:
    """Output, and the pool as plain backends lay it out."""
    case, sinks = ragged.case, None if ragged.sinks is None else jnp.asarray(ragged.sinks)
    held = ragged.quantized(ragged.pool)
    data = to_layout(case, np.asarray(held.data, np.float32)).astype(held.data.dtype)
    before = QuantizedPool(jnp.asarray(data), jnp.asarray(packed(case, held.scales)))
    out, pool = attend(case, blocks)(*(inputs or ragged.inputs()), before, ragged.batch, sinks)
    after = QuantizedPool(from_layout(case, pool.data), unpacked(case, pool.scales))
    return np.asarray(out, np.float64), after


def check(ragged: Ragged, blocks: Blocks | None) -> np.ndarray:
    """Hold outputs, padding and every slot to the oracle: new ones hold the new tokens, the others what they did."""
    case, table = ragged.case, np.asarray(ragged.batch.page_tables[0])
    result, after = run(ragged, blocks)
    expected = ragged.as_held(jax.tree.map(lambda leaf: leaf[None], after)).expected()
    tolerance = 2e-5 if case.dtype == "float32" else 4e-2
    np.testing.assert_allclose(result[: len(expected)], expected, atol=tolerance, rtol=tolerance)
    assert not result[len(expected) :].any()
    before = ragged.quantized(ragged.pool)
    for old, new in ((np.array(before.data, np.float32), after.data), (before.scales, after.scales)):
        for row, (cached, count) in enumerate(ragged.lengths):
            for position in range(cached, cached + count):
                page = table[row, position // case.page_size % table.shape[1]]
                old[page, :, :, position % case.page_size] = new[page, :, :, position % case.page_size]
        np.testing.assert_array_equal(new, old)
    return result


# Case, blocks, lengths, T, S, table width. Blocks of less and of more than 128 keys, heads in no whole rows of scales,
# pages of several tiles, rings, tiles that are written in part.
KINDS = {
    "int8": (tpu_case(), Blocks(2, 3, 8, 1 << 24), [(37, 1), (0, 1), (0, 0), (61, 12)], 16, 5, 4),
    "float8, rings of pages of two tiles": (
        tpu_case(
            num_heads=6,
            num_kv_heads=3,
            head_dim=64,
            page_size=64,
            window=20,
            has_sinks=True,
            scale=0.1,
            kv_dtype="float8_e4m3fn",
        ),
        Blocks(1, 2, 8, 1 << 24),
        [(150, 1), (118, 20), (0, 1)],
        24,
        3,
        3,
    ),
    "bfloat16": (
        tpu_case(num_heads=10, num_kv_heads=5, soft_cap=2.0, dtype="bfloat16"),
        Blocks(5, 2, 8, 1 << 24),
        [(150, 1), (40, 9), (31, 1)],
        16,
        3,
        6,
    ),
    "latents": (
        tpu_case(num_heads=12, num_kv_heads=1, head_dim=20, latent_dim=14),
        Blocks(2, 3, 8, 1 << 24),
        [(37, 1), (18, 11)],
        16,
        3,
        3,
    ),
    "float8 latents, blocks as chosen": (
        tpu_case(num_heads=4, num_kv_heads=1, head_dim=160, latent_dim=128, scale=0.1, kv_dtype="float8_e4m3fn"),
        None,
        [(70, 1), (18, 11)],
        16,
        3,
        5,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_matches_oracle_and_races_nowhere(kind: str) -> None:
    case, blocks, lengths, *sizes = KINDS[kind]
    check(Ragged(case, lengths, *sizes), blocks)


@pytest.mark.slow
def test_one_decode_alone() -> None:
    for cached in (0, 31, 32, 130):
        check(Ragged(tpu_case(), [(cached, 1)], 1, 2, 6), Blocks(2, 3, 1, 1 << 24))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "latents"])
def test_a_key_that_is_not_finite_reaches_none_that_do_not_see_it(kind: str) -> None:
    case, blocks, _, *sizes = KINDS[kind]
    ragged = Ragged(case, [(9, 1), (4, 6)], *sizes)
    want = check(ragged, blocks)
    q, k, v = ragged.inputs()
    k[5, 0, -1] = np.nan
    out, _ = run(ragged, blocks, q, k, v)
    np.testing.assert_array_equal(out[:5], want[:5])
    assert np.isnan(out[5:7, : case.group_size]).all()


@pytest.mark.slow
def test_tables_too_large_for_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool's two arrays are passed on from call to call."""
    monkeypatch.setattr(tpu, "TABLE_BYTES", 2 * 4 * 4)
    attend.cache_clear()
    check(Ragged(tpu_case(), [(20, 1), (40, 9), (3, 1)], 16, 3, 4), Blocks(2, 2, 8, 1 << 24))
    attend.cache_clear()


def test_what_is_served() -> None:
    assert choose_backend(tpu_case())[0].name == "pallas_tpu"
    assert (
        tpu_layout.supports(tpu_case(page_size=16)) == "page_size 16 is no multiple of 32, the rows of a tile of int8"
    )
    assert tpu_layout.supports(tpu_case(kv_dtype="int4")) == "kv_dtype int4 is not one of int8, float8_e4m3fn"
    # A token of 8 heads of 128 numbers: 2048 bytes, and 64 of scales.
    llama = tpu_case(num_heads=32, num_kv_heads=8, head_dim=128)
    backend, _ = choose_backend(llama)
    pool = backend.abstract_pool(llama, 1)
    assert (pool.data.size, pool.scales.size * 4) == (32 * 2048, 32 * 64)


def test_wrong_pools_are_refused() -> None:
    ragged = Ragged(tpu_case(), [(9, 1)], 1, 2, 4)
    q, k, v = (jnp.asarray(array) for array in ragged.inputs())
    rows = tpu.prepare(ragged.batch.page_tables[0], ragged.batch.query_start, ragged.batch.kv_len)
    data, scales = jnp.zeros(tpu.pool_shape(ragged.case, 9), jnp.int8), jnp.zeros(tpu.scales_shape(ragged.case, 8))
    for pool, message in (
        (data, "kv_dtype=int8, but the pool is"),
        (QuantizedPool(data, scales), r"pool.scales has shape \(8, 1, 1, 128\); this case needs \(9, 1, 1, 128\)"),
        (QuantizedPool(data.astype(jnp.float32), jnp.zeros((9, 1, 1, 128))), "the pool is of float32; .* needs int8"),
    ):
        with pytest.raises(ValueError, match=message):
            tpu.paged_attention(ragged.case, q, k, v, pool, rows, ragged.batch.num_tokens)
