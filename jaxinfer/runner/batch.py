"""The ragged, flat device batch: the one shape in which work reaches a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

if TYPE_CHECKING:
    from jaxinfer.scheduler.scheduler import Schedule


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


@dataclass(frozen=True)
class BatchLayout:
    """Where each field of a DeviceBatch lies in one flat int32 buffer, so that a step sends one array, not a dozen.

    num_tokens, num_sequences: the padded T and S. table_widths: P of every KV group.
    """

    num_tokens: int
    num_sequences: int
    table_widths: tuple[int, ...]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        tokens, rows = (self.num_tokens,), (self.num_sequences,)
        return {
            "tokens": tokens,
            "token_slots": tokens,
            "positions": tokens,
            "sequence_ids": tokens,
            "query_start": (self.num_sequences + 1,),
            "kv_len": rows,
            "logits_tokens": rows,
            "num_tokens": (),
            "num_sequences": (),
            **{f"page_table_{g}": (*rows, width) for g, width in enumerate(self.table_widths)},
        }

    @cached_property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def split(self, buffer: Any) -> dict[str, Any]:
        """Views of a flat buffer [size], numpy or jax, by field name."""
        fields, start = {}, 0
        for name, shape in self.shapes.items():
            stop = start + math.prod(shape)
            fields[name] = buffer[start:stop].reshape(shape)
            start = stop
        return fields

    def unpack(self, buffer: jax.Array) -> DeviceBatch:
        fields = self.split(buffer)
        tables = tuple(fields.pop(f"page_table_{g}") for g in range(len(self.table_widths)))
        return DeviceBatch(**fields, page_tables=tables)


def pack(schedule: Schedule, tables: Sequence[np.ndarray], layout: BatchLayout) -> np.ndarray:
    """The schedule as a flat int32 buffer [layout.size]; all padding of a step happens here.

    tables: per group [max_num_seqs, P], by slot. Rows that only draw a further sample from another row's hidden state
    have no tokens.
    """
    buffer = np.zeros(layout.size, np.int32)
    fields = layout.split(buffer)
    tokens, token_slots, positions = fields["tokens"], fields["token_slots"], fields["positions"]
    token_slots.fill(-1)
    fields["sequence_ids"].fill(layout.num_sequences)
    start = 0
    for row, scheduled in enumerate(schedule.rows):
        stop = start + scheduled.num_tokens
        first, count = scheduled.start, scheduled.num_tokens
        if scheduled.input_slot >= 0:
            token_slots[start] = scheduled.input_slot
        else:
            tokens[start:stop] = scheduled.sequence.token_ids[first : first + count]
        positions[start:stop] = np.arange(first, first + count)
        fields["sequence_ids"][start:stop] = row
        fields["query_start"][row + 1] = stop
        fields["kv_len"][row] = first + count if count else 0
        start = stop
    count = len(schedule.rows)
    fields["query_start"][count + 1 :] = start
    samples = [row.hidden_row for row in schedule.sampling_rows]
    fields["logits_tokens"][: len(samples)] = fields["query_start"][1:][samples] - 1
    fields["num_tokens"][...] = start
    fields["num_sequences"][...] = count
    slots = [row.slot for row in schedule.rows]
    for group, table in enumerate(tables):
        fields[f"page_table_{group}"][:count] = table[slots]
    return buffer
