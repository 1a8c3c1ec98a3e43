"""A feed-forward of many experts, of which every token is sent to a few (arXiv:1701.06538).

Routing, the order of rows, the products and their sum are functions of their own, and take how many experts and how
wide ones there are from the weights they are given: on a mesh these are a device's own. No token is ever dropped.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.layers.linear import Linear, project
from jaxinfer.layers.mlp import ACTIVATIONS, MLP
from jaxinfer.layers.parameters import Parameters
from jaxinfer.models.config import ExpertsConfig, LayerConfig, ModelConfig
from jaxinfer.ops.grouped_matmul import grouped_matmul
from jaxinfer.sharding.exchange import on_owners
from jaxinfer.sharding.spmd import all_rows, place_on, sum_own_rows, sum_parts


class MoE(nnx.Module):
    """The sum of each token's chosen experts, weighted by the router, and of the shared expert where there is one."""

    def __init__(self, make: Parameters, config: ModelConfig, layer: LayerConfig, *, fused: bool = False) -> None:
        assert layer.experts is not None
        shared_dim, embed = layer.experts.shared_ffn_dim, {"embed": config.hidden_size}
        self.router = Router(make, config, layer.experts)
        self.experts = Experts(make, config, layer)
        self.shared = MLP(make, config, shared_dim, fused=fused) if shared_dim else None
        has_gate = layer.experts.shared_gate
        self.shared_gate = Linear(make, embed, {"one": 1}, quantized=False) if has_gate else None

    def __call__(self, x: jax.Array, is_real: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """x [T, D] -> y [T, D], and how many tokens chose each expert, int32 [E].

        is_real: bool [T], False for padding, which no expert is troubled with; None: there is none.
        """
        weights, chosen = self.router(x)
        num_experts = self.experts.num_experts
        if is_real is not None:
            chosen = jnp.where(is_real[:, None], chosen, num_experts)
        load = jnp.zeros(num_experts, jnp.int32).at[chosen.reshape(-1)].add(1)
        y = self.experts(x, weights, chosen)
        if is_real is not None:
            y = jnp.where(is_real[:, None], y, 0)
        if self.shared is None:
            return y, load
        shared = self.shared(x)
        return y + (shared if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x)) * shared), load


