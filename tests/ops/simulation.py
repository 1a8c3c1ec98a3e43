"""Kernels for GPUs, simulated on the CPU."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from pallas_kernels.paged_attention import gpu_layout


def simulated(test: Any) -> Any:
    """A test that simulates Mosaic GPU, in a process of its own (tests/conftest.py); skipped where this JAX cannot."""
    too_old = jax.__version_info__[:2] < gpu_layout.MIN_JAX
    return pytest.mark.skipif(too_old, reason="this JAX cannot simulate Mosaic GPU")(pytest.mark.simulated_gpu(test))
