"""Compiled programs: made once per bucket, counted, and kept on disk so that a second start compiles nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import jax
from jax import monitoring

from jaxinfer.metrics import EngineMetrics

log = logging.getLogger(__name__)

_CACHE_HIT = "/jax/compilation_cache/cache_hits"
_cache_hits = 0


def _count_cache_hits(event: str, **_: Any) -> None:
    global _cache_hits
    _cache_hits += event == _CACHE_HIT


monitoring.register_event_listener(_count_cache_hits)


def use_compilation_cache(directory: Path | None) -> None:
    """Keep every compiled program in `directory`. A directory that the process already set is left as it is."""
    if directory is None or jax.config.jax_compilation_cache_dir:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("compiled programs are not kept: %s; give another compilation_cache_dir, or False", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class Programs:
    """The programs of one engine, by name and bucket. Only `get` compiles; a program never recompiles by itself."""

    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = metrics
        self._compiled: dict[Hashable, Callable[..., Any]] = {}

    def get(
        self, key: Hashable, lower: Callable[[], jax.stages.Lowered], options: dict[str, str] | None = None
    ) -> Callable[..., Any]:
        """The program called `key`, compiled from `lower()` with XLA's `options` on first use.

        Its arguments' shapes are fixed.
        """
        program = self._compiled.get(key)
        if program is None:
            started, hits = time.perf_counter(), _cache_hits
            program = self._compiled[key] = lower().compile(compiler_options=options or None)
            seconds = time.perf_counter() - started
            if _cache_hits > hits:
                self._metrics.programs_loaded()
            else:
                self._metrics.programs_compiled(seconds=seconds)
            log.info("%s: %s in %.2f s", key, "loaded" if _cache_hits > hits else "compiled", seconds)
        return program
