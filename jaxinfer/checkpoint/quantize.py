"""Weights quantized on their way in: read as they would be without it, one at a time, and rounded on their devices."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from jaxinfer.ops.quantized_matmul import Quantized, quantize
from jaxinfer.sharding.spmd import elsewhere


def is_quantized(node: Any) -> bool:
    """Whether a node of a parameters' structure (or of one like it) is a quantized weight."""
    return isinstance(node, Mapping) and node.keys() == set(Quantized._fields)


def before(abstract: Any) -> Any:
    """Abstract parameters, with what each quantized weight is made from in its place."""

    def made_from(node: Any) -> Any:
        return jax.ShapeDtypeStruct(node["values"].shape, node["scales"].dtype) if is_quantized(node) else node

    return jax.tree.map(made_from, abstract, is_leaf=is_quantized)


def shardings_before(shardings: Any) -> Any:
    """The shardings of `before`'s parameters."""
    return jax.tree.map(lambda node: node["values"] if is_quantized(node) else node, shardings, is_leaf=is_quantized)


def quantized(array: jax.Array, wanted: Any, shardings: Any) -> Any:
    """A parameter as `wanted`, a leaf of abstract parameters or a quantized weight, from what `before` says."""
    if not is_quantized(wanted):
        return array
    if not shardings["values"].addressable_devices:
        return jax.tree.map(lambda leaf, sharding: elsewhere(leaf.shape, leaf.dtype, sharding), wanted, shardings)
    bits = jnp.iinfo(wanted["values"].dtype).bits
    run = _quantizer(bits, wanted["scales"].shape, shardings["values"], shardings["scales"])
    return run(array)._asdict()


@lru_cache
def _quantizer(bits: int, scales_shape: tuple[int, ...], values: Sharding, scales: Sharding) -> Any:
    return jax.jit(partial(quantize, bits=bits, scales_shape=scales_shape), out_shardings=Quantized(values, scales))
