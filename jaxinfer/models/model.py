"""A model as pure functions over a plain pytree of parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinfer.layers.attention import Attend, Cache
from jaxinfer.layers.parameters import Parameters
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.dense import dense_attend

Params = dict[str, Any]


class Model:
    """The decoder of `config`, split once into its structure (kept here) and its parameters (the caller's).

    Parameters are nested dicts of arrays with string keys: {"layers": {"0": {"attention": {"q": {"weight": ...}}}}}.
    Every method is pure and may be called inside the caller's own `jit` or `grad`.
    """

    def __init__(self, config: ModelConfig, dtype: Any = jnp.float32) -> None:
        self.config = config
        self.dtype = np.dtype(dtype)
        self._graph, self._state = nnx.split(Decoder(Parameters(self.dtype), config))

    @cached_property
    def abstract_params(self) -> Params:
        """The parameters' shapes and dtypes, as jax.ShapeDtypeStruct leaves."""
        return _with_string_keys(nnx.to_pure_dict(self._state))

    @cached_property
    def logical_axes(self) -> Params:
        """For every parameter the tuple of its axes' logical names; None marks an axis that is never split."""
        axes: Params = {}
        for path, variable in nnx.to_flat_state(self._state):
            _insert(axes, tuple(str(key) for key in path), tuple(variable.get_metadata()["axes"]))
        return axes

    def init_params(self, seed: int = 0) -> Params:
        """Random parameters, scaled so that activations keep their size: for tests, benchmarks and training."""
        state = nnx.state(Decoder(Parameters(self.dtype, seed), self.config))
        return _with_string_keys(nnx.to_pure_dict(state))

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
        """tokens, positions int32 [T] -> final hidden states [T, D] and the extended cache; see Decoder."""
        return self._bind(params)(tokens, positions, attend, cache, context_len=context_len)

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """hidden [T, D] -> float32 logits [T, V]."""
        return self._bind(params).logits(hidden)

    def forward(self, params: Params, tokens: jax.Array, context_len: int | None = None) -> jax.Array:
        """Logits of whole sequences, without a cache.

        tokens int32 [T] or [batch, T] -> float32 [..., T, V]. `context_len` defaults to T, as transformers chooses
        the frequencies of length-dependent rope scalings.
        """
        if tokens.ndim == 2:
            one: Callable[[jax.Array], jax.Array] = lambda row: self.forward(params, row, context_len)  # noqa: E731
            return jax.vmap(one)(tokens)
        if tokens.ndim != 1:
            raise ValueError(f"tokens has shape {tokens.shape}; give [T] or [batch, T]")
        length = tokens.shape[0]
        decoder = self._bind(params)
        positions = jnp.arange(length, dtype=jnp.int32)
        hidden, _ = decoder(tokens, positions, dense_attend(self.config), {}, context_len=context_len or length)
        return decoder.logits(hidden)

    def _bind(self, params: Params) -> Decoder:
        return nnx.merge(self._graph, _with_list_keys(params))


def _insert(tree: Params, path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _with_string_keys(tree: Any) -> Any:
    return {str(k): _with_string_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _with_list_keys(tree: Any) -> Any:
    """NNX numbers the items of a list with ints; everywhere else keys are strings."""
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdigit() else k: _with_list_keys(v) for k, v in tree.items()}
