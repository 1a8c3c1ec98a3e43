"""grpc.health.v1: Check, and a Watch that a client which does not read it cannot hold up. Imports no jax.

grpcio-health-checking gives the messages; its own servicer writes to watchers under one lock, so that a single reader
that stands still would keep everybody else, and a server that wants to say it is shutting down, waiting.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE = "grpc.health.v1.Health"
PREFIX = f"/{SERVICE}/"
MAX_WATCHERS = 1000

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):
    """The health of the whole server ("") and of each named service, which are one and the same."""

    def __init__(self, *services: str) -> None:
        self._services = ("", *services)
        self._serving = False
        self._closed = False
        self._num_watchers = 0
        self._changed = asyncio.Event()

    def set(self, serving: bool) -> None:
        self._serving = serving
        self._wake()

    def close(self) -> None:
        """NOT_SERVING for good; watchers are told, and their streams end."""
        self._serving, self._closed = False, True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _status(self, service: str) -> Any:
        if service not in self._services:
            return _UNKNOWN
        return _SERVING if self._serving else _NOT_SERVING

    async def Check(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        status = self._status(request.service)
        if status == _UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"service={request.service[:100]!r} is not served here")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        if self._num_watchers >= MAX_WATCHERS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHERS} watchers are here already")
        self._num_watchers += 1
        try:
            told = None
            while True:
                changed, status = self._changed, self._status(request.service)
                if status != told:
                    await context.write(health_pb2.HealthCheckResponse(status=status))
                    told = status
                if self._closed and self._status(request.service) == told:
                    return
                if changed is self._changed:
                    await changed.wait()
        finally:
            self._num_watchers -= 1
