"""Numbers packed as MXFP4 (OCP Microscaling Formats 1.0): 4 bits each, and one power of two for every 32 of them."""

from __future__ import annotations

import numpy as np

PACKED_BYTES = 16  # of one block

_POSITIVE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_NUMBERS = np.concatenate([_POSITIVE, -_POSITIVE])
_PAIRS = np.stack([_NUMBERS[np.arange(256) & 15], _NUMBERS[np.arange(256) >> 4]], axis=1)  # the low half comes first


def unpack_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """blocks uint8 [..., n, 16], scales uint8 [..., n]: exponents plus 127 -> float32 [..., n * 32], exact."""
    numbers = _PAIRS[blocks].reshape(*scales.shape, 2 * PACKED_BYTES)
    factors = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
    np.multiply(numbers, factors[..., None], out=numbers)
    return numbers.reshape(*scales.shape[:-1], -1)
