"""The TPU kernel in interpret mode, which simulates copies and semaphores and raises on a race, against the oracle."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.ops.paged_attention import AttentionCase, choose_backend
from pallas_kernels.merge_attention.reference import merge
from pallas_kernels.paged_attention import tpu, tpu_layout
from pallas_kernels.paged_attention.cases import CASES
from pallas_kernels.paged_attention.tpu_layout import Blocks, Layout, choose_blocks
from tests.ops.ragged import Ragged, make_case

tpu_case = functools.partial(make_case, platform="tpu", page_size=8)
INTERPRET = pltpu.InterpretParams(detect_races=True)
RAISES_ON_RACE = "on_race" in inspect.signature(pltpu.InterpretParams).parameters


@functools.cache
def attend(case: AttentionCase, blocks: Blocks | None) -> Callable[..., tuple[Any, jax.Array]]:
    def run(q: Any, k: Any, v: Any, pool: Any, batch: Any, sinks: Any, place: Any = None) -> tuple[Any, jax.Array]:
        context = {"context": case.context, "place": place}
        rows = tpu.prepare(batch.page_tables[0], batch.query_start, batch.kv_len, **context)
        return tpu.paged_attention(
            case, q, k, v, pool, rows, batch.num_tokens, sinks, blocks=blocks, interpret=INTERPRET
        )

    # Compiling the simulation dominates: fast rather than well.
    return jax.jit(run, donate_argnums=3, compiler_options={"xla_backend_optimization_level": 0})


def to_layout(case: AttentionCase, pool: np.ndarray) -> np.ndarray:
    """[pages, 1 or 2, K, B, H] -> the kernel's; lanes without key or value are 0 where the key is not NaN."""
    layout = Layout.of(case)
    packed = np.zeros(tpu.pool_shape(case, pool.shape[0]), np.float32) + 0 * pool[:, 0, ..., :1]
    packed[..., : case.head_dim] = pool[:, 0]
    if case.latent_dim is None:
        packed[..., layout.value_start :][..., : case.head_dim] = pool[:, 1]
    return packed


def from_layout(case: AttentionCase, pool: jax.Array) -> np.ndarray:
    packed, start = np.asarray(pool, np.float32), Layout.of(case).value_start
    if case.latent_dim is not None:
        return packed[:, None, ..., : case.head_dim]
    return np.stack([packed[..., : case.head_dim], packed[..., start : start + case.head_dim]], axis=1)


