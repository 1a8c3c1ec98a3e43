"""Exact merge of attention over parts of a context, from each part's output and log-sum-exp.

The softmax over all keys is the parts' softmaxes, weighted by their shares of the sum (flash decoding; section 3.1 of
arXiv:2112.05682). It is elementwise work that XLA makes one pass of on every target, so there is no kernel beside it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def merge(out: jax.Array, lse: jax.Array, *, axis: int = 0) -> tuple[jax.Array, jax.Array]:
    """Merge parts that lie along `axis`.

    out [..., H]: each part's mixed values. lse [...]: the log of its sum of exponentials, float32; -inf where a query
    saw no key of the part, whose output is then not read.
    Returns (out in its dtype, lse float32), without the axis: 0 and -inf where no part saw a key.
    """
    _check(out, lse)
    weighted, weight, most = _weighted(out, lse, jnp.max(lse, axis=axis, keepdims=True))
    most = jnp.squeeze(most, axis)
    return _divided(jnp.sum(weighted, axis=axis), jnp.sum(weight, axis=axis), most, out.dtype)


def merge_across(out: jax.Array, lse: jax.Array, axis_name: str) -> tuple[jax.Array, jax.Array]:
    """The same for parts on the devices of a mesh axis, inside `shard_map`; every device gets the whole."""
    _check(out, lse)
    weighted, weight, most = _weighted(out, lse, lax.pmax(lse, axis_name))
    return _divided(lax.psum(weighted, axis_name), lax.psum(weight, axis_name), most, out.dtype)


def merge_own_rows(out: jax.Array, lse: jax.Array, axis_name: str) -> tuple[jax.Array, jax.Array]:
    """`merge_across`, of which every device gets only its own part of the first axis: half the bytes move."""
    _check(out, lse)
    most = lax.pmax(lse, axis_name)
    weighted, weight, most = _weighted(out, lse, most)
    weighted, weight = lax.psum_scatter((weighted, weight), axis_name, tiled=True)
    own = lax.dynamic_slice_in_dim(most, lax.axis_index(axis_name) * weight.shape[0], weight.shape[0])
    return _divided(weighted, weight, own, out.dtype)


def _check(out: jax.Array, lse: jax.Array) -> None:
    if out.shape[:-1] != lse.shape:
        raise ValueError(f"out {out.shape} and lse {lse.shape} do not fit; lse needs {out.shape[:-1]}")
    if lse.dtype != jnp.float32:
        raise ValueError(f"lse is of {lse.dtype}; it must be float32, or the merge is not exact")


def _weighted(out: jax.Array, lse: jax.Array, most: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each part's output times its weight, the weights, and the finite number that they are relative to."""
    most = jnp.where(most == -jnp.inf, 0.0, most)
    weight = jnp.exp(lse - most)
    # Chosen, not multiplied by 0: what a part without keys left in its output may be NaN.
    return jnp.where(weight[..., None] == 0, 0.0, weight[..., None] * out.astype(jnp.float32)), weight, most


def _divided(weighted: jax.Array, weight: jax.Array, most: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    out = jnp.where(weight[..., None] == 0, 0.0, weighted / jnp.where(weight == 0, 1.0, weight)[..., None])
    return out.astype(dtype), jnp.log(weight) + most
