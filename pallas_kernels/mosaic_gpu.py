"""What the Hopper kernels need of JAX: its Mosaic GPU changes with every release."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from jax.experimental import pallas as pl

MIN_JAX = (0, 11, 2)  # the oldest that has compiled them; simulated they are from 0.12 on


def refusal() -> str | None:
    """None, or why this JAX cannot compile the kernels."""
    if jax.__version_info__ >= MIN_JAX:
        return None
    return f"JAX {jax.__version__} is older than {'.'.join(map(str, MIN_JAX))}, whose Mosaic GPU the kernel needs"


def cost(estimate: pl.CostEstimate) -> dict[str, Any]:
    """The argument of `plgpu.kernel` that says what a call costs. JAX takes it from 0.12 on."""
    return {"cost_estimate": estimate} if jax.__version_info__ >= (0, 12) else {}
