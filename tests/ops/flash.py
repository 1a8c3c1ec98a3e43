"""Flash attention in float64 NumPy, one query at a time: the oracle of its tests."""

from __future__ import annotations

import numpy as np

from pallas_kernels.flash_attention.cases import FlashCase


def oracle(
    case: FlashCase,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_start: int = 0,
    kv_start: int = 0,
    segments: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [batch, T, N, value_dim] and log-sum-exps [batch, T, N]; reads only what a query sees."""
    batch, num_queries, num_heads = q.shape[:3]
    out, lse = np.zeros((*q.shape[:3], case.value_dim)), np.full(q.shape[:3], -np.inf)
    for b, t, n in np.ndindex(batch, num_queries, num_heads):
        position = q_start + t
        seen = [
            j
            for j in range(k.shape[1])
            if (not case.causal or kv_start + j <= position)
            and (case.window is None or kv_start + j > position - case.window)
            and (segments is None or segments[0][b, t] == segments[1][b, j])
        ]
        if not seen:
            continue
        head = n // case.group_size
        logits = k[b, seen, head].astype(np.float64) @ q[b, t, n].astype(np.float64) * case.scale
        if case.soft_cap is not None:
            logits = case.soft_cap * np.tanh(logits / case.soft_cap)
        weights = np.exp(logits - logits.max())
        lse[b, t, n] = logits.max() + np.log(weights.sum())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, head].astype(np.float64)
    return out, lse
