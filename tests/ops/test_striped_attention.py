"""Attention whose keys several devices share, against the oracle of the whole. The devices are lanes of a `vmap`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.ops.paged_attention import BACKENDS, AttentionCase, attend, choose_backend, prepare
from jaxinfer.ops.paged_attention_context import describe, rounds
from jaxinfer.sharding.spmd import all_parts, by_device, in_order, own_part, rows_at
from pallas_kernels import mosaic_gpu
from pallas_kernels.paged_attention import gpu_layout
from tests.ops.ragged import Ragged, make_case, run_laid_out

BY_NAME = {backend.name: backend for backend in BACKENDS if backend.supports(make_case(context=2)) is None}


@functools.cache
def striped(name: str, case: AttentionCase) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """q, k, v [T, ...], pools [C, ...], batch, sinks -> out [T, N, H], pools."""
    backend = BY_NAME[name]

    def run(q, k, v, pools, batch, sinks):
        def on_device(q, k, v, pool):
            metadata = prepare(backend, case, batch, 0)
            return run_laid_out(
                backend, case, pool, lambda pool: attend(backend, case, q, k, v, pool, batch, 0, metadata, sinks)
            )

        def parts(rows):
            return by_device(rows, case.context).reshape(case.context, -1, *rows.shape[1:])

        q, k, v = jax.tree.map(parts, (q, k, v))
        out, pools = jax.vmap(on_device, axis_name="context")(q, k, v, pools)
        return in_order(out.reshape(-1, *out.shape[2:]), case.context), pools

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


def check(ragged: Ragged, name: str) -> jax.Array:
    """Run one backend on all devices; hold its output and what each device wrote to the oracle. Returns the pools."""
    case, sinks = ragged.case, None if ragged.sinks is None else jnp.asarray(ragged.sinks)
    before = ragged.given(BY_NAME[name])
    out, pools = striped(name, case)(
        *ragged.inputs(BY_NAME[name]), jnp.asarray(before, case.dtype), ragged.batch, sinks
    )
    expected = ragged.expected()
    np.testing.assert_allclose(np.asarray(out, np.float64)[: len(expected)], expected, atol=2e-5, rtol=2e-5)
    table, held = np.asarray(ragged.batch.page_tables[0]), np.array(pools)
    for row, (cached, new) in enumerate(ragged.lengths):
        for position in range(cached, cached + new):
            kept = ragged.kept(held, table, row, position)
            np.testing.assert_array_equal(kept, ragged.written(row, position))
            kept[...] = ragged.kept(before, table, row, position)
    np.testing.assert_array_equal(held[:, 1:], before[:, 1:], err_msg="other slots were written to")
    return pools


# Case, T, S, table width, longest cached part. Few, so that few programs are compiled: windows that the devices do not
# divide (rings), pages of one slot, more rows than are tiled at once, what a GPU does where a CPU does otherwise.
KINDS = (
    (make_case(context=2), 16, 6, 9, 40),
    (
        make_case(num_heads=6, num_kv_heads=1, head_dim=5, page_size=3, soft_cap=2.0, window=20, context=3),
        150,
        20,
        19,
        90,
    ),
    (make_case(page_size=1, window=3, has_sinks=True, context=4), 16, 8, 6, 60),
    (
        make_case(num_heads=3, num_kv_heads=1, head_dim=9, latent_dim=8, page_size=2, platform="gpu", context=4),
        8,
        5,
        8,
        50,
    ),
)


@st.composite
def ragged_batches(draw: st.DrawFn) -> Ragged:
    """Any mixture of decodes and chunks that fits; short sequences leave devices without keys."""
    case, num_tokens, num_sequences, width, longest = draw(st.sampled_from(KINDS))
    cached = st.one_of(st.integers(0, case.context), st.integers(0, longest))
    rows = draw(st.integers(1, num_sequences))
    decodes = draw(st.integers(0, min(rows, num_tokens - 2)))
    lengths = [(draw(cached), 1) for _ in range(decodes)]
    room = num_tokens - decodes
    while len(lengths) < rows and room >= 2:
        new = draw(st.integers(2, room))
        room -= new
        fits = width * case.page_size * case.context - new
        lengths.append((draw(cached) if case.window is not None else min(draw(cached), fits), new))
    return Ragged(case, lengths, num_tokens, num_sequences, width, seed=draw(st.integers(0, 2**16)))


@pytest.mark.parametrize("name", BY_NAME)
@settings(max_examples=15, deadline=None)
@given(ragged=ragged_batches())
def test_parts_merge_to_the_oracle(name: str, ragged: Ragged) -> None:
    check(ragged, name)


def test_first_tokens_and_empty_devices() -> None:
    """A first token is seen by one device alone; a decode of any length up to twice the devices, with sinks."""
    case, *sizes = KINDS[2][:4]
    check(Ragged(case, [(cached, 1) for cached in range(8)], *sizes), "xla")
    check(Ragged(case, [(0, 1), (0, 2), (1, 3)], *sizes), "xla")
    check(Ragged(case, [], *sizes), "xla")


def test_keys_that_decoding_rows_share() -> None:
    """Two tiles on each of two devices; beyond them the first row has a key on one device alone."""
    case = KINDS[0][0]
    ragged = Ragged(case, [(512, 1), (513, 1), (530, 1)], 6, 6, 80, shared=(3, 512))
    backend = BY_NAME["xla"]

    def num_shared(_):
        return prepare(backend, case, ragged.batch, 0).metadata.num_shared

    assert jax.vmap(num_shared, axis_name="context")(jnp.arange(2)).tolist() == [2, 2]
    check(ragged, "xla")


TRAVELS = (  # the cached and new tokens of each row, and whether their keys are few enough to travel: of 4 pages
    ([(0, 16)], True),
    ([(17, 15)], True),
    ([(24, 9)], False),
    ([(0, 1), (8, 1), (3, 5), (7, 2)], False),  # 1, 2, 1 and 2
    ([(0, 1), (7, 1), (0, 14)], True),
)


def test_the_cheaper_form_is_taken() -> None:
    """Of each piece of rows too: chunks begin, end and lie within any."""
    case, *sizes = KINDS[0][:4]
    backend = BY_NAME["xla"]

    def is_cheaper(place, batch):
        return prepare(backend, case, batch, 0).keys.is_cheaper

    chosen = jax.jit(jax.vmap(is_cheaper, axis_name="context", in_axes=(0, None)))
    for lengths, keys_travel in TRAVELS:
        ragged = Ragged(case, lengths, *sizes)
        found = chosen(jnp.arange(case.context), ragged.batch)
        assert found.tolist() == [keys_travel] * case.context, lengths
        check(ragged, "xla")
    assert rounds(backend, case, 4, 4) == (0, 0), "a step of decodes"


def test_what_travels_is_said() -> None:
    """Llama 3.1 70B in bfloat16 on context=8: by hand, 13 chunks' worth of keys move less than a chunk's queries."""
    case = make_case(
        num_heads=64, num_kv_heads=8, head_dim=128, page_size=16, dtype="bfloat16", platform="tpu", context=8
    )
    said = "in a step of 2048 tokens queries travel, 84 MiB a layer; "
    assert describe(BY_NAME["xla"], case, 2048, 256) == (
        said + "where it sees no more than 24576 keys they do, 3.5 KiB each"
    )
    assert describe(BY_NAME["reference"], case, 2048, 256) == said + "keys, 3.5 KiB each, never do"


@pytest.mark.parametrize("name", BY_NAME)
def test_reads_another_layers_keys(name: str) -> None:
    case, *sizes = KINDS[0][:4]
    ragged = Ragged(case, [(9, 1), (4, 6)], *sizes)
    q, _, _ = ragged.inputs()
    pools = check(ragged, name)
    shared, after = striped(name, case)(q, None, None, pools, ragged.batch, None)
    np.testing.assert_allclose(shared[:7], ragged.expected(), atol=2e-5, rtol=2e-5)
    np.testing.assert_array_equal(after, pools)


def test_who_serves_shared_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(context=2, head_dim=128, num_heads=8, page_size=16, dtype="bfloat16", platform="tpu")
    assert choose_backend(case)[0].name == "pallas_tpu"
    monkeypatch.setattr(mosaic_gpu, "MIN_JAX", (0, 0))
    assert gpu_layout.supports(replace(case, platform="gpu")) is None


@pytest.mark.parametrize(("num_rows", "context"), [(48, 4), (12, 3), (6, 2), (9, 3)])
def test_rows_are_dealt_and_put_in_order(num_rows: int, context: int) -> None:
    """Of a first chunk row i sees i + 1 keys: every device's rows see as many, wherever they can be cut so."""
    rows = np.stack([np.arange(num_rows)] * 2, axis=1)
    dealt = np.asarray(jax.jit(by_device, static_argnums=1)(rows, context))
    seen = (dealt[:, 0] + 1).reshape(context, -1).sum(axis=1)
    assert (len(set(seen.tolist())) == 1) == (num_rows % (2 * context) == 0)

    def on_device(_):
        own = own_part(jnp.asarray(rows))
        return own, all_parts(own), rows_at(own, np.arange(num_rows)[::-1])

    own, whole, backwards = jax.jit(jax.vmap(on_device, axis_name="context"))(np.arange(context))
    np.testing.assert_array_equal(own.reshape(rows.shape), dealt)
    for place in range(context):
        np.testing.assert_array_equal(whole[place], rows)
        np.testing.assert_array_equal(backwards[place], rows[::-1])
