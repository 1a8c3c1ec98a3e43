"""Frequencies of rotary position embedding and its context extensions, on the host. Imports no jax.

All arithmetic is float32 in transformers' order: an angle is position * frequency, so at position 100,000 one unit in
the last place of a frequency is already 0.01 rad.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from jaxinfer.models.config import RopeConfig


def frequencies(rope: RopeConfig, context_len: int) -> tuple[np.ndarray, float]:
    """The angle per position of each rotated pair, float32 [rotary_dim / 2], and the factor on cos and sin.

    `context_len`: the longest sequence to be served; only "dynamic" and "longrope" depend on it. RoFormer
    (arXiv:2104.09864); "linear": position interpolation (arXiv:2306.15595); "dynamic": NTK-aware interpolation;
    "yarn": arXiv:2309.00071; "longrope": arXiv:2402.13753; "llama3": the Llama 3.1 release; "proportional": Gemma 4.
    """
    return _SCALINGS[rope.scaling](rope, context_len)


def _wavelengths(theta: float, rotary_dim: int) -> np.ndarray:
    """theta ** (2 k / rotary_dim), the positions per radian of pair k."""
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    return np.float32(theta) ** exponents


def _default(rope: RopeConfig, context_len: int) -> tuple[np.ndarray, float]:
    return 1 / _wavelengths(rope.theta, rope.rotary_dim), 1.0


def _linear(rope: RopeConfig, context_len: int) -> tuple[np.ndarray, float]:
    return 1 / _wavelengths(rope.theta, rope.rotary_dim) / np.float32(rope.factor), 1.0


def _dynamic(rope: RopeConfig, context_len: int) -> tuple[np.ndarray, float]:
    assert rope.max_position is not None
    stretch = rope.factor * max(context_len, rope.max_position) / rope.max_position - (rope.factor - 1)
    theta = rope.theta * stretch ** (rope.rotary_dim / (rope.rotary_dim - 2))
    return 1 / _wavelengths(theta, rope.rotary_dim), 1.0


def _llama3(rope: RopeConfig, context_len: int) -> tuple[np.ndarray, float]:
    assert rope.original_max_position is not None
    inv_freq = 1 / _wavelengths(rope.theta, rope.rotary_dim)
    factor, low, high = (np.float32(x) for x in (rope.factor, rope.low_freq_factor, rope.high_freq_factor))
    turns = np.float32(rope.original_max_position) / (np.float32(2 * math.pi) / inv_freq)
    smooth = (turns - low) / (high - low)
    between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    return np.where(turns < low, inv_freq / factor, np.where(turns > high, inv_freq, between)), 1.0


def _yarn(rope: RopeConfig, context_len: int) -> tuple[np.ndarray, float]:
    assert rope.original_max_position is not None
    dim, original = rope.rotary_dim, rope.original_max_position
    wavelengths = _wavelengths(rope.theta, dim)

    def pair_with(turns: float) -> float:
        """The pair that makes this many turns over the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    inv_freq = 1 / (np.float32(rope.factor) * wavelengths) * ramp + 1 / wavelengths * (1 - ramp)
    return inv_freq, _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def log_scale(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return log_scale(rope.mscale) / log_scale(rope.mscale_all_dim)
    return log_scale(1.0)


def _longrope(rope: RopeConfig, context_len: int) -> tuple[np.ndarray, float]:
    assert rope.original_max_position is not None
    stretch = rope.long_factor if context_len > rope.original_max_position else rope.short_factor
    inv_freq = 1 / (np.asarray(stretch, np.float32) * _wavelengths(rope.theta, rope.rotary_dim))
    if rope.attention_factor is not None:
        return inv_freq, rope.attention_factor
    if rope.factor <= 1:
        return inv_freq, 1.0
    return inv_freq, math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position))


def _proportional(rope: RopeConfig, context_len: int) -> tuple[np.ndarray, float]:
    """The rotation spans the whole head, but all pairs past the leading share of it stand still."""
    inv_freq = 1 / _wavelengths(rope.theta, rope.rotary_dim)
    inv_freq[int(rope.partial_rotary_factor * rope.rotary_dim // 2) :] = 0
    return inv_freq / np.float32(rope.factor), 1.0


_SCALINGS: dict[str, Callable[[RopeConfig, int], tuple[np.ndarray, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}
