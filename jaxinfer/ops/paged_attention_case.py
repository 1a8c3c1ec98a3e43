"""What a paged attention is asked for: the static case and the ragged batch. Backends and their table share it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax


@dataclass(frozen=True)
class AttentionCase:
    """All that is static about one kind of layer's attention.

    window: a query at i sees keys j with i - window < j <= i; None: all j <= i.
    soft_cap: logits become soft_cap * tanh(logits / soft_cap).
    dtype: name of the dtype of keys and values in the pool.
    has_sinks: every head has one more logit in its softmax, which mixes in nothing.
    platform: "cpu", "gpu" or "tpu".
    latent_dim: the first so many numbers of a key are its value (multi-head latent attention, arXiv:2405.04434, with
    its up-projections in the queries and after the mixing). There is no v, the pool holds keys alone, and what comes
    out is so wide. None: values are apart, as wide as keys.
    Heads are those of one device: attention is a program of its own on every device of a mesh.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    window: int | None
    soft_cap: float | None
    scale: float
    dtype: str
    has_sinks: bool
    platform: str
    latent_dim: int | None = None

    @property
    def group_size(self) -> int:
        """Query heads that share one kv head."""
        return self.num_heads // self.num_kv_heads


class RaggedBatch(Protocol):
    """The fields of the device batch that attention reads; see runner/batch.py for their meaning."""

    @property
    def positions(self) -> jax.Array: ...
    @property
    def sequence_ids(self) -> jax.Array: ...
    @property
    def query_start(self) -> jax.Array: ...
    @property
    def kv_len(self) -> jax.Array: ...
    @property
    def page_tables(self) -> tuple[jax.Array, ...]: ...
    @property
    def num_tokens(self) -> jax.Array: ...
    @property
    def num_sequences(self) -> jax.Array: ...
