"""Two warpgroups that take turns at the tensor cores of a Hopper GPU, as in FlashAttention-3, arXiv:2407.08608.

Each has 64 queries, and both mix the same blocks of keys and values, which a third warpgroup brings to shared memory.
While one multiplies, the other is at its softmax: whose turn it is, a barrier says. The weights go from registers into
the second product. Where keys come from and who sees which is the business of the kernels: flash attention's, and that
of the chunks of paged attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.xla import MASKED

GROUPS, ROWS = 2, 64  # warpgroups that multiply, and the queries of each: the rows of a WGMMA tile
COPYING = GROUPS  # the warpgroup that only copies
WARPGROUPS = "warpgroup"  # the axis of all of them
BY_ROW = plgpu.Layout.WGMMA.reduce(1)
_REGISTERS, _COPYING_REGISTERS = 232, 40  # of a thread; together what a multiprocessor has
_LANES = 64  # of a row of a tile of shared memory: 128 bytes, the widest swizzle
_LOG2_E = math.log2(math.e)

State = tuple[jax.Array, jax.Array, jax.Array]  # mixed values [64, H]; the largest logit [64], base 2; sum of weights


def _matrix(rows: tuple[int, ...], lanes: int, dtype: Any) -> Any:
    """Shared memory for matrices, as tensor cores and the copies of 128 bytes read them."""
    # JAX leaves a method of their base class abstract, that these are never asked for.
    tiling = plgpu.TilingTransform((8, _LANES))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM((*rows, lanes), dtype, transforms=(tiling, swizzle))


def buffers(
    keys: int, slots: int, head_dim: int, value_dim: int, dtype: Any, *, simulated: bool, copies: int = 1
) -> dict[str, Any]:
    """Shared memory and barriers, by the names that `Turns` has for them.

    keys: of a block, which arrives in so many copies of keys and as many of values. slots: blocks in the ring.
    """
    scratch: dict[str, Any] = {
        "q": _matrix((GROUPS, ROWS), head_dim, dtype),
        "keys": _matrix((slots, keys), head_dim, dtype),
        "values": _matrix((slots, keys), value_dim, dtype),
        "lse": plgpu.SMEM((GROUPS, ROWS), jnp.float32),
        "q_there": plgpu.Barrier(num_barriers=GROUPS),
        "keys_there": plgpu.Barrier(num_arrivals=copies, num_barriers=slots),
        "values_there": plgpu.Barrier(num_arrivals=copies, num_barriers=slots),
        "keys_done": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=slots),
        "values_done": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=slots),
        "turn": plgpu.Barrier(num_barriers=GROUPS),
    }
    if value_dim != head_dim:  # otherwise outputs leave from where the queries came
        scratch["out"] = _matrix((GROUPS, ROWS), value_dim, dtype)
    if simulated:
        scratch["weights"] = _matrix((GROUPS, ROWS), keys, dtype)
    return scratch


def split(copy: Callable[[], None], attend: Callable[[jax.Array], None]) -> None:
    """Let one warpgroup copy, with few registers, and the others attend; each of these gets its number."""
    warpgroup = lax.axis_index(WARPGROUPS)

    @pl.when(warpgroup == COPYING)
    def _() -> None:
        plgpu.set_max_registers(_COPYING_REGISTERS, action="decrease")
        copy()

    @pl.when(warpgroup < GROUPS)
    def _() -> None:
        plgpu.set_max_registers(_REGISTERS, action="increase")
        attend(warpgroup)


@dataclass(frozen=True)
class Turns:
    """The work of one warpgroup, number `group`, on the buffers `refs`: `begin`, `mix` for every block, `end`.

    simulated: without what JAX's simulation does not know; see `add`.
    """

    refs: dict[str, Any]
    group: jax.Array
    scale: float
    soft_cap: float | None
    simulated: bool

    def begin(self) -> State:
        """Nothing mixed yet; the turn is held."""
        plgpu.barrier_wait(self.refs["q_there"].at[self.group])
        by_row = jnp.full((ROWS,), MASKED, jnp.float32), jnp.zeros((ROWS,), jnp.float32)
        most, weight = (plgpu.layout_cast(part, BY_ROW) for part in by_row)
        nothing = jnp.zeros((ROWS, self.refs["values"].shape[-1]), jnp.float32)
        mixed = plgpu.layout_cast(nothing, plgpu.Layout.WGMMA)

        @pl.when(self.group == 1)
        def _() -> None:
            plgpu.barrier_wait(self.refs["turn"].at[1])

        return mixed, most, weight

    def end(self, state: State) -> tuple[Any, Any]:
        """Pass the turn on. Returns what to copy to memory: outputs [64, H] and log-sum-exps [64]."""

        @pl.when(self.group == 0)
        def _() -> None:
            plgpu.barrier_arrive(self.refs["turn"].at[1])

        mixed, most, weight = state
        total = jnp.where(weight == 0.0, 1.0, weight)
        out, lse = self.refs.get("out", self.refs["q"]).at[self.group], self.refs["lse"].at[self.group]
        out[...] = (mixed / lax.broadcast_in_dim(total, mixed.shape, [0])).astype(out.dtype)
        lse[...] = jnp.where(weight == 0.0, -jnp.inf, most / _LOG2_E + jnp.log(total))
        plgpu.commit_smem()
        return out, lse

    def mix(
        self,
        slot: jax.Array,
        state: State,
        mask: Callable[[jax.Array], jax.Array] | None = None,
        prepare: Callable[[Any], None] | None = None,
    ) -> State:
        """Take the block in a slot into the running softmax. The turn is held at the beginning and the end.

        mask: makes -inf of the logits [64, keys] of keys that a query does not see; None: all are seen. prepare: is
        called with the block's values before they are multiplied, by both warpgroups.
        """
        mixed, old_most, weight = state
        keys, values, turn = self.refs["keys"].at[slot], self.refs["values"].at[slot], self.refs["turn"]
        plgpu.barrier_wait(self.refs["keys_there"].at[slot])

        def multiply(total: Any) -> jax.Array:
            plgpu.wgmma(total, self.refs["q"].at[self.group], keys.transpose((1, 0)))
            plgpu.barrier_arrive(turn.at[1 - self.group])
            return total[...]

        shape = (ROWS, self.refs["keys"].shape[1])
        logits = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
        plgpu.barrier_arrive(self.refs["keys_done"].at[slot])
        factor = self.scale * _LOG2_E
        if self.soft_cap is not None:
            logits = jnp.tanh(logits * (self.scale / self.soft_cap))
            factor = self.soft_cap * _LOG2_E
        if mask is not None:
            logits = mask(logits)
        most = jnp.maximum(old_most, jnp.max(logits, axis=1) * factor)
        keep = jnp.exp2(old_most - most)
        weights = jnp.exp2(logits * factor - lax.broadcast_in_dim(most, shape, [0]))
        weight = weight * keep + jnp.sum(weights, axis=1)
        mixed *= lax.broadcast_in_dim(keep, mixed.shape, [0])
        # Nothing of the softmax may be put off until the tensor cores are this warpgroup's.
        operand = weights.astype(self.refs["values"].dtype)
        mixed, most, weight, operand = lax.optimization_barrier((mixed, most, weight, operand))
        plgpu.barrier_wait(self.refs["values_there"].at[slot])
        if prepare is not None:
            prepare(values)
        plgpu.barrier_wait(turn.at[self.group])
        mixed = self.add(mixed, operand, values)
        plgpu.barrier_arrive(self.refs["values_done"].at[slot])
        return mixed, most, weight

    def add(self, mixed: jax.Array, weights: jax.Array, values: Any) -> jax.Array:
        """mixed + weights @ values. JAX's simulation knows no WGMMA from registers, nor an accumulator that begins with
        a value: there the weights pass through shared memory, and the product is added."""
        if not self.simulated:

            def accumulate(total: Any) -> None:
                plgpu.wgmma(total, weights, values)

            run: Any = pl.run_state(accumulate)
            return run(plgpu.WGMMAAccumulatorRef.init(mixed))
        operand = self.refs["weights"].at[self.group]
        operand[...] = weights
        plgpu.commit_smem()

        def multiply(total: Any) -> jax.Array:
            plgpu.wgmma(total, operand, values)
            return total[...]

        return mixed + pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, mixed.shape[1]), jnp.float32))
