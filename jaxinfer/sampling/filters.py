"""Which tokens a row may still draw: min-p, top-k, top-p and typical-p as thresholds, found without sorting.

Every filter keeps the tokens on one side of a threshold, and the threshold is the first at which a measure of what is
kept (a count, or a mass of probability) reaches a target. It is found by bisection over integers, exactly; each step
is one reduction over the vocabulary, so rows sharded over the vocabulary would need only sums. Non-negative floats
order like their bit patterns, which makes them integers; probabilities become 30-bit fixed-point integers, whose sums
are exact, hence the same in any order, batch or sharding.

All four keep ties: tokens of exactly equal logits stay or go together, so top-k keeps more than k tokens where the
k-th largest logit occurs more than once.

top-p: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020. min-p: Nguyen et al., "Turning Up the
Heat", 2024. typical-p: Meister et al., "Locally Typical Sampling", 2023.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.sampling.groups import fold_sum, total_int
from jaxinfer.sharding.spmd import any_row

_LARGEST = 0x7F7F_FFFF  # bits of the largest finite float32


def survivors(
    distances: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array, typical_p: jax.Array
) -> jax.Array:
    """The filters in order: min-p, top-k, top-p, typical-p, each on what the one before it left, renormalised.

    distances [S, G, W] float32 >= 0: how far each logit lies below the row's largest, after temperature; inf where
    masked. top_k [S] int32, 0 is off; top_p, min_p, typical_p [S] float32, off at 1, 0 and 1.
    Returns the distances with inf in place of the tokens filtered out.
    """
    largest = jnp.full_like(top_k, _LARGEST)
    threshold = lax.cond(any_row(top_k > 0), lambda: _top_k_threshold(distances, top_k), lambda: largest)
    # -log(min_p) is inf, so no limit, at 0.
    reach = jnp.minimum(-jnp.log(min_p), lax.bitcast_convert_type(threshold, jnp.float32))
    return lax.cond(
        any_row((top_p < 1) | (typical_p < 1)),
        lambda: _filter_by_mass(distances, reach, top_p, typical_p),
        lambda: _within(distances, reach),
    )


def _within(distances: jax.Array, reach: jax.Array) -> jax.Array:
    return jnp.where(distances <= lax.expand_dims(reach, (1, 2)), distances, jnp.inf)


def _bisect(
    measure: Callable[[jax.Array], jax.Array],
    target: jax.Array,
    bracket: tuple[jax.Array, jax.Array],
    reached: jax.Array,
    settled: Callable[..., jax.Array],
    middle: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """A threshold [S] that selects the least set of tokens whose measure is `target` or more, for all rows together.

    measure: thresholds [S] int32 -> [S] int32, monotone.
    bracket: (outside, inside) [S] int32, in either order: the measure is 0 at `outside` and `reached` at `inside`,
    which is the answer where they are equal or neighbours, or where the target is beyond reach.
    settled(outside, inside, amount): whether `inside` selects the set sought, given the measure between the two.
    """

    def unsettled(carry: tuple[jax.Array, ...]) -> jax.Array:
        outside, inside, below, reached = carry
        done = (reached == target) | settled(outside, inside, reached - below)
        return (jnp.abs(outside - inside) > 1) & ~done

    def step(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        outside, inside, below, reached = carry
        x = middle(outside, inside)
        amount = measure(x)
        search = unsettled(carry)
        inward, outward = search & (amount < target), search & (amount >= target)
        return (
            jnp.where(inward, x, outside),
            jnp.where(outward, x, inside),
            jnp.where(inward, amount, below),
            jnp.where(outward, amount, reached),
        )

    start = (*bracket, jnp.zeros_like(target), reached)
    return lax.while_loop(lambda carry: any_row(unsettled(carry)), step, start)[1]


def _midpoint(a: jax.Array, b: jax.Array) -> jax.Array:
    return a + (b - a) // 2


def _counted(mask: jax.Array) -> jax.Array:
    return lax.convert_element_type(mask, jnp.int32)


def _top_k_threshold(distances: jax.Array, top_k: jax.Array) -> jax.Array:
    """[S] int32: bits of a distance that the k nearest and their ties do not exceed; the largest where top-k is off."""
    keys = lax.bitcast_convert_type(distances, jnp.int32)

    def count(threshold: jax.Array) -> jax.Array:
        return total_int(lambda key, threshold: _counted(lax.le(key, threshold)), (keys,), threshold)

    largest = jnp.full_like(top_k, _LARGEST)
    vocab_size = jnp.full_like(top_k, keys.shape[1] * keys.shape[2])
    return _bisect(
        count,
        top_k,
        (jnp.where((top_k > 0) & (top_k < vocab_size), -1, largest), largest),
        vocab_size,
        lambda outside, inside, amount: amount <= 1,
        _midpoint,
    )


def _filter_by_mass(distances: jax.Array, reach: jax.Array, top_p: jax.Array, typical_p: jax.Array) -> jax.Array:
    weights = _fixed_point(_within(distances, reach))
    least = lax.cond(
        any_row(top_p < 1), lambda: _top_p_threshold(weights, top_p), lambda: jnp.zeros(top_p.shape, jnp.int32)
    )
    nucleus = jnp.where(lax.expand_dims(top_p < 1, (1, 2)), weights >= lax.expand_dims(least, (1, 2)), True)
    distances = jnp.where(nucleus, _within(distances, reach), jnp.inf)
    return lax.cond(
        any_row(typical_p < 1),
        lambda: _typical(distances, jnp.where(nucleus, weights, 0), typical_p),
        lambda: distances,
    )


def _fixed_point(distances: jax.Array) -> jax.Array:
    """exp(-distance) as int32, in a unit (a power of two) that puts each row's sum between 2^29 and 2^30."""
    masses = jnp.exp(-distances)
    exponent = (lax.bitcast_convert_type(jnp.sum(fold_sum(masses), axis=-1), jnp.int32) >> 23) - 127
    unit = lax.bitcast_convert_type((127 + 29 - exponent) << 23, jnp.float32)
    return jnp.round(masses * lax.expand_dims(unit, (1, 2))).astype(jnp.int32)


