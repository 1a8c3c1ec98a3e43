"""Log-probabilities of the model's own distribution, of sampled tokens and of prompt tokens alike."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.sampling import groups
from jaxinfer.types import MAX_LOGPROBS


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms, of softmax(logits) before bias, penalties, temperature and filters.

    logprob [S] float32 and rank [S] int32 (1 is the most probable; ties share a rank) of the given tokens;
    top_token_ids [S, N] int32 and top_logprobs [S, N] float32, the N = min(MAX_LOGPROBS, V) best, best first.
    """

    logprob: jax.Array
    rank: jax.Array
    top_token_ids: jax.Array
    top_logprobs: jax.Array


def score(logits: jax.Array, targets: jax.Array) -> TokenLogprobs:
    """Logits [S, V] float32 and token ids [S] int32 -> their log-probabilities and the best tokens."""
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    target_logits = jnp.take_along_axis(logits, lax.expand_dims(targets, (1,)), axis=-1)
    grouped = groups.group(logits, -jnp.inf)
    above = groups.total_int(
        lambda x, target: lax.convert_element_type(lax.gt(x, target), jnp.int32), (grouped,), target_logits[:, 0]
    )
    top_token_ids, top_logits = _best(logits, grouped, min(MAX_LOGPROBS, logits.shape[-1]))
    return TokenLogprobs((target_logits - normaliser)[:, 0], 1 + above, top_token_ids, top_logits - normaliser)


def _best(logits: jax.Array, grouped: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest of logits [S, V], or of the same [S, G, W]: (token ids, logits) [S, count]. Lower ids first.

    Only a TPU has a fast top_k over the whole vocabulary. Elsewhere the candidates are the members of the `count`
    groups of largest maximum, laid out by token id.
    """

    def whole(logits: jax.Array, grouped: jax.Array) -> tuple[jax.Array, jax.Array]:
        top_logits, token_ids = lax.top_k(logits, count)
        return token_ids, top_logits

    def by_group(logits: jax.Array, grouped: jax.Array) -> tuple[jax.Array, jax.Array]:
        num_rows, num_members, width = grouped.shape
        _, best_groups = lax.top_k(groups.fold_max(grouped), min(count, width))
        best_groups = lax.expand_dims(jnp.sort(best_groups, axis=-1), (1,))
        candidates = jnp.take_along_axis(grouped, best_groups, axis=2)
        token_ids = lax.broadcasted_iota(jnp.int32, (1, num_members, 1), 1) * width + best_groups
        top_logits, places = lax.top_k(candidates.reshape(num_rows, -1), count)
        return jnp.take_along_axis(token_ids.reshape(num_rows, -1), places, axis=1), top_logits

    return lax.platform_dependent(logits, grouped, tpu=whole, default=by_group)


def no_logprobs(num_rows: int, vocab_size: int) -> TokenLogprobs:
    """Zeros in the shape of `score`'s answer, where nobody asked."""
    best = (num_rows, min(MAX_LOGPROBS, vocab_size))
    return TokenLogprobs(
        jnp.zeros(num_rows, jnp.float32),
        jnp.zeros(num_rows, jnp.int32),
        jnp.zeros(best, jnp.int32),
        jnp.zeros(best, jnp.float32),
    )