def check(ragged: Ragged, blocks: Blocks | None) -> tuple[np.ndarray, jax.Array]:
    """Hold outputs, padding and every page to the oracle: new slots hold the new tokens, the others what they did."""
    case = ragged.case
    sinks = None if ragged.sinks is None else jnp.asarray(ragged.sinks)
    before = to_layout(case, ragged.pool)
    out, pool = attend(case, blocks)(*ragged.inputs(), jnp.asarray(before, case.dtype), ragged.batch, sinks)
    expected, tolerance = ragged.expected(), 2e-5 if case.dtype == "float32" else 4e-2
    result = np.asarray(out, np.float64)
    np.testing.assert_allclose(result[: len(expected)], expected, atol=tolerance, rtol=tolerance)
    assert not result[len(expected) :].any()
    held = np.array(jnp.asarray(ragged.pool, case.dtype), np.float32)
    table = np.asarray(ragged.batch.page_tables[0])
    for row, (cached, new) in enumerate(ragged.lengths):
        for position in range(cached, cached + new):
            page = table[row, position // case.page_size % table.shape[1]]
            wrote = ragged.written(row, position)
            held[page, :, :, position % case.page_size] = jnp.asarray(wrote, case.dtype)
    np.testing.assert_array_equal(from_layout(case, pool), held)
    return result, pool


def check_parts(ragged: Ragged, blocks: Blocks | None) -> None:
    """The same, of devices that share the keys: each one's part, -inf where it has no key, and all merged."""
    case, context = ragged.case, ragged.case.context
    sinks = None if ragged.sinks is None else jnp.asarray(ragged.sinks)
    table, held = np.asarray(ragged.batch.page_tables[0]), np.array(ragged.pools)
    positions = [cached + i for cached, new in ragged.lengths for i in range(new)]
    for row, (cached, new) in enumerate(ragged.lengths):
        for position in range(cached, cached + new):
            ragged.kept(held, table, row, position)[...] = ragged.written(row, position)
    parts = []
    for place in range(context):
        before = jnp.asarray(to_layout(case, ragged.pools[place]), case.dtype)
        (mixed, lse), pool = attend(case, blocks)(*ragged.inputs(), before, ragged.batch, sinks, jnp.int32(place))
        assert (mixed.dtype, lse.dtype) == (jnp.float32, jnp.float32)
        np.testing.assert_array_equal(from_layout(case, pool), np.array(jnp.asarray(held[place], case.dtype), "f4"))
        for token, position in enumerate(positions):
            oldest = 0 if case.window is None else max(0, position - case.window + 1)
            seen = any(p % context == place for p in range(oldest, position + 1)) or (case.has_sinks and place == 0)
            assert bool(np.isfinite(lse[token]).all()) == seen
            assert seen or (np.isneginf(lse[token]).all() and not mixed[token].any())
        parts.append((mixed, lse))
    out, _ = merge(*map(jnp.stack, zip(*parts, strict=True)))
    expected, tolerance = ragged.expected(), 2e-5 if case.dtype == "float32" else 4e-2
    np.testing.assert_allclose(np.asarray(out)[: len(expected)], expected, atol=tolerance, rtol=tolerance)


# Case, blocks, T, S, table width, longest cached part. Few and small: interpreting is slow.
KINDS = (
    (tpu_case(), Blocks(2, 3, 8, 1 << 24), 24, 5, 8, 40),
    (
        tpu_case(num_heads=3, num_kv_heads=1, head_dim=64, window=7, has_sinks=True),
        Blocks(1, 2, 8, 1 << 24),
        16,
        4,
        5,
        60,
    ),
    (
        tpu_case(num_heads=3, num_kv_heads=3, dtype="bfloat16", page_size=16, soft_cap=2.0, window=20),
        Blocks(2, 2, 8, 1 << 24),
        16,
        3,
        5,
        70,
    ),
)


# The same, of devices that share the keys: windows that they do not divide, or less than their number.
STRIPED = (
    (tpu_case(context=2, soft_cap=2.0), Blocks(2, 3, 8, 1 << 24), 24, 5, 8, 40),
    (
        tpu_case(num_heads=3, num_kv_heads=1, head_dim=64, window=7, has_sinks=True, context=3),
        Blocks(1, 2, 8, 1 << 24),
        16,
        4,
        5,
        60,
    ),
    (
        tpu_case(num_heads=3, num_kv_heads=3, dtype="bfloat16", page_size=16, window=3, context=4),
        Blocks(2, 2, 8, 1 << 24),
        16,
        3,
        4,
        70,
    ),
)


@st.composite
def ragged_batches(draw: st.DrawFn, kinds: tuple[Any, ...] = KINDS) -> tuple[Ragged, Blocks]:
    """Any mixture of decodes and chunks that fits, rows without tokens among them."""
    case, blocks, num_tokens, num_sequences, width, longest = draw(st.sampled_from(kinds))
    lengths, room = [], num_tokens
    for _ in range(draw(st.integers(0, num_sequences))):
        new = min(draw(st.sampled_from((1, 1, 1, 0, 2, 9, 12, 20))), room)
        room -= new
        most = longest if case.window is not None else width * case.page_size * case.context - new
        lengths.append((draw(st.integers(0, most)) if new else 0, new))
    return Ragged(case, lengths, num_tokens, num_sequences, width, seed=draw(st.integers(0, 2**16))), blocks


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(batch=ragged_batches())
def test_matches_oracle_leaks_no_nan_and_races_nowhere(batch: tuple[Ragged, Blocks]) -> None:
    check(*batch)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(batch=ragged_batches(STRIPED))
def test_parts_of_devices_that_share_keys(batch: tuple[Ragged, Blocks]) -> None:
    check_parts(*batch)


def test_first_tokens_and_devices_without_keys() -> None:
    case = tpu_case(num_heads=3, num_kv_heads=1, window=13, has_sinks=True, context=2)
    check_parts(Ragged(case, [(0, 1), (33, 1), (0, 2)], 8, 4, 4), Blocks(1, 2, 8, 1 << 24))


def test_rows_of_another_context_are_refused() -> None:
    ragged = Ragged(tpu_case(context=2), [(9, 1)], 1, 2, 4)
    with pytest.raises(ValueError, match=r"context=2, but rows with place=None; prepare them for the same context"):
        attend(ragged.case, None)(*ragged.inputs(), jnp.zeros(tpu.pool_shape(ragged.case, 9)), ragged.batch, None)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "dtype"),
    [(10, 2, 80, "bfloat16"), (2, 1, 192, "float32"), pytest.param(3, 3, 128, "float32", marks=pytest.mark.slow)],
)
def test_head_ratios_and_dims(num_heads: int, num_kv_heads: int, head_dim: int, dtype: str) -> None:
    """Shared lane tiles and padded ones, heads in no whole tiles, blocks as the table chooses them."""
    sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "scale": head_dim**-0.5}
    case = tpu_case(dtype=dtype, page_size=16, **sizes)
    check(Ragged(case, [(37, 1), (0, 1), (18, 11)], 16, 4, 4), None)


