"""Attention over keys and values of 8 bits: against the oracle of what the pool holds, and of what it was given."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention.quantized import LARGEST, QuantizedPool, quantize
from tests.ops.ragged import Ragged, make_case
from tests.ops.test_paged_attention import BY_NAME, attend
from tests.ops.test_striped_attention import striped

# What 8 bits cost, of the outputs' root mean square, where queries, keys and values are random normal numbers.
LOSS = {"int8": 0.02, "float8_e4m3fn": 0.08}


def check(ragged: Ragged, name: str) -> tuple[jax.Array, QuantizedPool]:
    """Run one backend; hold what it wrote, and what it made of what the pool holds. Returns output and pool."""
    case, sinks = ragged.case, None if ragged.sinks is None else jnp.asarray(ragged.sinks)
    if case.context == 1:
        before = jax.tree.map(lambda leaf: leaf[0], ragged.quantized(ragged.given(BY_NAME[name])))
        out, pool = attend(name, case)(*ragged.inputs(BY_NAME[name]), before, ragged.batch, sinks)
        held = jax.tree.map(lambda leaf: leaf[None], pool)
    else:
        out, pool = striped(name, case)(
            *ragged.inputs(BY_NAME[name]), ragged.quantized(ragged.given(BY_NAME[name])), ragged.batch, sinks
        )
        held = pool
    exact, expected = ragged.expected(), ragged.as_held(held).expected()
    result = np.asarray(out, np.float64)[: len(exact)]
    tolerance = 2e-5 if case.dtype == "float32" else 3e-2
    np.testing.assert_allclose(result, expected, atol=tolerance, rtol=tolerance)
    assert case.kv_dtype is not None
    loss = np.sqrt(np.mean((result - exact) ** 2) / np.mean(exact**2))
    assert loss < LOSS[case.kv_dtype], f"{loss:.3f} of the outputs is lost"
    return out, pool


MANY = [(50, 1), (0, 1), (11, 1), (20, 9), (3, 2)]
KINDS = {
    "grouped queries": make_case(kv_dtype="int8"),
    "sinks, a ring": make_case(window=9, has_sinks=True, kv_dtype="float8_e4m3fn"),
    "latents": make_case(num_heads=12, num_kv_heads=1, head_dim=20, latent_dim=14, kv_dtype="int8"),
    "bfloat16": make_case(num_heads=8, num_kv_heads=1, soft_cap=2.0, dtype="bfloat16", kv_dtype="float8_e4m3fn"),
    "as on a GPU": make_case(num_heads=3, num_kv_heads=3, page_size=1, platform="gpu", kv_dtype="int8"),
    "over 2 devices": make_case(num_heads=6, num_kv_heads=1, context=2, window=20, kv_dtype="int8"),
}


QUICK = ("grouped queries", "latents")


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in QUICK else [pytest.mark.slow]) for k in KINDS])
def test_matches_both_oracles(kind: str, name: str) -> None:
    case = KINDS[kind]
    width = 6 if kind == "sinks, a ring" else -(-60 // case.page_size)
    check(Ragged(case, MANY, 16, 6, width), name)


def test_keys_that_decoding_rows_share() -> None:
    check(Ragged(KINDS["latents"], [(300, 1), (261, 1), (400, 1)], 6, 6, 101, shared=(3, 260)), "xla")


def test_one_decode_alone() -> None:
    for cached in (0, 3, 64):
        check(Ragged(KINDS["grouped queries"], [(cached, 1)], 1, 4, 18), "xla")


@pytest.mark.parametrize("kind", QUICK)
@pytest.mark.parametrize("name", BY_NAME)
def test_a_key_that_is_not_finite_reaches_none_that_do_not_see_it(kind: str, name: str) -> None:
    """Tokens before it in its chunk, and other rows, come out as if it were not there; itself, and after, as NaN."""
    ragged = Ragged(KINDS[kind], [(9, 1), (4, 6)], 16, 6, 15)
    want, _ = check(ragged, name)
    q, k, v = ragged.inputs()
    for bad in (np.nan, np.inf):
        k[5, 0, -1] = bad
        before = jax.tree.map(lambda leaf: leaf[0], ragged.quantized(ragged.given(BY_NAME[name])))
        out, _ = attend(name, ragged.case)(q, k, v, before, ragged.batch, None)
        np.testing.assert_array_equal(np.asarray(out)[:5], np.asarray(want)[:5])
        heads = ragged.case.group_size
        assert np.isnan(np.asarray(out)[5:7, :heads]).all()


@pytest.mark.parametrize("dtype", LARGEST)
def test_numbers_of_any_size(dtype: str) -> None:
    """Zeros, the least and the largest float32 numbers: nothing overflows, what is lost is small beside the largest."""
    x = np.outer([0, 1e-38, 1e-29, 1e-3, 1, 1e5, 3e38], np.linspace(-1, 1, 16)).astype(np.float32)
    data, scales = (np.asarray(leaf, np.float64) for leaf in quantize(jnp.asarray(x), dtype))
    assert np.isfinite(data).all()
    assert np.abs(data).max() == LARGEST[dtype]
    lost = np.abs(data * scales[:, None] - x).max(-1)
    assert (lost <= np.abs(x).max(-1) / (254 if dtype == "int8" else 28) + 1e-37).all(), lost


def test_pool_is_updated_in_place() -> None:
    case = make_case(num_heads=3, num_kv_heads=1, head_dim=16, page_size=16, kv_dtype="int8")
    ragged, temporaries = Ragged(case, [(20, 1)], 16, 8, 8), []
    for pages in (64, 4096):
        pool = BY_NAME["xla"].abstract_pool(case, pages)
        compiled = attend("xla", case).lower(*ragged.inputs(), pool, ragged.batch, None).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        assert memory.alias_size_in_bytes == pages * 2 * 16 * (16 + 4)
        temporaries.append(memory.temp_size_in_bytes)
    assert temporaries[0] == temporaries[1]


@pytest.mark.slow
def test_reads_another_layers_pool() -> None:
    ragged = Ragged(KINDS["grouped queries"], [(9, 1), (4, 6)], 16, 6, 15)
    out, pool = check(ragged, "xla")
    before = jax.tree.map(np.asarray, pool)
    shared, pool = attend("xla", ragged.case)(ragged.inputs()[0], None, None, pool, ragged.batch, None)
    np.testing.assert_array_equal(np.asarray(shared)[:7], np.asarray(out)[:7])
    jax.tree.map(np.testing.assert_array_equal, pool, before)
