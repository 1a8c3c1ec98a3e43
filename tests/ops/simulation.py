"""Kernels for GPUs, simulated on the CPU."""

from __future__ import annotations

from typing import Any

import jax
import pytest


def simulated(test: Any) -> Any:
    """A test that simulates Mosaic GPU, in a process of its own (tests/conftest.py); skipped where this JAX cannot:
    before 0.12 its simulation wants every thread to wait for every phase of a barrier, which the chip does not."""
    too_old = jax.__version_info__ < (0, 12)
    return pytest.mark.skipif(too_old, reason="this JAX cannot simulate Mosaic GPU")(pytest.mark.simulated_gpu(test))
