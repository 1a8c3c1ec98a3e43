"""Flash attention over whole sequences: the table of backends, chosen once, at start-up, with reasons.

The contract, and the meaning of the arguments, is `pallas_kernels.flash_attention.reference.flash_attention`'s. The
log-sum-exp that all return lets partial results be merged: `pallas_kernels.merge_attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from pallas_kernels.flash_attention import reference, xla
from pallas_kernels.flash_attention.cases import FlashCase

__all__ = ["BACKENDS", "Backend", "FlashCase", "choose_backend"]


@dataclass(frozen=True)
class Backend:
    """One implementation: on which platform it runs (None: any), what it cannot serve and why, and the attention.

    only_asked: None, or why it is not chosen unless it is named.
    """

    name: str
    platform: str | None
    supports: Callable[[FlashCase], str | None]
    run: Callable[..., tuple[jax.Array, jax.Array]]
    only_asked: str | None = None

    def refuses(self, case: FlashCase, platform: str) -> str | None:
        if self.platform not in (None, platform):
            return f"the platform is {platform}, not {self.platform}"
        return self.supports(case)


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
BACKENDS: tuple[Backend, ...] = (
    Backend("pallas_tpu", "tpu", _tpu_supports, _tpu_run),
    Backend("pallas_gpu", "gpu", _gpu_supports, _gpu_run, _NEVER_RUN),
    Backend("xla", None, xla.supports, xla.flash_attention),
    Backend("reference", None, lambda case: case.fault(), reference.flash_attention),
)


def choose_backend(case: FlashCase, platform: str, forced: str | None = None) -> tuple[Backend, dict[str, str]]:
    """The first backend that serves the case on a platform ("cpu", "gpu" or "tpu") or the forced one; why not others.

    Raises ValueError for an unknown name, a forced backend that cannot serve the case, and a case that is unsound.
    """
    names = ", ".join(backend.name for backend in BACKENDS)
    candidates = [backend for backend in BACKENDS if forced in (None, backend.name)]
    if not candidates:
        raise ValueError(f"flash attention backend {forced!r} is unknown; choose one of: {names}")
    refusals: dict[str, str] = {}
    for backend in candidates:
        reason = backend.refuses(case, platform) or (backend.only_asked if forced is None else None)
        if reason is None:
            return backend, refusals
        refusals[backend.name] = reason
    raise ValueError(f"no flash attention backend of {', '.join(refusals)} serves {case}: {refusals}")
