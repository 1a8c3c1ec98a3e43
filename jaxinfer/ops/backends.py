"""Implementations of an operation, of which the best one that serves a case is taken, with reasons."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

log = logging.getLogger(__name__)

_Case = TypeVar("_Case")


@dataclass(frozen=True)
class Backend(Generic[_Case]):
    """One implementation: on which platform it runs (None: any), what it cannot serve and why, and the operation.

    only_asked: None, or why it is not chosen unless it is named.
    """

    name: str
    platform: str | None
    supports: Callable[[_Case], str | None]
    run: Callable[..., Any]
    only_asked: str | None = None

    def refuses(self, case: _Case, platform: str) -> str | None:
        if self.platform not in (None, platform):
            return f"the platform is {platform}, not {self.platform}"
        return self.supports(case)


def choose(
    operation: str, backends: tuple[Backend[_Case], ...], case: _Case, platform: str, forced: str | None = None
) -> tuple[Backend[_Case], dict[str, str]]:
    """The first backend that serves the case on a platform ("cpu", "gpu" or "tpu") or the forced one; why not others.

    Raises ValueError for an unknown name, a forced backend that cannot serve the case, and a case that none serves.
    """
    candidates = [backend for backend in backends if forced in (None, backend.name)]
    if not candidates:
        names = ", ".join(backend.name for backend in backends)
        raise ValueError(f"{operation} backend {forced!r} is unknown; choose one of: {names}")
    refusals: dict[str, str] = {}
    for backend in candidates:
        reason = backend.refuses(case, platform) or (backend.only_asked if forced is None else None)
        if reason is None:
            return backend, refusals
        refusals[backend.name] = reason
    raise ValueError(f"no {operation} backend of {', '.join(refusals)} serves {case}: {refusals}")


@cache
def chosen(operation: str, backends: tuple[Backend[_Case], ...], case: _Case, platform: str) -> Backend[_Case]:
    """What `choose` takes; the choice, and why none before it was taken, is logged once."""
    backend, refusals = choose(operation, backends, case, platform)
    log.info("%s: %s%s", operation, backend.name, "".join(f"; {name} not: {why}" for name, why in refusals.items()))
    return backend
