"""Which tokens a row may still draw: min-p, top-k, top-p and typical-p as thresholds, found without sorting.

Every filter keeps the tokens whose non-negative key is at most a threshold, and the threshold is the smallest key whose
measure (a count, or a mass of probability) reaches a target. Non-negative floats order like their bit patterns, so the
threshold is found exactly by bisection over 31-bit integers; each step is one reduction over the vocabulary. Masses
are 30-bit fixed-point integers: their sums are exact, hence the same in any order, batch or sharding.

All four keep ties: tokens with exactly equal keys stay or go together, so top-k keeps more than k tokens where the
k-th largest logit occurs more than once.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.sampling.groups import total

_LARGEST = 0x7F7F_FFFF  # bits of the largest finite float32


def survivors(
    distances: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array, typical_p: jax.Array
) -> jax.Array:
    """The filters in order: min-p, top-k, top-p, typical-p, each on what the one before it left, renormalised.

    distances [S, G, W] float32 >= 0: how far each logit lies below the row's largest, after temperature; inf where
    masked. top_k [S] int32, 0 is off; top_p, min_p, typical_p [S] float32, off at 1, 0 and 1.
    Returns the distances with inf in place of the tokens filtered out.

    top-p: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020. min-p: Nguyen et al., "Turning Up the
    Heat", 2024. typical-p: Meister et al., "Locally Typical Sampling", 2023.
    """
    keys = _bits(distances)
    within_min_p = _bits(-jnp.log(min_p))
    threshold = jnp.minimum(within_min_p, _LARGEST)
    threshold = jnp.minimum(threshold, _top_k_threshold(keys, top_k))

    def by_mass(threshold: jax.Array) -> jax.Array:
        weights = _fixed_point(distances)
        threshold = _top_p_threshold(keys, weights, threshold, top_p)
        kept = jnp.where(keys <= threshold[:, None, None], distances, jnp.inf)
        return lax.cond(jnp.any(typical_p < 1), lambda: _typical(kept, weights, typical_p), lambda: kept)

    def by_rank(threshold: jax.Array) -> jax.Array:
        return jnp.where(keys <= threshold[:, None, None], distances, jnp.inf)

    return lax.cond(jnp.any((top_p < 1) | (typical_p < 1)), by_mass, by_rank, threshold)


def _bits(x: jax.Array) -> jax.Array:
    """Bit patterns of non-negative floats, int32, in the same order; -0.0 counts as 0."""
    return lax.bitcast_convert_type(jnp.abs(x), jnp.int32)


def _smallest_key(
    measure: Callable[[jax.Array], jax.Array],
    target: jax.Array,
    high: jax.Array,
    active: jax.Array,
    least: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Smallest threshold t <= high [S] with measure(t) >= target [S], as far as it selects; `high` if there is none.

    measure: monotone, thresholds [S] int32 -> [S] int32. active [S] bool: rows to search; the others return `high`.
    least(t): a lower bound of what a single token with key at most t adds to the measure. Once a bracket holds less
    than two such tokens it holds only one, and its upper end selects exactly the wanted set.
    """

    def unsettled(carry: tuple[jax.Array, ...]) -> jax.Array:
        low, high, below, reached = carry
        return (high - low > 1) & ((reached - below) >= 2 * least(high))

    def halve(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low, high, below, reached = carry
        middle = low + (high - low) // 2
        found = measure(middle)
        enough, open_ = found >= target, unsettled(carry)
        down, up = open_ & enough, open_ & ~enough
        return (
            jnp.where(up, middle, low),
            jnp.where(down, middle, high),
            jnp.where(up, found, below),
            jnp.where(down, found, reached),
        )

    low = jnp.where(active, -1, high - 1)
    start = (low, high, jnp.zeros_like(target), measure(high))
    return lax.while_loop(lambda carry: jnp.any(unsettled(carry)), halve, start)[1]


def _top_k_threshold(keys: jax.Array, top_k: jax.Array) -> jax.Array:
    """[S] int32: the key of the k-th nearest token, or the largest key where top-k is off or beyond the vocabulary."""

    def count(threshold: jax.Array) -> jax.Array:
        return total((keys <= threshold[:, None, None]).astype(jnp.int32))

    active = top_k > 0
    largest = jnp.full_like(top_k, _LARGEST)
    return lax.cond(
        jnp.any(active),
        lambda: _smallest_key(count, top_k, largest, active, jnp.ones_like),
        lambda: largest,
    )


def _fixed_point(distances: jax.Array) -> jax.Array:
    """exp(-distance) as int32 in units of a power of two, chosen a row so that the row's sum is in [2^29, 2^30]."""
    masses = jnp.exp(-distances)
    exponent = (lax.bitcast_convert_type(total(masses), jnp.int32) >> 23) - 127
    unit = lax.bitcast_convert_type((127 + 29 - exponent) << 23, jnp.float32)
    return jnp.round(masses * unit[:, None, None]).astype(jnp.int32)


def _mass(keys: jax.Array, weights: jax.Array, threshold: jax.Array) -> jax.Array:
    return total(jnp.where(keys <= threshold[:, None, None], weights, 0))


def _share(mass: jax.Array, portion: jax.Array) -> jax.Array:
    """ceil(portion * mass), at least 1 and at most the mass, which rounding could exceed."""
    return jnp.clip(jnp.ceil(mass.astype(jnp.float32) * portion).astype(jnp.int32), 1, mass)


def _top_p_threshold(keys: jax.Array, weights: jax.Array, threshold: jax.Array, top_p: jax.Array) -> jax.Array:
    """`threshold` [S] lowered to the smallest set that holds top_p of the mass within `threshold`."""
    target = _share(_mass(keys, weights, threshold), top_p)

    def least(threshold: jax.Array) -> jax.Array:
        return jnp.zeros_like(threshold)

    return _smallest_key(lambda t: _mass(keys, weights, t), target, threshold, top_p < 1, least)


def _typical(distances: jax.Array, weights: jax.Array, typical_p: jax.Array) -> jax.Array:
    """Keep the tokens whose surprisal is nearest the entropy, up to typical_p of the mass; inf for the rest.

    With p = exp(-distance) / Z, surprisal minus entropy is the distance minus its mean, Z cancels.
    """
    finite = distances < jnp.inf
    masses = jnp.exp(-distances)
    mean = total(jnp.where(finite, masses * distances, 0.0)) / total(masses)
    keys = jnp.where(finite, _bits(jnp.abs(distances - mean[:, None, None])), jnp.int32(_LARGEST + 1))
    largest = jnp.full(typical_p.shape, _LARGEST, jnp.int32)
    target = _share(_mass(keys, weights, largest), typical_p)
    threshold = _smallest_key(lambda t: _mass(keys, weights, t), target, largest, typical_p < 1, jnp.zeros_like)
    return jnp.where(keys <= threshold[:, None, None], distances, jnp.inf)
