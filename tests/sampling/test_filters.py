"""The thresholds found by bisection keep exactly what the sorting twin keeps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.sampling import filters, groups
from jaxinfer.types import SamplingParams
from tests.sampling import twin

S, V = 16, 1001


@jax.jit
def kept(logits, top_k, top_p, min_p, typical_p):
    grouped = groups.group(logits, -jnp.inf)
    distances = jnp.max(grouped, axis=(1, 2), keepdims=True) - grouped
    return jnp.isfinite(filters.survivors(distances, top_k, top_p, min_p, typical_p)).reshape(S, -1)[:, :V]


def check(logits, params):
    got = kept(
        logits.astype(np.float32),
        np.array([p.top_k for p in params], np.int32),
        np.array([p.top_p for p in params], np.float32),
        np.array([p.min_p for p in params], np.float32),
        np.array([p.typical_p for p in params], np.float32),
    )
    for i in range(S):
        want = twin.distribution(logits[i].astype(np.float32), params[i]) > 0
        assert np.flatnonzero(got[i]).tolist() == np.flatnonzero(want).tolist(), params[i]


def a_few(rng):
    return SamplingParams(
        top_k=rng.choice([0, 1, 2, 5, 50, V - 1, V, 2000]),
        top_p=rng.choice([1, 0.99, 0.9, 0.5, 0.01]),
        min_p=rng.choice([0, 0, 1e-4, 0.05, 1]),
        typical_p=rng.choice([1, 1, 0.95, 0.5, 0.05]),
    )


@pytest.mark.parametrize("seed", range(12))
def test_any_combination(seed):
    rng = np.random.default_rng(seed)
    scale = np.array([0.1, 1.0, 3.0, 10.0])[np.arange(S) % 4, None]
    check(rng.normal(size=(S, V)) * scale, [a_few(rng) for _ in range(S)])


@pytest.mark.parametrize("seed", range(4))
def test_ties_and_masks(seed):
    """Logits as bfloat16 has them: few distinct values; and many masked tokens."""
    rng = np.random.default_rng(100 + seed)
    logits = np.round(rng.normal(size=(S, V)) * 6) / 4
    logits[: S // 2, rng.permutation(V)[: V - 60]] = -np.inf
    filters_without_mass_ties = [
        SamplingParams(top_k=rng.choice([0, 1, 7, 200]), min_p=rng.choice([0, 0.2])) for _ in range(S)
    ]
    check(logits, filters_without_mass_ties)


def test_a_row_of_equals_stays_whole():
    check(np.zeros((S, V)), [SamplingParams(top_k=3, top_p=0.3)] * S)


def test_one_token_left():
    logits = np.full((S, V), -np.inf)
    logits[np.arange(S), np.arange(S) * 60] = -3.0
    check(logits, [SamplingParams(top_k=3, top_p=0.3, min_p=0.5, typical_p=0.2)] * S)


def test_tiny_nucleus_of_a_large_flat_vocabulary():
    logits = np.linspace(0, 0.5, V) * np.ones((S, 1))
    check(logits, [SamplingParams(top_p=0.001 * (i + 1)) for i in range(S)])
