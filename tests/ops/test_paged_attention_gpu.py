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
from pallas_kernels import mosaic_gpu
from pallas_kernels.merge_attention.reference import merge
from pallas_kernels.paged_attention import gpu_layout
from pallas_kernels.paged_attention.cases import CASES, FP8
from pallas_kernels.paged_attention.gpu_layout import Blocks, ChunkBlocks, Layout, pool_shape
from tests.ops.ragged import Ragged, make_case
from tests.ops.simulation import simulated

gpu_case = functools.partial(
    make_case, platform="gpu", page_size=16, head_dim=64, dtype="bfloat16", num_heads=4, num_kv_heads=2, scale=0.125
)
BLOCKS, CHUNK_BLOCKS = Blocks(keys=64, slots=2, programs=1), ChunkBlocks(keys=64, slots=2)


@functools.cache
def attend(
    case: AttentionCase,
    blocks: Blocks | None,
    shares: bool,
    chunk_blocks: ChunkBlocks | None = CHUNK_BLOCKS,
    detect_races: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.paged_attention import gpu

    def run(q: Any, k: Any, v: Any, pool: Any, batch: Any, sinks: Any, place: Any) -> tuple[Any, Any]:
        place = None if case.context == 1 else place
        prepared = gpu.prepare(case, q.shape[0], batch.page_tables[0], batch.query_start, batch.kv_len, place)
        new = (None, None) if shares else (k, v)
        interpret = plgpu.InterpretGPUParams(detect_races=detect_races)
        options = {"blocks": blocks, "chunk_blocks": chunk_blocks, "interpret": interpret}
        return gpu.paged_attention(case, q, *new, pool, prepared, sinks, **options)

    return jax.jit(run, donate_argnums=3, compiler_options={"xla_backend_optimization_level": 0})


def check(
    ragged: Ragged,
    blocks: Blocks | None = BLOCKS,
    chunk_blocks: ChunkBlocks | None = CHUNK_BLOCKS,
    detect_races: bool = False,
) -> tuple[np.ndarray, Any]:
    """Hold outputs, padding and every page to the oracle: new slots hold the new tokens, the others what they did.

    Returns the outputs, and the pool of the last of the devices that share the keys.
    """
    case, sinks = ragged.case, None if ragged.sinks is None else jnp.asarray(ragged.sinks)
    before: Any = jnp.asarray(ragged.pools, case.dtype) if case.kv_dtype is None else ragged.quantized(ragged.pools)
    num_pages, parts, pools, pool = ragged.pools.shape[1], [], [], None

    def padded(array: Any) -> jax.Array:
        if array.ndim < 5:
            return jnp.asarray(array)
        whole = np.zeros(pool_shape(case, num_pages), np.float32)
        whole[..., : case.head_dim] = array
        return jnp.asarray(whole, array.dtype)

    def cut(array: jax.Array) -> np.ndarray:
        return np.asarray(array, np.float32)[..., : case.head_dim] if array.ndim == 5 else np.asarray(array)

    for place in range(case.context):
        own = jax.tree.map(lambda leaf, place=place: padded(leaf[place]), before)
        out, pool = attend(case, blocks, False, chunk_blocks, detect_races)(
            *ragged.inputs(), own, ragged.batch, sinks, jnp.int32(place)
        )
        parts.append(out)
        pools.append(jax.tree.map(cut, pool))
    out = parts[0] if case.context == 1 else merge(*map(jnp.stack, zip(*parts, strict=True)))[0]
    after = jax.tree.map(lambda *leaves: np.stack(leaves), *pools)
    result = np.asarray(out, np.float64)
    expected = (ragged if case.kv_dtype is None else ragged.as_held(after)).expected()
    np.testing.assert_allclose(result[: len(expected)], expected, atol=4e-2, rtol=4e-2)
    assert not result[len(expected) :].any()
    table = np.asarray(ragged.batch.page_tables[0])
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        held = np.array(old, np.float32)
        for row, (cached, count) in enumerate(ragged.lengths):
            for position in range(cached, cached + count):
                wrote = ragged.kept(new, table, row, position)
                if case.kv_dtype is None:
                    wrote = jnp.asarray(ragged.written(row, position), case.dtype)
                ragged.kept(held, table, row, position)[...] = wrote
        np.testing.assert_array_equal(new, held)
    return result, pool


# Case, T, S, table width, longest cached part.
KINDS = (
    (gpu_case(), 24, 5, 16, 200),
    (gpu_case(num_heads=3, num_kv_heads=1, window=70, has_sinks=True), 16, 4, 8, 300),
    (gpu_case(num_kv_heads=4, soft_cap=2.0, head_dim=40), 160, 3, 16, 70),
    (gpu_case(kv_dtype="int8", num_heads=3, num_kv_heads=1, window=70, has_sinks=True), 16, 4, 8, 300),
    (gpu_case(kv_dtype=FP8, soft_cap=2.0, head_dim=128, page_size=32), 24, 4, 7, 150),
    (gpu_case(num_kv_heads=1, head_dim=96, latent_dim=70, page_size=8), 16, 3, 16, 100),
    (gpu_case(context=2, window=50, has_sinks=True), 16, 4, 5, 300),
)
# Values for two warpgroups; 70 heads of a key, on two tiles.
LATENTS = gpu_case(num_heads=70, num_kv_heads=1, head_dim=320, latent_dim=280, scale=0.06)


@st.composite
def ragged_batches(draw: st.DrawFn) -> Ragged:
    """Any mixture of decodes and chunks that fits, rows without tokens among them."""
    case, num_tokens, num_sequences, width, longest = draw(st.sampled_from(KINDS))
    lengths, room = [], num_tokens
    for _ in range(draw(st.integers(0, num_sequences))):
        new = min(draw(st.sampled_from((1, 1, 1, 0, 2, 9, 12, 70, 140))), room)
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
@pytest.mark.parametrize("slots", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_decodes_and_chunks_together(slots: int) -> None:
    ragged = Ragged(gpu_case(), [(200, 1), (0, 1), (18, 11)], 16, 4, 16)
    check(ragged, Blocks(keys=64, slots=slots, programs=1), ChunkBlocks(keys=64, slots=slots))


# Case, (cached, new) of each row, width of a page table.
CHUNKS = {
    "a window over a ring": (
        gpu_case(num_heads=3, num_kv_heads=1, window=70, has_sinks=True),
        [(150, 1), (300, 60), (5, 45)],
        9,
    ),
    "tiles of 64 tokens": (gpu_case(), [(9, 1), (40, 150), (0, 3), (130, 2)], 16),
    "a head for each key, and a soft cap": (gpu_case(num_kv_heads=4, soft_cap=2.0, head_dim=40), [(70, 200)], 20),
    "one kv head": (gpu_case(num_heads=12, num_kv_heads=1, head_dim=128), [(3, 1), (300, 25), (0, 30)], 24),
    "head dim 128": (gpu_case(head_dim=128, num_heads=8), [(3, 1), (300, 90), (0, 40)], 30),
    "head dim 192, float16, pages of two blocks": (
        gpu_case(head_dim=192, num_kv_heads=1, dtype="float16", page_size=128),
        [(140, 90)],
        3,
    ),
    "head dim 256, a window and a soft cap": (gpu_case(head_dim=256, window=100, soft_cap=5.0), [(200, 90)], 24),
    "pages of 8": (gpu_case(page_size=8), [(131, 1), (61, 75), (0, 2)], 20),
    "heads of two tiles": (gpu_case(num_heads=70, num_kv_heads=1), [(70, 1), (18, 11)], 8),
}


@simulated
@pytest.mark.parametrize(
    "name",
    [name if index == 0 else pytest.param(name, marks=pytest.mark.slow) for index, name in enumerate(CHUNKS)],
)
def test_chunks(name: str) -> None:
    """Of several tiles each, beside decodes, with and without a cache before them; in blocks as the table has them."""
    case, lengths, width = CHUNKS[name]
    num_tokens = sum(new for _, new in lengths) + 3
    check(Ragged(case, lengths, num_tokens, len(lengths) + 1, width), chunk_blocks=None)


@simulated
@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "lengths"),
    [
        ({}, [(30, 1), (48, 150), (320, 2)]),
        ({"num_kv_heads": 1, "window": 100, "soft_cap": 2.0, "has_sinks": True}, [(320, 130)]),
        ({"head_dim": 128, "num_kv_heads": 1}, [(5, 1), (256, 40)]),
    ],
    ids=["several tiles", "a window", "two pieces to clean"],
)
def test_no_races(changes: dict[str, Any], lengths: list[tuple[int, int]]) -> None:
    """Simulated so that races raise, as far as the simulator sees them. The chunks begin with a page: of others the
    first page is copied while it is written, and what may come of that is zeroed."""
    num_tokens = sum(new for _, new in lengths) + 3
    check(Ragged(gpu_case(**changes), lengths, num_tokens, len(lengths) + 1, 32), detect_races=True)