class Router(nnx.Module):
    """Which experts a token is sent to, and their weights; in float32, since near ties decide."""

    def __init__(self, make: Parameters, config: ModelConfig, experts: ExpertsConfig) -> None:
        self.config = experts
        router = {"router": experts.num_experts}
        self.weight = make.normal({**router, "embed": config.hidden_size}, config.hidden_size**-0.5)
        self.bias = make.constant(router, 0.0) if experts.router_bias else None
        self.score_bias = make.constant(router, 0.0, jnp.float32) if experts.score_bias else None

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [T, D] -> weights float32 [T, A], experts int32 [T, A]."""
        logits = project(x.astype(jnp.float32), self.weight[...].astype(jnp.float32))
        if self.bias is not None:
            logits = logits + self.bias[...].astype(jnp.float32)
        return route(self.config, logits, None if self.score_bias is None else self.score_bias[...])


def route(config: ExpertsConfig, logits: jax.Array, score_bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """logits [T, E] and score_bias [E], float32 -> weights float32 [T, A], experts int32 [T, A], best first."""
    if config.scoring == "softmax_of_chosen":
        best, chosen = jax.lax.top_k(logits, config.num_active)
        return jax.nn.softmax(best, axis=-1) * config.scaling, chosen
    scores = jax.nn.softmax(logits, axis=-1) if config.scoring == "softmax" else jax.nn.sigmoid(logits)
    ranked = scores if score_bias is None else scores + score_bias
    if config.num_groups > 1:
        ranked = _in_best_groups(config, ranked)
    _, chosen = jax.lax.top_k(ranked, config.num_active)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if config.normalize:
        weights = weights / (weights.sum(-1, keepdims=True) + config.normalize_eps)
    return weights * config.scaling, chosen


def _in_best_groups(config: ExpertsConfig, ranked: jax.Array) -> jax.Array:
    """ranked [T, E], with -inf for the experts outside the groups whose best experts score highest in sum."""
    grouped = ranked.reshape(ranked.shape[0], config.num_groups, -1)
    best, _ = jax.lax.top_k(grouped, config.group_best)
    _, groups = jax.lax.top_k(best.sum(-1), config.num_active_groups)
    kept = jax.nn.one_hot(groups, config.num_groups, dtype=bool).any(axis=1)
    return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(ranked.shape)


class Experts(nnx.Module):
    """The experts' gated feed-forwards, stacked: gate and up [E, D, F], down [E, F, D].

    Where the experts at hand are one device's, a row is sent to those that have the experts chosen for it; with fewer
    devices than choices less is moved if each takes the rows of all, and each gets back the sum for its own rows.
    Where they are parts of the width, the parts are summed.
    """

    def __init__(self, make: Parameters, config: ModelConfig, layer: LayerConfig) -> None:
        assert layer.experts is not None
        self.num_experts, self.ffn_dim = layer.experts.num_experts, layer.ffn_dim
        self.activation, self.clamp = config.activation, layer.experts.clamp
        experts, bias = {"experts": layer.experts.num_experts}, layer.experts.bias
        embed, ffn = {"embed": config.hidden_size}, {"ffn": layer.ffn_dim}
        self.gate = StackedLinear(make, experts, embed, ffn, bias=bias)
        self.up = StackedLinear(make, experts, embed, ffn, bias=bias)
        self.down = StackedLinear(make, experts, ffn, embed, bias=bias)

    def __call__(self, x: jax.Array, weights: jax.Array, chosen: jax.Array) -> jax.Array:
        """x [T, D], weights and chosen experts [T, A] -> [T, D]. Expert E is none: what comes of it is nothing."""
        num_experts, _, ffn_dim = self.gate.weight.shape
        num_devices = self.num_experts // num_experts
        if num_devices > chosen.shape[1]:
            y = self._elsewhere(x, weights, chosen)
        elif num_devices > 1:
            y = sum_own_rows(self._for_all(x, weights, chosen), "experts")
        else:
            rows, group_sizes = group_by_expert(chosen, num_experts)
            y = combine(self.feed_forward(x[rows // chosen.shape[1]], group_sizes), rows, weights)
        return sum_parts(y, "ffn") if ffn_dim < self.ffn_dim else y

    def _elsewhere(self, x: jax.Array, weights: jax.Array, chosen: jax.Array) -> jax.Array:
        """Every choice's row is sent to the device that has the expert, and what that makes of it comes back."""
        num_experts = self.gate.weight.shape[0]
        rows, group_sizes = group_by_expert(chosen, self.num_experts)

        def work(given: jax.Array, experts: jax.Array) -> jax.Array:
            order, sizes = group_by_expert(experts[:, None], num_experts)
            return jnp.zeros_like(given).at[order].set(self.feed_forward(given[order], sizes))

        y = on_owners(
            work,
            x,
            rows // chosen.shape[1],
            chosen.reshape(-1)[rows] % num_experts,
            group_sizes.reshape(-1, num_experts).sum(1),
            no_label=num_experts,
            axis="experts",
        )
        return combine(y, rows, weights)

    def _for_all(self, x: jax.Array, weights: jax.Array, chosen: jax.Array) -> jax.Array:
        """What this device's experts make of the rows of all devices that share the experts [all T, D].

        They are taken in windows of as many as one device has choices: one or two of them where the experts are
        chosen evenly, and what is kept beside the rows does not grow with the number of devices.
        """
        num_experts, num_active, window = self.gate.weight.shape[0], chosen.shape[1], chosen.size
        x, weights, chosen = (all_rows(rows, "experts") for rows in (x, weights, chosen))
        chosen = chosen - place_on("experts") * num_experts
        is_here = (chosen >= 0) & (chosen < num_experts)
        rows, group_sizes = group_by_expert(jnp.where(is_here, chosen, num_experts), num_experts)
        ends = jnp.cumsum(group_sizes)

        def add_window(number: jax.Array, y: jax.Array) -> jax.Array:
            first = number * window
            own = jax.lax.dynamic_slice_in_dim(rows, first, window)
            sizes = jnp.clip(ends, first, first + window) - jnp.clip(ends - group_sizes, first, first + window)
            part = self.feed_forward(x[own // num_active], sizes).astype(jnp.float32) * weights.reshape(-1)[own, None]
            is_row = first + jnp.arange(window) < ends[-1]
            return y.at[own // num_active].add(jnp.where(is_row[:, None], part, 0))

        y = jax.lax.fori_loop(0, -(-ends[-1] // window), add_window, jnp.zeros(x.shape, jnp.float32))
        return y.astype(x.dtype)

    def feed_forward(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """x [R, D], grouped by expert, group_sizes [E] -> [R, D]."""
        gate, up = self.gate(x, group_sizes), self.up(x, group_sizes)
        if self.clamp is None:
            return self.down(ACTIVATIONS[self.activation](gate) * up, group_sizes)
        alpha, limit = self.clamp
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return self.down(gate * jax.nn.sigmoid(alpha * gate) * (up + 1), group_sizes)


class StackedLinear(nnx.Module):
    """One projection of every expert: weight [E, in, out], bias [E, out]."""

    def __init__(
        self, make: Parameters, experts: dict[str, int], inputs: dict[str, int], out: dict[str, int], *, bias: bool
    ) -> None:
        ((self.input_axis, width),) = inputs.items()
        self.input_size = width
        self.weight = make.projection({**experts, **inputs, **out}, inputs)
        self.bias = make.constant({**experts, **out}, 0.0) if bias else None

    def __call__(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """x [R, in], grouped by expert -> [R, out]."""
        y = grouped_matmul(x, self.weight[...], group_sizes)
        if self.bias is None:
            return y
        expert = jnp.repeat(jnp.arange(group_sizes.shape[0]), group_sizes, total_repeat_length=x.shape[0])
        bias = self.bias[...]
        if self.weight.shape[1] < self.input_size:  # y is one of several parts, and the bias is added to the first
            bias = jnp.where(place_on(self.input_axis) == 0, bias, 0)
        return y + bias[expert]


def group_by_expert(chosen: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """chosen int32 [T, A] -> rows int32 [T * A], group_sizes int32 [E].

    Row r of the grouped order is choice rows[r] % A of token rows[r] // A; the rows of one expert are neighbours.
    Choices of `num_experts` are of no expert: their rows come last, and in no group.
    """
    flat = chosen.reshape(-1)
    rows = jnp.argsort(flat, stable=True).astype(jnp.int32)
    return rows, jnp.zeros(num_experts, jnp.int32).at[flat].add(1)


def combine(y: jax.Array, rows: jax.Array, weights: jax.Array) -> jax.Array:
    """y [T * A, D] in the grouped order of `rows`, weights float32 [T, A] -> each token's weighted sum [T, D]."""
    place = jnp.zeros_like(rows).at[rows].set(jnp.arange(rows.shape[0], dtype=rows.dtype))
    own = y[place].reshape(*weights.shape, -1)
    return jnp.sum(own.astype(jnp.float32) * weights[..., None], axis=1).astype(y.dtype)
