"""A model as pure functions over a plain pytree of parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinfer.layers.attention import Attend, Cache
from jaxinfer.layers.parameters import Parameters
from jaxinfer.layers.rotary import Rotation, rotation
from jaxinfer.models.config import LayerConfig, ModelConfig
from jaxinfer.models.decoder import DecoderLayer, Ends
from jaxinfer.models.dense import Mix, attend_whole, dense

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stream:
    """What enters the first layer.

    x [T, D]. rotations: of each rope of the model, in the order in which layers first use them. per_layer: every
    layer's own input [T, Dp], or nothing.
    """

    x: jax.Array
    rotations: tuple[Rotation, ...]
    per_layer: tuple[jax.Array, ...]


class Model:
    """The decoder of `config`, split once into its structure (kept here) and its parameters (the caller's).

    Parameters are nested dicts of arrays with string keys: {"layers": {"0": {"attention": {"q": {"weight": ...}}}}}.
    Every method is pure and may be called inside the caller's own `jit` or `grad`.

    fused: products that read the same rows are one matrix, "qkv" and "gate_up"; see models/fused.py.
    """

    def __init__(self, config: ModelConfig, dtype: Any = jnp.float32, *, fused: bool = False) -> None:
        self.config = config
        self.dtype = np.dtype(dtype)
        self.fused = fused
        # In the layers' order: a set's differs between processes, and so would the programs, which are kept on disk.
        self._ropes = tuple(dict.fromkeys(layer.rope for layer in config.layers if layer.rope is not None))
        make = Parameters(self.dtype, None, config.quantization)
        kinds = {layer: self._layer(make, layer) for layer in dict.fromkeys(config.layers)}
        self._abstract = Ends(make, config), [kinds[layer] for layer in config.layers]
        self._ends = nnx.graphdef(self._abstract[0])
        graphs = {layer: nnx.graphdef(module) for layer, module in kinds.items()}
        self._layers = tuple(graphs[layer] for layer in config.layers)

    def _layer(self, make: Parameters, layer: LayerConfig) -> DecoderLayer:
        return DecoderLayer(make, self.config, layer, fused=self.fused)

    @cached_property
    def abstract_params(self) -> Params:
        """The parameters' shapes and dtypes, as jax.ShapeDtypeStruct leaves."""
        return _by_layer(_values, *self._abstract)

    @cached_property
    def logical_axes(self) -> Params:
        """For every parameter the tuple of its axes' logical names; None marks an axis that is never split."""
        return _by_layer(_axes, *self._abstract)

    def init_params(self, seed: int = 0) -> Params:
        """Random parameters, scaled so that activations keep their size: for tests, benchmarks and training."""
        make = Parameters(self.dtype, seed, self.config.quantization)
        layers = [self._layer(make, layer) for layer in self.config.layers]
        return _by_layer(_values, Ends(make, self.config), layers)

    def begin(self, params: Params, tokens: jax.Array, positions: jax.Array, *, context_len: int) -> Stream:
        """tokens, positions int32 [T] -> what enters the first layer. Of `params` it reads all but "layers".

        `context_len`: the longest sequence this program serves; see layers/rotary.py.
        """
        x, per_layer = self._bind_ends(params).begin(tokens, positions)
        split = () if per_layer is None else tuple(per_layer[:, index] for index in range(len(self._layers)))
        return Stream(x, self.rotations(positions, context_len=context_len), split)

    def rotations(self, positions: jax.Array, *, context_len: int) -> tuple[Rotation, ...]:
        """Those of a Stream, for positions int32 [T]."""
        return tuple(rotation(rope, positions, context_len) for rope in self._ropes)

    def layer(
        self,
        index: int,
        params: Params,
        x: jax.Array,
        rotations: tuple[Rotation, ...],
        per_layer: jax.Array | None,
        attend: Attend[Cache],
        cache: Cache,
        is_real: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache, jax.Array | None]:
        """One layer over the residual stream x [T, D]; `params` are the layer's own.

        is_real: bool [T], False for padding; None: there is none. Returns x, the cache, and how many tokens chose each
        of the layer's experts, int32 [E], if it has any.

        Two layers of the same LayerConfig are the same function of their arguments, but for what `attend` makes of
        the index.
        """
        rope = self.config.layers[index].rope
        cos_sin = None if rope is None else rotations[self._ropes.index(rope)]
        q, k, v = _before(self._layers[index], params, x, cos_sin)
        mixed, cache = attend(index, q, k, v, params["attention"].get("sinks"), cache)
        x, load = _after(self._layers[index], params, x, mixed, per_layer, is_real)
        return x, cache, load

    def end(self, params: Params, x: jax.Array) -> jax.Array:
        """x [T, D] after the last layer -> hidden states [T, D] for `logits`."""
        return self._bind_ends(params).final_norm(x)

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """hidden [T, D] -> float32 logits [T, V]. Of `params` it reads all but "layers"."""
        return self._bind_ends(params).logits(hidden)

    def hidden(
        self,
        params: Params,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend[Cache],
        cache: Cache,
        *,
        context_len: int,
    ) -> tuple[jax.Array, Cache]:
        """tokens, positions int32 [T] -> final hidden states [T, D] and the extended cache: the whole decoder."""
        stream = self.begin(params, tokens, positions, context_len=context_len)
        x = stream.x
        for index in range(len(self._layers)):
            own = stream.per_layer[index] if stream.per_layer else None
            x, cache, _ = self.layer(index, params["layers"][str(index)], x, stream.rotations, own, attend, cache)
        return self.end(params, x), cache

    def forward(self, params: Params, tokens: jax.Array, context_len: int | None = None, mix: Mix = dense) -> jax.Array:
        """Logits of whole sequences, without a cache.

        tokens int32 [T] or [batch, T] -> float32 [..., T, V]. `context_len` defaults to T, as transformers chooses
        the frequencies of length-dependent rope scalings. mix: how tokens attend to each other.
        """
        if tokens.ndim not in (1, 2) or not tokens.size:
            raise ValueError(f"tokens has shape {tokens.shape}; give [T] or [batch, T], both at least 1")
        batch, length = tokens.size // tokens.shape[-1], tokens.shape[-1]
        positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)
        attend = attend_whole(self.config, batch, mix)
        hidden, _ = self.hidden(params, tokens.reshape(-1), positions, attend, {}, context_len=context_len or length)
        return self.logits(params, hidden).reshape(*tokens.shape, -1)

    def _bind_ends(self, params: Params) -> Ends:
        """Of parameters that are not among `params`, as a stage has only those that it reads, there are but shapes."""
        every = {**self.abstract_params, **params}
        return nnx.merge(self._ends, {name: value for name, value in every.items() if name != "layers"})


# Layers of one structure are traced once: inside an outer jit these are calls of one and the same function.
@partial(jax.jit, static_argnums=0)
def _before(graph: Any, params: Params, x: jax.Array, cos_sin: Rotation | None) -> Any:
    return nnx.merge(graph, params).before(x, cos_sin)


@partial(jax.jit, static_argnums=0)
def _after(
    graph: Any,
    params: Params,
    x: jax.Array,
    mixed: jax.Array,
    per_layer_input: jax.Array | None,
    is_real: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    return nnx.merge(graph, params).after(x, mixed, per_layer_input, is_real)


def _by_layer(tree: Callable[[nnx.Module], Params], ends: Ends, layers: list[DecoderLayer]) -> Params:
    return {**tree(ends), "layers": {str(index): tree(layer) for index, layer in enumerate(layers)}}


def _values(module: nnx.Module) -> Params:
    return nnx.to_pure_dict(nnx.state(module))


def _axes(module: nnx.Module) -> Params:
    axes: Params = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        inner = axes
        for key in path[:-1]:
            inner = inner.setdefault(str(key), {})
        inner[str(path[-1])] = tuple(variable.get_metadata()["axes"])
    return axes