@pytest.mark.parametrize(
    ("num_heads", "head_dim", "latent_dim"), [pytest.param(16, 160, 128, marks=pytest.mark.slow), (5, 20, 13)]
)
def test_keys_that_begin_with_their_values(num_heads: int, head_dim: int, latent_dim: int) -> None:
    sizes = {"num_heads": num_heads, "num_kv_heads": 1, "head_dim": head_dim, "latent_dim": latent_dim}
    check(Ragged(tpu_case(**sizes), [(37, 1), (0, 1), (18, 11)], 16, 4, 8), Blocks(2, 3, 8, 1 << 24))


def test_one_decode_alone() -> None:
    for cached in (0, 7, 8, 33):
        check(Ragged(tpu_case(), [(cached, 1)], 1, 2, 6), Blocks(2, 3, 1, 1 << 24))


def test_tables_too_large_for_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu, "TABLE_BYTES", 2 * 8 * 4)
    ragged = Ragged(tpu_case(), [(20, 1), (0, 0), (11, 9)], 16, 3, 8)
    assert len(tpu.prepare(ragged.batch.page_tables[0], ragged.batch.query_start, ragged.batch.kv_len)) == 2
    attend.cache_clear()
    check(ragged, Blocks(2, 2, 8, 1 << 24))
    attend.cache_clear()
    monkeypatch.setattr(tpu, "TABLE_BYTES", 16)
    with pytest.raises(ValueError, match=r"a page table of 8 pages is 32 bytes, more than the 16 .* larger page_size"):
        tpu.prepare(ragged.batch.page_tables[0], ragged.batch.query_start, ragged.batch.kv_len)


def test_reads_another_layers_pool() -> None:
    """Through the backend: without k and v, attention reads what the owner of the pool wrote, and changes nothing."""
    ragged = Ragged(tpu_case(), [(9, 1), (4, 6)], 8, 3, 4)
    backend, refusals = choose_backend(ragged.case)
    assert (backend.name, refusals) == ("pallas_tpu", {})
    out, pool = check(ragged, None)
    before = np.asarray(pool)
    metadata = backend.prepare(ragged.case, ragged.batch, 0)
    with pltpu.force_tpu_interpret_mode(INTERPRET):
        q = jnp.asarray(ragged.inputs()[0])
        shared, pool = backend.run(ragged.case, q, None, None, pool, ragged.batch, 0, metadata)
    np.testing.assert_array_equal(np.asarray(shared), out)
    np.testing.assert_array_equal(np.asarray(pool), before)


