"""Runs a piece of Python with several pretended CPU devices: their number is fixed when jax starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def run_on_devices(code: str, num_devices: int = 1) -> str:
    """The standard output of `code`; AssertionError with its errors where it fails."""
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=_ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout
