"""Every backend against a float64 oracle on ragged batches, and what the fast one promises about memory and work."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.ops.paged_attention import BACKENDS, AttentionCase, Backend
from tests.ops.ragged import Ragged, make_case

BY_NAME = {backend.name: backend for backend in BACKENDS}


@functools.cache
def compiled(backend: Backend, case: AttentionCase, writes: bool):
    def attend(q, k, v, pool, batch, sinks):
        metadata = backend.prepare(case, batch, 0)
        new = (k, v) if writes else (None, None)
        return backend.run(case, q, *new, pool, batch, 0, metadata, sinks=sinks)

    return jax.jit(attend, donate_argnums=(3,))


def check(ragged: Ragged, name: str) -> jax.Array:
    """Run one backend on the batch; hold its output and the pages of every sequence to the oracle. Returns the pool."""
    case = ragged.case
    sinks = None if ragged.sinks is None else jnp.asarray(ragged.sinks)
    pool = jnp.asarray(ragged.pool, case.dtype)
    out, pool = compiled(BY_NAME[name], case, True)(*ragged.inputs(), pool, ragged.batch, sinks)
    expected = ragged.expected()
    tolerance = 2e-5 if case.dtype == "float32" else 3e-2
    np.testing.assert_allclose(np.asarray(out, np.float64)[: len(expected)], expected, atol=tolerance, rtol=tolerance)
    held = np.asarray(pool, np.float32)
    table = np.asarray(ragged.batch.page_tables[0])
    for row, (cached, new) in enumerate(ragged.lengths):
        for position in range(cached, cached + new):
            slot = held[table[row, position // case.page_size % table.shape[1]], :, :, position % case.page_size]
            wrote = np.stack([ragged.keys[row][position], ragged.values[row][position]])
            np.testing.assert_allclose(slot, wrote, rtol=1e-2 if case.dtype != "float32" else 0)
    return pool


@st.composite
def ragged_batches(draw: st.DrawFn) -> Ragged:
    """Any mixture of decodes and chunks. Shapes come from a few, so that few programs are compiled."""
    case, num_tokens, num_sequences = draw(
        st.sampled_from(
            [
                (make_case(), 16, 4),
                (make_case(num_heads=6, num_kv_heads=1, head_dim=5, page_size=3, soft_cap=2.0), 24, 6),
                (make_case(num_heads=3, num_kv_heads=3, head_dim=16, page_size=16, window=20), 96, 8),
                (make_case(window=3, has_sinks=True), 16, 8),
            ]
        )
    )
    longest = 300 if case.page_size == 16 else 40
    rows = draw(st.integers(1, num_sequences))
    decodes = draw(st.integers(0, rows))
    cached = st.integers(0, longest)
    lengths = [(draw(cached), 1) for _ in range(decodes)]
    room = num_tokens - decodes
    for _ in range(rows - decodes):
        if room < 2:
            break
        new = draw(st.integers(2, room))
        room -= new
        lengths.append((draw(cached), new))
    width = None
    if case.window is not None and draw(st.booleans()):
        width = -(-(case.window + num_tokens) // case.page_size) + 1
    return Ragged(case, lengths or [(5, 1)], num_tokens, num_sequences, width, seed=draw(st.integers(0, 2**16)))


@pytest.mark.parametrize("name", BY_NAME)
@settings(max_examples=40, deadline=None)
@given(ragged=ragged_batches())
def test_matches_oracle_and_leaks_no_nan(name: str, ragged: Ragged) -> None:
    check(ragged, name)