@pytest.mark.skipif(not RAISES_ON_RACE, reason="this JAX prints races but does not raise")
def test_a_race_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that does not wait for its pages is caught: the tests above can fail."""
    original = tpu.Kernel.copy_block

    def copy_and_never_wait(self: Any, cursor: Any, slot: Any, *, wait: bool) -> None:
        if not wait:
            original(self, cursor, slot, wait=False)

    monkeypatch.setattr(tpu.Kernel, "copy_block", copy_and_never_wait)
    ragged = Ragged(tpu_case(num_heads=1, num_kv_heads=1), [(9, 1)], 1, 1, 4)
    try:
        with pytest.raises(Exception, match=r"(?i)race|mismatch"):
            check(ragged, None)
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"platform": "gpu"}, "the platform is gpu, not tpu"),
        ({"dtype": "float16"}, "dtype float16 is not one of float32, bfloat16"),
        ({"head_dim": 320}, "head_dim 320 is not in 1..256"),
        ({"head_dim": 641, "num_kv_heads": 1, "latent_dim": 512}, "head_dim 641 is not in 1..640"),
        ({"latent_dim": 9}, "latent_dim 9 is not in 1..8, the head_dim"),
        ({"dtype": "bfloat16"}, "page_size 8 is no multiple of 16, the rows of a tile of bfloat16"),
        ({"num_heads": 5}, "5 query heads are no multiple of 2 kv heads"),
        ({"window": 0}, "window 0 is less than 1"),
        ({"page_size": 8192}, "one page of 2 kv heads needs"),
    ],
)
def test_refusals(changes: dict[str, Any], reason: str) -> None:
    backend, refusals = choose_backend(tpu_case(**changes)) if "num_heads" not in changes else (None, None)
    if backend is None or refusals is None:
        assert tpu_layout.supports(tpu_case(**changes)) == reason
    else:
        assert backend.name == "xla"
        assert refusals["pallas_tpu"].startswith(reason)


def test_wrong_arguments_are_refused() -> None:
    ragged = Ragged(tpu_case(), [(9, 1)], 1, 2, 4)
    q, k, v = (jnp.asarray(array) for array in ragged.inputs())
    pool = jnp.zeros(tpu.pool_shape(ragged.case, 9))
    rows = tpu.prepare(ragged.batch.page_tables[0], ragged.batch.query_start, ragged.batch.kv_len)
    count = ragged.batch.num_tokens
    with pytest.raises(ValueError, match=r"k has shape \(1, 1, 8\); this case needs \(1, 2, 8\)"):
        tpu.paged_attention(ragged.case, q, k[:, :1], v, pool, rows, count)
    with pytest.raises(ValueError, match="one of k and v is None"):
        tpu.paged_attention(ragged.case, q, k, None, pool, rows, count)
    with pytest.raises(ValueError, match="the pool is of bfloat16; this case needs float32"):
        tpu.paged_attention(ragged.case, q, k, v, pool.astype(jnp.bfloat16), rows, count)
    with pytest.raises(ValueError, match="has_sinks=True, but sinks are missing"):
        tpu.paged_attention(replace(ragged.case, has_sinks=True), q, k, v, pool, rows, count)
    with pytest.raises(ValueError, match=r"the page table names page \d+; the pool has pages 0 to 1"):
        tpu.paged_attention(ragged.case, q, k, v, pool[:2], rows, count)


def test_real_models_are_served_and_fit_every_chip() -> None:
    for case in CASES:
        assert tpu_layout.supports(case) is None, case.name
        for chip in ("v5e", "v5p", "v6e", "7x", "a chip nobody tuned"):
            for num_tokens in (1, 8, 2048):
                blocks = choose_blocks(case, num_tokens, 512, chip)
                assert tpu_layout._vmem_bytes(case, blocks) <= blocks.vmem_limit_bytes // 2
                assert blocks.pages >= 1
                assert blocks.slots >= 2
