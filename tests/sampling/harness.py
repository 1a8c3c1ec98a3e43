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

MAX_NUM_SEQS = 512  # few shapes, so few compilations: S is 1, 16 or 512 in nearly all tests
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

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.table = SamplingTable(MAX_NUM_SEQS)
        self.state = init_state(MAX_NUM_SEQS, vocab_size)

    def put(self, slot: int, row: Row) -> None:
        self.table.set(slot, row.params, row.seed, row.sample_index)
        if uses_dense_state(row.params):
            rows = dense_rows(row.params, row.stop_token_ids, row.prompt, row.output, self.vocab_size)
            self.state = set_slot(self.state, slot, *rows)

    def step(self, logits, slots, positions, num_rows=16):
        """logits [len(slots), V]; padded with NaN rows to the bucket. Returns the output as numpy, without padding."""
        padded = np.full((num_rows, self.vocab_size), np.nan, np.float32)
        padded[: len(slots)] = logits
        rows = self.table.rows(slots, positions, num_rows)
        output, self.state = step(jnp.asarray(padded), self.state, rows)
        return jax.tree.map(lambda x: np.asarray(x)[: len(slots)], output)


def sample_rows(logits, rows: Sequence[Row], *, num_rows=16):
    """One step over rows placed in slots 0, 1, ... of a fresh batch."""
    logits = np.atleast_2d(np.asarray(logits, np.float32))
    batch = Batch(logits.shape[1])
    for slot, row in enumerate(rows):
        batch.put(slot, row)
    return batch.step(logits, range(len(rows)), [len(row.output) for row in rows], num_rows)


def draw_many(logits, rows: Sequence[Row]):
    """One draw for each row, all from the same logits [V]."""
    taken = []
    for start in range(0, len(rows), MAX_NUM_SEQS):
        some = rows[start : start + MAX_NUM_SEQS]
        taken.append(sample_rows(np.tile(logits, (len(some), 1)), some, num_rows=MAX_NUM_SEQS).token_ids)
    return np.concatenate(taken)
