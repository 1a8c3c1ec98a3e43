"""The pure functions a step is made of, as one device of a shard sees them. `step_programs.py` compiles them.

`cuts` says how the parameters that a function gets are cut over the mesh. T tokens are those of the batch; of x and
whatever else is computed token by token, a device has its own rows [T / C, ...] of the C along the axis `context`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.cache.pool import Pools
from jaxinfer.layers.attention import Attend
from jaxinfer.layers.rotary import Rotation
from jaxinfer.models.model import Model, Params, Stream
from jaxinfer.ops import paged_attention
from jaxinfer.ops.paged_attention import AttentionCase, Backend
from jaxinfer.plan import Plan
from jaxinfer.runner.batch import BatchLayout, DeviceBatch
from jaxinfer.runner.segments import Segment, attention_kinds
from jaxinfer.sharding.spmd import gather_after, gather_stored, own_part, rows_at


def begin(
    model: Model, plan: Plan, layout: BatchLayout, cuts: Any, ends: Params, last_tokens: jax.Array, buffer: jax.Array
) -> tuple[Stream, tuple[Any, ...]]:
    """A packed batch to what enters the first layer, and what attention needs to know of the batch, kind by kind.

    last_tokens int32 [slots]: the newest token of each sampling slot, still on the device when this step is sent.
    """
    batch = layout.unpack(buffer)
    from_slot = last_tokens[jnp.maximum(batch.token_slots, 0)]
    tokens = jnp.where(batch.token_slots >= 0, from_slot, batch.tokens)
    rows = own_part(tokens), own_part(batch.positions)
    read = [name for name in ends if name not in ("embed", "positions")]  # of these tables a few rows are
    whole = ends | gather_stored({name: ends[name] for name in read}, {name: cuts[name] for name in read})
    return model.begin(whole, *rows, context_len=plan.max_model_len), _prepare(plan, batch)


def resume(
    model: Model, plan: Plan, layout: BatchLayout, buffer: jax.Array
) -> tuple[tuple[Rotation, ...], tuple[Any, ...]]:
    """What `begin` makes of a packed batch, but for what comes from the stage before: rotations, prepared."""
    batch = layout.unpack(buffer)
    return model.rotations(own_part(batch.positions), context_len=plan.max_model_len), _prepare(plan, batch)


def _prepare(plan: Plan, batch: DeviceBatch) -> tuple[Any, ...]:
    backends = {(layer.case, layer.group): layer.backend for layer in plan.layers}
    return tuple(paged_attention.prepare(backends[kind], kind[0], batch, kind[1]) for kind in attention_kinds(plan))


def run_layers(
    model: Model,
    plan: Plan,
    layout: BatchLayout,
    segment: Segment,
    cuts: tuple[Any, ...],
    layers: tuple[Params, ...],
    x: jax.Array,
    pools: Pools,
    rotations: tuple[Rotation, ...],
    per_layer: tuple[jax.Array, ...],
    prepared: tuple[Any, ...],
    load: jax.Array | None,
    buffer: jax.Array,
) -> tuple[jax.Array, Pools, jax.Array | None]:
    """The layers of a segment, or of another of the same function: x [T / C, D], their pools, and both after them.

    layers, pools, per_layer, prepared: those of the segment, in its order.
    load: how many of this device's tokens each expert was chosen for so far, int32 [layers with experts, E], to which
    this step's are added; None where nobody counts.
    """
    batch = layout.unpack(buffer)
    attend = _paged_attend(plan, segment, batch, prepared)
    is_real = own_part(jnp.arange(layout.num_tokens) < batch.num_tokens)
    chosen: list[jax.Array] = []
    following = gather_stored(layers[0], cuts[0])
    for place, index in enumerate(segment.layers):
        own, params = per_layer[place] if per_layer else None, following
        if place + 1 < len(layers):
            x, following = gather_after(x, layers[place + 1], cuts[place + 1])
        x, pools, by_expert = model.layer(index, params, x, rotations, own, attend, pools, is_real)
        if by_expert is not None:
            chosen.append(by_expert)
    return x, pools, None if load is None else load + jnp.stack(chosen)


def end(
    model: Model, layout: BatchLayout, cuts: Any, ends: Params, x: jax.Array, buffer: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """x [T / C, D] after the last layer -> hidden states [T / C, D], and those of the rows to sample from [S, D]."""
    hidden = model.end(gather_stored(ends, cuts), x)
    return hidden, rows_at(hidden, layout.unpack(buffer).logits_tokens)


def _paged_attend(plan: Plan, segment: Segment, batch: DeviceBatch, prepared: tuple[Any, ...]) -> Attend[Pools]:
    """Attention over the page pools of a segment; what a backend derives from the batch is derived once per kind."""
    kinds = attention_kinds(plan)

    def attend(
        index: int,
        q: jax.Array,
        k: jax.Array | None,
        v: jax.Array | None,
        sinks: jax.Array | None,
        cache: Pools,
    ) -> tuple[jax.Array, Pools]:
        layer = plan.layers[index]
        if k is not None:
            k, v = _with_finite_values(k, v, layer.case.latent_dim)
        metadata = prepared[segment.kinds.index(kinds.index((layer.case, layer.group)))]
        place = segment.pools.index(layer.pool)
        run = _run_traced_once
        out, pool = run(layer.backend, layer.case, layer.group, q, k, v, cache[place], batch, metadata, sinks)
        return out, (*cache[:place], pool, *cache[place + 1 :])

    return attend


def _with_finite_values(
    k: jax.Array, v: jax.Array | None, latent_dim: int | None
) -> tuple[jax.Array, jax.Array | None]:
    """Values that are not finite become 0, and their key NaN, which says the same to every query that sees it.

    A masked key counts for nothing whatever it is, but a masked value is multiplied by 0, and 0 times NaN is NaN: one
    bad token would spoil the tokens before it in its chunk (and with them pages that others share), and whoever gets
    its pages later. Of a key whose first latent_dim numbers are its value, the rest becomes NaN.
    """
    if v is None:
        latent, rest = k[..., :latent_dim], k[..., latent_dim:]
        finite = jnp.isfinite(latent).all(-1, keepdims=True)
        return jnp.concatenate([jnp.where(finite, latent, 0), jnp.where(finite, rest, jnp.nan)], -1), None
    finite = jnp.isfinite(v).all(-1, keepdims=True)
    return jnp.where(finite, k, jnp.nan), jnp.where(finite, v, 0)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run_traced_once(
    backend: Backend,
    case: AttentionCase,
    group: int,
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    pool: Any,
    batch: DeviceBatch,
    metadata: Any,
    sinks: jax.Array | None,
) -> tuple[jax.Array, Any]:
    """Layers of one case call one and the same function, so that a deep model is traced as fast as a shallow one."""
    return paged_attention.attend(backend, case, q, k, v, pool, batch, group, metadata, sinks)


def logits(model: Model, num_rows: int, cuts: Any, ends: Params, hidden: jax.Array) -> jax.Array:
    """hidden [S, D], of which the first `num_rows` count -> float32 logits [num_rows, V], this device's part of V."""
    return model.logits(gather_stored(ends, cuts), hidden[:num_rows])


def logits_of(model: Model, cuts: Any, ends: Params, hidden: jax.Array, rows: jax.Array) -> jax.Array:
    """The logits after the tokens at `rows` [R] of the batch, of hidden [T / C, D]: float32 [R, V], this device's part
    of V."""
    return model.logits(gather_stored(ends, cuts), rows_at(hidden, rows))
