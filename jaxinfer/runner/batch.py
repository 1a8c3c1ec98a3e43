"""The ragged, flat device batch: the one shape in which work reaches a model."""

from __future__ import annotations

from dataclasses import dataclass

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeviceBatch:
    """Decodes and prefill chunks of one step, flat, rows in schedule order, all int32.

    tokens [T]           token ids; where `token_slots` >= 0 the id is taken from the last sampled token of that slot
    token_slots [T]      sampling slot to take the token from, or -1
    positions [T]        position in the sequence; padding 0
    sequence_ids [T]     row in [0, S) each token belongs to; padding tokens have S (one past the last row)
    query_start [S + 1]  first token of each row; padding rows are empty (start = number of real tokens)
    kv_len [S]           tokens of the sequence in the cache once this step's are written; padding 0
    page_tables          per KV group [S, P]: page of the logical page j at column j % P; unused entries 0, page 0 is
                         nobody's: padding writes go there
    logits_tokens [S]    for the row-th sample, the flat index of the token whose hidden state it is drawn from
    num_tokens, num_sequences  [] real counts, for kernels that skip padding
    """

    tokens: jax.Array
    token_slots: jax.Array
    positions: jax.Array
    sequence_ids: jax.Array
    query_start: jax.Array
    kv_len: jax.Array
    page_tables: tuple[jax.Array, ...]
    logits_tokens: jax.Array
    num_tokens: jax.Array
    num_sequences: jax.Array
