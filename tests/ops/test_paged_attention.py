"""Every backend against a float64 oracle on ragged batches, and what the fast one promises about memory and work."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.ops.paged_attention import BACKENDS, AttentionCase, choose_backend
from tests.ops.ragged import Ragged, make_case, run_laid_out

# Those of other platforms have tests of their own.
BY_NAME = {backend.name: backend for backend in BACKENDS if backend.supports(make_case()) is None}


@functools.cache
def attend(name: str, case: AttentionCase) -> Callable[..., tuple[jax.Array, jax.Array]]:
    backend = BY_NAME[name]

    def run(q, k, v, pool, batch, sinks):
        metadata = backend.prepare(case, batch, 0)
        return run_laid_out(
            backend, case, pool, lambda pool: backend.run(case, q, k, v, pool, batch, 0, metadata, sinks=sinks)
        )

    return jax.jit(run, donate_argnums=(3,))


def check(ragged: Ragged, name: str) -> jax.Array:
    """Run one backend; hold its output and the pages it wrote to the oracle. Returns the output."""
    case = ragged.case
    sinks = None if ragged.sinks is None else jnp.asarray(ragged.sinks)
    before = ragged.given(BY_NAME[name])[0]
    out, pool = attend(name, case)(*ragged.inputs(BY_NAME[name]), jnp.asarray(before, case.dtype), ragged.batch, sinks)
    expected = ragged.expected()
    tolerance = 2e-5 if case.dtype == "float32" else 3e-2
    np.testing.assert_allclose(np.asarray(out, np.float64)[: len(expected)], expected, atol=tolerance, rtol=tolerance)
    held = np.asarray(pool, np.float32)
    table = np.asarray(ragged.batch.page_tables[0])
    for row, (cached, new) in enumerate(ragged.lengths):
        for position in range(cached, cached + new):
            slot = ragged.kept(held[None], table, row, position)
            wrote = ragged.written(row, position)
            np.testing.assert_allclose(slot, wrote, rtol=0 if case.dtype == "float32" else 1e-2)
    return out


# Case, T, S, table width, longest cached part. Few, so that few programs are compiled.
KINDS = (
    (make_case(), 16, 6, 16, 40),
    (make_case(num_heads=6, num_kv_heads=1, head_dim=5, page_size=3, soft_cap=2.0), 24, 3, 20, 36),
    (make_case(num_heads=3, num_kv_heads=3, head_dim=16, page_size=16, window=20), 160, 8, 32, 300),
    (make_case(num_heads=3, num_kv_heads=3, head_dim=16, page_size=16, window=20), 160, 8, 13, 300),  # ring
    (make_case(window=3, has_sinks=True), 16, 8, 6, 60),  # ring
    (make_case(window=9, page_size=1, platform="gpu"), 8, 5, 19, 30),
    (make_case(num_heads=12, num_kv_heads=1, head_dim=20, latent_dim=14), 24, 5, 20, 50),
    (make_case(num_heads=3, num_kv_heads=1, head_dim=9, latent_dim=8, window=9, page_size=2), 8, 2, 10, 40),  # ring
)


@st.composite
def ragged_batches(draw: st.DrawFn) -> Ragged:
    """Any mixture of decodes and chunks that fits."""
    case, num_tokens, num_sequences, width, longest = draw(st.sampled_from(KINDS))
    cached = st.integers(0, longest)
    rows = draw(st.integers(1, num_sequences))
    decodes = draw(st.integers(0, min(rows, num_tokens - 2)))
    lengths = [(draw(cached), 1) for _ in range(decodes)]
    room = num_tokens - decodes
    while len(lengths) < rows and room >= 2:
        new = draw(st.integers(2, room))
        room -= new
        most = longest if case.window is not None else min(longest, width * case.page_size - new)
        lengths.append((draw(st.integers(0, most)), new))
    return Ragged(case, lengths, num_tokens, num_sequences, width, seed=draw(st.integers(0, 2**16)))


@pytest.mark.parametrize("name", BY_NAME)
@settings(max_examples=30, deadline=None)
@given(ragged=ragged_batches())
def test_matches_oracle_and_leaks_no_nan(name: str, ragged: Ragged) -> None:
    check(ragged, name)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (8, 1), (12, 2), (16, 1)])
def test_any_head_ratio_and_dtype(name: str, num_heads: int, num_kv_heads: int) -> None:
    for dtype, num_tokens in (("float32", 2), ("bfloat16", 40)):
        case = make_case(num_heads=num_heads, num_kv_heads=num_kv_heads, dtype=dtype)
        lengths = [(90, 1)] if num_tokens == 2 else [(11, 1), (0, 1), (70, 1), (20, 30)]
        check(Ragged(case, lengths, num_tokens, 8, 32), name)


def test_one_decode_alone() -> None:
    for cached in (0, 3, 4, 63, 64, 150):
        check(Ragged(make_case(), [(cached, 1)], 1, 4, 40), "xla")


def test_empty_batch_is_finite() -> None:
    out = check(Ragged(make_case(), [], 4, 2, 4), "xla")
    assert np.isfinite(np.asarray(out)).all()


def test_ring_equals_full_table() -> None:
    """The same window over a table that holds everything and over the smallest ring."""
    case = make_case(window=7)
    lengths = [(90, 1), (33, 1), (50, 20)]
    smallest = -(-(7 + 20) // case.page_size) + 1
    full = check(Ragged(case, lengths, 32, 4, 30, seed=3), "xla")
    ring = check(Ragged(case, lengths, 32, 4, smallest, seed=3), "xla")
    np.testing.assert_allclose(full[:22], ring[:22], atol=1e-6)


def test_reads_another_layers_pool() -> None:
    """Without k and v, attention reads what the layer that owns the pool wrote this step, and changes nothing."""
    ragged = Ragged(make_case(), [(9, 1), (4, 6)], 8, 4, 8)
    q, k, v = ragged.inputs()
    out, pool = attend("xla", ragged.case)(q, k, v, jnp.asarray(ragged.given(BY_NAME["xla"])[0]), ragged.batch, None)
    before = np.asarray(pool)
    shared, pool = attend("xla", ragged.case)(q, None, None, pool, ragged.batch, None)
    np.testing.assert_array_equal(np.asarray(shared)[:7], np.asarray(out)[:7])
    np.testing.assert_array_equal(np.asarray(pool), before)


# Case, rows that share and how many tokens, lengths, tiles of 128 keys that are read once.
SHARING = (
    (make_case(), (4, 384), [(384, 1), (385, 1), (390, 1), (600, 1)], 3),
    (make_case(), (4, 384), [(383, 1), (385, 1), (390, 1), (600, 1)], 2),  # a newest token is a row's own
    (make_case(), (3, 512), [(520, 1), (900, 1), (555, 1), (0, 3), (70, 2)], 4),  # chunks share nothing
    (
        make_case(num_heads=6, num_kv_heads=3, has_sinks=True, soft_cap=2.0),
        (5, 132),
        [(140 + i, 1) for i in range(5)],
        1,
    ),
    (make_case(num_heads=12, num_kv_heads=1, head_dim=20, latent_dim=14), (3, 260), [(300, 1), (261, 1), (400, 1)], 2),
    (make_case(platform="gpu"), (3, 256), [(300, 1), (261, 1), (400, 1)], 2),
    (make_case(page_size=256), (3, 512), [(600, 1), (700, 1), (512, 1)], 2),  # a tile is a page
    (make_case(), (3, 124), [(300, 1), (261, 1), (400, 1)], 0),  # less than a tile
    (make_case(), (3, 384), [(400, 1), (390, 1), (400, 1), (400, 1)], 0),  # not all of them
    (make_case(), (2, 384), [(400, 1), (390, 7)], 0),  # one alone
    (make_case(), (2, 384), [(400, 4), (390, 4)], 0),
    (make_case(window=100), (3, 384), [(400, 1), (390, 1), (400, 1)], 0),  # the first keys are forgotten
)


@pytest.mark.parametrize(("case", "shared", "lengths", "tiles"), SHARING)
def test_keys_that_decoding_rows_share_are_read_once(
    case: AttentionCase, shared: tuple[int, int], lengths: list[tuple[int, int]], tiles: int
) -> None:
    ragged = Ragged(case, lengths, 8, 8, 256 if case.page_size == 4 else 4, shared=shared)
    metadata = BY_NAME["xla"].prepare(case, ragged.batch, 0)
    assert metadata.num_shared == tiles
    own = [-(-(cached + new) // max(128, case.page_size)) - tiles for cached, new in lengths if new == 1]
    if case.window is None:
        assert metadata.num_tiles == sum(own)
    for name in BY_NAME:
        check(ragged, name)


def test_only_programs_for_decodes_look_for_shared_keys() -> None:
    ragged = Ragged(make_case(), [(390, 1)] * 4, 9, 8, 256, shared=(4, 384))
    assert BY_NAME["xla"].prepare(ragged.case, ragged.batch, 0).num_shared == 0
    check(ragged, "xla")


@pytest.mark.parametrize("num_tokens", [1, 8, 64])
def test_pool_is_updated_in_place(num_tokens: int) -> None:
    """No copy of the pool: it is aliased, and the program's own memory does not grow with it."""
    case = make_case(num_heads=3, num_kv_heads=1, head_dim=16, page_size=16)
    ragged = Ragged(case, [(20, 1)], num_tokens, 8, 8)
    temporaries = []
    for pages in (64, 4096):
        pool = BY_NAME["xla"].abstract_pool(case, pages)
        compiled = attend("xla", case).lower(*ragged.inputs(), pool, ragged.batch, None).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        assert memory.alias_size_in_bytes == pool.size * 4
        temporaries.append(memory.temp_size_in_bytes)
    assert temporaries[0] == temporaries[1]


def test_choice_of_backend() -> None:
    chosen, refusals = choose_backend(make_case())
    assert chosen.name == "xla"
    assert refusals == {
        "pallas_tpu": "the platform is cpu, not tpu",
        "pallas_gpu": "the platform is cpu, not gpu",
    }
    assert choose_backend(make_case(), "reference")[0].name == "reference"
    with pytest.raises(ValueError, match="'fast' is unknown; choose one of: pallas_tpu, pallas_gpu, xla, reference"):
        choose_backend(make_case(), "fast")


def test_refusals_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxinfer.ops import paged_attention

    picky = paged_attention.Backend("picky", lambda case: "head_dim 8 is odd", None, None, None)  # type: ignore[arg-type]
    monkeypatch.setattr(paged_attention, "BACKENDS", (picky, *BACKENDS))
    assert choose_backend(make_case())[1]["picky"] == "head_dim 8 is odd"
    with pytest.raises(ValueError, match="'picky' cannot serve this model: head_dim 8 is odd"):
        choose_backend(make_case(), "picky")
