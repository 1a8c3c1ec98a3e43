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
    rank = 1 + groups.total_int(lambda x: (x > target_logits).astype(jnp.int32), grouped)
    top_token_ids, top_logits = _best(grouped, min(MAX_LOGPROBS, logits.shape[-1]))
    return TokenLogprobs((target_logits - normaliser)[:, 0], rank, top_token_ids, top_logits - normaliser)


def _best(grouped: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest logits of [S, G, W]: (token ids, logits) [S, count].

    They are in the groups of largest maximum. The candidates are laid out by token id, so that of equal logits the
    lower id comes first.
    """
    num_rows, _, width = grouped.shape
    _, best_groups = lax.top_k(groups.fold(grouped, jnp.maximum), min(count, width))
    best_groups = jnp.sort(best_groups, axis=-1)
    candidates = jnp.take_along_axis(grouped, lax.expand_dims(best_groups, (1,)), axis=2)
    token_ids = jnp.arange(groups.NUM_MEMBERS)[:, None] * width + lax.expand_dims(best_groups, (1,))
    top_logits, places = lax.top_k(candidates.reshape(num_rows, -1), count)
    return jnp.take_along_axis(token_ids.reshape(num_rows, -1), places, axis=1), top_logits


def no_logprobs(num_rows: int, vocab_size: int) -> TokenLogprobs:
    """Zeros in the shape of `score`'s answer, where nobody asked."""
    best = (num_rows, min(MAX_LOGPROBS, vocab_size))
    return TokenLogprobs(
        jnp.zeros(num_rows, jnp.float32),
        jnp.zeros(num_rows, jnp.int32),
        jnp.zeros(best, jnp.int32),
        jnp.zeros(best, jnp.float32),
    )
