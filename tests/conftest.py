"""What holds for every test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# A shell ignores Ctrl-C in what it starts in the background, and children inherit that; some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

_THREADS = 8  # of a process that simulates a kernel for GPUs


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every program is compiled once for all of pytest's processes, and not much optimised.

    By jax's own cache, which knows equal programs of unequal engines; what engines keep is tested in
    tests/e2e/test_processes.py, and the directory given is for that.
    """
    base = tmp_path_factory.getbasetemp()
    settings = {
        "jax_compilation_cache_dir": str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXINFER_COMPILATION_CACHE_DIR", "off")
        yield tmp_path_factory.mktemp("kept")
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


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
