"""Rows that are another device's to work on: sent there and back, however unevenly they are spread.

Of rows sorted by owner, every device sends each other one as many as fit a block, works on the blocks it got and sends
them back; what did not fit goes in the next round. So buffers do not grow with how uneven the rows are, and none is
dropped. Where the backend has it (TPU, GPU) a block travels as a ragged all-to-all: its rows and no padding.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxinfer.sharding.mesh import AXES
from jaxinfer.sharding.rules import mesh_axes

_SLACK = 2  # blocks are so many times as large as even rows would need
_LEAST = 8


def on_owners(
    work: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    rows: jax.Array,
    labels: jax.Array,
    counts: jax.Array,
    *,
    no_label: int,
    axis: str,
) -> jax.Array:
    """work(row, label) of every row, on the device that owns it: [R, D].

    work: rows [M, D] and labels int32 [M] -> [M, D]; those labelled `no_label` are nobody's.
    x [T, D], of which `rows` int32 [R] are sent; they are sorted by owner. labels int32 [R]: what their owner is told.
    counts int32 [devices]: how many of the rows are whose, in the order of the logical axis; rows after them all are
    not sent, and get 0.
    """
    (axis,) = mesh_axes((axis,))
    num_devices, num_rows = counts.shape[0], rows.shape[0]
    block = min(num_rows, max(_LEAST, -(-_SLACK * num_rows // num_devices)))
    first = jnp.cumsum(counts) - counts
    slot = jnp.arange(block)

    def round_trip(number: jax.Array, y: jax.Array) -> jax.Array:
        sent = slot < (counts - number * block)[:, None]  # [devices, block]
        index = jnp.where(sent, first[:, None] + number * block + slot, num_rows)
        given = jax.lax.all_to_all(jnp.where(sent, labels.at[index].get(mode="clip"), no_label), axis, 0, 0)
        is_row = given != no_label
        theirs = _all_to_all(x[rows.at[index].get(mode="clip")], sent, is_row, axis)
        done = work(theirs.reshape(-1, x.shape[1]), given.reshape(-1)).reshape(theirs.shape)
        return y.at[index].set(_all_to_all(done, is_row, sent, axis), mode="drop")

    # As many rounds on all devices: whoever leaves the loop early is missed by the others.
    rounds = jax.lax.pmax(jnp.max(-(-counts // block)), AXES)
    return jax.lax.fori_loop(0, rounds, round_trip, jnp.zeros((num_rows, x.shape[1]), x.dtype))


def _all_to_all(blocks: jax.Array, sent: jax.Array, received: jax.Array, axis: str) -> jax.Array:
    """Give block d of [devices, block, D] to device d; the blocks of all devices for this one.

    sent, received bool [devices, block]: which rows there are; the others come out as 0, or as anything where the
    backend has no ragged exchange.
    """

    def padded(blocks: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(blocks, axis, 0, 0)

    def ragged(blocks: jax.Array) -> jax.Array:
        num_devices, block, width = blocks.shape
        starts = jnp.arange(num_devices, dtype=jnp.int32) * block
        here = jnp.broadcast_to(jax.lax.axis_index(axis) * block, starts.shape).astype(jnp.int32)
        flat = blocks.reshape(-1, width)
        send, receive = (jnp.sum(which, axis=1, dtype=jnp.int32) for which in (sent, received))
        out = jax.lax.ragged_all_to_all(flat, jnp.zeros_like(flat), starts, send, here, receive, axis_name=axis)
        return out.reshape(blocks.shape)

    return jax.lax.platform_dependent(blocks, cpu=padded, default=ragged)