def _share(mass: jax.Array, portion: jax.Array) -> jax.Array:
    """ceil(portion * mass), at least 1 and at most the mass, which rounding could exceed."""
    return jnp.clip(jnp.ceil(mass.astype(jnp.float32) * portion).astype(jnp.int32), 1, mass)


def _top_p_threshold(weights: jax.Array, top_p: jax.Array) -> jax.Array:
    """[S] int32: the weight down to which tokens hold top_p of the row's mass; not for rows where top-p is off."""

    def mass(least: jax.Array) -> jax.Array:
        return total_int(lambda weight, least: lax.mul(weight, _counted(lax.ge(weight, least))), (weights,), least)

    def middle(high: jax.Array, low: jax.Array) -> jax.Array:
        geometric = jnp.sqrt(high.astype(jnp.float32) * low.astype(jnp.float32)).astype(jnp.int32)
        return jnp.where(high > 4 * low, geometric, _midpoint(low, high))

    low = jnp.ones(top_p.shape, jnp.int32)  # a weight of 0 is no mass: such tokens never help to reach the target
    high = jnp.where(top_p < 1, 1 << 30, low)
    whole = jnp.sum(fold_sum(weights), axis=-1)
    # A token within the bracket weighs `low` or more: less than twice that is one token.
    return _bisect(mass, _share(whole, top_p), (high, low), whole, lambda high, low, amount: amount < 2 * low, middle)


def _typical(distances: jax.Array, weights: jax.Array, typical_p: jax.Array) -> jax.Array:
    """Keep the tokens whose surprisal is nearest the entropy, up to typical_p of the mass; inf for the rest.

    With p = exp(-distance) / Z, a token's surprisal less the entropy is its distance less the mean distance.
    """
    moment = jnp.sum(fold_sum(jnp.where(weights > 0, weights.astype(jnp.float32) * distances, 0.0)), axis=-1)
    whole = jnp.sum(fold_sum(weights), axis=-1)
    mean = moment / whole.astype(jnp.float32)
    keys = lax.bitcast_convert_type(jnp.abs(distances - lax.expand_dims(mean, (1, 2))), jnp.int32)

    def mass(threshold: jax.Array) -> jax.Array:
        return total_int(
            lambda key, weight, threshold: lax.mul(weight, _counted(lax.le(key, threshold))), (keys, weights), threshold
        )

    active = typical_p < 1
    largest = jnp.full(typical_p.shape, _LARGEST, jnp.int32)
    threshold = _bisect(
        mass,
        _share(whole, typical_p),
        (jnp.where(active, -1, largest), largest),
        whole,
        lambda outside, inside, amount: jnp.zeros_like(active),
        _midpoint,
    )
    return jnp.where(keys <= lax.expand_dims(threshold, (1, 2)), distances, jnp.inf)
