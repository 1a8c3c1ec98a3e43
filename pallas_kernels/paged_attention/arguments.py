"""The arguments that every kernel of this operation takes, checked when it is traced."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.core import Tracer

from pallas_kernels.paged_attention.quantized import QuantizedPool

if TYPE_CHECKING:
    from pallas_kernels.paged_attention.tpu_layout import Case


def check(
    kernel: str,
    supports: Callable[[Case], str | None],
    pool_shape: Callable[[Case, int], tuple[int, ...]],
    scales_shape: Callable[[Case, int], tuple[int, ...]],
    case: Case,
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    pool: jax.Array | QuantizedPool,
    sinks: jax.Array | None,
    tables: Iterable[jax.Array],
) -> None:
    """ValueError, with the values, for a case that the kernel does not serve and for arrays that are not the case's.

    supports, pool_shape, scales_shape: the kernel's own. tables: of pages, which are looked into where their numbers
    are known; within a trace they are not, and whoever makes them answers for them.
    """
    reason = supports(case)
    if reason is not None:
        raise ValueError(f"the {kernel} kernel cannot serve {case}: {reason}")
    expected: dict[str, tuple[jax.Array, tuple[int, ...]]] = {"q": (q, (q.shape[0], case.num_heads, case.head_dim))}
    if case.latent_dim is not None and v is not None:
        raise ValueError(f"latent_dim={case.latent_dim}: the values are in the keys; give no v")
    if case.latent_dim is None and (k is None) != (v is None):
        raise ValueError("one of k and v is None; give both, or neither where the pool holds them")
    shape = (q.shape[0], case.num_kv_heads, case.head_dim)
    expected |= {name: (array, shape) for name, array in (("k", k), ("v", v)) if array is not None}
    if (case.kv_dtype is not None) != isinstance(pool, QuantizedPool):
        raise ValueError(f"kv_dtype={case.kv_dtype}, but the pool is {type(pool).__name__}")
    if isinstance(pool, QuantizedPool):
        data = pool.data
        expected["pool.scales"] = (pool.scales, scales_shape(case, data.shape[0]))
    else:
        data = pool
    expected["pool"] = (data, pool_shape(case, data.shape[0]))
    if case.has_sinks != (sinks is not None):
        raise ValueError(f"has_sinks={case.has_sinks}, but sinks are {'given' if sinks is not None else 'missing'}")
    if sinks is not None:
        expected["sinks"] = (sinks, (case.num_heads,))
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}; this case needs {shape}")
    held = case.kv_dtype or case.dtype
    if data.dtype.name != held:
        raise ValueError(f"the pool is of {data.dtype.name}; this case needs {held}")
    for table in tables:
        if table.size and not isinstance(table, Tracer):
            pages = np.asarray(table)
            page = next((page for page in (pages.min(), pages.max()) if not 0 <= page < data.shape[0]), None)
            if page is not None:
                raise ValueError(f"the page table names page {page}; the pool has pages 0 to {data.shape[0] - 1}")
