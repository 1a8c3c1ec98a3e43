"""Ragged paged attention: the operation's contract and the table of backends that implement it.

One call writes a layer's new keys and values into their pages and attends from every query of the flat batch to its own
sequence. A backend is a module of functions; `choose_backend` picks one for a case, once, at start-up, with reasons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import jax

from jaxinfer.ops import (
    paged_attention_context,
    paged_attention_gpu,
    paged_attention_reference,
    paged_attention_tpu,
    paged_attention_xla,
)
from jaxinfer.ops.paged_attention_case import AttentionCase, RaggedBatch

__all__ = ["BACKENDS", "AttentionCase", "Backend", "RaggedBatch", "attend", "choose_backend", "prepare"]


class Run(Protocol):
    """Attention of one layer.

    q [T, N, H]; k and v [T, K, H], or None when the layer reads a pool that this step's keys and values are in already;
    v is None in a case with a latent_dim.
    pool is the layer's, in the backend's layout; it is returned updated, in place where the caller donated it. What it
    holds of values is finite, and so are the values in v, whoever sees them (`runner/step.py`); keys may be anything.
    metadata is what `prepare` made of the same case, batch and group; sinks [N] when the case has them.
    Returns ([T, N, H or latent_dim] in q's dtype, the pool); the values at padding tokens are finite and mean nothing.
    Of a case whose keys several devices share, the first is a pair: what this device's keys mix, float32, and the log
    of their sum of exponentials, float32 [T, N]. Where the latter is -inf the former means nothing.
    """

    def __call__(
        self,
        case: AttentionCase,
        q: jax.Array,
        k: jax.Array | None,
        v: jax.Array | None,
        pool: Any,
        batch: RaggedBatch,
        group: int,
        metadata: Any,
        sinks: jax.Array | None = None,
    ) -> tuple[Any, Any]: ...


@dataclass(frozen=True)
class Backend:
    """One implementation.

    supports    None, or the reason why the backend cannot serve the case
    abstract_pool  one layer's pool of so many pages, as shapes and dtypes: an array, or a QuantizedPool of two, whose
                axis 0 is pages and the rest the backend's own layout: one other axis grows with the page size, of
                which every slot has a stretch
    prepare     arrays derived from the batch and one KV group's table, once a step, for all layers of the case
    run         the attention of one layer
    only_asked  None, or why the backend is not chosen unless the user names it
    write       the part of `run` that puts a step's keys and values into the pool; None where it can not be done apart
    """

    name: str
    supports: Callable[[AttentionCase], str | None] = field(repr=False)
    abstract_pool: Callable[[AttentionCase, int], Any] = field(repr=False)
    prepare: Callable[[AttentionCase, RaggedBatch, int], Any] = field(repr=False)
    run: Run = field(repr=False)
    only_asked: str | None = field(default=None, repr=False)
    write: Callable[..., Any] | None = field(default=None, repr=False)


def prepare(backend: Backend, case: AttentionCase, batch: RaggedBatch, group: int) -> Any:
    """What `attend` needs to know of a batch and one KV group's table, once a step, for all layers of the case."""
    if case.context == 1:
        return backend.prepare(case, batch, group)
    return paged_attention_context.prepare(backend, case, batch, group)


def attend(
    backend: Backend,
    case: AttentionCase,
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    pool: Any,
    batch: RaggedBatch,
    group: int,
    metadata: Any,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """`Run`, over all the devices that share the keys of a sequence: each has its own rows of q, k and v [T / C, ...]
    and gets back its own. metadata is what `prepare` made."""
    run = backend.run if case.context == 1 else partial(paged_attention_context.run, backend)
    return run(case, q, k, v, pool, batch, group, metadata, sinks)


def _backend(name: str, module: Any, only_asked: str | None = None) -> Backend:
    write = getattr(module, "write", None)
    return Backend(name, module.supports, module.abstract_pool, module.prepare, module.run, only_asked, write)


# Best first; "xla" serves every case, so the search always ends.
BACKENDS: tuple[Backend, ...] = (
    _backend("pallas_tpu", paged_attention_tpu),
    _backend(
        "pallas_gpu", paged_attention_gpu, "it was simulated and compiled, but has never run on a GPU; name it to try"
    ),
    _backend("xla", paged_attention_xla),
    _backend("reference", paged_attention_reference),
)


def choose_backend(case: AttentionCase, forced: str | None = None) -> tuple[Backend, dict[str, str]]:
    """The first backend that serves the case, or the forced one, and why those before it do not.

    Raises ValueError for an unknown name, and for a forced backend that cannot serve the case.
    """
    if forced is not None:
        backend = next((backend for backend in BACKENDS if backend.name == forced), None)
        if backend is None:
            names = ", ".join(backend.name for backend in BACKENDS)
            raise ValueError(f"attention backend {forced!r} is unknown; choose one of: {names}")
        reason = backend.supports(case)
        if reason is not None:
            raise ValueError(f"attention backend {forced!r} cannot serve this model: {reason}; leave it to be chosen")
        return backend, {}
    refusals: dict[str, str] = {}
    for backend in BACKENDS:
        reason = backend.supports(case) or backend.only_asked
        if reason is None:
            return backend, refusals
        refusals[backend.name] = reason
    raise ValueError(f"no attention backend serves {case}: {refusals}")
