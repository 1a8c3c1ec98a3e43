"""Flash attention's contract in plain jnp, float32, all logits at once: slow, and the oracle of the fast ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.cases import FlashCase

Segments = tuple[jax.Array, jax.Array]


def check(case: FlashCase, q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments | None) -> None:
    """Raise a ValueError where arguments do not fit the case; all implementations begin with it."""
    fault = case.fault()
    if fault is not None:
        raise ValueError(f"flash attention cannot serve {case}: {fault}")
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q {q.shape} and k {k.shape} must have 4 axes: batch, tokens, heads, head dim")
    batch, num_queries, num_keys = q.shape[0], q.shape[1], k.shape[1]
    expected: dict[str, tuple[jax.Array, tuple[int, ...]]] = {
        "q": (q, (batch, num_queries, case.num_heads, case.head_dim)),
        "k": (k, (batch, num_keys, case.num_kv_heads, case.head_dim)),
        "v": (v, (batch, num_keys, case.num_kv_heads, case.value_dim)),
    }
    if case.has_segments != (segments is not None):
        given = "missing" if segments is None else "given"
        raise ValueError(f"has_segments={case.has_segments}, but segments are {given}")
    if segments is not None:
        expected["segments of queries"] = (segments[0], (batch, num_queries))
        expected["segments of keys"] = (segments[1], (batch, num_keys))
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}; this case needs {shape}")
        if name in ("q", "k", "v") and array.dtype.name != case.dtype:
            raise ValueError(f"{name} is of {array.dtype.name}; this case needs {case.dtype}")
    if not num_queries or not num_keys:
        raise ValueError(f"{num_queries} queries and {num_keys} keys; there must be at least one of each")


def flash_attention(
    case: FlashCase,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_start: jax.Array | int = 0,
    kv_start: jax.Array | int = 0,
    segments: Segments | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of whole sequences, or of a part of their queries to a part of their keys.

    q                  [batch, T, N, H]; k [batch, J, K, H]; v [batch, J, K, value_dim]
    q_start, kv_start  position of the first query and of the first key, int32 scalars: where the parts lie in a context
                       that is split over devices
    segments           int32 [batch, T] of queries and [batch, J] of keys, when the case has them

    Returns the mixed values [batch, T, N, value_dim] in q's dtype, and the log-sum-exp of each query's logits
    [batch, T, N] in float32, by which parts are merged (pallas_kernels/merge_attention): 0 and -inf for a query that
    sees no key. Keys and values past the positions that queries see may be NaN; those of other segments may not.
    """
    check(case, q, k, v, segments)
    batch, num_queries, num_keys = q.shape[0], q.shape[1], k.shape[1]
    grouped = q.astype(jnp.float32).reshape(batch, num_queries, case.num_kv_heads, case.group_size, case.head_dim)
    logits = jnp.einsum("btkgh,bjkh->bkgtj", grouped, k.astype(jnp.float32), precision="highest") * case.scale
    if case.soft_cap is not None:
        logits = case.soft_cap * jnp.tanh(logits / case.soft_cap)
    distance = (q_start + jnp.arange(num_queries))[:, None] - (kv_start + jnp.arange(num_keys))
    seen = jnp.broadcast_to(distance >= 0 if case.causal else True, (batch, num_queries, num_keys))
    if case.window is not None:
        seen &= distance < case.window
    if segments is not None:
        seen &= segments[0][:, :, None] == segments[1][:, None]
    logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - jnp.where(lse == -jnp.inf, 0.0, lse)[..., None])
    values = jnp.where(seen.any(1)[:, :, None, None], v.astype(jnp.float32), 0.0)
    out = jnp.einsum("bkgtj,bjkh->btkgh", weights, values, precision="highest")
    out = out.reshape(batch, num_queries, case.num_heads, case.value_dim).astype(q.dtype)
    return out, lse.transpose(0, 3, 1, 2).reshape(batch, num_queries, case.num_heads)
