"""Flash attention over whole sequences: the table of backends, of which a program takes one when it is traced.

The contract, and the meaning of the arguments, is `pallas_kernels.flash_attention.reference.flash_attention`'s. The
log-sum-exp that all return lets partial results be merged: `pallas_kernels.merge_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxinfer.ops.backends import Backend, choose, chosen
from jaxinfer.sharding.spmd import SHARDS
from pallas_kernels.flash_attention import reference, xla
from pallas_kernels.flash_attention.backward import gradients
from pallas_kernels.flash_attention.cases import FlashCase

__all__ = ["BACKENDS", "Backend", "FlashCase", "attend", "choose_backend"]


# Pallas is imported where it is used, since a process on another platform need not load it.
def _tpu_supports(case: FlashCase) -> str | None:
    from pallas_kernels.flash_attention import tpu

    return tpu.supports(case)


def _tpu_run(case: FlashCase, *arrays: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    from pallas_kernels.flash_attention import tpu

    return tpu.flash_attention(case, *arrays, **options)


def _gpu_supports(case: FlashCase) -> str | None:
    from pallas_kernels.flash_attention import gpu

    return gpu.supports(case)


def _gpu_run(case: FlashCase, *arrays: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    from pallas_kernels.flash_attention import gpu

    return gpu.flash_attention(case, *arrays, **options)


_NEVER_RUN = "it was simulated and compiled, but has never run on a GPU; name it to try"

# Best first; "xla" serves every sound case.
BACKENDS: tuple[Backend[FlashCase], ...] = (
    Backend("pallas_tpu", "tpu", _tpu_supports, _tpu_run),
    Backend("pallas_gpu", "gpu", _gpu_supports, _gpu_run, _NEVER_RUN),
    Backend("xla", None, xla.supports, xla.flash_attention),
    Backend("reference", None, lambda case: case.fault(), reference.flash_attention),
)


def choose_backend(case: FlashCase, platform: str, forced: str | None = None) -> tuple[Backend, dict[str, str]]:
    """See backends.choose."""
    return choose("flash attention", BACKENDS, case, platform, forced)


def attend(case: FlashCase, q: jax.Array, k: jax.Array, v: jax.Array, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Attention of whole sequences in a program on the mesh, of which XLA cuts the arrays as it likes.

    q [batch, T, N, H], k [batch, T, K, H], v [batch, T, K, value_dim]; returns what reference.flash_attention does.
    Gradients in reverse mode are XLA's, whichever backend is chosen; there are no others.
    """
    backend = chosen("flash attention", BACKENDS, case, mesh.devices.flat[0].platform)
    is_kernel = backend.platform is not None and mesh.size > 1
    return _differentiable(partial(_by_heads, backend, mesh) if is_kernel else backend.run, case, q, k, v)


def _by_heads(
    backend: Backend, mesh: Mesh, case: FlashCase, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A kernel, which XLA cannot cut, for every device's own heads and sequences, where they divide evenly."""
    tensor = mesh.shape["tensor"] if case.num_kv_heads % mesh.shape["tensor"] == 0 else 1
    shards = SHARDS if q.shape[0] % math.prod(mesh.shape[axis] for axis in SHARDS) == 0 else None
    own = replace(case, num_heads=case.num_heads // tensor, num_kv_heads=case.num_kv_heads // tensor)
    cut = PartitionSpec(shards, None, "tensor" if tensor > 1 else None)
    return jax.shard_map(
        partial(backend.run, own), mesh=mesh, in_specs=(cut, cut, cut), out_specs=(cut, cut), check_vma=False
    )(q, k, v)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(
    run: Callable[..., tuple[jax.Array, jax.Array]], case: FlashCase, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return run(case, q, k, v)


def _forward(run: Callable[..., Any], case: FlashCase, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    out, lse = run(case, q, k, v)
    return (out, lse), (q, k, v, out, lse)


def _backward(run: Callable[..., Any], case: FlashCase, kept: Any, cotangents: Any) -> Any:
    return gradients(case, *kept, *cotangents)


_differentiable.defvjp(_forward, _backward)