def test_tiles_of_chunks() -> None:
    """Rows for two warpgroups that take turns, where they do."""
    assert Layout.of(gpu_case()).tile_tokens == 64
    assert Layout.of(gpu_case(num_heads=14)).tile_tokens == 18
    for changes in ({"kv_dtype": "int8"}, {"context": 2}, {"num_kv_heads": 1, "latent_dim": 64}, {"scale": -1.0}):
        case = gpu_case(**changes)
        assert Layout.of(case).tile_tokens == 64 // case.group_size


@simulated
@pytest.mark.parametrize("kv_dtype", ["int8", pytest.param(FP8, marks=pytest.mark.slow)])
def test_keys_of_8_bits(kv_dtype: str) -> None:
    """Scales of other rows, of padding and of slots that nobody wrote are NaN, and so are float8's numbers there."""
    check(Ragged(gpu_case(kv_dtype=kv_dtype), [(100, 1), (18, 5)], 8, 3, 8))


@simulated
def test_a_key_that_begins_with_its_value() -> None:
    check(Ragged(LATENTS, [(70, 1)], 1, 2, 6))


@simulated
@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", [None, "int8", FP8])
def test_keys_that_begin_with_their_values(kv_dtype: str | None) -> None:
    """In chunks, and in a decode that is split."""
    case = replace(LATENTS, kv_dtype=kv_dtype)
    check(Ragged(case, [(70, 1), (60, 9)], 10, 3, 6))
    check(Ragged(case, [(600, 1)], 1, 2, 40), Blocks(keys=64, slots=2, programs=6))


