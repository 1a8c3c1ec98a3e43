"""Sampling parameters as an array: what each row of one step's sample asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.sampling.state import uses_dense_state
from jaxinfer.types import SamplingParams

GREEDY_BELOW = 1e-5  # temperatures under this are greedy: dividing by them leaves nothing but the largest logit

_USES_DENSE_STATE = 1
_MIN_TOKENS_PENDING = 2
_WANTS_LOGPROBS = 4

_INTEGERS = ("slot", "top_k", "seed", "sample_index", "position", "flags", "min_tokens")
_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_COLUMN = {name: column for column, name in enumerate(_INTEGERS + _FLOATS)}
NUM_COLUMNS = 16  # two spare, so that rows are 64 bytes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingRows:
    """One array for all parameters, so that a step sends one: words [S, NUM_COLUMNS] int32, floats as their bits."""

    words: jax.Array | np.ndarray

    def _integer(self, name: str) -> jax.Array:
        return lax.index_in_dim(jnp.asarray(self.words), _COLUMN[name], axis=1, keepdims=False)

    def _float(self, name: str) -> jax.Array:
        return lax.bitcast_convert_type(self._integer(name), jnp.float32)

    def _unsigned(self, name: str) -> jax.Array:
        return lax.bitcast_convert_type(self._integer(name), jnp.uint32)

    def _flag(self, bit: int) -> jax.Array:
        return (self._integer("flags") & bit) != 0

    @property
    def slot(self) -> jax.Array:
        """[S] int32; padding rows have the spare slot."""
        return self._integer("slot")

    @property
    def top_k(self) -> jax.Array:
        """[S] int32; 0 is off."""
        return self._integer("top_k")

    @property
    def seed(self) -> jax.Array:
        """[S] uint32."""
        return self._unsigned("seed")

    @property
    def sample_index(self) -> jax.Array:
        """[S] uint32: which of the request's `n` samples."""
        return self._unsigned("sample_index")

    @property
    def position(self) -> jax.Array:
        """[S] uint32: index of the token being sampled in the sequence's output."""
        return self._unsigned("position")

    @property
    def temperature(self) -> jax.Array:
        """[S] float32; 0 is greedy."""
        return self._float("temperature")

    @property
    def top_p(self) -> jax.Array:
        """[S] float32; 1 is off."""
        return self._float("top_p")

    @property
    def min_p(self) -> jax.Array:
        """[S] float32; 0 is off."""
        return self._float("min_p")

    @property
    def typical_p(self) -> jax.Array:
        """[S] float32; 1 is off."""
        return self._float("typical_p")

    @property
    def repetition_penalty(self) -> jax.Array:
        """[S] float32; 1 is off."""
        return self._float("repetition_penalty")

    @property
    def presence_penalty(self) -> jax.Array:
        """[S] float32; 0 is off."""
        return self._float("presence_penalty")

    @property
    def frequency_penalty(self) -> jax.Array:
        """[S] float32; 0 is off."""
        return self._float("frequency_penalty")

    @property
    def uses_dense_state(self) -> jax.Array:
        """[S] bool: the slot's counts and bias are this request's, and are to be used."""
        return self._flag(_USES_DENSE_STATE)

    @property
    def min_tokens_pending(self) -> jax.Array:
        """[S] bool: stop tokens may not be chosen yet."""
        return self._flag(_MIN_TOKENS_PENDING)

    @property
    def wants_logprobs(self) -> jax.Array:
        """[S] bool."""
        return self._flag(_WANTS_LOGPROBS)


class SamplingTable:
    """Host side: each slot's constant words, written once a request, gathered each step with one numpy index."""

    def __init__(self, max_num_seqs: int) -> None:
        self.spare_slot = max_num_seqs
        self._words = np.zeros((max_num_seqs + 1, NUM_COLUMNS), np.int32)
        for slot in range(max_num_seqs + 1):
            self.set(slot, SamplingParams(temperature=0.0), seed=0)

    def set(self, slot: int, params: SamplingParams, seed: int, sample_index: int = 0) -> None:
        """Give `slot` to a sample of a request. `seed` [0, 2**32) is the request's, or the one drawn for it."""
        temperature = 0.0 if params.temperature < GREEDY_BELOW else params.temperature
        filtered = temperature > 0  # a filter never removes the largest logit, so greedy rows need none
        row = self._words[slot]
        integers, floats = row.view(np.uint32), row.view(np.float32)
        flags = _USES_DENSE_STATE * uses_dense_state(params) | _WANTS_LOGPROBS * (params.logprobs is not None)
        top_k = min(max(params.top_k, 0), 2**31 - 1) if filtered else 0
        for name, value in (
            ("slot", slot),
            ("top_k", top_k),
            ("seed", seed),
            ("sample_index", sample_index),
            ("position", 0),
            ("flags", flags),
            ("min_tokens", min(params.min_tokens, 2**31 - 1)),
        ):
            integers[_COLUMN[name]] = value
        for name, value in (
            ("temperature", temperature),
            ("top_p", params.top_p if filtered else 1.0),
            ("min_p", params.min_p if filtered else 0.0),
            ("typical_p", params.typical_p if filtered else 1.0),
            ("repetition_penalty", params.repetition_penalty),
            ("presence_penalty", params.presence_penalty),
            ("frequency_penalty", params.frequency_penalty),
        ):
            floats[_COLUMN[name]] = value

    def rows(
        self, slots: Sequence[int] | np.ndarray, positions: Sequence[int] | np.ndarray, num_rows: int
    ) -> SamplingRows:
        """The rows of one step, padded to the bucket `num_rows` with rows of the spare slot.

        positions: for each slot, how many tokens its sequence has generated before this one.
        """
        assert len(slots) == len(positions) <= num_rows
        indices = np.full(num_rows, self.spare_slot, np.int64)
        indices[: len(slots)] = slots
        words = self._words[indices]
        words[: len(slots), _COLUMN["position"]] = positions
        pending = words[:, _COLUMN["position"]] < words[:, _COLUMN["min_tokens"]]
        words[:, _COLUMN["flags"]] |= _MIN_TOKENS_PENDING * pending
        return SamplingRows(words)
