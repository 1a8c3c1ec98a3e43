"""Runs the sampler the way the runner does: a slot table, a donated state, one jitted program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.sampling.rows import SamplingTable
from jaxinfer.sampling.sampler import sample
from jaxinfer.sampling.state import admit, dense_rows, init_state, uses_dense_state
from jaxinfer.types import SamplingParams

traces: list[tuple[int, ...]] = []


def _traced_sample(logits, state, rows):
    traces.append(logits.shape)
    return sample(logits, state, rows)


step = jax.jit(_traced_sample, donate_argnums=1)
set_slot = jax.jit(admit, donate_argnums=0)


@dataclass
class Row:
    """One sequence: its parameters and where it stands."""

    params: SamplingParams
    seed: int = 0
    sample_index: int = 0
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    stop_token_ids: Sequence[int] = ()


class Batch:
    """Slots that hold sequences."""

    def __init__(self, max_num_seqs: int, vocab_size: int) -> None:
        self.max_num_seqs, self.vocab_size = max_num_seqs, vocab_size
        self.table = SamplingTable(max_num_seqs)
        self.state = init_state(max_num_seqs, vocab_size)

    def put(self, slot: int, row: Row) -> None:
        self.table.set(slot, row.params, row.seed, row.sample_index)
        if uses_dense_state(row.params):
            rows = dense_rows(row.params, row.stop_token_ids, row.prompt, row.output, self.vocab_size)
            self.state = set_slot(self.state, slot, *rows)

    def step(self, logits, slots, positions, num_rows=None):
        """logits [len(slots), V]; padded with NaN rows to the bucket. Returns the output as numpy, without padding."""
        num_rows = num_rows or len(slots)
        padded = np.full((num_rows, self.vocab_size), np.nan, np.float32)
        padded[: len(slots)] = logits
        rows = self.table.rows(slots, positions, num_rows)
        output, self.state = step(jnp.asarray(padded), self.state, rows)
        return jax.tree.map(lambda x: np.asarray(x)[: len(slots)], output)


def sample_rows(logits, rows: Sequence[Row], *, num_rows=None, max_num_seqs=None):
    """One step over rows placed in slots 0, 1, ... of a fresh batch."""
    logits = np.atleast_2d(np.asarray(logits, np.float32))
    batch = Batch(max_num_seqs or len(rows), logits.shape[1])
    for slot, row in enumerate(rows):
        batch.put(slot, row)
    return batch.step(logits, range(len(rows)), [len(row.output) for row in rows], num_rows)


def draw_many(logits, params: SamplingParams, count: int, *, seed: int = 0, rows_a_step: int = 512):
    """`count` independent draws from one row of logits: as many samples (`sample_index`) of one request."""
    taken = []
    for start in range(0, count, rows_a_step):
        rows = [Row(params, seed, start + i) for i in range(rows_a_step)]
        taken.append(sample_rows(np.tile(logits, (rows_a_step, 1)), rows).token_ids)
    return np.concatenate(taken)[:count]
