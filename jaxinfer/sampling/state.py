"""What the sampler keeps on the device between steps, by sampling slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.sampling import groups
from jaxinfer.types import SamplingParams

# A packed count: how often the token was generated in the low bits, and two facts about it above them.
COUNT_MASK = (1 << 29) - 1
IN_PROMPT = 1 << 29
IS_STOP_TOKEN = 1 << 30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplerState:
    """Donated to, and returned by, every step. Slots are 0 .. max_num_seqs - 1; the extra one belongs to padding rows.

    last_tokens [max_num_seqs + 1] int32        the token each slot sampled last: the next step's input
    counts      [max_num_seqs + 1, G, W] int32     generated-token counts, in-prompt and stop-token bits
    bias        [max_num_seqs + 1, G, W] float32   added to the logits; -inf for tokens that must not be chosen

    The vocabulary is laid out in groups (groups.py). The dense rows take 8 * V bytes a slot (0.4 MB at V = 49152,
    2 MB at V = 262144). A slot's rows mean something only between `admit` and the end of a request that
    `uses_dense_state`; for others they are stale and without effect.
    """

    last_tokens: jax.Array
    counts: jax.Array
    bias: jax.Array


def init_state(max_num_seqs: int, vocab_size: int) -> SamplerState:
    """The state before any request."""
    dense = (max_num_seqs + 1, groups.NUM_MEMBERS, groups.num_groups(vocab_size))
    return SamplerState(
        last_tokens=jnp.zeros((max_num_seqs + 1,), jnp.int32),
        counts=jnp.zeros(dense, jnp.int32),
        bias=jnp.zeros(dense, jnp.float32),
    )


def uses_dense_state(params: SamplingParams) -> bool:
    """Whether a request needs `admit`: it has a penalty, a bias, allowed or banned tokens, or min_tokens."""
    return bool(
        params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or params.allowed_token_ids is not None
        or params.banned_token_ids
        or params.min_tokens
    )


def dense_rows(
    params: SamplingParams,
    stop_token_ids: Sequence[int],
    prompt_token_ids: Sequence[int],
    output_token_ids: Sequence[int],
    vocab_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Host rows for `admit`: (counts [V] int32, bias [V] float32), of one size whatever the request.

    stop_token_ids: every token that would end the request (the model's, unless ignore_eos, and the request's own);
    they cannot be chosen while fewer than min_tokens are out. output_token_ids: what the sequence has generated
    already, when it re-enters the batch after a preemption.
    """
    counts = np.zeros(vocab_size, np.int32)
    if len(output_token_ids):
        counts += np.bincount(np.asarray(output_token_ids, np.int64), minlength=vocab_size).astype(np.int32)
    counts[np.asarray(prompt_token_ids, np.int64)] |= IN_PROMPT
    if params.min_tokens:
        counts[np.asarray(stop_token_ids, np.int64)] |= IS_STOP_TOKEN

    bias = np.zeros(vocab_size, np.float32)
    if params.allowed_token_ids is not None:
        bias.fill(-np.inf)
        bias[np.asarray(params.allowed_token_ids, np.int64)] = 0.0
    for token_id, value in (params.logit_bias or {}).items():
        bias[token_id] += value
    if params.banned_token_ids:
        bias[np.asarray(params.banned_token_ids, np.int64)] = -np.inf
    return counts, bias


def admit(state: SamplerState, slot: jax.Array, counts: jax.Array, bias: jax.Array) -> SamplerState:
    """Set one slot's dense rows, [V] each. Jit it with `state` donated: one program serves every request."""
    counts, bias = groups.group(counts[None], 0), groups.group(bias[None], 0)
    return SamplerState(state.last_tokens, state.counts.at[slot].set(counts[0]), state.bias.at[slot].set(bias[0]))
