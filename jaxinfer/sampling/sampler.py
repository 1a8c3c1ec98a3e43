"""From logits to tokens, inside the compiled step: any mix of requests in one batch, one program a row bucket.

The order of operations is the ecosystem's (vLLM's; typical-p, which it lacks, comes last as in transformers):

    bias, allowed and banned tokens -> min_tokens -> repetition, frequency, presence penalties   (penalties.py)
    -> greedy rows end here: argmax
    -> temperature -> min-p -> top-k -> top-p -> typical-p                                       (filters.py)
    -> draw

The work a batch does not need is skipped inside the program (`lax.cond` on "any row wants it"): a greedy batch costs
an argmax. Which branch runs never changes a row's result, so a request's tokens do not depend on its companions.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.sampling import filters, groups, noise
from jaxinfer.sampling.logprobs import TokenLogprobs, no_logprobs, score
from jaxinfer.sampling.penalties import adjust
from jaxinfer.sampling.rows import SamplingRows
from jaxinfer.sampling.state import SamplerState
from jaxinfer.sharding.spmd import any_row


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampleOutput:
    """token_ids [S] int32; invalid [S] bool: the row's logits held a NaN or +inf, or nothing but -inf, so its token is
    0 and means nothing; logprobs: of the tokens, zeros unless some row of the batch asked."""

    token_ids: jax.Array
    invalid: jax.Array
    logprobs: TokenLogprobs


def sample(logits: jax.Array, state: SamplerState, rows: SamplingRows) -> tuple[SampleOutput, SamplerState]:
    """One token a row. Pure: jit it, donate `state`.

    logits [S, V] float32. -inf is a legal logit (probability 0). A row with non-finite values otherwise is reported in
    `invalid` and touches no other row. Tokens and counts are recorded in the rows' slots; padding rows write to the
    spare slot.
    """
    # The barrier makes the branch below read the grouped copy: XLA would make it one of its own, in every step.
    grouped = lax.optimization_barrier(groups.group(logits.astype(jnp.float32), -jnp.inf))
    logits = groups.ungroup(grouped, logits.shape[1])
    token_ids, maximum = _choose(grouped, state, rows)
    invalid = ~jnp.isfinite(maximum)
    token_ids = jnp.where(invalid, 0, token_ids)
    logprobs = lax.cond(
        any_row(rows.wants_logprobs), lambda: score(logits, token_ids), lambda: no_logprobs(*logits.shape)
    )
    width = groups.num_groups(logits.shape[1])
    counted = (rows.uses_dense_state & ~invalid).astype(jnp.int32)
    state = SamplerState(
        last_tokens=state.last_tokens.at[rows.slot].set(token_ids),
        counts=state.counts.at[rows.slot, token_ids // width, token_ids % width].add(counted),
        bias=state.bias,
    )
    return SampleOutput(token_ids, invalid, logprobs), state


def _choose(logits: jax.Array, state: SamplerState, rows: SamplingRows) -> tuple[jax.Array, jax.Array]:
    """Logits [S, G, W] -> (token ids [S], the rows' largest logits [S]). The branches differ in the work they skip."""
    random = rows.temperature > 0
    filtered = (rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0) | (rows.typical_p < 1)
    any_random, any_adjusted, any_filtered = any_row(random), any_row(rows.uses_dense_state), any_row(filtered)
    num_contestants = logits.shape[1] + logits.shape[2]
    race = lax.cond(
        any_random,
        lambda: noise.exponentials(rows.seed, rows.sample_index, rows.position, num_contestants),
        lambda: jnp.ones((logits.shape[0], num_contestants), jnp.float32),
    )

    def distances_of(logits: jax.Array, maximum: jax.Array) -> jax.Array:
        temperature = lax.expand_dims(jnp.where(random, rows.temperature, 1.0), (1, 2))
        return (lax.expand_dims(maximum, (1, 2)) - logits) / temperature

    maximum, best = groups.argmax(logits)

    def adjusted_greedy() -> tuple[jax.Array, jax.Array]:
        maximum, best = groups.argmax(adjust(logits, state, rows))
        return best, maximum

    def plain() -> tuple[jax.Array, jax.Array]:
        return jnp.where(random, _draw(distances_of(logits, maximum), race), best), maximum

    def adjusted() -> tuple[jax.Array, jax.Array, jax.Array]:
        adjusted_logits = adjust(logits, state, rows)
        maximum, best = groups.argmax(adjusted_logits)
        return best, maximum, distances_of(adjusted_logits, maximum)

    def any_mix() -> tuple[jax.Array, jax.Array]:
        own_best, own_maximum, distances = lax.cond(
            any_adjusted, adjusted, lambda: (best, maximum, distances_of(logits, maximum))
        )
        distances = lax.cond(
            any_filtered,
            lambda: filters.survivors(distances, rows.top_k, rows.top_p, rows.min_p, rows.typical_p),
            lambda: distances,
        )
        return jnp.where(random, _draw(distances, race), own_best), own_maximum

    branch = jnp.where(any_random, jnp.where(any_adjusted | any_filtered, 3, 2), jnp.where(any_adjusted, 1, 0))
    return lax.switch(branch, [lambda: (best, maximum), adjusted_greedy, plain, any_mix])


def _draw(distances: jax.Array, race: jax.Array) -> jax.Array:
    """A token [S] with probability proportional to exp(-distance); distances [S, G, W], inf for tokens left out.

    An exponential race (the Gumbel-max trick: argmax of p_i / E_i is distributed as p) in two heats: between the
    groups of tokens with the groups' masses, then between the members of the winner. It takes random numbers `race`
    [S, W + G] for W + G contestants instead of V. As in a single race, small changes of the logits almost never
    change the token.
    """
    width = distances.shape[2]
    masses = jnp.exp(-distances)
    group = groups.first_argmax(groups.fold_sum(masses) / race[:, :width])[1]
    member = groups.first_argmax(groups.pick(masses, group) / race[:, width:])[1]
    return member * width + group
