"""Compiled programs: made once per bucket, counted, and kept (program_store.py) so that a second start makes none."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax import monitoring

from jaxinfer.metrics import EngineMetrics
from jaxinfer.runner.program_store import ProgramStore

log = logging.getLogger(__name__)

_CACHE_HIT = "/jax/compilation_cache/cache_hits"
_cache_hits = 0


def _count_cache_hits(event: str, **_: Any) -> None:
    global _cache_hits
    _cache_hits += event == _CACHE_HIT


monitoring.register_event_listener(_count_cache_hits)


class Programs:
    """The programs of one engine, by name and bucket. Only `get` compiles; a program never recompiles by itself."""

    def __init__(self, metrics: EngineMetrics, store: ProgramStore | None) -> None:
        self._metrics = metrics
        self._store = store
        self._compiled: dict[Hashable, jax.stages.Compiled] = {}

    def get(
        self, key: Hashable, lower: Callable[[], jax.stages.Lowered], options: dict[str, str] | None = None
    ) -> jax.stages.Compiled:
        """The program called `key`; on first use from the store, or compiled from `lower()` with XLA's `options`.

        Its arguments' shapes are fixed.
        """
        program = self._compiled.get(key)
        if program is None:
            program = self._compiled[key] = self._make(key, lower, options or {})
        return program

    def _make(
        self, key: Hashable, lower: Callable[[], jax.stages.Lowered], options: dict[str, str]
    ) -> jax.stages.Compiled:
        name = (key, *sorted(options.items()))
        started, hits = time.perf_counter(), _cache_hits
        program = self._store.load(name) if self._store else None
        is_compiled = False
        if program is None:
            program = lower().compile(compiler_options=options or None)
            is_compiled = _cache_hits == hits  # where the process has given jax a cache of its own, that may have it
            if is_compiled and self._store:
                self._store.save(name, program)
        seconds = time.perf_counter() - started
        if is_compiled:
            self._metrics.programs_compiled(seconds=seconds)
        else:
            self._metrics.programs_loaded()
        log.info("%s: %s in %.2f s", key, "compiled" if is_compiled else "loaded", seconds)
        return program
