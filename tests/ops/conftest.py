"""Where simulated GPU kernels run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_THREADS = 8


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A simulated warpgroup that waits for another holds one of XLA's threads, of which there are as many as
    processors: on two, all of them can wait for ever. So each test gets a process, with more threads."""
    if pyfuncitem.get_closest_marker("simulated_gpu") is None or os.environ.get("NPROC") == str(_THREADS):
        return None
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"{pyfuncitem.path}::{pyfuncitem.name}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command,
        cwd=pyfuncitem.config.rootpath,
        env=environment | {"NPROC": str(_THREADS)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    if done.returncode != 0:
        pytest.fail(done.stdout + done.stderr, pytrace=False)
    return True