@simulated
@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"kv_dtype": "int8"}, {"kv_dtype": FP8, "window": 40, "has_sinks": True}])
def test_parts_of_shared_keys_merge_to_the_whole(changes: dict[str, Any]) -> None:
    """Of three devices: chunks that begin on any of them, first tokens that two of them do not see, split decodes."""
    check(Ragged(gpu_case(context=3, **changes), [(0, 1), (1, 1), (200, 1), (0, 7), (46, 70)], 80, 6, 8))
    check(Ragged(gpu_case(context=3, **changes), [(900, 1)], 1, 2, 24), Blocks(keys=64, slots=2, programs=4))


@simulated
@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["int8", FP8])
def test_a_key_that_is_not_finite_reaches_none_that_do_not_see_it(kv_dtype: str) -> None:
    ragged = Ragged(gpu_case(kv_dtype=kv_dtype), [(9, 1), (4, 6)], 8, 3, 4)
    want, pool = check(ragged)
    q, k, v = ragged.inputs()
    k[5, 0, -1] = np.nan
    out, _ = attend(ragged.case, BLOCKS, False)(q, k, v, pool, ragged.batch, None, jnp.int32(0))
    np.testing.assert_array_equal(np.asarray(out, np.float64)[:5], want[:5])
    assert np.isnan(out[5:7, : ragged.case.group_size]).all()


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
    shared, pool = attend(ragged.case, BLOCKS, True)(*ragged.inputs(), pool, ragged.batch, None, jnp.int32(0))
    np.testing.assert_allclose(np.asarray(shared, np.float64), out, atol=2e-2)
    np.testing.assert_array_equal(np.asarray(pool, np.float32), before)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "dtype float32 is not one of bfloat16, float16"),
        ({"head_dim": 320}, "head_dim 320 is not in 1..256"),
        ({"page_size": 24}, "page_size 24 is not one of 8, 16, 32, 64, 128"),
        ({"num_heads": 5}, "5 query heads are no multiple of 2 kv heads"),
        ({"window": 0}, "window 0 is less than 1"),
        ({"kv_dtype": "int4"}, "kv_dtype int4 is not one of int8, float8_e4m3fn"),
        ({"num_kv_heads": 1, "head_dim": 640, "latent_dim": 512}, "head_dim 640 is not in 1..576"),
        ({"num_kv_heads": 1, "head_dim": 576, "latent_dim": 520}, "latent_dim 520 is not in 1..512"),
        ({"latent_dim": 64}, "latent_dim 64 with 2 kv heads, where all heads share one latent"),
        (
            {"num_kv_heads": 1, "head_dim": 576, "latent_dim": 512, "page_size": 128},
            "page_size 128 needs 238592 bytes of shared memory, more than 231424",
        ),
    ],
)
def test_refusals(changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic_gpu, "MIN_JAX", (0, 0))
    assert gpu_layout.supports(gpu_case(**changes)) == reason


def test_other_gpus_get_xla_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention_gpu, "_capability", lambda: "8.0")
    backend, refusals = choose_backend(gpu_case())
    assert (backend.name, refusals["pallas_gpu"]) == ("xla", "the GPU's compute capability is 8.0, not 9.0 (Hopper)")
    monkeypatch.setattr(paged_attention_gpu, "_capability", lambda: "9.0")
    monkeypatch.setattr(mosaic_gpu, "MIN_JAX", (0, 0))
    backend, refusals = choose_backend(gpu_case())
    assert backend.name == "xla"
    assert "has never run on a GPU" in refusals["pallas_gpu"]
    assert choose_backend(gpu_case(), forced="pallas_gpu")[0].name == "pallas_gpu"
    monkeypatch.setattr(mosaic_gpu, "MIN_JAX", (99, 0))
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
    with pytest.raises(ValueError, match=r"the page table names page \d+; the pool has pages 0 to 1"):
        gpu.paged_attention(ragged.case, q, k, v, pool[:2], prepared)
    with pytest.raises(ValueError, match="context=2, but place=None"):
        gpu.prepare(
            replace(ragged.case, context=2),
            1,
            ragged.batch.page_tables[0],
            ragged.batch.query_start,
            ragged.batch.kv_len,
        )
    with pytest.raises(ValueError, match=r"query_start .* do not fit page_table"):
        gpu.prepare(ragged.case, 1, ragged.batch.page_tables[0], ragged.batch.kv_len, ragged.batch.kv_len)


def test_real_models_fit_shared_memory() -> None:
    largest = replace(CASES[0], name="the largest pages and heads", head_dim=256, page_size=128)
    for case in (*CASES, largest):
        if case.dtype in gpu_layout.DTYPES:
            blocks = gpu_layout.choose_blocks(case)
            assert blocks.slots >= (1 if case is largest else 2), case.name
            assert gpu_layout.shared_bytes(case, blocks) <= gpu_layout.SHARED_BYTES, case.name
            chunk_blocks = gpu_layout.choose_chunk_blocks(case)
            assert not gpu_layout.takes_turns(case) or chunk_blocks.slots >= 2, case.name
