"""What a paged attention is asked for: the static case and the ragged batch. Backends and their table share it.

Over the devices of a mesh's axis `context` keys are dealt out one by one (striped attention, arXiv:2311.09431): of C
devices the one at place c has the keys of positions c, c + C, c + 2 C, ..., in its slots 0, 1, 2, ... So every device
has as much to do for any stretch of queries, and the arithmetic is `newest_slot` and `num_slots`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxinfer.sharding.spmd import CONTEXT
from pallas_kernels.paged_attention.quantized import QuantizedPool


@dataclass(frozen=True)
class AttentionCase:
    """All that is static about one kind of layer's attention.

    window: a query at i sees keys j with i - window < j <= i; None: all j <= i.
    soft_cap: logits become soft_cap * tanh(logits / soft_cap).
    dtype: name of the dtype of queries, keys and values, and what the pool holds where there is no kv_dtype.
    kv_dtype: "int8" or "float8_e4m3fn": the pool is a QuantizedPool, keys and values of so many bits, each of a token
    and head with a float32 scale of its own, which whoever writes it computes. None: keys and values as they are.
    has_sinks: every head has one more logit in its softmax, which mixes in nothing.
    platform: "cpu", "gpu" or "tpu".
    latent_dim: the first so many numbers of a key are its value (multi-head latent attention, arXiv:2405.04434, with
    its up-projections in the queries and after the mixing). There is no v, the pool holds keys alone, and what comes
    out is so wide. None: values are apart, as wide as keys.
    context: so many devices share the keys of a sequence; what comes out are their parts of the softmax.
    Heads, and the page_size tokens of a page, are those of one device: attention is a program of its own on every
    device of a mesh.
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
    context: int = 1
    kv_dtype: str | None = None

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


def pool_arrays(case: AttentionCase, shape: tuple[int, ...], scales_shape: tuple[int, ...] | None) -> Any:
    """Shapes and dtypes of a pool. scales_shape: None where the backend serves no quantized case."""
    if case.kv_dtype is None:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(case.dtype))
    assert scales_shape is not None
    return QuantizedPool(
        jax.ShapeDtypeStruct(shape, jnp.dtype(case.kv_dtype)), jax.ShapeDtypeStruct(scales_shape, jnp.float32)
    )


def newest_slot(case: AttentionCase, position: jax.Array) -> jax.Array:
    """The slot of the newest key at or before `position` that this device has; -1 or less where there is none.

    So a query sees the slots from newest_slot(position - window) + 1 to newest_slot(position).
    """
    return position if case.context == 1 else (position - jax.lax.axis_index(CONTEXT)) // case.context


def num_slots(case: AttentionCase, length: jax.Array) -> jax.Array:
    """How many keys of a sequence of `length` tokens this device has."""
    return newest_slot(case, length + (case.context - 1))


def is_here(case: AttentionCase, position: jax.Array) -> jax.Array | bool:
    """Whether this device has the key of `position`."""
    return case.context == 1 or position % case.context == jax.lax.axis_index(CONTEXT)
