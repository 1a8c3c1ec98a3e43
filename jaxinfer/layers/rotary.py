"""Rotary position embedding applied to heads (RoFormer, arXiv:2104.09864); frequencies come from layers/rope.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinfer.layers.rope import frequencies
from jaxinfer.models.config import RopeConfig

Rotation = tuple[jax.Array, jax.Array]


def rotation(rope: RopeConfig, positions: jax.Array, context_len: int) -> Rotation:
    """cos and sin, float32 [T, rotary_dim / 2], of int32 `positions` [T].

    `context_len` selects the frequencies of scalings that depend on the length served (dynamic, longrope). It is a
    constant of the program, so that every chunk of a sequence, and every sequence sharing its pages, is rotated alike.
    """
    inv_freq, factor = frequencies(rope, context_len)
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(inv_freq)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, cos_sin: Rotation, *, interleaved: bool = False) -> jax.Array:
    """Rotate the first 2 * cos.shape[-1] numbers of every head of x [T, heads, H], half against half.

    interleaved: neighbours are pairs. They too come out half and half, which a product of two such heads does not see.
    """
    cos, sin = (part[:, None, :] for part in cos_sin)
    half = cos.shape[-1]
    wide = x.astype(jnp.float32)
    rest = wide[..., 2 * half :]
    if interleaved:
        first, second = wide[..., 0 : 2 * half : 2], wide[..., 1 : 2 * half : 2]
    else:
        first, second = wide[..., :half], wide[..., half : 2 * half]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)
